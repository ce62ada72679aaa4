"""Dead letters: read, counted, shown, and sent again to where they came from once the cause is mended."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from stream.config import Settings
from stream.errors import ConfigError, DeliveryError

_FIRST_HEADER: Final = "dlq.reason"
REPLAYED_HEADER: Final = "dlq.replayed"
_TIMEOUT_S: Final = 10.0
_STALL_S: Final = 30.0
_POLL_S: Final = 0.5
#: Errors of a partition that waiting does not mend; of others a client says nothing, or goes on by itself.
_LASTING: Final = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError._AUTHENTICATION,
)
_NOT_THERE: Final = (
    KafkaError._PARTITION_EOF,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
)
_ROWS_PER_POLL: Final = 200
Headers = list[tuple[str, bytes | None]]
Progress = Callable[[int, int | None], None]


class Place(NamedTuple):
    """Where a record lies."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Letter:
    """A dead letter.

    Attributes:
        partition: of the dead-letter topic.
        offset: in that partition.
        timestamp_ms: when it was written.
        key: the rejected record's key, untouched.
        value: its value, untouched; None for a null value, or for a reference.
        headers: all of its headers, ours included.
    """

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers

    @property
    def _ours_at(self) -> int:
        """Where our headers begin: they follow the record's own, which may have any names."""
        return max((n for n, (name, _) in enumerate(self.headers) if name == _FIRST_HEADER), default=len(self.headers))

    def text(self, name: str) -> str:
        """Value of our header of that name; empty without one."""
        found = dict(self.headers[self._ours_at :]).get(f"dlq.{name}")
        return (found or b"").decode(errors="replace")

    @property
    def reason(self) -> str:
        """Why it was turned away."""
        return self.text("reason")

    @property
    def source(self) -> Place | None:
        """Where the rejected record lies, None for a letter that is not ours."""
        partition, offset = self.text("partition"), self.text("offset")
        if not (self.text("topic") and partition.isdecimal() and offset.isdecimal()):
            return None
        return Place(self.text("topic"), int(partition), int(offset))

    @property
    def own_headers(self) -> Headers:
        """The rejected record's own headers."""
        return self.headers[: self._ours_at]


@dataclass(frozen=True)
class Filter:
    """Which letters are meant; what is empty or None admits all.

    Attributes:
        reasons: `dlq.reason`.
        topics: `dlq.topic`.
        since_ms: written at or after.
        until_ms: written before.
        letters: partition and offset of each.
    """

    reasons: frozenset[str] = frozenset()
    topics: frozenset[str] = frozenset()
    since_ms: int | None = None
    until_ms: int | None = None
    letters: frozenset[tuple[int, int]] = frozenset()

    def admits(self, letter: Letter) -> bool:
        """Whether a letter is meant."""
        return (
            (not self.reasons or letter.reason in self.reasons)
            and (not self.topics or letter.text("topic") in self.topics)
            and (self.since_ms is None or letter.timestamp_ms >= self.since_ms)
            and (self.until_ms is None or letter.timestamp_ms < self.until_ms)
            and (not self.letters or (letter.partition, letter.offset) in self.letters)
        )


def _consumer(settings: Settings) -> Consumer:
    return Consumer(
        {
            **settings.librdkafka_client,
            "group.id": f"{settings.app_id}-dlq",  # nothing is committed under it
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "log_level": 2,
        }
    )


def read_letters(settings: Settings, wanted: Filter, on_progress: Progress | None = None) -> Iterator[Letter]:
    """The letters that `wanted` admits, up to the topic's ends as of now, each partition in its order.

    Raises:
        ConfigError: no broker answers, or there is no dead-letter topic.
        DeliveryError: the topic can't be read to its end.
    """
    consumer, name = _consumer(settings), settings.dlq_topic
    try:
        try:
            topic = consumer.list_topics(name, timeout=_TIMEOUT_S).topics[name]
        except KafkaException as exc:
            msg = f"no broker answers at {settings.bootstrap_servers}; set UEMB_BOOTSTRAP_SERVERS"
            raise ConfigError(msg) from exc
        if topic.error is not None:
            msg = f"there is no topic {name}; set UEMB_DLQ_TOPIC, or start a worker first, which creates it"
            raise ConfigError(msg)
        left = {}
        places = []
        for start, end in _bounds(consumer, name, list(topic.partitions), wanted):
            left[start.partition] = end
            places.append(start)
        total, seen, moved_at = sum(left[at.partition] - at.offset for at in places), 0, time.monotonic()
        consumer.assign(places)
        problem = "no answer"
        while left:
            message = consumer.poll(_POLL_S)
            if message is not None:
                problem = _problem(message, name) or problem
                if not message.error():
                    seen, moved_at = seen + 1, time.monotonic()
                    letter = _letter(message)
                    if letter.offset < left.get(letter.partition, 0) and wanted.admits(letter):
                        yield letter
                        moved_at = time.monotonic()  # what the caller does with it is no stall
            if _forget_read(consumer, name, left):
                moved_at = time.monotonic()
            if message is not None and on_progress is not None:
                on_progress(min(seen, total), total)
            if left and time.monotonic() - moved_at > _STALL_S:
                msg = f"{name} can't be read to its end ({problem}); see the brokers' logs"
                raise DeliveryError(msg)
    finally:
        consumer.close()


def _bounds(
    consumer: Consumer, name: str, partitions: list[int], wanted: Filter
) -> Iterator[tuple[TopicPartition, int]]:
    """Where to start in each partition that may hold what is wanted, and before which offset to end."""
    try:
        ends = {p: consumer.get_watermark_offsets(TopicPartition(name, p), timeout=_TIMEOUT_S) for p in partitions}
        starts = {partition: low for partition, (low, _) in ends.items()}
        if wanted.since_ms is not None:  # all before these offsets was written earlier
            asked = [TopicPartition(name, p, max(0, wanted.since_ms)) for p in partitions]
            for at in consumer.offsets_for_times(asked, timeout=_TIMEOUT_S):
                starts[at.partition] = at.offset if at.offset >= 0 else ends[at.partition][1]
    except KafkaException as exc:
        msg = f"{name} can't be read ({exc.args[0].str()}); see the brokers' logs"
        raise DeliveryError(msg) from exc
    for partition, (_, high) in ends.items():
        start, end = starts[partition], high
        if wanted.letters:
            offsets = [offset for of, offset in wanted.letters if of == partition]
            start, end = max([start, min(offsets, default=high)]), min(high, max(offsets, default=-1) + 1)
        if start < end:
            yield TopicPartition(name, partition, start), end


def _problem(message: Message, what: str) -> str:
    """What a message that is none says; empty for a record, and at a partition's end.

    Raises:
        DeliveryError: it won't pass.
    """
    error = message.error()
    if error is None or error.code() == KafkaError._PARTITION_EOF:
        return ""
    if error.fatal() or error.code() in _LASTING:
        msg = f"{what} can't be read ({error.str()})"
        raise DeliveryError(msg)
    return str(error.str())


def _forget_read(consumer: Consumer, name: str, left: dict[int, int]) -> bool:
    """Drop the partitions that have been read to where they ended; return whether there were any."""
    before = len(left)
    for at in consumer.position([TopicPartition(name, p) for p in left]):
        if at.offset != OFFSET_INVALID and at.offset >= left[at.partition]:
            del left[at.partition]
    return len(left) < before


def _letter(message: Message) -> Letter:
    return Letter(
        message.partition(),
        message.offset(),
        message.timestamp()[1],
        message.key(),
        message.value(),
        list(message.headers() or []),
    )


@dataclass
class ReplayReport:
    """What became of the letters: sent again, or left where they are, by cause.

    Attributes:
        sent: acknowledged by Kafka.
        left: ``foreign`` (not a letter of these input topics), ``keyless`` (a null key belongs to no partition),
            ``gone`` (a reference whose record the topic no longer holds).
    """

    sent: int = 0
    left: Counter[str] = field(default_factory=Counter)


class Replayer:
    """Sends rejected records to their topics again: same key, value and headers, on the partition of their key.

    Records carry the time of now, so that retention keeps them and an event that was ahead of its time may be due.
    What was processed meanwhile changes nobody's history when it is sent again (law 1); what is still at fault is
    turned away again, with a letter of its own.

    Args:
        settings: topics; a letter that names any other topic is left alone.
        dry_run: only count.
    """

    def __init__(self, settings: Settings, *, dry_run: bool = False) -> None:
        self._topics = {*settings.event_topics, settings.deletion_topic}
        self._dry_run = dry_run
        self._originals = _consumer(settings)
        self._producer = Producer(
            {
                **settings.librdkafka_client,
                "partitioner": "murmur2_random",
                "acks": "all",
                "enable.idempotence": True,
                "compression.type": "lz4",
                "message.max.bytes": min(settings.dlq_max_bytes + (1 << 20), 1_000_000_000),
                "log_level": 2,
            }
        )
        self._failure = ""
        self.report = ReplayReport()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._originals.close()
        self._producer.purge()
        self._producer.close()

    def replay(self, letters: Iterable[Letter]) -> ReplayReport:
        """Send letters again and wait until all are acknowledged.

        Raises:
            DeliveryError: Kafka refused a record; what was acknowledged before stays sent.
        """
        for number, letter in enumerate(letters):
            if left := self._send(letter):
                self.report.left[left] += 1
            if number % _ROWS_PER_POLL == 0:
                self._producer.poll(0)
            if self._failure:
                break
        self._producer.flush()
        if self._failure:
            msg = f"a record was not acknowledged ({self._failure}); replay again, what arrives twice changes nothing"
            raise DeliveryError(msg)
        return self.report

    def _send(self, letter: Letter) -> str:
        """Send one letter; return why it was left, empty when it was not."""
        source = letter.source
        if source is None or source.topic not in self._topics:
            return "foreign"
        if letter.key is None:
            return "keyless"
        value = letter.value
        if value is None and letter.text("value_sha256"):
            value = self._original(source, letter.text("value_sha256"))
            if value is None:
                return "gone"
        if self._dry_run:
            self.report.sent += 1
            return ""
        headers = [header for header in letter.own_headers if header[0] != REPLAYED_HEADER]
        headers.append((REPLAYED_HEADER, f"{letter.partition}:{letter.offset}".encode()))
        while True:
            try:
                self._producer.produce(source.topic, value, letter.key, headers=headers, on_delivery=self._delivered)
            except BufferError:
                self._producer.poll(_POLL_S)
            except KafkaException as exc:
                self._failure = self._failure or exc.args[0].str()
                return ""
            else:
                return ""

    def _delivered(self, error: Any, _: Message) -> None:
        if error is None:
            self.report.sent += 1
        else:
            self._failure = self._failure or error.str()

    def _original(self, source: Place, sha256: str) -> bytes | None:
        """Value of the record that a reference stands for; None when its topic no longer holds it.

        Raises:
            DeliveryError: the topic can't be read.
        """
        self._originals.assign([TopicPartition(*source)])
        deadline, problem = time.monotonic() + _TIMEOUT_S, "no answer"
        while time.monotonic() < deadline:
            message = self._originals.poll(_POLL_S)
            if message is None:
                continue
            error = message.error()
            if error is not None and error.code() not in _NOT_THERE:
                problem = _problem(message, source.topic)
                continue
            if error is not None or message.offset() != source.offset:
                return None
            value: bytes | None = message.value()
            return value if value is not None and hashlib.sha256(value).hexdigest() == sha256 else None
        msg = f"{source.topic} can't be read ({problem}); replay again, what arrives twice changes nothing"
        raise DeliveryError(msg)
