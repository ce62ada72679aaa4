"""What readers are told of a pipeline that stopped behind their store: stale, in time, and no longer than it lasts."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest
from kafka_broker import KafkaBroker
from odd_records import NOW_MS, Sender
from pipeline import Pipeline, event_json

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.retrieval.reader import EmbeddingReader
from stream.retrieval.staleness import STALE_HEARTBEAT_S

#: The reader's own look at the store, and the heartbeat's pace, come on top of the bound.
PATIENCE_S = STALE_HEARTBEAT_S + 60
EVENTS = 2_000
Fault = Callable[[Pipeline, KafkaBroker], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def kafka(own_kafka: KafkaBroker) -> KafkaBroker:
    """One that may be paused and killed."""
    return own_kafka


@contextmanager
def frozen(pipeline: Pipeline, _: KafkaBroker) -> Iterator[None]:
    assert pipeline.process is not None
    pipeline.process.send_signal(signal.SIGSTOP)
    yield
    pipeline.process.send_signal(signal.SIGCONT)


@contextmanager
def cut_off(_: Pipeline, kafka: KafkaBroker) -> Iterator[None]:
    """The worker runs, and its store answers: it has nothing to do, and can't know whether that is still so."""
    kafka.pause()
    yield
    kafka.resume()


@contextmanager
def killed(pipeline: Pipeline, _: KafkaBroker) -> Iterator[None]:
    assert pipeline.process is not None
    pipeline.process.kill()
    pipeline.wait()
    yield
    pipeline.start()


def transactions(pipeline: Pipeline, user: str) -> None:
    """Records that don't count, and markers that are no records, at the ends of logs: nothing is behind for them."""
    sender = Sender(pipeline.bootstrap)
    for how in ("committed", "aborted"):
        for kind, topic in pipeline.topics.items():
            sender.send(topic, user.encode(), event_json(user, 1, kind, NOW_MS), name=f"{how} {kind}", how=how)
    sender.flush()


@pytest.mark.parametrize(
    ("store", "session_timeout_s", "faults"),
    # the group is not to be the one that notices: a worker without partitions writes no heartbeat
    [("rocksdb", 6, (frozen, killed)), ("redis", 30, (frozen, cut_off))],
)
def test_a_pipeline_that_stopped_is_stale_until_it_goes_on(
    store: str,
    session_timeout_s: int,
    faults: Sequence[Fault],
    films: Dataset,
    kafka: KafkaBroker,
    make_pipeline: Callable[..., Pipeline],
    request: pytest.FixtureRequest,
) -> None:
    kv = {"kv_url": request.getfixturevalue("redis").url} if store == "redis" else {}
    pipeline = make_pipeline(**kv, session_timeout_s=session_timeout_s)
    pipeline.start()
    pipeline.until_ready()
    users = sorted({row.user_id for row in films.events[:EVENTS]})
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:EVENTS])
        pipeline.until_committed()
        transactions(pipeline, films.events[0].user_id)
        with EmbeddingReader.open(pipeline.kv_url, max_lag_s=2.0, timeout_s=1.0) as reader:

            def stale() -> set[bool]:
                vectors, answers = reader.get_many(users)
                assert len(vectors) == len(users)
                withheld = {answer.reason for answer in answers} & {"store_down", "timeout", "missing"}
                assert not withheld, "there is a vector, and it was not given"
                return {answer.stale for answer in answers}

            pipeline.until(lambda: stale() == {False}, "the pipeline is fresh", PATIENCE_S)
            for fault in faults:
                with fault(pipeline, kafka):
                    deadline = time.monotonic() + PATIENCE_S
                    while stale() != {True}:
                        assert time.monotonic() < deadline, f"{fault.__name__}, and nobody is told"
                        time.sleep(0.05)
                pipeline.until(lambda: stale() == {False}, f"fresh again ({fault.__name__})")
        feeder.send(films.events[EVENTS : 2 * EVENTS])
    pipeline.until_committed()
    pipeline.check(len({row.user_id for row in films.events[: 2 * EVENTS]}))
    assert pipeline.stop() == 0
