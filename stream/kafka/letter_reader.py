"""Dead letters: read, and told apart by why and where from."""

from collections.abc import Generator
from dataclasses import dataclass

from stream.config import Settings
from stream.errors import ConfigError
from stream.kafka.brokers import list_topics
from stream.kafka.dead_letters import Header, Letter
from stream.kafka.grants import TOPIC_REFUSED
from stream.kafka.log_reader import LogConsumer, Span, open_consumer, read, since, unreadable, whole
from stream.logs import OnProgress


@dataclass(frozen=True)
class Filter:
    """Which letters are meant; what is empty or None admits all.

    Attributes:
        reasons: why they were turned away.
        topics: where the rejected records lie.
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
            and (not self.topics or letter.text(Header.TOPIC) in self.topics)
            and (self.since_ms is None or letter.timestamp_ms >= self.since_ms)
            and (self.until_ms is None or letter.timestamp_ms < self.until_ms)
            and (not self.letters or (letter.partition, letter.offset) in self.letters)
        )


def read_letters(
    settings: Settings, wanted: Filter, on_progress: OnProgress | None = None
) -> Generator[Letter, None, None]:
    """The letters that `wanted` admits, up to the topic's ends as of now, each partition in its order.

    Raises:
        ConfigError: no broker answers, or there is no dead-letter topic.
        DeliveryError: the topic can't be read to its end.
        NotAllowed: it may not be read.
    """
    consumer, name = open_consumer(settings, "dlq"), settings.dlq_topic
    try:
        topic = list_topics(consumer, settings, name).topics[name]
        if topic.error is not None:
            if topic.error.code() == TOPIC_REFUSED:
                raise unreadable(name, topic.error)
            msg = f"there is no topic {name}; set UEMB_DLQ_TOPIC, or start a worker first, which creates it"
            raise ConfigError(msg)
        for message in read(consumer, _spans(consumer, name, list(topic.partitions), wanted), on_progress):
            letter = Letter.of(message)
            if wanted.admits(letter):
                yield letter
    finally:
        consumer.close()


def _spans(consumer: LogConsumer, name: str, partitions: list[int], wanted: Filter) -> list[Span]:
    """Where the letters that are wanted may lie."""
    spans = [span for partition in partitions if (span := whole(consumer, name, partition)) is not None]
    if wanted.since_ms is not None and spans:
        spans = since(consumer, spans, wanted.since_ms)
    if wanted.letters:
        offsets = {p: [offset for of, offset in wanted.letters if of == p] for p, _ in wanted.letters}
        spans = [
            span._replace(start=max(span.start, min(here)), end=min(span.end, max(here) + 1))
            for span in spans
            if (here := offsets.get(span.partition))
        ]
    return spans
