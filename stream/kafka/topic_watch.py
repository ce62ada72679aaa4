"""The input topics, watched while a worker runs: one that grew, or was made anew, is not what the offsets are of."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from confluent_kafka import KafkaException, TopicCollection

from stream.config import Settings
from stream.errors import ConfigError, DeliveryError, StateError, TopicMismatch, way_on
from stream.kafka.brokers import admin_client

log = logging.getLogger(__name__)

#: A change is noticed within so many seconds and the time of an answer.
WATCH_S: Final = 20.0
_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class Look:
    """A topic at one moment: the identity that the broker gave it when it was made, and its number of partitions."""

    topic_id: str
    partitions: int


class TopicWatch:
    """Compares the input topics with what they were at the first look.

    Args:
        settings: the topics, and how to reach the brokers.
        partitions: n of the application.
    """

    def __init__(self, settings: Settings, partitions: int) -> None:
        self._topics = (*settings.event_topics, settings.deletion_topic)
        self._partitions = partitions
        self._settings = settings
        self._first: dict[str, Look] = {}

    def check(self) -> None:
        """Look once more; blocking. Brokers that do not answer, or tell nothing, are asked again next time.

        Raises:
            TopicMismatch: a topic has another number of partitions.
            StateError: a topic was deleted and made anew.
        """
        now = self._look(self._topics)
        self._first = {**now, **self._first}
        for topic, look in now.items():
            if look.partitions != self._partitions:
                msg = (
                    f"{topic} has {look.partitions} partitions and {self._partitions} are served: users whose keys "
                    f"moved would be turned away (wrong_partition); {way_on(max(look.partitions, self._partitions))}"
                )
                raise TopicMismatch(msg)
            if look.topic_id != self._first[topic].topic_id:
                msg = (
                    f"{topic} was made anew: the committed offsets are of the one before; decide where to go on with "
                    "kafka-consumer-groups --reset-offsets, then start again"
                )
                raise StateError(msg)

    def _look(self, topics: Iterable[str]) -> dict[str, Look]:
        found = {}
        try:
            admin = admin_client(self._settings)  # anew each time: it keeps the certificates that it began with
            asked = admin.describe_topics(TopicCollection(list(topics)), request_timeout=_TIMEOUT_S)
            for topic, future in asked.items():
                described = future.result(2 * _TIMEOUT_S)
                found[topic] = Look(str(described.topic_id), len(described.partitions))
        except (KafkaException, TimeoutError, ConfigError, DeliveryError) as exc:
            log.debug("the input topics can't be looked at now (%s)", type(exc).__name__)
        return found
