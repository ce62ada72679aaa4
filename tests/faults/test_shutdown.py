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
from stream.worker.app import STOP_TIMEOUT_S, TOO_LATE
from stream.worker.run import FAULT_STOP_TIMEOUT_S, SAME_SIGNAL_S

EVENTS = 30_000
LATE_COMMITTER = [sys.executable, str(Path(__file__).parent / "late_committer.py")]


@pytest.fixture(scope="module")
def kafka(own_kafka: KafkaBroker) -> KafkaBroker:
    """One that may be paused and killed."""
    return own_kafka


def in_a_backlog(pipeline: Pipeline, films: Dataset) -> Pipeline:
    """Start a worker, and bring it into the middle of a backlog."""
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:EVENTS])
    pipeline.until(lambda: pipeline.length(pipeline.output) > 1_000, "events flow")
    return pipeline


@pytest.fixture
def busy(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> Pipeline:
    """A worker in the middle of a backlog."""
    return in_a_backlog(make_pipeline(), films)


def stop_without(kafka: KafkaBroker, pipeline: Pipeline) -> str:
    """SIGTERM while the broker is away: the worker ends with 1 in time; return the one line that says why."""
    kafka.pause()
    try:
        assert pipeline.stop(3 + FAULT_STOP_TIMEOUT_S + 10) == 1, "what is not done, or not committed, counts as done"
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


def test_a_signal_in_the_middle_of_a_backlog(busy: Pipeline, films: Dataset) -> None:
    assert busy.stop() == 0
    assert busy.lag() > 0, "nothing was left to do"
    said = len(busy.log.read_text())
    go_on(busy, films.events[:EVENTS])
    assert "duplicate" not in busy.log.read_text()[said:], "what was published was not committed, and done twice"


def test_two_signals_under_load_end_it_at_once(busy: Pipeline, films: Dataset) -> None:
    """It is frozen in the middle of its drain, which may take less time than two signals must be apart."""
    assert busy.process is not None
    busy.process.send_signal(signal.SIGTERM)
    busy.until(lambda: "draining and stopping" in busy.log.read_text(), "the first signal is followed")
    busy.process.send_signal(signal.SIGSTOP)
    time.sleep(SAME_SIGNAL_S + 0.1)
    assert busy.process.poll() is None, "it was done before the second signal"
    busy.process.send_signal(signal.SIGTERM)
    busy.process.send_signal(signal.SIGCONT)
    assert busy.wait(5) == 128 + signal.SIGTERM
    assert busy.lag() > 0, "nothing was left to do"
    go_on(busy, films.events[:EVENTS])


@pytest.mark.slow
def test_two_signals_while_the_broker_is_away_end_it_at_once(
    busy: Pipeline, films: Dataset, kafka: KafkaBroker
) -> None:
    assert busy.process is not None
    kafka.pause()
    try:
        busy.process.send_signal(signal.SIGTERM)
        time.sleep(SAME_SIGNAL_S + 0.5)
        assert busy.process.poll() is None, "there was nothing to wait for"
        busy.process.send_signal(signal.SIGTERM)
        assert busy.wait(5) == 128 + signal.SIGTERM
    finally:
        kafka.resume()
    go_on(busy, films.events[:EVENTS])


def test_a_signal_while_the_broker_is_away_does_not_wait_for_it_long(
    films: Dataset, kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = in_a_backlog(make_pipeline(delivery_timeout_s=3), films)
    assert "see whether the brokers are up" in stop_without(kafka, pipeline)
    assert pipeline.lag() > 0
    go_on(pipeline, films.events[:EVENTS])


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
    pipeline = make_pipeline()
    pipeline.start([sys.executable, "-m", "faust", "-A", "stream.app", "worker", "-l", "warn"])
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:EVENTS])
    kafka.pause()
    try:
        assert pipeline.stop(STOP_TIMEOUT_S + 30) != 0
    finally:
        kafka.resume()
    assert TOO_LATE in pipeline.log.read_text()
    go_on(pipeline, films.events[:EVENTS])
