"""Whose an output and a dead-letter topic are: two applications that write to one would each take it for its own.

Kafka's topics carry no names of their owners. So each application keeps a record of what it writes to on its status
topic, which is its own by name, and looks at those of the others before it starts. Inputs, erasures and the control
topic may be shared.
"""

import logging
from typing import Final

import msgspec
from confluent_kafka import Consumer

from stream.config import ITEM_STATUS, Settings
from stream.core.json_records import decode_json, encode_json
from stream.errors import ConfigError, DeliveryError, NotAllowed
from stream.kafka.brokers import admin_client, list_topics
from stream.kafka.log_reader import open_consumer, read, whole

log = logging.getLogger(__name__)

_STALL_S: Final = 5.0
#: Key of the record; those of statuses have colons.
KEY: Final = b"topics"


class Written(msgspec.Struct, frozen=True):
    """Topics that an application alone writes to."""

    output: str | None = None
    dlq: str | None = None


def topics_record(settings: Settings) -> tuple[bytes, bytes]:
    """Key and value of the record."""
    return KEY, encode_json(Written(settings.output_topic, settings.dlq_topic))


def decode_topics(value: bytes) -> Written:
    """What the value of a record says; nothing where it is damaged."""
    try:
        return decode_json(value, Written)
    except ValueError:
        return Written()


def check_owners(settings: Settings) -> None:
    """Refuse topics that another application writes to; blocking. Those that may not be looked at are passed over.

    Raises:
        ConfigError: there is such an application, or no broker answers.
    """
    known = list_topics(admin_client(settings), settings).topics
    others = [name for name, topic in known.items() if name.endswith(ITEM_STATUS) and topic.error is None]
    others = [name for name in others if name != settings.item_status_topic]
    if not others:
        return
    consumer = open_consumer(settings, "owners")
    try:
        for name in others:
            try:
                theirs = _topics_of(consumer, name)
            except (DeliveryError, NotAllowed) as exc:
                log.info("whether its application writes to our topics is not known: %s", exc)
            else:
                _compare(settings, name, theirs)
    finally:
        consumer.close()


def _topics_of(consumer: Consumer, status_topic: str) -> Written:
    span = whole(consumer, status_topic, 0)
    value = b""
    for message in read(consumer, [span] if span else [], stall_s=_STALL_S):
        if message.key() == KEY:
            value = message.value() or b""
    return decode_topics(value)


def _compare(settings: Settings, status_topic: str, theirs: Written) -> None:
    for setting, name, written in (
        ("UEMB_OUTPUT_TOPIC", settings.output_topic, theirs.output),
        ("UEMB_DLQ_TOPIC", settings.dlq_topic, theirs.dlq),
    ):
        if name == written:
            msg = (
                f"{setting}: application {status_topic.removesuffix(ITEM_STATUS)} writes to {name}; name another, or "
                f"delete the topic {status_topic} if that application is no more"
            )
            raise ConfigError(msg)
