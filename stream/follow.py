"""Following the embedding topic from Python: decoded records as they come, tombstones as None."""

import json
from collections.abc import Iterator
from typing import Any, Final
from uuid import uuid4

from confluent_kafka import Consumer, KafkaError, KafkaException

from stream.config import Settings
from stream.errors import ConfigError, UembError
from stream.records import CorruptRecord, decode, to_json

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
        UembError: a record of a schema that this release does not carry.
    """
    consumer = Consumer(
        {
            **settings.librdkafka_client,
            "group.id": f"uemb-tail-{uuid4().hex}",
            "auto.offset.reset": "earliest" if from_beginning else "latest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "log_level": 2,
        }
    )
    try:
        try:
            topic = consumer.list_topics(settings.output_topic, timeout=10).topics[settings.output_topic]
        except KafkaException as exc:
            msg = f"no broker answers at {settings.bootstrap_servers}; set UEMB_BOOTSTRAP_SERVERS"
            raise ConfigError(msg) from exc
        if topic.error is not None:
            msg = f"topic {settings.output_topic} does not exist yet; start a worker first"
            raise ConfigError(msg)
        consumer.subscribe([settings.output_topic])
        while count is None or count > 0:
            message = consumer.poll(_POLL_S)
            if message is None:
                continue
            if message.error():
                if message.error().code() == KafkaError._PARTITION_EOF:
                    continue
                msg = f"reading {settings.output_topic} failed: {message.error().str()}"
                raise UembError(msg)
            yield message.key().decode(), _record(message.value())
            count = None if count is None else count - 1
    finally:
        consumer.close()


def _record(value: bytes | None) -> dict[str, Any] | None:
    if value is None:
        return None
    if value[:1] == b"{":
        document: dict[str, Any] = json.loads(value)
        return document
    try:
        return to_json(decode(value))
    except CorruptRecord as exc:
        msg = f"{exc}; upgrade this client"
        raise UembError(msg) from exc
