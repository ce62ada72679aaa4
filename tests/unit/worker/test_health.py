"""What is alive and what is ready, of a worker whose parts are as a test wants them."""

import time
from types import SimpleNamespace

import pytest
from faust.types import TP

from stream.errors import DeliveryError
from stream.pipeline.activity import Activity
from stream.pipeline.lane import BROKERS, STORE
from stream.worker.health import STUCK_S, Health, Pulse
from stream.worker.input_lag import Lag

DELIVERY_S = 60.0


class Store:
    is_away = False
    waits_since_s: float | None = None


class Worker:
    """One that is well, and owns partition 2."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(delivery_timeout_s=DELIVERY_S, ready_max_lag_s=30.0)
        self.pulse = Pulse()
        self.failure: BaseException | None = None
        self.should_stop = False
        self.agent_has_ended = False
        self.has_assignment = True
        self.restoring: dict[int, int | None] = {}
        self.kv: Store | None = Store()
        self.progress = SimpleNamespace(whole=True)
        self.processor = SimpleNamespace(activity=Activity(), owned={2: SimpleNamespace(progress=self.progress)})
        self.lane: SimpleNamespace | None = SimpleNamespace(activity=Activity(), has_ended=False)
        self.lags = {TP("events", 2): Lag(0, 0.0, int(time.time() * 1000))}
        self.input_lag = SimpleNamespace(lags=lambda: self.lags)

    def dead(self) -> list[str]:
        return Health(self).dead()  # type: ignore[arg-type]

    def not_ready(self) -> list[str]:
        return Health(self).not_ready()  # type: ignore[arg-type]


@pytest.fixture
def worker() -> Worker:
    return Worker()


def since(activity: Activity, seconds: float, awaits: str = "") -> None:
    activity.begin(awaits)
    activity.since_s = time.monotonic() - seconds


def test_a_worker_that_is_well_is_alive_and_ready(worker: Worker) -> None:
    assert (worker.dead(), worker.not_ready()) == ([], [])


def test_a_stuck_event_loop_is_told_within_ten_seconds(worker: Worker) -> None:
    assert STUCK_S <= 9
    worker.pulse.beat_s = time.monotonic() - STUCK_S - 1
    assert worker.dead() == ["the event loop is stuck for 8 s"]
    assert worker.not_ready() == ["the event loop is stuck for 8 s"]
    worker.should_stop = True
    assert worker.dead() == ["the event loop is stuck for 8 s"]


def test_an_agent_that_has_ended_or_is_stuck(worker: Worker) -> None:
    worker.agent_has_ended = True
    assert worker.dead() == ["the agent has ended"]
    worker.agent_has_ended = False
    since(worker.processor.activity, STUCK_S - 1)
    assert worker.dead() == []
    since(worker.processor.activity, STUCK_S + 1)
    assert worker.dead() == ["the agent is stuck for 8 s"]
    since(worker.processor.activity, 10 * DELIVERY_S, "room in the lane")
    assert worker.dead() == [], "the lane is judged by itself"


def test_an_agent_that_takes_nothing(worker: Worker) -> None:
    worker.pulse.takes_nothing_s = time.monotonic() - 1
    assert worker.dead() == []
    worker.pulse.takes_nothing_s = time.monotonic() - STUCK_S - 1
    assert worker.dead() == ["the agent takes nothing of what was fetched"]


@pytest.mark.parametrize("awaits", [BROKERS, STORE])
def test_a_lane_that_waits_for_what_is_away_is_alive(worker: Worker, awaits: str) -> None:
    since(worker.lane.activity, DELIVERY_S, awaits)
    assert worker.dead() == []
    since(worker.lane.activity, DELIVERY_S + STUCK_S + 1, awaits)
    assert worker.dead() == ["the lane is stuck for 68 s"]


def test_a_lane_that_waits_for_nothing_like_that_is_stuck(worker: Worker) -> None:
    since(worker.lane.activity, STUCK_S + 1)
    assert worker.dead() == ["the lane is stuck for 8 s"]
    worker.lane.has_ended = True
    assert worker.dead() == ["the lane has ended"]
    worker.should_stop = True
    assert worker.dead() == [], "tasks end in a stop, which is bounded"


def test_a_fault_is_told_by_its_kind_alone(worker: Worker) -> None:
    worker.failure = DeliveryError("user-events.view: a secret")
    assert worker.dead() == ["a fault stops the worker (DeliveryError)"]


def test_a_store_that_never_answers(worker: Worker) -> None:
    assert worker.kv is not None
    worker.kv.waits_since_s = time.monotonic() - 6
    assert (worker.dead(), worker.not_ready()) == ([], ["the store does not answer"])
    worker.kv.waits_since_s = time.monotonic() - DELIVERY_S - STUCK_S - 1
    assert worker.dead() == ["a call of the store is stuck for 68 s"]
    worker.kv.waits_since_s = None
    worker.kv.is_away = True
    assert (worker.dead(), worker.not_ready()) == ([], ["the store does not answer"])


def test_a_start_is_alive_and_not_ready(worker: Worker) -> None:
    worker.has_assignment, worker.kv, worker.lane = False, None, None
    worker.lags, worker.processor.owned = {}, {}
    assert (worker.dead(), worker.not_ready()) == ([], ["waiting for partitions"])
    worker.restoring = {4: None, 3: 1_500}
    assert worker.not_ready() == ["restoring partitions 3, 4: 1500 records left"]


def test_a_worker_that_was_given_nothing_is_ready(worker: Worker) -> None:
    worker.lags, worker.processor.owned = {}, {}
    assert worker.not_ready() == []


def test_brokers_that_are_away(worker: Worker) -> None:
    worker.lags[TP("likes", 2)] = Lag(0, 0.0, int(time.time() * 1000) - 7_500)
    assert worker.dead() == []
    assert worker.not_ready() in (["the brokers do not answer for 7 s"], ["the brokers do not answer for 8 s"])


def test_lag(worker: Worker) -> None:
    now_ms = int(time.time() * 1000)
    worker.lags[TP("likes", 2)] = Lag(5, 29.0, now_ms)
    assert worker.not_ready() == []
    worker.lags[TP("likes", 2)] = Lag(5, 31.0, now_ms)
    assert worker.not_ready() == ["partition 2: 31 s behind, UEMB_READY_MAX_LAG_S=30"]
    worker.lags[TP("likes", 2)] = Lag(5, None, now_ms)
    assert worker.not_ready() == ["the lag of partition 2 is not known yet"]


def test_a_store_that_is_being_rebuilt(worker: Worker) -> None:
    worker.progress.whole = False
    assert (worker.dead(), worker.not_ready()) == ([], ["rebuilding the store of partition 2"])


def test_a_worker_that_stops_is_not_ready(worker: Worker) -> None:
    worker.should_stop = True
    assert (worker.dead(), worker.not_ready()) == ([], ["stopping"])
