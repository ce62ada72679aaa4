"""Dead letters as they come: counted by reason, topic and minute; the newest of each kind, without payload."""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from stream.config import Settings
from stream.errors import ConfigError
from stream.foreign_text import one_line
from stream.inspector.sources import now_ms
from stream.kafka.dead_letters import Header, Letter
from stream.kafka.log_reader import LogConsumer, Span, open_consumer, read, since, whole
from stream.kafka.topics import topic_partitions
from stream.logs import OncePerMinute

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())

#: So far back is looked, in each partition at no more than so many letters.
LOOK_BACK_S: Final = 24 * 3600
_MOST: Final = 20_000
_MINUTE_MS: Final = 60_000
#: Kinds that are told apart; anybody may write to the topic.
_KINDS: Final = 200
_SAMPLES: Final = 20
_DETAIL_CHARS: Final = 300
#: Longest name of a topic.
_NAME_CHARS: Final = 249
#: A topic may grow; how many partitions there are is asked again after so long.
_COUNT_S: Final = 30.0

Kind = tuple[str, str]  # reason, topic


class Fact(NamedTuple):
    """What may be said of a letter without its payload.

    Attributes:
        place: ``partition:offset``.
        ts_ms: when it was written.
        source: ``topic:partition:offset`` of the rejected record.
        size: bytes of its value.
        detail: what was wrong.
    """

    place: str
    ts_ms: int
    source: str
    size: int
    detail: str


@dataclass(frozen=True)
class LettersView:
    """The letters of the last day, or the newest of them.

    Attributes:
        counts: by kind.
        minutes: the same by minute (epoch minutes).
        newest: of each kind, the newest last.
        since_ms: letters written before are not among them.
        written: letters that came since the inspector was started.
    """

    counts: Mapping[Kind, int]
    minutes: Mapping[int, Mapping[Kind, int]]
    newest: Mapping[Kind, list[Fact]]
    since_ms: int
    written: int


class LettersWatch:
    """Follows the topic.

    Args:
        settings: where it is.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: LogConsumer | None = None
        self._next: dict[int, int] | None = None  # None: not begun
        self._partitions: list[int] = []
        self._counted_s = -float("inf")
        self._counts: dict[Kind, int] = defaultdict(int)
        self._minutes: dict[int, dict[Kind, int]] = {}
        self._newest: dict[Kind, deque[Fact]] = {}
        self._written = 0
        self._since_ms = 0
        self._cut: set[int] = set()  # partitions of which not all of the day is read, and nothing yet

    def look(self) -> LettersView:
        """Take in what is new.

        Raises:
            ConfigError: there is no such topic.
            DeliveryError: it can't be read.
            NotAllowed: it may not be read.
        """
        if self._consumer is None:
            self._consumer = open_consumer(self._settings, "inspect-letters")
        spans = self._spans(self._consumer)
        is_first = self._next is None
        if self._next is None or any(span.end < self._next.get(span.partition, 0) for span in spans):
            self._begin(self._consumer, spans)  # also where the topic was made anew
        begun = self._next or {}
        new = [span._replace(start=max(span.start, begun.get(span.partition, 0))) for span in spans]
        for message in read(self._consumer, new, on_unreadable=self._pass_over):
            self._add(Letter.of(message))
            self._written += not is_first
            begun[message.partition()] = message.offset() + 1  # what breaks off here goes on there
        begun.update({span.partition: span.end for span in spans})
        self._forget()
        return LettersView(
            dict(self._counts),
            {minute: dict(counts) for minute, counts in self._minutes.items()},
            {kind: list(facts) for kind, facts in self._newest.items()},
            self._since_ms,
            self._written,
        )

    def close(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            self._consumer.close()

    def _spans(self, consumer: LogConsumer) -> list[Span]:
        """What the topic's partitions hold now."""
        topic = self._settings.dlq_topic
        if time.monotonic() - self._counted_s > _COUNT_S:
            count = topic_partitions(self._settings, topic, to="Read") or 0
            self._partitions, self._counted_s = list(range(count)), time.monotonic()
        if not self._partitions:
            self._counted_s = -float("inf")
            msg = f"there is no topic {topic}; start a worker first, it makes its topics"
            raise ConfigError(msg)
        return [span for partition in self._partitions if (span := whole(consumer, topic, partition)) is not None]

    def _begin(self, consumer: LogConsumer, spans: list[Span]) -> None:
        """Find where to begin in each partition."""
        day_ago_ms = now_ms() - LOOK_BACK_S * 1000
        self._since_ms, self._cut = day_ago_ms, set()
        self._counts.clear()
        self._minutes.clear()
        self._newest.clear()
        self._next = {}
        for span in since(consumer, spans, day_ago_ms):
            self._next[span.partition] = max(span.start, span.end - _MOST)
            if self._next[span.partition] > span.start:
                self._cut.add(span.partition)

    def _pass_over(self, topic: str, partition: int, offset: int) -> None:
        log.warning(
            "a batch of %s, partition %d, offset %d can't be expanded and is passed over", topic, partition, offset
        )

    def _add(self, letter: Letter) -> None:
        written_ms = min(letter.timestamp_ms, now_ms())  # whatever a producer's clock says
        if letter.partition in self._cut:  # of this partition the first is read now
            self._cut.remove(letter.partition)
            self._since_ms = max(self._since_ms, written_ms)
        kind = (letter.reason[:_NAME_CHARS] or "not a letter", letter.text(Header.TOPIC)[:_NAME_CHARS])
        if kind not in self._counts and len(self._counts) >= _KINDS:
            kind = ("other", "")
        self._counts[kind] += 1
        minute = self._minutes.setdefault(written_ms // _MINUTE_MS, {})
        minute[kind] = minute.get(kind, 0) + 1
        source = ":".join(map(letter.text, (Header.TOPIC, Header.PARTITION, Header.OFFSET)))
        fact = Fact(
            f"{letter.partition}:{letter.offset}",
            letter.timestamp_ms,
            one_line(source, _DETAIL_CHARS),
            letter.value_size,
            one_line(letter.text(Header.DETAIL), _DETAIL_CHARS),
        )
        self._newest.setdefault(kind, deque(maxlen=_SAMPLES)).append(fact)

    def _forget(self) -> None:
        """Minutes of more than a day ago."""
        first = (now_ms() - LOOK_BACK_S * 1000) // _MINUTE_MS
        for minute in [minute for minute in self._minutes if minute < first]:
            for kind, count in self._minutes.pop(minute).items():
                self._counts[kind] -= count
                if not self._counts[kind]:
                    del self._counts[kind], self._newest[kind]
        self._since_ms = max(self._since_ms, first * _MINUTE_MS)
