"""How far a worker is behind in each input partition that it owns, by the brokers' own figures.

What is durable is counted, not what was fetched. An end of a log comes with each answer to a fetch. While nothing is
fetched, because what was fetched waits for the store or the brokers, the ends are asked for; what nobody has told for
long is not known, and is not made up.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from faust.types import TP

from stream.kafka.delivery import DurableMarks
from stream.pipeline.processor import Owned
from stream.pipeline.watermark import now_ms

#: An end that is older than this is asked for.
ASK_AFTER_S: Final = 2.0
ASK_PATIENCE_S: Final = 5.0
#: An end that is older than this is not known any more.
KNOWN_S: Final = 30.0


class Ends(Protocol):
    """What the consumer knows of the logs, and can ask of the brokers."""

    def due(self, tp: TP) -> int | None:
        """As in `stream.pipeline.watermark.Fetches`."""
        ...

    def fetched_ms(self, tp: TP) -> int | None:
        """The same."""
        ...

    def highwater(self, tp: TP) -> int | None:
        """End of a log as of the last fetch; None when that is not known."""
        ...

    def started_at(self, tp: TP) -> int | None:
        """Offset at which a partition was positioned last; None before that."""
        ...

    def committed_offset(self, tp: TP) -> int | None:
        """Offset that was committed last; None without one."""
        ...

    def committed_s(self, tp: TP) -> float | None:
        """When this worker last committed (monotonic s); None if it never did."""
        ...

    async def highwaters(self, *tps: TP) -> Mapping[TP, int]:
        """Ends of logs, asked of the brokers."""
        ...


class Lag(NamedTuple):
    """How far one input partition is behind.

    Attributes:
        records: that the brokers hold and that are not durable; None where that is not known.
        seconds: no record among them is older; 0 without one, None where that is not known.
        known_ms: when the brokers last told its end, in epoch ms; 0 if they never did.
    """

    records: int | None
    seconds: float | None
    known_ms: int


class InputLag:
    """Follows the input partitions of the worker. The event loop calls `ask` and `note`, any thread the rest.

    Args:
        ends: the consumer.
        marks: what is durable.
        topics: all input topics.
        owned: gives the partitions that the worker owns.
        clock: wall clock in epoch ms.
    """

    def __init__(
        self,
        ends: Ends,
        marks: DurableMarks,
        topics: Sequence[str],
        owned: Callable[[], Mapping[int, Owned]],
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._ends = ends
        self._marks = marks
        self._topics = topics
        self._owned = owned
        self._clock = clock
        self._asked: dict[TP, tuple[int, int]] = {}  # end, and when the brokers told it
        self._caught_up_ms: dict[TP, int] = {}
        self._settled_s: dict[TP, float] = {}

    async def ask(self) -> None:
        """Ask the brokers for the ends that no fetch has told of late; they may not answer."""
        now, behind = self._clock(), []
        for tp in self._places():
            told_ms = max(self._ends.fetched_ms(tp) or 0, self._asked.get(tp, (0, 0))[1])
            if now - told_ms > 1000 * ASK_AFTER_S:
                behind.append(tp)
        if not behind:
            return
        try:
            async with asyncio.timeout(ASK_PATIENCE_S):
                ends = await self._ends.highwaters(*behind)
        except Exception:  # noqa: BLE001 - whatever it is, they have told nothing
            return
        told_ms = self._clock()
        self._asked.update({tp: (end, told_ms) for tp, end in ends.items()})

    def note(self) -> None:
        """Take note of the partitions in which nothing is left to do; call it every second."""
        places, due, now, now_s = self._places(), self._marks.due(), self._clock(), time.monotonic()
        for tp, owned in places.items():
            if self._lag(tp, owned, due).records == 0:
                self._caught_up_ms[tp] = now
            if self._is_settled(tp, owned, due) or tp not in self._settled_s:
                self._settled_s[tp] = now_s
        for tp in [tp for tp in self._settled_s if tp not in places]:
            for kept in (self._asked, self._caught_up_ms, self._settled_s):
                kept.pop(tp, None)

    def lags(self) -> dict[TP, Lag]:
        """Of each input partition that is owned."""
        due = self._marks.due()
        return {tp: self._lag(tp, owned, due) for tp, owned in self._places().items()}

    def commit_age_s(self) -> float:
        """For how long the partition that is worst off has had something to do without a commit; 0 without one."""
        due, now_s, oldest = self._marks.due(), time.monotonic(), 0.0
        for tp, owned in self._places().items():
            if not self._is_settled(tp, owned, due):
                settled_s = max(self._ends.committed_s(tp) or 0.0, self._settled_s.get(tp, now_s))
                oldest = max(oldest, now_s - settled_s)
        return oldest

    def _places(self) -> dict[TP, Owned]:
        return {TP(topic, p): owned for p, owned in self._owned().items() for topic in self._topics}

    def _lag(self, tp: TP, owned: Owned, due: Mapping[tuple[str, int], int]) -> Lag:
        now = self._clock()
        end, known_ms = self._end(tp)
        done = due.get((tp.topic, tp.partition), self._ends.started_at(tp))
        if end is None or done is None or now - known_ms > 1000 * KNOWN_S:
            return Lag(None, None, known_ms)
        records = max(0, end - done)
        if not records:
            return Lag(0, 0.0, known_ms)
        after_ms = max(owned.progress.newest_ms.get(tp.topic, -1), self._caught_up_ms.get(tp, -1))
        return Lag(records, None if after_ms < 0 else max(0, now - after_ms) / 1000, known_ms)

    def _end(self, tp: TP) -> tuple[int | None, int]:
        """Offset below which all must be durable for nothing to be left to do, and when the brokers told it."""
        due, fetched_ms, highwater = self._ends.due(tp), self._ends.fetched_ms(tp) or 0, self._ends.highwater(tp)
        asked, asked_ms = self._asked.get(tp, (-1, 0))
        if asked_ms > fetched_ms and (highwater is None or asked > highwater):
            return asked, asked_ms
        return due, max(fetched_ms, asked_ms)

    def _is_settled(self, tp: TP, owned: Owned, due: Mapping[tuple[str, int], int]) -> bool:
        marked = due.get((tp.topic, tp.partition))
        is_committed = marked is None or marked <= (self._ends.committed_offset(tp) or 0)
        return is_committed and self._lag(tp, owned, due).records == 0
