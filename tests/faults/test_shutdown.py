"""Stopping: in order, with nothing done twice; at once, and still safe, for who asks twice."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from kafka_broker import KafkaBroker
from pipeline import Pipeline

from stream.core.events import EventRow
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.worker.app import TOO_LATE
from stream.worker.run import FAULT_STOP_TIMEOUT_S, SAME_SIGNAL_S

EVENTS = 30_000
#: More than twice what a worker may have at hand and not be done with: 18 steps of 2,000 records.
BACKLOG = 90_000
Busy = Callable[..., tuple[Pipeline, list[EventRow]]]
LATE_COMMITTER = [sys.executable, str(Path(__file__).parent / "late_committer.py")]


@pytest.fixture(scope="module")
def kafka(own_kafka: KafkaBroker) -> KafkaBroker:
    """One that may be paused and killed."""
    return own_kafka


@pytest.fixture
def make_busy(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> Busy:
    """Starts a worker, and freezes it in the middle of a backlog; gives it and what was sent."""

    def start(**settings: object) -> tuple[Pipeline, list[EventRow]]:
        pipeline = make_pipeline(session_timeout_s=15, **settings)
        pipeline.start()
        pipeline.until_ready()
        with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
            pipeline.freeze()
            feeder.send(films.events[:BACKLOG])

            def flows() -> bool:
                """Let it go on for a moment only, so that it is never at the end before it is seen in the middle."""
                pipeline.thaw()
                time.sleep(0.03)
                pipeline.freeze()
                return pipeline.length(pipeline.output) > 1_000

            pipeline.until(flows, "events flow")
        return pipeline, films.events[:BACKLOG]

    return start


def stop_without(kafka: KafkaBroker, pipeline: Pipeline) -> str:
    """SIGTERM while the broker is away: the worker ends with 75 in time; return the one line that says why."""
    kafka.pause()
    try:
        assert pipeline.stop(3 + FAULT_STOP_TIMEOUT_S + 10) == 75, "what is not done, or not committed, counts as done"
    finally:
        kafka.resume()
    (said,) = [line for line in pipeline.log.read_text().splitlines() if line.startswith("uemb: ")]
    return said


def go_on(pipeline: Pipeline, events: Sequence[EventRow]) -> None:
    """A new start finishes what is left, and all is in order."""
    assert "Traceback" not in pipeline.log.read_text()
    pipeline.start()
    pipeline.until_ready()  # a commit that a frozen broker took in after all leaves nothing to wait for
    pipeline.until_committed(120)
    pipeline.check(len({row.user_id for row in events}))
    assert pipeline.stop() == 0


def test_a_signal_in_the_middle_of_a_backlog(make_busy: Busy) -> None:
    busy, events = make_busy()
    assert busy.stop() == 0
    assert busy.lag() > 0, "nothing was left to do"
    said = len(busy.log.read_text())
    go_on(busy, events)
    assert "duplicate" not in busy.log.read_text()[said:], "what was published was not committed, and done twice"


@pytest.mark.slow
def test_two_signals_under_load_end_it_at_once(make_busy: Busy) -> None:
    """It is frozen in the middle of its drain, which may take less time than two signals must be apart."""
    busy, events = make_busy()
    assert busy.process is not None
    busy.process.send_signal(signal.SIGTERM)
    busy.thaw()
    busy.until(lambda: "draining and stopping" in busy.log.read_text(), "the first signal is followed")
    busy.freeze()
    time.sleep(SAME_SIGNAL_S + 0.1)
    assert busy.process.poll() is None, "it was done before the second signal"
    busy.process.send_signal(signal.SIGTERM)
    busy.thaw()
    assert busy.wait(5) == 128 + signal.SIGTERM
    assert busy.lag() > 0, "nothing was left to do"
    go_on(busy, events)


@pytest.mark.slow
def test_two_signals_while_the_broker_is_away_end_it_at_once(make_busy: Busy, kafka: KafkaBroker) -> None:
    busy, events = make_busy()
    assert busy.process is not None
    kafka.pause()
    try:
        busy.process.send_signal(signal.SIGTERM)
        busy.thaw()
        time.sleep(SAME_SIGNAL_S + 0.5)
        assert busy.process.poll() is None, "there was nothing to wait for"
        busy.process.send_signal(signal.SIGTERM)
        assert busy.wait(5) == 128 + signal.SIGTERM
    finally:
        kafka.resume()
    go_on(busy, events)


@pytest.mark.slow
def test_a_signal_while_the_broker_is_away_does_not_wait_for_it_long(make_busy: Busy, kafka: KafkaBroker) -> None:
    busy, events = make_busy(delivery_timeout_s=3)
    assert "see whether the brokers are up" in stop_without(kafka, busy)
    assert busy.lag() > 0
    go_on(busy, events)


@pytest.mark.slow
def test_a_stop_takes_no_longer_than_it_was_told(make_busy: Busy, kafka: KafkaBroker) -> None:
    """Nothing else ends it so soon: what it sends is waited for, and so is a stop after a fault, for longer."""
    busy, events = make_busy(stop_timeout_s=3)
    began = time.monotonic()
    assert TOO_LATE in stop_without(kafka, busy)
    assert time.monotonic() - began < FAULT_STOP_TIMEOUT_S
    go_on(busy, events)


@pytest.mark.slow
def test_a_commit_while_the_broker_is_away_is_not_waited_for_long(
    films: Dataset, kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]
) -> None:
    """Nothing is under way, so no delivery fails: the last commit alone finds that the broker is away."""
    pipeline = make_pipeline(delivery_timeout_s=3)
    pipeline.start(LATE_COMMITTER)
    pipeline.until_ready()
    events = list({row.user_id: row for row in films.events[:EVENTS]}.values())
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(events)
    pipeline.until(lambda: len(pipeline.last_output()) == len(events), "all is published")
    assert "no commit of offsets for 3 s; see whether the brokers are up" in stop_without(kafka, pipeline)
    go_on(pipeline, events)


@pytest.mark.slow
def test_a_stop_of_fausts_own_command_ends_in_time_too(
    films: Dataset, kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline(stop_timeout_s=4)
    pipeline.start([sys.executable, "-m", "faust", "-A", "stream.app", "worker", "-l", "warn", "--without-web"])
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:EVENTS])
    kafka.pause()
    try:
        assert pipeline.stop(4 + 20) == 75
    finally:
        kafka.resume()
    assert TOO_LATE in pipeline.log.read_text()
    go_on(pipeline, films.events[:EVENTS])


@pytest.mark.parametrize("when", ["starting", "taking"])
def test_a_signal_while_the_control_topics_are_waited_for(when: str, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    pipeline.start([sys.executable, str(Path(__file__).parent / f"stopped_while_{when}.py")])
    assert pipeline.wait(60) == 0
    log = pipeline.log.read_text()
    assert "draining and stopping" in log
    assert "CRITICAL" not in log
