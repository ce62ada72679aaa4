"""How a partition stands against its topics, and since when that is known: what its watermark vouches for (law 10)."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from faust.types import TP


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
