"""A broker that pauses, dies, or refuses what it is sent: nothing is lost, and no commit runs ahead."""

import shutil
import time
from collections.abc import Callable

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from kafka_broker import KafkaBroker
from odd_records import Sender
from pipeline import Pipeline, feeding

from stream.dataset import Dataset
from stream.feed import Feeder


def grown(pipeline: Pipeline, what: str) -> int:
    """Wait until the output topic grows; return its length."""
    before = len(pipeline.read(pipeline.output))
    pipeline.until(lambda: len(pipeline.read(pipeline.output)) > before, what)
    return len(pipeline.read(pipeline.output))


@pytest.mark.parametrize("fault", ["paused", "killed"])
def test_a_broker_that_is_away_for_some_seconds(
    fault: str, films: Dataset, kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]
) -> None:
    rows = films.events[:20_000]
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with feeding(pipeline, rows, 2_000) as thread:
        grown(pipeline, "events flow")
        if fault == "paused":
            kafka.pause()
            time.sleep(5)
            assert thread.is_alive(), "all events were sent before the fault"
            kafka.resume()
        else:
            kafka.kill()
            time.sleep(1)
            assert thread.is_alive(), "all events were sent before the fault"
            kafka.restart()
        grown(pipeline, "events flow again")
    pipeline.until_committed(120)
    assert pipeline.process is not None
    assert pipeline.process.poll() is None
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


def test_a_broker_that_is_away_for_longer_than_requests_wait(
    films: Dataset, kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]
) -> None:
    rows = films.events[:10_000]
    pipeline = make_pipeline(delivery_timeout_s=120)
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(rows)
        grown(pipeline, "events flow")
        kafka.pause()
        time.sleep(45)
        kafka.resume()
    pipeline.until_committed(120)
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


def test_a_broker_that_is_away_for_longer_than_the_worker_waits(
    films: Dataset, kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]
) -> None:
    rows = films.events[:20_000]
    pipeline = make_pipeline(delivery_timeout_s=3)
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(rows)
        grown(pipeline, "events flow")
        kafka.pause()
        try:
            # with nothing under way there is nothing to wait for: the next event tells
            assert pipeline.wait(60) == 1
        finally:
            kafka.resume()
    assert "no acknowledgement for 3 s" in pipeline.tail()
    assert "Traceback" not in pipeline.log.read_text()
    pipeline.start()
    pipeline.until_committed(120)
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


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
    pipeline.until_committed(120)
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


def set_limit(bootstrap: str, topic: str, limit: int) -> None:
    """Set the size that a topic admits."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})
    entry = ConfigEntry("max.message.bytes", str(limit), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    for future in admin.incremental_alter_configs([resource]).values():
        future.result()


@pytest.mark.parametrize("refused", ["changelog", "output", "dlq"])
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
        set_limit(pipeline.bootstrap, topic, 60)
        if refused == "dlq":
            send_bad(pipeline)
        feeder.send(then)
        assert pipeline.wait() == 1
    said = [line for line in pipeline.log.read_text().splitlines() if line.startswith("uemb: ")]
    assert len(said) == 1
    assert topic in said[0]
    assert "max.message.bytes" in said[0]
    assert pipeline.lag() > 0
    pipeline.start()  # the check at start finds it too, before anything is read
    assert pipeline.wait() == 2
    assert "max.message.bytes" in pipeline.tail()
    set_limit(pipeline.bootstrap, topic, 80_000_000)
    pipeline.start()
    pipeline.until_ready()
    pipeline.until_committed()
    report = pipeline.check(len({row.user_id for row in films.events[:6_000]}))
    assert (report["rejected"], report["letterless"]) == (4 * (refused == "dlq"), 0)
    assert pipeline.stop() == 0


def send_bad(pipeline: Pipeline) -> None:
    """A bad record on each partition."""
    sender = Sender(pipeline.bootstrap)
    for user in pipeline.users_by_partition().values():
        sender.send(pipeline.topics["view"], user, b"{")
    sender.flush()
