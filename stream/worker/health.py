"""Whether a worker is alive, and whether it is ready; both can be asked while its event loop is stuck.

Alive is a worker whose event loop, agent and lane move, or wait for brokers or a store no longer than these may be
away, which a restart would not mend. Ready is one that has taken what the group gave it, with its state, and is not far
behind.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from stream.config import Settings
from stream.kafka.schema_registry import REGISTRY
from stream.kv.retrying import PatientKV
from stream.pipeline.lane import Lane
from stream.pipeline.measures import Measures
from stream.pipeline.processor import BatchProcessor
from stream.rollout.rollout import Rollout
from stream.worker.input_lag import InputLag

#: The event loop, the agent or the lane that has not moved for so long is stuck.
STUCK_S: Final = 7.0
BEAT_S: Final = 0.5
#: Who has not answered for so long is away.
SILENT_S: Final = 5.0


class Pulse:
    """Beats as long as the event loop runs.

    Attributes:
        beat_s: when it did so last (monotonic s).
        takes_nothing_s: since when the agent has not taken a batch that waits for it (monotonic s); None: it has.
    """

    def __init__(self) -> None:
        self.beat_s = time.monotonic()
        self.takes_nothing_s: float | None = None

    async def run(self, is_kept_waiting: Callable[[], bool]) -> None:
        """Beat until cancelled; `is_kept_waiting` says whether a batch waits while the agent is at rest."""
        while True:
            self.beat_s = time.monotonic()
            if not is_kept_waiting():
                self.takes_nothing_s = None
            elif self.takes_nothing_s is None:
                self.takes_nothing_s = self.beat_s
            await asyncio.sleep(BEAT_S)


class Vitals(Protocol):
    """The worker as those see it who judge or measure it, in another thread.

    Attributes:
        settings: how long brokers and store may be away, and how far behind is ready.
        processor: what the agent does, and the partitions that are owned.
        pulse: the event loop's.
        input_lag: how far it is behind.
        measures: what was counted and timed.
        failure: the fault that stops the worker.
        has_assignment: whether all is taken that the group gave, be it nothing.
    """

    settings: Settings
    processor: BatchProcessor
    pulse: Pulse
    input_lag: InputLag
    measures: Measures
    failure: BaseException | None
    has_assignment: bool

    @property
    def should_stop(self) -> bool:
        """Whether it is being stopped."""
        ...

    @property
    def agent_has_ended(self) -> bool:
        """Whether the agent's task has."""
        ...

    @property
    def restoring(self) -> Mapping[int, int | None]:
        """Partitions that are being taken, with how many records are to be read; None where that is not known yet."""
        ...

    @property
    def kv(self) -> PatientKV | None:
        """The store; None before it is opened."""
        ...

    @property
    def lane(self) -> Lane | None:
        """What makes all durable; None before the store is opened."""
        ...

    @property
    def rollout(self) -> Rollout | None:
        """Versions; None before they are known."""
        ...


class Health:
    """Judges a worker.

    Args:
        of: the worker.
        clock: wall clock in epoch s.
    """

    def __init__(self, of: Vitals, clock: Callable[[], float] = time.time) -> None:
        self._of = of
        self._clock = clock

    def dead(self) -> list[str]:
        """Why the worker is not alive; nothing where it is."""
        of, now_s = self._of, time.monotonic()
        reasons = []
        if of.failure is not None:
            reasons.append(f"a fault stops the worker ({type(of.failure).__name__})")
        if (silent_s := now_s - of.pulse.beat_s) > STUCK_S:
            reasons.append(f"the event loop is stuck for {silent_s:.0f} s")
        if of.should_stop or of.failure is not None:
            return reasons  # which is bounded, and ends the tasks
        if of.agent_has_ended:
            reasons.append("the agent has ended")
        agent = of.processor.activity
        if agent.since_s is not None and not agent.awaits:  # else it waits for the lane, which is judged by itself
            reasons += _stuck("the agent", now_s - agent.since_s, STUCK_S)
        if of.pulse.takes_nothing_s is not None and now_s - of.pulse.takes_nothing_s > STUCK_S:
            reasons.append("the agent takes nothing of what was fetched")
        longest_s = of.settings.delivery_timeout_s + STUCK_S  # what may be away is given up before that
        if (lane := of.lane) is not None:
            if lane.has_ended:
                reasons.append("the lane has ended")
            elif (since_s := lane.activity.since_s) is not None:
                reasons += _stuck("the lane", now_s - since_s, longest_s if lane.activity.awaits else STUCK_S)
        if of.kv is not None and (since_s := of.kv.waits_since_s) is not None:
            reasons += _stuck("a call of the store", now_s - since_s, longest_s)
        return reasons

    def not_ready(self) -> list[str]:
        """Why the worker is not ready; nothing where it is."""
        of = self._of
        reasons = self.dead()
        if of.should_stop:
            return [*reasons, "stopping"]
        if not of.has_assignment:
            reasons.append(_restoring(dict(of.restoring)))
        reasons += self._away()
        owned = dict(of.processor.owned)
        rebuilding = [partition for partition, one in sorted(owned.items()) if not one.progress.whole]
        if rebuilding:
            reasons.append(f"rebuilding the store of {_partitions(rebuilding)}")
        return reasons + self._behind()

    def _away(self) -> list[str]:
        of, now_s = self._of, time.monotonic()
        reasons = []
        if of.kv is not None:
            since_s = of.kv.waits_since_s
            if of.kv.is_away or (since_s is not None and now_s - since_s > SILENT_S):
                reasons.append("the store does not answer")
        agent = of.processor.activity
        if agent.awaits == REGISTRY and agent.since_s is not None and now_s - agent.since_s > SILENT_S:
            reasons.append("the schema registry does not answer")
        known = [lag.known_ms for lag in of.input_lag.lags().values() if lag.known_ms]
        if known and (silent_s := self._clock() - min(known) / 1000) > SILENT_S:
            reasons.append(f"the brokers do not answer for {silent_s:.0f} s")
        return reasons

    def _behind(self) -> list[str]:
        lags, most_s = self._of.input_lag.lags(), self._of.settings.ready_max_lag_s
        unknown = sorted({tp.partition for tp, lag in lags.items() if lag.seconds is None})
        late = [(tp.partition, lag.seconds) for tp, lag in lags.items() if lag.seconds is not None]
        late = [(partition, seconds) for partition, seconds in late if seconds > most_s]
        reasons = [f"the lag of {_partitions(unknown)} is not known yet"] if unknown else []
        if late:
            who, most = _partitions(sorted({p for p, _ in late})), max(seconds for _, seconds in late)
            reasons.append(f"{who}: {most:.0f} s behind, UEMB_READY_MAX_LAG_S={most_s:g}")
        return reasons


def _stuck(who: str, for_s: float, longest_s: float) -> list[str]:
    return [f"{who} is stuck for {for_s:.0f} s"] if for_s > longest_s else []


def _restoring(left: Mapping[int, int | None]) -> str:
    if not left:
        return "waiting for partitions"
    return f"restoring {_partitions(sorted(left))}: {sum(n or 0 for n in left.values())} records left"


def _partitions(numbers: list[int]) -> str:
    return f"partition{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
