"""What a partition's watermark vouches for, in simulated time: idle is not stale, cut off is."""

from collections.abc import Iterator

import pytest
from faust.types import TP

from stream.pipeline.watermark import Progress, Standing
from stream.retrieval.staleness import STALE_HEARTBEAT_S, Judge

HOUR_S = 3_600
PLACES = [TP("events", 0), TP("deletions", 0)]
START_MS = 1_700_000_000_000


class Logs:
    """Two logs, and the time."""

    def __init__(self) -> None:
        self.ms = START_MS
        self.ends: dict[TP, int | None] = dict.fromkeys(PLACES, 7)
        self.answered: dict[TP, int | None] = dict.fromkeys(PLACES, START_MS)

    def due(self, tp: TP) -> int | None:
        return self.ends[tp]

    def fetched_ms(self, tp: TP) -> int | None:
        return self.answered[tp]

    def clock(self) -> int:
        return self.ms

    def seconds(self, count: int, *, fetched: bool) -> Iterator[int]:
        """Let time pass; fetches are answered with nothing, or not at all."""
        for second in range(1, count + 1):
            self.ms += 1_000
            if fetched:
                self.answered = dict.fromkeys(PLACES, self.ms - 10)
            yield second


class Store:
    """A store as far as a judge of watermarks reads it."""

    def __init__(self) -> None:
        self.record: bytes | None = None

    def watermark(self, _: bytes) -> bytes | None:
        return self.record


@pytest.fixture
def logs() -> Logs:
    return Logs()


def stale(logs: Logs, store: Store, max_lag_s: float | None = None) -> bool:
    judge = Judge(max_lag_s, lambda: logs.ms / 1000)
    ((found, _),) = judge.freshness(store, ["42"], 1)  # type: ignore[arg-type]
    return found


def progress(done: int = 7) -> Progress:
    return Progress(3, {place.topic: done for place in PLACES}, kafka_time_ms=START_MS - 5_000)


def test_a_partition_that_is_idle_for_an_hour_is_never_stale(logs: Logs) -> None:
    standing, store, idle = Standing(logs, PLACES, logs.clock), Store(), progress()
    for _ in logs.seconds(HOUR_S, fetched=True):
        assert store.record is None or not stale(logs, store, max_lag_s=2)
        store.record = idle.entry(standing)
        assert not stale(logs, store, max_lag_s=2)


def test_one_whose_worker_hears_nothing_of_the_brokers_is_stale_within_the_bound(logs: Logs) -> None:
    standing, store, idle = Standing(logs, PLACES, logs.clock), Store(), progress()
    for second in logs.seconds(HOUR_S, fetched=False):
        store.record = idle.entry(standing)  # the store answers, and heartbeats go on
        assert stale(logs, store) == (second > STALE_HEARTBEAT_S)
    for _ in logs.seconds(1, fetched=True):
        store.record = idle.entry(standing)
        assert not stale(logs, store)


def test_one_topic_that_is_not_heard_of_is_enough(logs: Logs) -> None:
    standing, store, idle = Standing(logs, PLACES, logs.clock), Store(), progress()
    for second in logs.seconds(20, fetched=True):
        logs.answered[PLACES[1]] = START_MS
        store.record = idle.entry(standing)
        assert stale(logs, store) == (second > STALE_HEARTBEAT_S)


def test_one_that_works_off_what_it_has_needs_no_fetch_of_its_own(logs: Logs) -> None:
    """Its lag says how far behind it is; readers that set a bound on it are told."""
    standing, store, busy = Standing(logs, PLACES, logs.clock), Store(), progress(done=5)
    for second in logs.seconds(60, fetched=False):
        standing.acknowledged()
        store.record = busy.entry(standing)
        assert not stale(logs, store)
        assert stale(logs, store, max_lag_s=20) == (second + 5 > 20)


def test_one_that_is_behind_and_gets_nowhere_is_stale(logs: Logs) -> None:
    standing, store, busy = Standing(logs, PLACES, logs.clock), Store(), progress(done=5)
    for second in logs.seconds(60, fetched=False):
        store.record = busy.entry(standing)
        assert stale(logs, store) == (second > STALE_HEARTBEAT_S)


def test_before_the_first_fetch_the_claim_is_what_is_known(logs: Logs) -> None:
    logs.ends, logs.answered = dict.fromkeys(PLACES), dict.fromkeys(PLACES)
    standing, store = Standing(logs, PLACES, logs.clock), Store()
    for second in logs.seconds(20, fetched=False):
        store.record = Progress(3).entry(standing)
        assert stale(logs, store) == (second > STALE_HEARTBEAT_S)
