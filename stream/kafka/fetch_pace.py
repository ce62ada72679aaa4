"""How long brokers may hold a fetch: not at all while events are few, for a moment to gather them while they are many.

What one fetch brings is one step, whatever it holds, with its own requests, writes and wake-ups. A fetch that answers
to each event at once makes events dear exactly when there are many of them, and late, for each waits for the steps of
those before it. So brokers gather while events come in quickly; a single one among few is answered at once.
"""

import math
from typing import Final, NamedTuple

#: Records are gathered where so many are to be expected in the time that is given for it (`UEMB_GATHER_MS`); where it
#: is fewer, few would meet another one.
GATHER_FROM: Final = 2.4
#: Until the time is up, or there is so much: then a worker that is behind has its hands full already.
GATHER_BYTES: Final = 32 << 10
#: A fetch that leaves partitions out, for what came of them is not taken in yet, holds up their next one so long. So
#: does the first after one that brought something, for one event is often followed by another (without it p99 from
#: event to vector was 101 ms at 500 events/s, with it 76: medians of three rounds side by side). No other waits for
#: longer at the embedded broker, which answers not when a record comes but when the time is up.
SHORT_MS: Final = 10
#: The same where all are in it and nothing is to be gathered: an idle worker spares itself and the broker.
IDLE_MS: Final = 100
#: The rate is that of the last moments, which count less the longer ago they are, and a burst no more than so many
#: times what is gathered: what comes after it is not to wait long for its sake.
_MEMORY_S: Final = 0.5
_HIGHEST: Final = 4


class Hold(NamedTuple):
    """How long a fetch may be held, and from how many bytes on it is answered sooner."""

    wait_ms: int
    min_bytes: int


class FetchPace:
    """Follows what is fetched, and says how the next fetch is to be held.

    Args:
        gather_ms: for how long events that come in quickly are gathered.

    Attributes:
        idle_ms: how long where nothing is to be gathered.
    """

    def __init__(self, gather_ms: int) -> None:
        self.idle_ms = IDLE_MS
        self._gather_ms = gather_ms
        self._gather_from = 1000 * GATHER_FROM / gather_ms  # records per second
        self._rate = 0.0
        self._at_s = -math.inf
        self._is_first = False

    def took(self, records: int, now_s: float) -> None:
        """Take note of what a fetch brought."""
        self._rate = min(self._rate_at(now_s) + records / _MEMORY_S, _HIGHEST * self._gather_from)
        self._at_s = now_s
        self._is_first = True

    def hold(self, now_s: float, *, is_partial: bool) -> Hold:
        """How the next fetch is to be held; `is_partial`, if it leaves partitions out."""
        if is_partial:
            return Hold(SHORT_MS, 1)
        if self._rate_at(now_s) >= self._gather_from:
            return Hold(self._gather_ms, GATHER_BYTES)
        was_first, self._is_first = self._is_first, False
        return Hold(SHORT_MS if was_first else self.idle_ms, 1)

    def _rate_at(self, now_s: float) -> float:
        return self._rate * math.exp((self._at_s - now_s) / _MEMORY_S)
