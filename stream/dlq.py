"""Dead letters: read, and told apart by why and where from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from stream.config import Settings
from stream.errors import ConfigError
from stream.topic_reader import TIMEOUT_S, Progress, Span, open_consumer, read, unreadable, whole

_FIRST_HEADER: Final = "dlq.reason"
Headers = list[tuple[str, bytes | None]]


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


def read_letters(settings: Settings, wanted: Filter, on_progress: Progress | None = None) -> Iterator[Letter]:
    """The letters that `wanted` admits, up to the topic's ends as of now, each partition in its order.

    Raises:
        ConfigError: no broker answers, or there is no dead-letter topic.
        DeliveryError: the topic can't be read to its end.
    """
    consumer, name = open_consumer(settings, "dlq"), settings.dlq_topic
    try:
        try:
            topic = consumer.list_topics(name, timeout=TIMEOUT_S).topics[name]
        except KafkaException as exc:
            msg = f"no broker answers at {settings.bootstrap_servers}; set UEMB_BOOTSTRAP_SERVERS"
            raise ConfigError(msg) from exc
        if topic.error is not None:
            msg = f"there is no topic {name}; set UEMB_DLQ_TOPIC, or start a worker first, which creates it"
            raise ConfigError(msg)
        for message in read(consumer, _spans(consumer, name, list(topic.partitions), wanted), on_progress):
            letter = _letter(message)
            if wanted.admits(letter):
                yield letter
    finally:
        consumer.close()


def _spans(consumer: Consumer, name: str, partitions: list[int], wanted: Filter) -> list[Span]:
    """Where the letters that are wanted may lie."""
    spans = [span for partition in partitions if (span := whole(consumer, name, partition)) is not None]
    if wanted.since_ms is not None:  # all before these offsets was written earlier
        asked = [TopicPartition(name, span.partition, wanted.since_ms) for span in spans]
        try:
            found = consumer.offsets_for_times(asked, timeout=TIMEOUT_S)
        except KafkaException as exc:
            raise unreadable(name, exc.args[0].str()) from exc
        starts = {at.partition: at.offset for at in found if at.offset >= 0}
        spans = [span._replace(start=starts[span.partition]) for span in spans if span.partition in starts]
    if wanted.letters:
        offsets = {p: [offset for of, offset in wanted.letters if of == p] for p, _ in wanted.letters}
        spans = [
            span._replace(start=max(span.start, min(here)), end=min(span.end, max(here) + 1))
            for span in spans
            if (here := offsets.get(span.partition))
        ]
    return spans


def _letter(message: Message) -> Letter:
    return Letter(
        message.partition(),
        message.offset(),
        message.timestamp()[1],
        message.key(),
        message.value(),
        list(message.headers() or []),
    )
