"""What the consumer hands on: runs of records of one partition, and the check that none is left out between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from aiokafka.structs import ConsumerRecord

from stream.errors import OwnershipError

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
    """

    topic: str
    partition: int
    records: Sequence[ConsumerRecord]
    seeks: int
    number: int
    start: int = 0

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


class DeliveryChain:
    """Checks that the batches of each partition arrive one after another, none left out (law 6)."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], tuple[int, int]] = {}
        self._ends: dict[tuple[str, int], int] = {}
        self._gaps: dict[tuple[str, int], tuple[int, int]] = {}
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
            self._miss(batch, expected, due)
            self._last[place] = (batch.seeks + 1, -1)
            raise BatchMissing(due)
        if expected and batch.records[0].offset < self._ends[place]:
            msg = (
                f"the offsets of {batch.topic}-{batch.partition} went back from {self._ends[place]} to "
                f"{batch.records[0].offset}: the topic was made anew, or cut; decide where to go on with "
                "kafka-consumer-groups --reset-offsets, then start again"
            )
            raise OwnershipError(msg)
        self._last[place] = (batch.seeks, batch.number)
        self._ends[place] = batch.next_offset
        return True

    def due(self, topic: str, partition: int, given_out: GivenOut) -> int | None:
        """The first offset of what was given out that has not arrived yet; None when all has."""
        place = (topic, partition)
        seeks, number = self._last.get(place, (-1, -1))
        if seeks > given_out.seeks:
            return None
        at = self._ends[place] if seeks == given_out.seeks and number >= 0 else given_out.start
        return at if at < given_out.end else None

    def _miss(self, batch: RecordBatch, expected: int, due: int) -> None:
        place = (batch.topic, batch.partition)
        before, times = self._gaps.get(place, (due, 0))
        times = times + 1 if before == due else 1
        self._gaps[place] = (due, times)
        if times > GAP_TRIES:
            msg = (
                f"batch {batch.number} of {batch.topic}-{batch.partition} arrived where {expected} was due, and again "
                f"each of {GAP_TRIES} times that offset {due} was read; restart"
            )
            raise OwnershipError(msg)

    def restart(self, seeks: int) -> None:
        """Partitions were given up: what was fetched before the consumer has sought `seeks` times is read again."""
        self._last.clear()
        self._since = seeks
