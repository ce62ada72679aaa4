"""What the brokers' access lists must allow, for the worker and for each command: the least that suffices."""

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

_OPTIONS: Final = {"topic": "--topic", "group": "--group", "transactional id": "--transactional-id"}


class Grant(NamedTuple):
    """Operations on one thing, or on all whose names begin with `name`."""

    operations: tuple[str, ...]
    kind: str
    name: str
    prefixed: bool = False

    def __str__(self) -> str:
        return f"{'/'.join(self.operations)} {self.kind} {self.name}{'*' if self.prefixed else ''}"

    @property
    def arguments(self) -> str:
        """The same as arguments of ``kafka-acls.sh``."""
        words = [word for operation in self.operations for word in ("--operation", operation)]
        words += [_OPTIONS[self.kind], self.name, *(("--resource-pattern-type", "prefixed") if self.prefixed else ())]
        return shlex.join(words)


def worker(settings: Settings) -> list[Grant]:
    """What a worker needs whose topics are there."""
    return [
        *_topics(["Read"], *settings.event_topics, settings.deletion_topic),
        *_topics(["Read", "Write"], settings.changelog_topic),
        *_topics(["Write"], settings.output_topic, settings.dlq_topic),
        *_topics(["Read"], settings.item_versions_topic),
        *_topics(["Read", "Write"], settings.item_status_topic),
        Grant(("Read",), "group", settings.app_id),
        Grant(("Write",), "transactional id", f"{settings.app_id}-", prefixed=True),
    ]


def worker_extras(settings: Settings) -> list[Grant]:
    """What lets a worker make its topics, and check their settings; it goes on without where all is as it should be."""
    return [grant._replace(operations=("Create", "DescribeConfigs")) for grant in worker(settings) if _is_topic(grant)]


def _is_topic(grant: Grant) -> bool:
    return grant.kind == "topic"


def _topics(operations: Iterable[str], *names: str) -> Iterator[Grant]:
    return (Grant(tuple(operations), "topic", name) for name in names)


def _items(settings: Settings) -> list[Grant]:
    return [
        *_topics(["Read", "Write"], settings.item_versions_topic),
        *_topics(["Read"], settings.item_status_topic),
        *_topics(["Describe"], settings.event_topics[0]),
    ]


def _dlq(settings: Settings) -> list[Grant]:
    return [
        *_topics(["Read"], settings.dlq_topic),
        *_topics(["Read", "Write"], *settings.event_topics, settings.deletion_topic),
    ]


def _verify(settings: Settings) -> list[Grant]:
    topics = [*settings.event_topics, settings.deletion_topic, settings.changelog_topic, settings.output_topic]
    topics += [settings.dlq_topic, settings.item_versions_topic, settings.item_status_topic]
    return [*_topics(["Read"], *topics), Grant(("Describe",), "group", settings.app_id)]


def _doctor(settings: Settings) -> list[Grant]:
    """What tells which of a worker's grants are missing; who runs it is the worker's own user."""
    topics = [grant.name for grant in worker(settings) if _is_topic(grant)]
    return [
        *_topics(["Describe", "DescribeConfigs"], *topics),
        *_topics(["Read"], settings.changelog_topic, settings.item_versions_topic),
        Grant(("Describe",), "group", settings.app_id),
    ]


def _repartition(settings: Settings) -> list[Grant]:
    return [
        *_topics(["Alter"], *settings.event_topics),
        *_topics(["Alter", "Read", "Write"], settings.deletion_topic, settings.changelog_topic, settings.output_topic),
        Grant(("Describe",), "group", settings.app_id),
        Grant(("Write",), "transactional id", f"{settings.app_id}-", prefixed=True),
    ]


def _bench(_: Settings) -> list[Grant]:
    prefix = "uemb-bench-"
    return [
        Grant(("Create", "Delete", "DescribeConfigs", "Read", "Write"), "topic", prefix, prefixed=True),
        Grant(("Read",), "group", prefix, prefixed=True),
        Grant(("Write",), "transactional id", prefix, prefixed=True),
    ]


#: Who needs what. A command that is not here needs nothing of the brokers; `kv rebuild` may run a worker.
NEEDS: Final[dict[str, Callable[[Settings], list[Grant]]]] = {
    "worker": worker,
    "send": lambda settings: [*_topics(["Write"], *settings.event_topics)],
    "delete": lambda settings: [*_topics(["Write"], settings.deletion_topic)],
    "tail": lambda settings: [*_topics(["Read"], settings.output_topic)],
    "items": _items,
    "encoder": _items,
    "dlq": _dlq,
    "verify": _verify,
    "doctor": _doctor,
    "repartition": _repartition,
    "bench": _bench,
}
