"""Following the embedding topic from Python: decoded records as they come, tombstones as None."""

from collections.abc import Iterator
from typing import Any, Final

import msgspec
from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, TopicPartition

from stream.config import Settings
from stream.core.framing import MAGIC, schema_id_of
from stream.core.records import CorruptRecord, decode, to_json
from stream.errors import ConfigError, UembError
from stream.kafka.brokers import list_topics
from stream.kafka.grants import GROUP_REFUSED, TOPIC_REFUSED
from stream.kafka.log_reader import open_consumer, unreadable
from stream.kafka.schema_registry import SchemaRegistry, open_registry

_POLL_S: Final = 0.5


class _Vector(msgspec.Struct):
    vector: list[float]


class _Document(msgspec.Struct):
    """What a record in JSON must hold to be shown; later releases may add to it."""

    epoch: int
    revision: int
    status: str
    reason: str
    history_len: int
    as_of: int | None
    user_embedding: _Vector


def follow(
    settings: Settings, *, from_beginning: bool = False, count: int | None = None
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield key and record (the JSON shape of `records.to_json`) of each message on the output topic.

    Args:
        settings: brokers, topic and format.
        from_beginning: start with what the topic holds.
        count: stop after so many records; None follows until interrupted.

    Raises:
        ConfigError: the topic does not exist, or no broker answers.
        UembError: the topic can't be read, or may not be; or a record of a schema that this release does not carry.
    """
    registry = open_registry(settings)
    reader = open_consumer(settings, "tail", wait_ms=500)
    try:
        topic = list_topics(reader, settings, settings.output_topic).topics[settings.output_topic]
        if topic.error is not None:
            if topic.error.code() == TOPIC_REFUSED:
                raise unreadable(settings.output_topic, topic.error)
            msg = f"topic {settings.output_topic} does not exist yet; start a worker first"
            raise ConfigError(msg)
        start = OFFSET_BEGINNING if from_beginning else OFFSET_END
        reader.assign([TopicPartition(settings.output_topic, partition, start) for partition in topic.partitions])
        while count is None or count > 0:
            reader.look_again()
            message = reader.poll(_POLL_S)
            if message is None:
                continue
            if (error := message.error()) is not None:
                if error.code() == TOPIC_REFUSED:
                    reader.refused(settings.output_topic)
                elif error.code() == KafkaError._PARTITION_EOF:
                    reader.took(settings.output_topic)
                elif error.code() != GROUP_REFUSED:  # we need no group
                    raise unreadable(settings.output_topic, error)
                continue
            reader.took(settings.output_topic)
            yield (message.key() or b"").decode(errors="backslashreplace"), _record(message.value(), registry)
            count = None if count is None else count - 1
    finally:
        reader.close()
        if registry is not None:
            registry.close()


def _record(value: bytes | None, registry: SchemaRegistry | None) -> dict[str, Any] | None:
    if value is None:
        return None
    if registry is not None and value.startswith(MAGIC) and not registry.is_output_id(number := schema_id_of(value)):
        msg = f"a record is of schema {number} of the registry, which this client does not carry; upgrade it"
        raise UembError(msg)
    try:
        if value[:1] == b"{":
            document: dict[str, Any] = msgspec.json.decode(value)
            msgspec.convert(document, _Document)
            return document
        return to_json(decode(value))
    except CorruptRecord as exc:
        msg = f"{exc}; upgrade this client"
        raise UembError(msg) from exc
    except (ValueError, RecursionError) as exc:  # msgspec's errors are ValueErrors
        msg = "a record of the output topic is none of ours; see who else writes there, or upgrade this client"
        raise UembError(msg) from exc
