"""Batches lost between the client and the agent come again; events lost before they were read stop the worker."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka_broker import KafkaBroker
from pipeline import Pipeline
from topic_admin import delete_records, recreate_topic

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.kafka.fetch_pace import IDLE_MS
from stream.kafka.topic_watch import WATCH_S

EVENTS = 6_000
LOSSES = 8
_DROPPING_WORKER = Path(__file__).parent / "dropping_worker.py"


@pytest.mark.parametrize(
    "place", ["fetch", *(pytest.param(place, marks=pytest.mark.slow) for place in ("buffer", "fetcher", "delivery"))]
)
def test_a_batch_that_is_lost_on_its_way_is_read_again(
    place: str, films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    """Wherever it is lost, and also when nothing follows it that would show the gap."""
    pipeline = make_pipeline()
    pipeline.start([sys.executable, str(_DROPPING_WORKER), place, str(LOSSES)])
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        for start in range(0, EVENTS, EVENTS // 4):
            feeder.send(films.events[start : start + EVENTS // 4])
            pipeline.until_committed()
    log = pipeline.log.read_text()
    assert f"lost at {place}" in log
    if place != "fetcher":  # a fetcher that begins has all partitions positioned, before any gap can be seen
        assert "not all arrived that was fetched; reading on from offset" in log
    pipeline.check(len({row.user_id for row in films.events[:EVENTS]}))
    assert pipeline.stop() == 0


@pytest.fixture
def frozen(films: Dataset, kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]) -> Pipeline:
    """A worker that has committed some events, and is frozen before it has read those that came after."""
    pipeline = make_pipeline(session_timeout_s=60)  # it stays in the group, and goes on reading where it was
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:1_000])
        pipeline.until_committed()
        assert pipeline.process is not None
        pipeline.process.send_signal(signal.SIGSTOP)
        time.sleep(10 * IDLE_MS / 1000)  # a fetch that waits at the broker would take the first of them
        feeder.send(films.events[1_000:2_000])
    return pipeline


def test_events_that_are_deleted_before_a_running_worker_reads_them_stop_it(frozen: Pipeline) -> None:
    """Retention does the same to a worker that is slow."""
    topic = frozen.topics["view"]
    before = [max(offset, 0) for offset in frozen.committed(topic)]
    delete_records(frozen.bootstrap, topic, {partition: at + 5 for partition, at in enumerate(before)})
    assert frozen.process is not None
    frozen.process.send_signal(signal.SIGCONT)
    assert frozen.wait() == 1
    (said,) = [line for line in frozen.log.read_text().splitlines() if line.startswith("uemb: ")]
    # by the fetch, or, where the group has dropped the frozen worker meanwhile, when it takes its partitions again
    texts = (
        "offset {} of {}-{}, the next to be read, is gone",
        "offset {}, from where {}-{} is to be read, is outside",
    )
    assert any(text.format(at, topic, p) in said for text in texts for p, at in enumerate(before)), said
    assert "kafka-consumer-groups --reset-offsets" in said
    assert "Traceback" not in frozen.log.read_text()
    assert [max(offset, 0) for offset in frozen.committed(topic)] == before, "what is lost does not count as read"


def test_a_topic_that_is_made_anew_under_a_running_worker_stops_it(films: Dataset, frozen: Pipeline) -> None:
    """Even if it has as many records by then as the one before: the first of them would be passed over."""
    topic = frozen.topics["view"]
    recreate_topic(frozen.bootstrap, topic, frozen.partitions)
    with Feeder(frozen.bootstrap, frozen.topics) as feeder:
        feeder.send(films.events[:5_000])
    assert frozen.process is not None
    frozen.process.send_signal(signal.SIGCONT)
    assert frozen.wait(WATCH_S + 40) == 1
    (said,) = [line for line in frozen.log.read_text().splitlines() if line.startswith("uemb: ")]
    texts = (f"{topic} was made anew", f"of {topic}-", f"from where {topic}-")
    assert any(text in said for text in texts), said
    assert any(text in said for text in ("made anew", "the next to be read, is gone")), said
    assert "kafka-consumer-groups --reset-offsets" in said
