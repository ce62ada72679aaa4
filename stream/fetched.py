"""What the consumer hands on: runs of records of one partition, and the check that none is left out between them."""

from collections.abc import Sequence
from dataclasses import dataclass

from aiokafka.structs import ConsumerRecord

from stream.errors import OwnershipError


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Consecutive records of one topic partition, as fetched.

    Attributes:
        topic: where they come from.
        partition: which partition.
        records: the records, in offset order.
        seeks: how often the consumer had been positioned anew when they were fetched.
        number: position of this batch among all fetched from the partition since then, from 0.
    """

    topic: str
    partition: int
    records: Sequence[ConsumerRecord]
    seeks: int
    number: int

    @property
    def next_offset(self) -> int:
        """Offset to commit when all of it is durable."""
        return int(self.records[-1].offset) + 1


class DeliveryChain:
    """Checks that the batches of each partition arrive one after another, none left out (law 6: stop, don't skip)."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], tuple[int, int]] = {}
        self._ends: dict[tuple[str, int], int] = {}
        self._since = 0

    def check(self, batch: RecordBatch) -> bool:
        """Return False for a batch that will be read again; raise `OwnershipError` when one is missing."""
        place = (batch.topic, batch.partition)
        seeks, number = self._last.get(place, (-1, -1))
        if batch.seeks < max(seeks, self._since):
            return False
        expected = number + 1 if batch.seeks == seeks else 0
        if batch.number != expected:
            msg = f"batch {batch.number} of {batch.topic}-{batch.partition} arrived where {expected} was due; restart"
            raise OwnershipError(msg)
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

    def restart(self, seeks: int) -> None:
        """Partitions were given up: what was fetched before the consumer has sought `seeks` times is read again."""
        self._last.clear()
        self._since = seeks
