"""Topics at start: create what is missing, check what is there; a wrong one is a clear error before anything runs."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient, ClusterMetadata, ConfigResource, NewTopic

from stream.config import Settings
from stream.core.history_codec import max_state_bytes
from stream.errors import ConfigError, NotAllowed, TopicMismatch, way_on
from stream.kafka.brokers import admin_client, list_topics, refused
from stream.kafka.grants import REFUSED, TOPIC_REFUSED, Grant, worker

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 20.0
CONNECT_TIMEOUT_S: Final = 10.0
SETTLE_TRIES: Final = 50
SETTLE_S: Final = 0.2
_FRAME_BYTES: Final = 16 * 1024  # record and batch headers, key, and the fields around a vector
_DLQ_HEADROOM_BYTES: Final = 64 * 1024
_SUPERSEDED_MS: Final = 24 * 3600 * 1000
_KEEP_MS: Final = 30 * 24 * 3600 * 1000
_EMBEDDED_DIM: Final = 32 * 1024  # the embedded broker does not tell its limit
_REMOVED_KEPT_S: Final = 24 * 3600.0  # Kafka's default
_DEFAULT_LIMIT: Final = 1_048_588  # the same of max.message.bytes


@dataclass(frozen=True)
class Wanted:
    """What a topic must be like.

    Attributes:
        name: its name.
        role: how an error names it.
        partitions: exact number, or None for any.
        compacted: whether it must be compacted; None for either.
        min_bytes: least acceptable ``max.message.bytes``.
        config: settings with which it is created.
        create_partitions: how many partitions it is created with, where any number will do; None: as many as others.
    """

    name: str
    role: str
    partitions: int | None
    compacted: bool | None
    min_bytes: int = 0
    config: Mapping[str, str] = field(default_factory=dict)
    create_partitions: int | None = None


@dataclass(frozen=True)
class Prepared:
    """What the check found.

    Attributes:
        partitions: n of all input topics, the changelog and the output.
        dead_letter_partitions: number of partitions of the dead-letter topic.
        administered: whether the broker answers admin requests (the embedded one doesn't).
        largest_dim: what a record of the output topic has room for.
        removed_kept_s: how long the changelog tells of what was removed from it (``delete.retention.ms``).
    """

    partitions: int
    dead_letter_partitions: int
    administered: bool
    largest_dim: int
    removed_kept_s: float = _REMOVED_KEPT_S


@dataclass(frozen=True)
class Survey:
    """Topics as they are, beside what they must be like.

    Attributes:
        found: number of partitions of each topic that is there.
        partitions: n of all input topics, the changelog and the output, as they are or would be made.
        wanted: what each must be like.
        configs: settings of those that are there, by topic and name, without those that this client may not be told.
    """

    found: Mapping[str, int]
    partitions: int
    wanted: Sequence[Wanted]
    configs: Mapping[str, Mapping[str, str]]

    @property
    def there(self) -> list[Wanted]:
        """Topics that exist."""
        return [topic for topic in self.wanted if topic.name in self.found]

    @property
    def missing(self) -> list[Wanted]:
        """Topics that a worker would make."""
        return [topic for topic in self.wanted if topic.name not in self.found]

    @property
    def untold(self) -> list[str]:
        """Topics that exist, whose settings this client may not be told."""
        return [topic.name for topic in self.there if topic.name not in self.configs]

    def troubles(self, settings: Settings) -> Iterator[ConfigError]:
        """All that a worker refuses to start with."""
        yield from _count_troubles(self.wanted, self.found)
        yield from _config_troubles(settings, self.there, self.configs)


def survey_topics(settings: Settings, admin: AdminClient, cluster: ClusterMetadata, dim: int) -> Survey:
    """Look at all topics without changing any; blocking.

    Args:
        settings: names and limits.
        admin: asks.
        cluster: what the brokers say of all topics.
        dim: dimension of the largest item space, which decides the size of an output record.

    Raises:
        ConfigError: the settings of a topic can't be read.
    """
    found = _partition_counts(cluster)
    counts = {topic: found[topic] for topic in settings.event_topics if topic in found}
    partitions = next(iter(counts.values())) if counts else settings.partitions
    configs: dict[str, dict[str, str]] = {}
    if is_administered(cluster):
        configs = topic_configs(settings, admin, [name for name in _names(settings) if name in found])
    limits = {name: int(configs[name]["max.message.bytes"]) for name in counts if name in configs}
    return Survey(found, partitions, _wanted(settings, partitions, dim, limits), configs)


def is_administered(cluster: ClusterMetadata) -> bool:
    """Whether the brokers answer admin requests; the embedded one doesn't."""
    return cluster.controller_id in cluster.brokers


def prepare_topics(settings: Settings, dim: int) -> Prepared:
    """Create missing topics and check all; blocking.

    Args:
        settings: names and limits.
        dim: dimension of the largest item space, which decides the size of an output record.

    Raises:
        TopicMismatch: a topic has the wrong partition count, cleanup policy or size limit.
        NotAllowed: the worker may not do with a topic what it must, or not create one that is missing.
        ConfigError: the broker can't be reached.
    """
    admin = admin_client(settings)
    cluster = list_topics(admin, settings)
    if not is_administered(cluster):
        log.info("the broker answers no admin requests (embedded broker): topic settings are not checked")
        # asking for a topic's metadata creates it there
        found = {
            name: len(admin.list_topics(name, timeout=TIMEOUT_S).topics[name].partitions) for name in _names(settings)
        }
        partitions = found[settings.event_topics[0]]
        _refuse(_count_troubles(_wanted(settings, partitions, dim, {}), found))
        return Prepared(partitions, found[settings.dlq_topic], administered=False, largest_dim=_EMBEDDED_DIM)
    _check_grants(admin, settings)
    survey = survey_topics(settings, admin, cluster, dim)
    _refuse(survey.troubles(settings))  # a start that is refused creates nothing
    if inputs := [topic for topic in survey.missing if topic.name in settings.event_topics]:
        # One that somebody has just made may not be known yet. What it is like decides what the others must be like.
        create_topics(admin, inputs, settings, survey.partitions)
        topic_configs(settings, admin, [topic.name for topic in inputs])  # waits until all are known
        survey = survey_topics(settings, admin, list_topics(admin, settings), dim)
        _refuse(survey.troubles(settings))
    partitions, missing = survey.partitions, survey.missing
    create_topics(admin, missing, settings, partitions)
    configs = {**survey.configs, **topic_configs(settings, admin, [w.name for w in missing])}
    _refuse(_config_troubles(settings, missing, configs))
    if untold := [w.name for w in survey.wanted if w.name not in configs]:
        log.warning("not allowed to DescribeConfigs topic %s: these settings are not checked", ", ".join(untold))
    changelog, output = configs.get(settings.changelog_topic, {}), configs.get(settings.output_topic, {})
    removed_kept_s = int(changelog.get("delete.retention.ms", 1000 * _REMOVED_KEPT_S)) / 1000
    largest_dim = room_for_dims(settings, output)
    letters = survey.found.get(settings.dlq_topic, partitions)
    return Prepared(partitions, letters, True, largest_dim, removed_kept_s)


def room_for_dims(settings: Settings, output: Mapping[str, str]) -> int:
    """Dimensions that a record of the output topic has room for; `output` are the topic's settings."""
    room = int(output.get("max.message.bytes", _DEFAULT_LIMIT)) - _FRAME_BYTES
    return room // _bytes_per_dim(settings)


def topic_partitions(settings: Settings, *topics: str, to: str = "Describe") -> int | None:
    """Number of partitions of the first of `topics` that is there, by default of the event topics; blocking.

    Args:
        settings: how to reach the brokers.
        topics: their names.
        to: what whoever asks is there to do with them, and so must be allowed.

    Raises:
        NotAllowed: none is there that may be described.
        ConfigError: the broker can't be reached.
    """
    admin, names = admin_client(settings), topics or settings.event_topics
    found = _partition_counts(list_topics(admin, settings))
    if (there := next((topic for topic in names if topic in found), None)) is not None:
        return found[there]
    for topic, description in _described(admin, names[:1]).items():
        if _is_hidden(description):
            raise NotAllowed(topic, to=f"{to} topic")
    return None


def _names(settings: Settings) -> list[str]:
    return [
        *settings.event_topics,
        settings.deletion_topic,
        settings.changelog_topic,
        settings.output_topic,
        settings.dlq_topic,
        settings.item_versions_topic,
        settings.item_status_topic,
    ]


def _wanted(settings: Settings, partitions: int, dim: int, event_limits: Mapping[str, int]) -> list[Wanted]:
    # what is superseded, or erased, is gone from the log after a day, and not when half of the log is
    compact = {"cleanup.policy": "compact", "max.compaction.lag.ms": str(_SUPERSEDED_MS)}
    state = max_state_bytes(settings.history_limit) + _FRAME_BYTES
    output = _bytes_per_dim(settings) * dim + _FRAME_BYTES
    # a topic that is not there yet gets the broker's default limit, 1 MiB
    largest = max(event_limits.values(), default=_DEFAULT_LIMIT)
    dlq = min(largest, settings.dlq_max_bytes) + _DLQ_HEADROOM_BYTES
    wanted = [Wanted(name, "event topic", partitions, compacted=False) for name in settings.event_topics]
    return [
        *wanted,
        Wanted(settings.deletion_topic, "deletion topic", partitions, compacted=True, config=compact),
        Wanted(settings.changelog_topic, "changelog", partitions, True, state, _sized(compact, state)),
        Wanted(settings.output_topic, "output topic", partitions, True, output, _sized(compact, output)),
        Wanted(
            settings.dlq_topic,
            "dead-letter topic",
            None,
            compacted=False,
            min_bytes=dlq,
            config=_sized({"cleanup.policy": "delete", "retention.ms": str(_KEEP_MS)}, dlq),
        ),
        # always written to and read from partition 0
        Wanted(settings.item_versions_topic, "control topic", None, True, config=compact, create_partitions=1),
        Wanted(settings.item_status_topic, "status topic", None, True, config=compact, create_partitions=1),
    ]


def _bytes_per_dim(settings: Settings) -> int:
    return 4 if settings.output_format == "avro" else 25  # a component in JSON takes up to so many


def _sized(config: Mapping[str, str], needed: int) -> dict[str, str]:
    """Leave the broker's own limit alone where it suffices."""
    return {**config, "max.message.bytes": str(needed)} if needed > 1_000_000 else dict(config)


def _partition_counts(cluster: ClusterMetadata) -> dict[str, int]:
    return {name: len(topic.partitions) for name, topic in cluster.topics.items() if topic.error is None}


def _refuse(troubles: Iterable[ConfigError]) -> None:
    """Raise the first."""
    for trouble in troubles:
        raise trouble


def _described(admin: AdminClient, names: Iterable[str]) -> dict[str, Any]:
    """What the brokers tell of topics, what this client may do with them too; the `KafkaError` where they refuse."""
    asked = admin.describe_topics(
        TopicCollection(list(names)), include_authorized_operations=True, request_timeout=TIMEOUT_S
    )
    found: dict[str, Any] = {}
    for name, future in asked.items():
        try:
            found[name] = future.result()
        except KafkaException as exc:
            found[name] = exc.args[0]
    return found


def hidden_topics(admin: AdminClient, names: Iterable[str]) -> set[str]:
    """Those that may be there, and that this client may not see; blocking."""
    return {name for name, description in _described(admin, names).items() if _is_hidden(description)}


def _is_hidden(description: Any) -> bool:
    """Whether a topic, if it is there at all, may not be described, and so is in no list either."""
    return isinstance(description, KafkaError) and description.code() == TOPIC_REFUSED


def _check_grants(admin: AdminClient, settings: Settings) -> None:
    """Refuse to start where a grant is missing: it would show late, and in many ways.

    Raises:
        NotAllowed: all that is missing on topics that are there, or may be.
    """
    if missing := missing_grants(admin, worker(settings)):
        raise NotAllowed(", ".join(missing))


def missing_grants(admin: AdminClient, grants: Iterable[Grant]) -> list[str]:
    """Of grants on topics, there or not, which this client lacks: operations and name of each; blocking."""
    needed = {grant.name: grant.operations for grant in grants if grant.kind == "topic"}
    missing = []
    for name, description in _described(admin, needed).items():
        lacks: Sequence[str] = ()
        if isinstance(description, KafkaError):
            lacks = needed[name] if _is_hidden(description) else ()
        elif (allowed := description.authorized_operations) is not None:
            lacks = [op for op in needed[name] if AclOperation[op.upper()] not in allowed]
        if lacks:
            missing.append(f"{'/'.join(lacks)} topic {name}")
    return missing


def _count_troubles(wanted: Sequence[Wanted], found: Mapping[str, int]) -> Iterator[ConfigError]:
    first = wanted[0]
    for topic in wanted:
        count = found.get(topic.name)
        if count is not None and topic.partitions is not None and count != topic.partitions:
            msg = (
                f"{topic.role} {topic.name} has {count} partitions, {first.name} has {topic.partitions}; "
                f"all input topics, the changelog and the output need the same number: {way_on(max(found.values()))}"
            )
            yield TopicMismatch(msg)


def create_topics(
    admin: AdminClient, topics: Sequence[Wanted], settings: Settings, partitions: int, *, dry_run: bool = False
) -> None:
    """Make topics; blocking.

    Args:
        admin: orders them.
        topics: what they must be like.
        settings: how many replicas.
        partitions: how many partitions, where a topic says nothing else.
        dry_run: have the brokers only say whether they would.

    Raises:
        NotAllowed: one may not be made by this client.
        ConfigError: the brokers refuse one.
    """
    if not topics:
        return
    new = [
        NewTopic(
            t.name,
            num_partitions=t.partitions or t.create_partitions or partitions,
            replication_factor=settings.replication_factor,
            config=dict(t.config),
        )
        for t in topics
    ]
    asked = admin.create_topics(new, operation_timeout=TIMEOUT_S, request_timeout=TIMEOUT_S, validate_only=dry_run)
    for name, future in asked.items():
        try:
            future.result()
            if not dry_run:
                log.info("created topic %s", name)
        except KafkaException as exc:
            if exc.args[0].code() in REFUSED:
                raise NotAllowed(name, to="Create topic") from exc
            if exc.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another worker was quicker
                msg = f"topic {name} can't be created ({exc.args[0].str()}); create it or allow the worker to"
                raise refused(exc.args[0], msg) from exc


def topic_configs(settings: Settings, admin: AdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    """Settings of topics, by topic and name, without those that this client may not be told; blocking.

    Raises:
        ConfigError: they can't be read.
        DeliveryError: the brokers don't tell now.
    """
    if not names:
        return {}
    for _ in range(SETTLE_TRIES):  # a topic just created is not known everywhere at once
        known = list_topics(admin, settings).topics
        unknown = [name for name in names if name not in known or known[name].error is not None]
        if not unknown or all(map(_is_hidden, _described(admin, unknown).values())):
            break
        time.sleep(SETTLE_S)
    asked: dict[ConfigResource, Future[Any]] = admin.describe_configs(
        [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names], request_timeout=TIMEOUT_S
    )
    out: dict[str, dict[str, str]] = {}
    for resource, future in asked.items():
        try:
            out[resource.name] = {name: entry.value for name, entry in future.result().items()}
        except KafkaException as exc:
            if exc.args[0].code() in REFUSED:
                continue
            msg = f"settings of topic {resource.name} can't be read ({exc.args[0].str()})"
            raise refused(exc.args[0], msg) from exc
    return out


def _config_troubles(
    settings: Settings, wanted: Sequence[Wanted], configs: Mapping[str, Mapping[str, str]]
) -> Iterator[ConfigError]:
    for topic in wanted:
        if (config := configs.get(topic.name)) is None:
            if topic.name in settings.event_topics and settings.erasure_marker_retention_ms is not None:
                yield NotAllowed(topic.name, to="DescribeConfigs topic")  # erased users might come back
            continue
        policy = set(config["cleanup.policy"].split(","))
        if topic.compacted is True and policy != {"compact"}:
            msg = f"{topic.role} {topic.name} has cleanup.policy={','.join(sorted(policy))}; it must be compact alone"
            yield TopicMismatch(msg)
        if topic.compacted is False and "compact" in policy:
            msg = f"{topic.role} {topic.name} is compacted, which loses records of one key; set cleanup.policy=delete"
            yield TopicMismatch(msg)
        if int(config["max.message.bytes"]) < topic.min_bytes:
            msg = (
                f"{topic.role} {topic.name} has max.message.bytes={config['max.message.bytes']}; "
                f"it needs at least {topic.min_bytes}"
            )
            yield TopicMismatch(msg)
        if topic.name in settings.event_topics:
            yield from _marker_troubles(settings, topic.name, config)


def _marker_troubles(settings: Settings, name: str, config: Mapping[str, str]) -> Iterator[TopicMismatch]:
    """Refuse to forget an erasure while a topic still holds events that it covers: a replay would bring the user back.

    So it does where an event topic keeps its records for longer than markers are kept, or for ever.
    """
    kept_ms = settings.erasure_marker_retention_ms
    if kept_ms is None:
        return
    retention_ms, segment_ms = int(config["retention.ms"]), int(config["segment.ms"])
    if retention_ms < 0:
        msg = (
            f"event topic {name} keeps its records for ever (retention.ms={retention_ms}), so that markers of erased "
            "users must be kept as well; set retention.ms, or unset UEMB_ERASURE_MARKER_RETENTION"
        )
        yield TopicMismatch(msg)
    elif kept_ms < retention_ms + segment_ms:  # a segment goes when its newest record is old enough
        msg = (
            f"UEMB_ERASURE_MARKER_RETENTION is {kept_ms / 1000:g} s, but event topic {name} keeps records for up to "
            f"{(retention_ms + segment_ms) / 1000:g} s (retention.ms + segment.ms), whose replay would bring erased "
            "users back; raise the one, or lower the others"
        )
        yield TopicMismatch(msg)
