"""Records in, offsets out: batches of one partition, the check that none is left out, and what may be committed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from aiokafka.structs import ConsumerRecord

from stream.errors import OwnershipError, StateError, TopicMismatch

#: A topic whose first so many well-keyed records are all on wrong partitions is misproduced as a whole.
PROBATION_RECORDS: Final = 1_000
#: How often in a row the same offset is read again because what holds it did not arrive.
GAP_TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Consecutive records of one topic partition, as fetched.

    Attributes:
        topic: where they come from.
        partition: which partition.
        records: the records, in offset order.
        seeks: how often the consumer had been positioned anew when they were fetched.
        number: position of this batch among all fetched from the partition since then, from 0.
        start: offset at which the partition was positioned then.
        fetched_s: when they were fetched (monotonic s); None where nobody asks how long they take.
    """

    topic: str
    partition: int
    records: Sequence[ConsumerRecord]
    seeks: int
    number: int
    start: int
    fetched_s: float | None = None

    @property
    def next_offset(self) -> int:
        """Offset to commit when all of it is durable."""
        return int(self.records[-1].offset) + 1


class GivenOut(NamedTuple):
    """What the client gave out of a partition since it was positioned: the count of seeks then, and the offsets."""

    seeks: int
    start: int
    end: int


class BatchMissing(Exception):
    """Batches of a partition did not arrive; `due` is the first offset that did not."""

    def __init__(self, due: int) -> None:
        super().__init__(due)
        self.due = due


class Lost(NamedTuple):
    """What was given out and will not arrive: of which partition, from which offset on, in which run."""

    topic: str
    partition: int
    due: int
    seeks: int


class DeliveryChain:
    """Checks that the batches of each partition arrive one after another, none left out (law 6)."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], tuple[int, int]] = {}
        self._ends: dict[tuple[str, int], int] = {}
        self._gaps: dict[tuple[str, int], tuple[int, int]] = {}
        self._awaited: dict[tuple[str, int], tuple[tuple[int, int], int]] = {}
        self._since = 0

    def check(self, batch: RecordBatch) -> bool:
        """Return False for a batch that will be read again.

        Raises:
            BatchMissing: one before it is missing. The partition is to be read again from there; until the consumer
                has sought, its batches count as read again.
            OwnershipError: the same one was missing too often, or the offsets went back.
        """
        place = (batch.topic, batch.partition)
        seeks, number = self._last.get(place, (-1, -1))
        if batch.seeks < max(seeks, self._since):
            return False
        expected = number + 1 if batch.seeks == seeks else 0
        if batch.number != expected:
            due = self._ends[place] if expected else batch.start
            self._count_gap(batch.topic, batch.partition, due)
            self._last[place] = (batch.seeks + 1, -1)
            raise BatchMissing(due)
        if expected and batch.records[0].offset < self._ends[place]:
            msg = (
                f"the offsets of {batch.topic}-{batch.partition} went back from {self._ends[place]} to "
                f"{batch.records[0].offset}: the topic was made anew, or cut; decide where to go on with "
                "kafka-consumer-groups --reset-offsets, then start again"
            )
            raise StateError(msg)
        self._last[place] = (batch.seeks, batch.number)
        self._ends[place] = batch.next_offset
        return True

    def lost(self, given_out: Mapping[tuple[str, int], GivenOut], fetches: int, *, buffered: bool) -> list[Lost]:
        """What is on its way no more and has not arrived; call it every second or so, and have it read again.

        A batch that is lost would be missed at the partition's next event only, without this.

        Args:
            given_out: what the client gave out of each partition.
            fetches: how many fetches were begun; each begins when all of the one before is handed on.
            buffered: whether anything waits to be processed.

        Raises:
            OwnershipError: the same one was missing too often.
        """
        awaited = {}
        for place, given in given_out.items():
            if (due := self._due(place, given)) is not None:
                what = (given.seeks, due)
                first_missed, since = self._awaited.get(place, (what, fetches))
                awaited[place] = (what, since if first_missed == what else fetches)
        self._awaited = awaited
        if buffered:
            return []
        lost = [Lost(*place, due, seeks) for place, ((seeks, due), since) in awaited.items() if fetches > since]
        for topic, partition, due, _ in lost:
            self._count_gap(topic, partition, due)
        return lost

    def _due(self, place: tuple[str, int], given_out: GivenOut) -> int | None:
        """The first offset of what was given out that has not arrived yet; None when all has."""
        seeks, number = self._last.get(place, (-1, -1))
        if seeks > given_out.seeks:
            return None
        at = self._ends[place] if seeks == given_out.seeks and number >= 0 else given_out.start
        return at if at < given_out.end else None

    def _count_gap(self, topic: str, partition: int, due: int) -> None:
        before, times = self._gaps.get((topic, partition), (due, 0))
        times = times + 1 if before == due else 1
        self._gaps[topic, partition] = (due, times)
        if times > GAP_TRIES:
            msg = (
                f"offset {due} of {topic}-{partition} was fetched and did not arrive, and again each of {GAP_TRIES} "
                "times that it was read; restart"
            )
            raise OwnershipError(msg)

    def restart(self, seeks: int) -> None:
        """Partitions were given up: what was fetched before the consumer has sought `seeks` times is read again."""
        self._last.clear()
        self._since = seeks


class DurableMarks:
    """Of each input partition the offset below which all that its records caused is durable: what may be committed.

    Lanes mark, the consumer commits what is `due`, and nothing else moves a commit (law 5). While all that a topic has
    shown lies on wrong partitions, its marks are held back: its records are read again once its producer is mended.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[str, int], int] = {}
        self._proven: set[str] = set()
        self._wrong: Counter[str] = Counter()

    def mark(self, topic: str, partition: int, next_offset: int) -> None:
        """All that records below `next_offset` caused is durable; a mark never goes backward."""
        place = (topic, partition)
        self._marks[place] = max(next_offset, self._marks.get(place, 0))

    def saw(self, topic: str, right: int, wrong: int) -> None:
        """Take note of how many well-keyed records of a batch are where their keys belong, and how many are not.

        Raises:
            TopicMismatch: none of the topic's first 1,000 was on the right partition.
        """
        if topic in self._proven:
            return
        self._wrong[topic] += wrong
        if right:
            self._proven.add(topic)
        elif self._wrong[topic] >= PROBATION_RECORDS:
            msg = (
                f"all of the first {self._wrong[topic]} records of {topic} are on wrong partitions; "
                "its producer must partition by murmur2 of the key (librdkafka: partitioner=murmur2_random)"
            )
            raise TopicMismatch(msg)

    def due(self) -> dict[tuple[str, int], int]:
        """Next offset to commit of each topic and partition."""
        return {
            (topic, partition): offset
            for (topic, partition), offset in list(self._marks.items())  # metrics ask from another thread
            if topic in self._proven or not self._wrong[topic]
        }

    def forget(self, places: Iterable[tuple[str, int]]) -> None:
        """Topic partitions were given up: what was not committed is read again."""
        for place in places:
            self._marks.pop(place, None)
