"""Where data of an erased user may still lie, and until when, from the settings that the topics really have."""

from dataclasses import dataclass
from typing import Final

from stream.config import Settings
from stream.core.events import MAX_LEAD_MS
from stream.kafka.brokers import admin_client
from stream.kafka.topics import topic_configs

_FOR_EVER_MS: Final = (1 << 63) - 1


@dataclass(frozen=True)
class Trace:
    """A place where something of a user may be found for some time.

    Attributes:
        where: a topic, or a store.
        what: what it is.
        longest_s: seconds after which it is gone at the latest, None without a bound.
        bound: the settings that decide, or what to do where there is none.
    """

    where: str
    what: str
    longest_s: float | None
    bound: str


def traces(settings: Settings) -> list[Trace]:
    """What an erasure that is processed now leaves behind; blocking.

    Raises:
        ConfigError: the brokers can't be asked.
    """
    admin = admin_client(settings)
    kept = [*settings.event_topics, settings.dlq_topic]
    compacted = [settings.changelog_topic, settings.output_topic]
    configs = topic_configs(settings, admin, [*kept, *compacted])
    found = [
        _retained(name, "dead letters" if name == settings.dlq_topic else "events", configs.get(name)) for name in kept
    ]
    changelog, output = map(configs.get, compacted)
    found += [
        _compacted(settings.changelog_topic, "earlier states", changelog, tombstone=False),
        _compacted(settings.output_topic, "earlier vectors", output, tombstone=True),
    ]
    local = "RocksDB rewrites its files in its own time; removing UEMB_STATE_DIR while its worker is stopped ends it"
    found.append(Trace("local tables", "earlier states, in files that are not read any more", None, local))
    return found + _marker(settings, changelog)


def _marker(settings: Settings, changelog: dict[str, str] | None) -> list[Trace]:
    where, what = "changelog, local tables, store", "the erasure's marker"
    kept_s = settings.erasure_marker_retention
    if kept_s is None:
        marker = "kept, so that replayed events stay erased: the id and the time of the erasure, nothing else"
        return [Trace(where, what, None, marker)]
    request = "the id and the time; a null value under the user's key withdraws it once the marker is gone"
    own = Trace(settings.deletion_topic, "the erasure itself", None, request)
    removed = _compacted(where, what, changelog, tombstone=True)
    if removed.longest_s is None:
        return [removed, own]
    # an erasure reaches some minutes further than its own time, and its marker is kept from there on
    longest_s = MAX_LEAD_MS / 1000 + kept_s + removed.longest_s
    return [Trace(where, what, longest_s, f"UEMB_ERASURE_MARKER_RETENTION + the changelog's {removed.bound}"), own]


def _untold(topic: str) -> str:
    return f"how long can't be said: not allowed to DescribeConfigs topic {topic} (see `uemb acl`)"


def _retained(name: str, what: str, config: dict[str, str] | None) -> Trace:
    if config is None:
        return Trace(name, what, None, _untold(name))
    if "delete" not in config["cleanup.policy"] or int(config["retention.ms"]) < 0:
        return Trace(name, what, None, "set retention.ms")
    # a segment goes when its newest record is old enough
    longest_ms = int(config["retention.ms"]) + int(config["segment.ms"])
    return Trace(name, what, longest_ms / 1000, "retention.ms + segment.ms")


def _compacted(name: str, what: str, config: dict[str, str] | None, *, tombstone: bool) -> Trace:
    if config is None:
        return Trace(name, what, None, _untold(name))
    lag_ms = int(config["max.compaction.lag.ms"])
    if lag_ms == _FOR_EVER_MS:
        return Trace(name, what, None, "set max.compaction.lag.ms")
    if not tombstone:
        return Trace(name, what, lag_ms / 1000, "max.compaction.lag.ms")
    # the tombstone itself names the user for a while longer
    longest_ms = lag_ms + int(config["delete.retention.ms"])
    return Trace(name, what, longest_ms / 1000, "max.compaction.lag.ms + delete.retention.ms")
