"""A broker that pauses, dies, or refuses what it is sent: nothing is lost, and no commit runs ahead."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from kafka_broker import KafkaBroker
from odd_records import Sender
from pipeline import Pipeline, feeding
from topic_admin import create_topic, delete_topic, set_config

from stream.config import Settings
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.kafka.log_reader import Span, open_consumer, whole


@pytest.fixture(scope="module")
def kafka(own_kafka: KafkaBroker) -> KafkaBroker:
    """One that may be paused and killed."""
    return own_kafka


def grown(pipeline: Pipeline, what: str) -> int:
    """Wait until the output topic grows; return its length."""
    before = len(pipeline.read(pipeline.output))
    pipeline.until(lambda: len(pipeline.read(pipeline.output)) > before, what)
    return len(pipeline.read(pipeline.output))


@contextmanager
def paused(kafka: KafkaBroker, seconds: float) -> Iterator[None]:
    kafka.pause()
    time.sleep(seconds)
    yield
    kafka.resume()


@contextmanager
def killed(kafka: KafkaBroker, seconds: float) -> Iterator[None]:
    kafka.kill()
    time.sleep(seconds)
    yield
    kafka.restart()


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        pytest.param(paused, 5, marks=pytest.mark.slow),
        pytest.param(paused, 45, id="paused for longer than requests wait", marks=pytest.mark.slow),
        (killed, 1),
    ],
)
def test_a_broker_that_is_away(
    fault: Callable[[KafkaBroker, float], AbstractContextManager[None]],
    seconds: float,
    films: Dataset,
    kafka: KafkaBroker,
    make_pipeline: Callable[..., Pipeline],
) -> None:
    rows = films.events[:20_000]
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with feeding(pipeline, rows, 2_000):
        grown(pipeline, "events flow")
        with fault(kafka, seconds):
            pass
        grown(pipeline, "events flow again")
    pipeline.until_committed(120)
    assert pipeline.process is not None
    assert pipeline.process.poll() is None
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_a_broker_that_is_away_for_longer_than_the_worker_waits(
    films: Dataset, kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]
) -> None:
    rows = films.events[:20_000]
    pipeline = make_pipeline(delivery_timeout_s=10)
    pipeline.start()
    pipeline.until_ready()
    with feeding(pipeline, rows, 500):
        grown(pipeline, "events flow")
        kafka.pause()
        try:
            # with nothing under way there is nothing to wait for: the next event tells
            assert pipeline.wait(120) == 75
        finally:
            kafka.resume()
    # whichever of the two it was waiting for
    assert any(f"no {what} for 10 s" in pipeline.tail() for what in ("acknowledgement", "commit of offsets"))
    assert "Traceback" not in pipeline.log.read_text()
    pipeline.start(UEMB_DELIVERY_TIMEOUT_S="60")
    pipeline.until_committed()
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_a_broker_that_pauses_across_a_commit_and_a_worker_that_then_loses_its_disk(
    films: Dataset, kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]
) -> None:
    rows = films.events[:20_000]
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with feeding(pipeline, rows, 4_000):
        for _ in range(2):
            grown(pipeline, "events flow")
            kafka.pause()
            time.sleep(1.5)  # a commit is due every second
            pipeline.kill()
            kafka.resume()
            shutil.rmtree(pipeline.state)
            pipeline.start()
            pipeline.until_ready()
    pipeline.until_committed()
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


@pytest.mark.parametrize(
    "refused", ["changelog", *(pytest.param(t, marks=pytest.mark.slow) for t in ("output", "dlq"))]
)
def test_writes_that_a_topic_refuses_stop_the_worker_and_move_no_offset(
    refused: str, films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    first, then = films.events[:3_000], films.events[3_000:6_000]
    pipeline = make_pipeline()
    topic = {"changelog": pipeline.changelog, "output": pipeline.output, "dlq": pipeline.dlq}[refused]
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(first)
        pipeline.until_committed()
        set_config(pipeline.bootstrap, topic, max_message_bytes=60)
        if refused == "dlq":
            send_bad(pipeline)
        feeder.send(then)
        assert pipeline.wait() == 2
    said = [line for line in pipeline.log.read_text().splitlines() if line.startswith("uemb: ")]
    assert len(said) == 1
    assert topic in said[0]
    assert "max.message.bytes" in said[0]
    assert pipeline.lag() > 0
    pipeline.start()  # the check at start finds it too, before anything is read
    assert pipeline.wait() == 2
    assert "max.message.bytes" in pipeline.tail()
    set_config(pipeline.bootstrap, topic, max_message_bytes=80_000_000)
    pipeline.start()
    pipeline.until_ready()
    pipeline.until_committed()
    report = pipeline.check(len({row.user_id for row in films.events[:6_000]}))
    assert (report["rejected"], report["letterless"]) == (4 * (refused == "dlq"), 0)
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_dead_letters_whose_topic_is_gone_stop_the_worker(
    films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    first, then = films.events[:3_000], films.events[3_000:6_000]
    pipeline = make_pipeline(delivery_timeout_s=4)
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(first)
        pipeline.until_committed()
        delete_topic(pipeline.bootstrap, pipeline.dlq)
        send_bad(pipeline)
        feeder.send(then)
        assert pipeline.wait(60) == 75
    said = [line for line in pipeline.log.read_text().splitlines() if line.startswith("uemb: ")]
    assert len(said) == 1
    assert pipeline.dlq in said[0]
    log = pipeline.log.read_text()
    assert "Traceback" not in log
    assert 0 < log.count("not found in cluster metadata") < 5, "the client repeats itself"
    assert pipeline.lag() >= pipeline.partitions, "a bad record was committed without its letter"
    pipeline.start()  # which makes the topic anew
    pipeline.until_committed()
    report = pipeline.check(len({row.user_id for row in films.events[:6_000]}))
    assert (report["rejected"], report["letterless"]) == (pipeline.partitions, 0)
    assert pipeline.stop() == 0


def send_bad(pipeline: Pipeline) -> None:
    """A bad record on each partition."""
    sender = Sender(pipeline.bootstrap)
    for user in pipeline.users_by_partition().values():
        sender.send(pipeline.topics["view"], user, b"{")
    sender.flush()


def test_a_partition_without_a_leader_is_waited_for(kafka: KafkaBroker, unique: str) -> None:
    """For a moment after a pause that took longer than its session the broker leads nothing."""
    create_topic(kafka.bootstrap, unique, 1)
    consumer = open_consumer(Settings(bootstrap_servers=kafka.bootstrap), "look")
    while whole(consumer, unique, 0) is None:  # until the broker tells of it, before which there is no partition
        time.sleep(0.05)
    with paused(kafka, 4):
        pass
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert whole(consumer, unique, 0) == Span(unique, 0, 0, 0)
    consumer.close()
