"""Batches lost between the client and the agent come again; events lost before they were read stop the worker."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka_broker import KafkaBroker
from pipeline import Pipeline
from topic_admin import add_partitions, delete_records, recreate_topic

from stream.dataset import Dataset
from stream.feed import Feeder
from stream.topic_watch import WATCH_S
from stream.transport import FETCH_MAX_WAIT_MS

EVENTS = 6_000
LOSSES = 8
_DROPPING_WORKER = Path(__file__).parent / "dropping_worker.py"


@pytest.mark.parametrize("place", ["fetch", "fetcher", "delivery", "buffer"])
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
    assert place == "fetcher" or "not all arrived that was fetched; reading on from offset" in log, "nothing was lost"
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
        time.sleep(50 * FETCH_MAX_WAIT_MS / 1000)  # a fetch that waits at the broker would take the first of them
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
    assert any(f"offset {at} of {topic}-{p}, the next to be read, is gone" in said for p, at in enumerate(before)), said
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
    assert f"{topic} was made anew" in said or f"of {topic}-" in said
    assert "kafka-consumer-groups --reset-offsets" in said


def test_a_topic_that_grows_under_a_running_worker_stops_it(
    films: Dataset, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """And the way on that the README shows leads to every user's whole history."""
    old = make_pipeline()
    old.start()
    old.until_ready()
    events = films.events[:4_000]
    with Feeder(old.bootstrap, old.topics) as feeder:
        feeder.send(events[:2_000])
        old.until_committed()
        add_partitions(old.bootstrap, old.topics["like"], 6)
        assert old.wait(WATCH_S + 40) == 2
        (said,) = [line for line in old.log.read_text().splitlines() if line.startswith("uemb: ")]
        assert f"{old.topics['like']} has 6 partitions and 4 are served" in said
        old.start()
        assert old.wait() == 2, "nor does it start"

        for topic in (old.topics["view"], old.deletions):
            add_partitions(old.bootstrap, topic, 6)
        new = make_pipeline(kv_url=f"rocksdb://{tmp_path / 'new-kv'}", state_dir=tmp_path / "new-state")
        name = f"{old.app_id}-new"
        new.output, new.dlq, new.app_id, new.partitions = f"{name}.out", f"{name}.dlq", name, 6
        new.environment |= {"UEMB_APP_ID": name, "UEMB_OUTPUT_TOPIC": new.output, "UEMB_DLQ_TOPIC": new.dlq}
        new.start()
        new.until_ready()
    with Feeder(old.bootstrap, old.topics) as feeder:
        feeder.send(events[2_000:])
    new.until_committed()
    assert "sent again" in new.uemb("dlq", "replay", "--reason", "wrong_partition")
    new.until_committed()
    new.check(len({row.user_id for row in events}))
    assert new.stop() == 0
