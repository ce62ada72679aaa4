"""Lag by the brokers' figures: what is durable against the ends of logs, and nothing made up where nobody told."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from stream.kafka.delivery import DurableMarks
from stream.pipeline.watermark import Progress
from stream.worker.input_lag import InputLag, Lag

EVENTS = TP("events", 0)
ERASURES = TP("erasures", 0)


class Brokers:
    """What the consumer knows, and what the brokers would say."""

    def __init__(self) -> None:
        self.ends: dict[TP, int | None] = {EVENTS: 10, ERASURES: 0}
        self.told_ms = 1_000_000
        self.start = {EVENTS: 4, ERASURES: 0}
        self.offsets: dict[TP, int] = {}
        self.commits: dict[TP, float] = {}
        self.answers: Mapping[TP, int] | Exception = {}
        self.asked: list[tuple[TP, ...]] = []

    def due(self, tp: TP) -> int | None:
        return self.ends[tp]

    highwater = due

    def fetched_ms(self, tp: TP) -> int | None:
        return self.told_ms

    def started_at(self, tp: TP) -> int | None:
        return self.start.get(tp)

    def committed_offset(self, tp: TP) -> int | None:
        return self.offsets.get(tp)

    def committed_s(self, tp: TP) -> float | None:
        return self.commits.get(tp)

    async def highwaters(self, *tps: TP) -> Mapping[TP, int]:
        self.asked.append(tps)
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


class World:
    def __init__(self) -> None:
        self.now_ms = 1_000_100
        self.brokers = Brokers()
        self.marks = DurableMarks()
        self.progress = Progress(1)
        self.owned: dict[int, Any] = {0: SimpleNamespace(progress=self.progress)}
        topics = [EVENTS.topic, ERASURES.topic]
        self.lag = InputLag(self.brokers, self.marks, topics, lambda: self.owned, lambda: self.now_ms)

    def of_events(self) -> Lag:
        return self.lag.lags()[EVENTS]

    def mark(self, offset: int) -> None:
        self.marks.mark(*EVENTS, offset)


@pytest.fixture
def world() -> World:
    return World()


def test_lag_is_the_end_less_what_is_durable(world: World) -> None:
    assert world.of_events().records == 6, "nothing is durable yet: from where it was begun"
    world.mark(9)
    assert world.of_events().records == 1
    world.mark(10)
    assert world.of_events()[:2] == (0, 0.0)
    assert world.lag.lags()[ERASURES][:2] == (0, 0.0)


def test_lag_is_never_negative(world: World) -> None:
    world.mark(12)
    assert world.of_events().records == 0


def test_what_nobody_has_told_is_not_known(world: World) -> None:
    world.brokers.ends[EVENTS] = None
    assert world.of_events()[:2] == (None, None)
    world.brokers.ends[EVENTS] = 10
    world.now_ms += 31_000
    assert world.of_events()[:2] == (None, None), "the end is too old"
    world.brokers.told_ms = world.now_ms
    del world.brokers.start[EVENTS]
    assert world.of_events()[:2] == (None, None), "not positioned"


def test_a_partition_that_is_given_up_has_no_lag(world: World) -> None:
    world.owned.clear()
    assert world.lag.lags() == {}
    assert world.lag.commit_age_s() == 0


def test_seconds_are_those_since_the_newest_durable_record(world: World) -> None:
    assert world.of_events().seconds is None, "nothing is known of how old what waits is"
    world.progress.newest_ms[EVENTS.topic] = world.now_ms - 5_000
    assert world.of_events().seconds == 5.0


def test_seconds_begin_when_the_partition_was_last_caught_up(world: World) -> None:
    """The newest durable record may be of yesterday; what waits came since there was nothing left to do."""
    world.progress.newest_ms[EVENTS.topic] = world.now_ms - 86_400_000
    world.mark(10)
    world.lag.note()
    world.now_ms += 300
    world.brokers.ends[EVENTS] = 11
    assert world.of_events()[:2] == (1, 0.3)


async def test_ends_are_asked_for_when_no_fetch_tells_them(world: World) -> None:
    await world.lag.ask()
    assert world.brokers.asked == []
    world.now_ms += 3_000
    world.brokers.answers = {EVENTS: 50, ERASURES: 0}
    await world.lag.ask()
    assert world.brokers.asked == [(EVENTS, ERASURES)]
    assert world.of_events()[:1] == (46,)
    assert world.of_events().known_ms == world.now_ms
    await world.lag.ask()
    assert len(world.brokers.asked) == 1, "they were told a moment ago"
    world.brokers.ends[EVENTS], world.brokers.told_ms = 60, world.now_ms + 1
    assert world.of_events().records == 56, "a fetch has told since"


async def test_brokers_that_do_not_answer_have_told_nothing(world: World) -> None:
    world.now_ms += 3_000
    world.brokers.answers = ConnectionError("away")
    await world.lag.ask()
    assert world.of_events() == Lag(6, None, world.brokers.told_ms)


def test_the_age_of_a_commit_grows_while_there_is_something_to_do(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    world.mark(10)
    world.brokers.offsets[EVENTS] = 10
    world.lag.note()
    now_s = 200.0
    assert world.lag.commit_age_s() == 0, "there is nothing to commit"
    world.lag.note()
    world.brokers.ends[EVENTS] = 12
    now_s = 203.0
    assert world.lag.commit_age_s() == 3.0, "what came is not durable"
    world.mark(12)
    assert world.lag.commit_age_s() == 3.0, "what is durable is not committed"
    world.brokers.commits[EVENTS] = 202.0
    assert world.lag.commit_age_s() == 1.0
    world.brokers.offsets[EVENTS] = 12
    assert world.lag.commit_age_s() == 0
