"""What the brokers' access lists must allow, by role: the least that suffices for all that one with the role does."""

import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from stream.config import Settings

#: Codes with which brokers, and both clients, say that a grant is missing, and for what kind of thing.
TOPIC_REFUSED: Final = 29
GROUP_REFUSED: Final = 30
CLUSTER_REFUSED: Final = 31
TRANSACTIONAL_ID_REFUSED: Final = 53
REFUSED: Final = frozenset({TOPIC_REFUSED, GROUP_REFUSED, CLUSTER_REFUSED, TRANSACTIONAL_ID_REFUSED})

#: Begins the names of all that `uemb bench` makes.
BENCH_PREFIX: Final = "uemb-bench-"
_RELEASE: Final = ("publish", "activate", "rollback", "retire", "status")
_OPTIONS: Final = {"topic": "--topic", "group": "--group", "transactional id": "--transactional-id"}


class Grant(NamedTuple):
    """Operations on one thing, or on all whose names begin with `name`.

    Attributes:
        operations: as brokers name them.
        kind: topic, group or transactional id.
        name: of the thing.
        prefixed: whether all are meant whose names begin so.
        why: what it is for.
        optional: whether its role does without, and says what it leaves out.
    """

    operations: tuple[str, ...]
    kind: str
    name: str
    prefixed: bool = False
    why: str = ""
    optional: bool = False

    def __str__(self) -> str:
        return f"{'/'.join(self.operations)} {self.kind} {self.name}{'*' if self.prefixed else ''}"

    @property
    def arguments(self) -> str:
        """The same as arguments of ``kafka-acls.sh``."""
        words = [word for operation in self.operations for word in ("--operation", operation)]
        words += [_OPTIONS[self.kind], self.name, *(("--resource-pattern-type", "prefixed") if self.prefixed else ())]
        return shlex.join(words)


class Role(NamedTuple):
    """What somebody is there for, and may do.

    Attributes:
        commands: of `uemb`, or programs, that it runs.
        grants: what it needs for these settings.
    """

    commands: tuple[str, ...]
    grants: Callable[[Settings], list[Grant]]


def worker(settings: Settings) -> list[Grant]:
    """What a worker needs whose topics are there."""
    return [
        *_topics("Read", "interactions", settings.event_topics),
        *_topics("Read", "erasures", [settings.deletion_topic]),
        *_topics("Read/Write", "histories and claims: restored, and kept", [settings.changelog_topic]),
        *_topics("Write", "vectors", [settings.output_topic]),
        *_topics("Write", "what is turned away", [settings.dlq_topic]),
        *_topics("Read", "which versions are published and served", [settings.item_versions_topic]),
        *_topics("Read/Write", "how far each partition is with each version", [settings.item_status_topic]),
        Grant(("Read",), "group", settings.app_id, why="partitions among workers, committed offsets"),
        _transactional(settings, "shuts out the earlier owner of a partition"),
    ]


def _worker_options(settings: Settings) -> list[Grant]:
    """What lets a worker make its topics, and check their settings; it goes on without where all is as it should be."""
    names = [grant.name for grant in worker(settings) if grant.kind == "topic"]
    return [
        *_topics("Create", "topics that are not there yet", names, optional=True),
        *_topics("DescribeConfigs", "limits and policies are checked at the start", names, optional=True),
    ]


def _sender(settings: Settings) -> list[Grant]:
    return [*_topics("Write", "events", settings.event_topics)]


def _reader(settings: Settings) -> list[Grant]:
    return [*_topics("Read", "vectors", [settings.output_topic])]


def _release(settings: Settings) -> list[Grant]:
    return [
        *_topics("Read/Write", "what is published, activated and retired", [settings.item_versions_topic]),
        *_topics("Read", "how far the workers are", [settings.item_status_topic]),
        *_topics("Read", "`--compare` looks at some users", [settings.output_topic]),
        *_topics("Describe", "how many partitions there are", settings.event_topics[:1]),
    ]


def _eraser(settings: Settings) -> list[Grant]:
    kept = [*settings.event_topics, settings.dlq_topic, settings.changelog_topic, settings.output_topic]
    return [
        *_topics("Write", "erasures", [settings.deletion_topic]),
        *_topics("DescribeConfigs", "until when traces remain", kept, optional=True),
    ]


def _auditor(settings: Settings) -> list[Grant]:
    inputs = [*settings.event_topics, settings.deletion_topic]
    checked = [settings.changelog_topic, settings.output_topic, settings.dlq_topic, settings.item_versions_topic]
    checked.append(settings.item_status_topic)
    return [
        *_topics("Read", "what the input adds up to", inputs),
        *_topics("Read", "is compared with that", checked[:3]),
        *_topics("Read", "which versions are published and served", checked[3:]),
        Grant(("Describe",), "group", settings.app_id, why="what is committed, and who is a member"),
        *_topics("DescribeConfigs", "`uemb doctor` checks limits and policies", [*inputs, *checked], optional=True),
    ]


def _replayer(settings: Settings) -> list[Grant]:
    inputs = [*settings.event_topics, settings.deletion_topic]
    return [
        *_topics("Read", "dead letters", [settings.dlq_topic]),
        *_topics("Read/Write", "sent again; read where a letter is a reference", inputs),
    ]


def _operator(settings: Settings) -> list[Grant]:
    moved = [settings.deletion_topic, settings.changelog_topic, settings.output_topic]
    return [
        *_topics("Alter", "more partitions", [*settings.event_topics, *moved]),
        *_topics("Read/Write", "records move to where they belong then", moved),
        Grant(("Describe",), "group", settings.app_id, why="what is committed, and that no worker runs"),
        _transactional(settings, "shuts out earlier owners of partitions"),
    ]


def _bench(_: Settings) -> list[Grant]:
    why = "its own topics, groups and workers"
    return [
        Grant(("Create", "Delete", "Read", "Write"), "topic", BENCH_PREFIX, prefixed=True, why=why),
        Grant(("Read",), "group", BENCH_PREFIX, prefixed=True, why=why),
        Grant(("Write",), "transactional id", BENCH_PREFIX, prefixed=True, why=why),
    ]


def _transactional(settings: Settings, why: str) -> Grant:
    return Grant(("Write",), "transactional id", f"{settings.app_id}-", prefixed=True, why=why)


def _topics(operations: str, why: str, names: Iterable[str], *, optional: bool = False) -> Iterator[Grant]:
    return (Grant(tuple(operations.split("/")), "topic", name, why=why, optional=optional) for name in names)


#: A command that is under none needs nothing of the brokers. None but the worker joins a group.
ROLES: Final[dict[str, Role]] = {
    "worker": Role(("worker", "kv rebuild", "doctor"), lambda settings: worker(settings) + _worker_options(settings)),
    "sender": Role(("send",), _sender),
    "reader": Role(("tail", "followers of the vectors"), _reader),
    "release": Role(
        tuple(f"{what} {verb}" for what in ("items", "encoder") for verb in _RELEASE),
        _release,
    ),
    "eraser": Role(("delete",), _eraser),
    "auditor": Role(("verify", "inspect", "dlq list", "dlq show", "items status", "doctor --role auditor"), _auditor),
    "replayer": Role(("dlq list", "dlq show", "dlq replay"), _replayer),
    "operator": Role(("repartition",), _operator),
    "bench": Role(("bench",), _bench),
}


def needed(role: str, settings: Settings) -> list[Grant]:
    """What a role can't do without."""
    return [grant for grant in ROLES[role].grants(settings) if not grant.optional]


def single(grants: Iterable[Grant]) -> list[Grant]:
    """The same, one operation each."""
    return [grant._replace(operations=(operation,)) for grant in grants for operation in grant.operations]
