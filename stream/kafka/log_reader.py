"""Reading stretches of topics to their ends: the command line's view of a log, outside any consumer group."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from confluent_kafka import (
    OFFSET_INVALID,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AclOperation, AdminClient, OffsetSpec

from stream.config import Settings
from stream.core.events import MAX_EXPANDED_BYTES
from stream.errors import DeliveryError, NotAllowed, UembError
from stream.kafka.brokers import admin_client, consumer
from stream.kafka.grants import TOPIC_REFUSED
from stream.logs import OnProgress

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 10.0
STALL_S: Final = 30.0
_POLL_S: Final = 0.05  # the client waits so long for a batch to fill
_BATCH: Final = 500
#: A connection answers in order: other questions wait behind a fetch for records that are not there (500 ms as given).
_FETCH_WAIT_MS: Final = 20
#: What the client expands a batch to at most, in steps: it must read all that a worker does (its default is 100 MB).
_EXPANDED_BYTES: Final = 4 * MAX_EXPANDED_BYTES
#: Errors that waiting does not mend; a client goes on by itself after any other.
_LASTING: Final = (KafkaError._AUTHENTICATION,)
_NOT_THERE: Final = (KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION, KafkaError.UNKNOWN_TOPIC_OR_PART)
#: Said for a moment of a partition that gets another leader, as when a broker is restarted.
_ELECTING: Final = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)
_ELECTION_POLL_S: Final = 0.1
_GRANT_POLL_S: Final = 0.5
#: Called with topic, partition and offset.
Unreadable = Callable[[str, int, int], None]


class Span(NamedTuple):
    """Records of a partition: from offset `start` to before `end`."""

    topic: str
    partition: int
    start: int
    end: int


class LogConsumer(Consumer):  # type: ignore[misc]  # the library has no types
    """A consumer that waits for a grant that it had: grants are replaced by deleting and making them.

    What was refused from the beginning is better told at once.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._settings: Settings | None = None
        self._admin: AdminClient | None = None
        self._patience_s = 0.0
        self._had: set[str] = set()
        self._refused: dict[str, float] = {}  # topics, and since when
        self._look_at = 0.0

    def be_patient(self, settings: Settings) -> None:
        """Wait as long as a worker does."""
        self._settings, self._patience_s = settings, settings.delivery_timeout_s

    def took(self, topic: str) -> None:
        """Note that something was read."""
        self._had.add(topic)
        if self._refused and self._refused.pop(topic, None) is not None:
            log.info("allowed again to Read topic %s", topic)

    @property
    def waits(self) -> bool:
        """Whether a grant is waited for."""
        return bool(self._refused)

    def refused(self, topic: str) -> None:
        """Note that a topic may not be read, which the client tells once.

        Raises:
            NotAllowed: it never might, or no more for too long.
        """
        now_s = time.monotonic()
        if topic not in self._had or now_s - self._refused.setdefault(topic, now_s) >= self._patience_s:
            raise NotAllowed(topic, to="Read topic")
        if self._refused[topic] == now_s:
            log.warning("not allowed to Read topic %s; waiting up to %g s for the grant", topic, self._patience_s)

    def look_again(self) -> None:
        """See now and then whether what was refused is allowed by now: a client says nothing of a topic at rest.

        Raises:
            NotAllowed: not for too long.
        """
        if not self._refused or time.monotonic() < self._look_at:
            return
        for topic in list(self._refused):
            if self._may_read(topic):
                self.took(topic)
            else:
                self.refused(topic)
        self._look_at = time.monotonic() + _GRANT_POLL_S

    def _may_read(self, topic: str) -> bool:
        if self._settings is None:
            return False
        self._admin = self._admin or admin_client(self._settings)  # made where it is wanted, which is seldom
        return may_read(self._admin, topic)


def open_consumer(settings: Settings, purpose: str, wait_ms: int = _FETCH_WAIT_MS) -> LogConsumer:
    """A consumer that joins no group and sees what is committed.

    Args:
        settings: the brokers.
        purpose: tells it apart in their logs.
        wait_ms: a fetch waits so long for records that are not there.
    """
    opened = consumer(
        settings,
        {
            "group.id": f"{settings.app_id}-{purpose}",  # nothing is committed under it
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": wait_ms,
            "receive.message.max.bytes": _EXPANDED_BYTES,
        },
        LogConsumer,
    )
    opened.be_patient(settings)
    return opened


def whole(consumer: LogConsumer, topic: str, partition: int) -> Span | None:
    """All that a partition holds now; None when there is no such partition. Waits for its leader while one is elected.

    Waits for a grant that is being replaced, too.

    Raises:
        DeliveryError: the broker does not answer.
        NotAllowed: the topic may not be read.
    """
    while True:
        try:
            found = _watermarks(consumer, TopicPartition(topic, partition))
        except KafkaException as exc:
            if exc.args[0].code() != TOPIC_REFUSED:
                raise unreadable(topic, exc.args[0]) from exc
            consumer.refused(topic)
            time.sleep(_GRANT_POLL_S)
            consumer.look_again()
        else:
            break
    return None if found is None else Span(topic, partition, *found)


def since(consumer: LogConsumer, spans: Sequence[Span], since_ms: int) -> list[Span]:
    """What of `spans`, which are of one topic, was written at or after a time (epoch ms); none of it is an empty span.

    Raises:
        DeliveryError: the broker does not answer.
        NotAllowed: the topic may not be read.
    """
    asked = [TopicPartition(span.topic, span.partition, since_ms) for span in spans]
    try:
        found = consumer.offsets_for_times(asked, timeout=TIMEOUT_S)
    except KafkaException as exc:
        raise unreadable(spans[0].topic, exc.args[0]) from exc
    starts = {at.partition: at.offset for at in found if at.offset >= 0}
    return [span._replace(start=max(span.start, starts.get(span.partition, span.end))) for span in spans]


def log_ends(admin: AdminClient, places: Iterable[tuple[str, int]], spec: OffsetSpec | None = None) -> dict[Any, Any]:
    """What brokers tell of the ends of partitions without a consumer, who would have them make the topic of groups.

    Args:
        admin: asks.
        places: topic and partition of each.
        spec: which place in the log, by default the next offset of what is committed.

    Returns:
        By place, an object with its `offset` and `timestamp` (ms, negative where there is no record).

    Raises:
        DeliveryError: a broker does not tell.
        NotAllowed: a topic may not be described.
    """
    wanted = {TopicPartition(*place): spec or OffsetSpec.latest() for place in places}
    asked = admin.list_offsets(wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=TIMEOUT_S)
    found = {}
    for place, future in asked.items():
        try:
            found[place.topic, place.partition] = future.result()
        except KafkaException as exc:
            raise unreadable(place.topic, exc.args[0]) from exc
    return found


def _watermarks(consumer: Consumer, place: TopicPartition) -> tuple[int, int] | None:
    """First and next offset; None when the brokers know of no such partition."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            low, high = consumer.get_watermark_offsets(place, timeout=TIMEOUT_S)
        except KafkaException as exc:
            code = exc.args[0].code()
            if code in _NOT_THERE and not _is_there(consumer, place):
                return None
            if code not in (*_NOT_THERE, *_ELECTING) or time.monotonic() > deadline:
                raise
            time.sleep(_ELECTION_POLL_S)
        else:
            return low, high


def _is_there(consumer: Consumer, place: TopicPartition) -> bool:
    """Whether the brokers list a partition: a client takes one without a leader for one that is not there."""
    metadata = consumer.list_topics(place.topic, timeout=TIMEOUT_S)
    topic = metadata.topics[place.topic]
    if topic.error is not None and topic.error.code() == TOPIC_REFUSED:  # which hides it
        raise KafkaException(topic.error)
    return place.partition in topic.partitions or not metadata.brokers


def read(
    consumer: LogConsumer,
    spans: Iterable[Span],
    on_progress: OnProgress | None = None,
    stall_s: float = STALL_S,
    on_unreadable: Unreadable | None = None,
) -> Iterator[Message]:
    """The records of `spans`, each in its order; offsets that hold none (compacted, aborted) are passed over.

    Args:
        consumer: its assignment is replaced.
        spans: at most one of a partition.
        on_progress: called with offsets done and their total.
        on_unreadable: called for each offset of a batch that expands beyond what the client bears, or a worker, which
            is then passed over; without it that is an error.
        stall_s: seconds without progress that are an error.

    Raises:
        DeliveryError: a span can't be read to its end.
        NotAllowed: its topic may not be read.
    """
    left = {(span.topic, span.partition): span for span in spans if span.start < span.end}
    at = {place: span.start for place, span in left.items()}
    first, total = sum(at.values()), sum(span.end - span.start for span in left.values())
    consumer.assign([TopicPartition(*place, offset) for place, offset in at.items()])
    moved_at, problem = time.monotonic(), "no answer"
    while left:
        before, unreadable_at = sum(at.values()), set[tuple[str, int]]()
        for message in consumer.consume(_BATCH, _POLL_S):
            place = message.topic(), message.partition()
            if place not in left:
                continue
            if (error := message.error()) is None:
                consumer.took(place[0])
                end = left[place].end
                at[place] = min(message.offset() + 1, end)
                if message.offset() < end:
                    yield message
            elif error.code() == KafkaError._PARTITION_EOF:  # beyond markers that end a transaction
                consumer.took(place[0])
                at[place] = min(max(at[place], message.offset()), left[place].end)
            elif error.code() == KafkaError._BAD_COMPRESSION and on_unreadable is not None:
                unreadable_at.add(place)
            elif error.code() == TOPIC_REFUSED:
                consumer.refused(place[0])
            else:
                problem = _checked(error, message.topic())
        consumer.look_again()
        for place in unreadable_at:  # the client says the same of each offset of such a batch, but not where it ends
            on_unreadable(*place, at[place])  # type: ignore[misc]
            at[place] += 1
            consumer.seek(TopicPartition(*place, at[place]))
        for seen in consumer.position([TopicPartition(*place) for place in left]):
            place = seen.topic, seen.partition
            if seen.offset != OFFSET_INVALID:
                at[place] = max(at[place], min(seen.offset, left[place].end))
            if at[place] >= left[place].end:
                del left[place]
                consumer.incremental_unassign([TopicPartition(*place)])
        if (now := sum(at.values())) > before:
            moved_at = time.monotonic()
            if on_progress is not None:
                on_progress(now - first, total)
        elif consumer.waits:
            moved_at = time.monotonic()
        elif left and time.monotonic() - moved_at > stall_s:
            raise unreadable(next(iter(left))[0], problem)


def _checked(error: KafkaError, topic: str) -> str:
    """Text of an error that may pass.

    Raises:
        UembError: it won't.
    """
    if error.fatal() or error.code() in _LASTING:
        raise unreadable(topic, error)
    return str(error.str())


def unreadable(topic: str, problem: KafkaError | str) -> UembError:
    """An error about a topic that is to be read."""
    if isinstance(problem, KafkaError):
        if problem.code() == TOPIC_REFUSED:
            return NotAllowed(topic, to="Read topic")
        problem = problem.str()
    return DeliveryError(f"{topic} can't be read ({problem}); see the brokers' logs, then try again")


def may_read(admin: AdminClient, topic: str) -> bool:
    """Whether the brokers say so; blocking."""
    asked = admin.describe_topics(
        TopicCollection([topic]), include_authorized_operations=True, request_timeout=TIMEOUT_S
    )
    try:
        allowed = asked[topic].result().authorized_operations
    except KafkaException:
        return False
    return allowed is None or AclOperation.READ in allowed
