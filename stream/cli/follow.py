"""Following the embedding topic from Python: decoded records as they come, tombstones as None."""

import json
from collections.abc import Iterator
from typing import Any, Final

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, TopicPartition

from stream.config import Settings
from stream.core.framing import MAGIC, schema_id_of
from stream.core.records import CorruptRecord, decode, to_json
from stream.errors import ConfigError, UembError
from stream.kafka.brokers import consumer, list_topics
from stream.kafka.grants import GROUP_REFUSED, TOPIC_REFUSED
from stream.kafka.log_reader import unreadable
from stream.kafka.schema_registry import SchemaRegistry, open_registry

_POLL_S: Final = 0.5


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
    reader = consumer(
        settings,
        {
            "group.id": f"{settings.app_id}-tail",  # which is not joined
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        },
    )
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
            message = reader.poll(_POLL_S)
            if message is None:
                continue
            if message.error():
                if message.error().code() in (KafkaError._PARTITION_EOF, GROUP_REFUSED):  # we need no group
                    continue
                raise unreadable(settings.output_topic, message.error())
            yield message.key().decode(), _record(message.value(), registry)
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
    if value[:1] == b"{":
        document: dict[str, Any] = json.loads(value)
        return document
    try:
        return to_json(decode(value))
    except CorruptRecord as exc:
        msg = f"{exc}; upgrade this client"
        raise UembError(msg) from exc
