"""What a partition's watermark vouches for (law 10): what is durable, how far behind that is, and as of when."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from faust.types import TP

from stream.core.watermark import Watermark
from stream.kafka.delivery import RecordBatch


class Fetches(Protocol):
    """What the consumer knows of the logs that it fetches from."""

    def due(self, tp: TP) -> int | None:
        """Offset below which all must be durable for nothing to be left to do, as of the last fetch; None before it."""
        ...

    def fetched_ms(self, tp: TP) -> int | None:
        """When a fetch from it was last answered, be it with nothing, in epoch ms; None before the first."""
        ...


def now_ms() -> int:
    """Wall clock, in epoch ms."""
    return time.time_ns() // 1_000_000


class Standing:
    """Watches one partition from its claim on, which the brokers have just acknowledged.

    Args:
        fetches: what is known of the logs.
        places: the partition in each input topic.
        clock: wall clock in epoch ms, as that of `fetches`.
    """

    def __init__(self, fetches: Fetches, places: Sequence[TP], clock: Callable[[], int] = now_ms) -> None:
        self._fetches = fetches
        self._places = places
        self._clock = clock
        self._acknowledged_ms = clock()

    def acknowledged(self) -> None:
        """The brokers have acknowledged something for the partition."""
        self._acknowledged_ms = self._clock()

    def lag_ms(self, offsets: Mapping[str, int], kafka_time_ms: int | None) -> int:
        """How far the partition is behind: 0 when all that the brokers hold is durable.

        Args:
            offsets: next offset of each input topic.
            kafka_time_ms: of the newest durable record, None without one; its age is the lag.
        """
        if self._caught_up(offsets) or kafka_time_ms is None:
            return 0
        return max(0, self._clock() - kafka_time_ms)

    def known_ms(self, offsets: Mapping[str, int]) -> int:
        """When the brokers last said something that the lag rests on, in epoch ms.

        A worker that is cut off from them sees no new records, and must not vouch for having none. One that is caught
        up knows of it from the oldest answer to a fetch of each topic; one that is behind, and may fetch nothing while
        it works off what it has, from any answer.
        """
        fetched = [self._fetches.fetched_ms(place) for place in self._places]
        oldest_first = sorted(at or 0 for at in fetched)
        return max(self._acknowledged_ms, oldest_first[0 if self._caught_up(offsets) else -1])

    def _caught_up(self, offsets: Mapping[str, int]) -> bool:
        due = {place.topic: self._fetches.due(place) for place in self._places}
        return all(offset is None or offsets.get(topic, 0) >= offset for topic, offset in due.items())


@dataclass
class Progress:
    """What the watermark of a partition says (law 10).

    Attributes:
        epoch: this worker's claim.
        offsets: next offset of each input topic.
        kafka_time_ms: Kafka time of the last durable record.
        newest_ms: the same of each input topic, of those that had a record since the claim.
        sequence: counts the watermarks of the epoch.
        whole: whether the store holds all that the offsets cover; while it does not, no watermark is written, so that
            the next owner knows as well.
    """

    epoch: int
    offsets: dict[str, int] = field(default_factory=dict)
    kafka_time_ms: int | None = None
    newest_ms: dict[str, int] = field(default_factory=dict)
    sequence: int = 0
    whole: bool = True

    def took_in(self, batch: RecordBatch) -> None:
        """All that a batch caused is about to be told of."""
        newest_ms = batch.records[-1].timestamp
        self.offsets[batch.topic] = batch.next_offset
        self.newest_ms[batch.topic] = max(self.newest_ms.get(batch.topic, 0), newest_ms)
        self.kafka_time_ms = max(self.kafka_time_ms or 0, newest_ms)

    def entry(self, standing: Standing) -> bytes:
        """Next key-value entry of the watermark."""
        self.sequence += 1
        told = Watermark(
            offsets=self.offsets,
            kafka_time_ms=self.kafka_time_ms,
            lag_ms=standing.lag_ms(self.offsets, self.kafka_time_ms),
            heartbeat_ms=standing.known_ms(self.offsets),
        )
        return told.entry(self.epoch, self.sequence)
