"""Local state, store and offsets that are damaged, old, cut off or gone: restored, rebuilt or refused, never served."""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from pipeline import UEMB, Pipeline
from topic_admin import recreate_topic, set_config

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder

FIRST, ALL = 5_000, 8_000


@pytest.fixture
def pipeline(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> Pipeline:
    """A worker that has processed the first events, and runs."""
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:FIRST])
    pipeline.until_committed()
    return pipeline


def go_on(pipeline: Pipeline, films: Dataset, said: str) -> None:
    """Process the other events, starting the worker again where it stops; it must have said `said`."""
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[FIRST:ALL])
    for _ in range(2):  # one part that is found damaged has the next start distrust all
        pipeline.start()
        assert pipeline.process is not None
        while pipeline.process.poll() is None and pipeline.lag():
            time.sleep(0.1)
        if pipeline.process.poll() is None:
            break
        assert pipeline.process.returncode == 75, pipeline.tail()
    pipeline.until_committed()
    log = pipeline.log.read_text()
    assert said in log
    assert "Traceback" not in log
    pipeline.check(len({row.user_id for row in films.events[:ALL]}))
    assert pipeline.stop() == 0


def newest(folder: Path, pattern: str) -> list[Path]:
    """The largest file of a kind in each partition's database."""
    files = [max(db.glob(pattern), key=lambda file: file.stat().st_size) for db in databases(folder)]
    assert all(file.stat().st_size > 100 for file in files)
    return files


def databases(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("IDENTITY"))


def flip(file: Path) -> None:
    """Change some bytes in the middle."""
    data = bytearray(file.read_bytes())
    for _ in range(5):
        data[random.Random(len(data)).randrange(len(data) // 4, len(data) // 2)] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize(
    "kind", ["*.sst", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("MANIFEST-*", "CURRENT"))]
)
def test_a_damaged_table_is_wiped_and_restored(kind: str, pipeline: Pipeline, films: Dataset) -> None:
    assert pipeline.stop() == 0
    for db in databases(pipeline.state):
        file = max(db.glob(kind), key=lambda file: file.stat().st_size)
        if kind == "CURRENT":
            file.unlink()
        else:
            flip(file)
    go_on(pipeline, films, "damaged")


def test_a_damaged_log_of_a_table_costs_nothing(pipeline: Pipeline, films: Dataset) -> None:
    pipeline.kill()
    for file in newest(pipeline.state, "*.log"):
        flip(file)
    go_on(pipeline, films, "claimed epoch 2")


def test_a_store_that_forgot_its_tables_is_rebuilt(pipeline: Pipeline, films: Dataset) -> None:
    """RocksDB reads a damaged manifest up to the damage, and says nothing: the watermark tells."""
    assert pipeline.stop() == 0
    for file in newest(pipeline.kv_path, "MANIFEST-*"):
        flip(file)
    go_on(pipeline, films, "lacks committed writes")


@pytest.mark.parametrize("fault", ["removed", "damaged"])
def test_a_store_that_is_removed_or_damaged_under_its_worker_is_rebuilt_beside_the_events(
    fault: str, pipeline: Pipeline, films: Dataset
) -> None:
    if fault == "removed":
        gone = pipeline.kv_path.with_name("gone")  # at once: file by file it would go on among those of the new store
        pipeline.kv_path.rename(gone)
        shutil.rmtree(gone)
    else:
        assert pipeline.stop() == 0
        for file in newest(pipeline.kv_path, "*.sst"):
            data = bytearray(file.read_bytes())
            for at in range(0, len(data) * 3 // 4, 512):  # in every block of data, so that any read meets it
                data[at] ^= 0xFF
            file.write_bytes(data)
        pipeline.log.unlink()
        pipeline.start()
        pipeline.until_ready_again()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[FIRST:ALL])
    pipeline.until_committed()
    pipeline.until(lambda: pipeline.log.read_text().count("rebuilt ") == pipeline.partitions, "all are rebuilt")
    log = pipeline.log.read_text()
    assert f"was {fault}" in log or f"is {fault}" in log
    assert log.count("claimed epoch") == pipeline.partitions, "there was a rebalance"
    assert "Traceback" not in log
    pipeline.check(len({row.user_id for row in films.events[:ALL]}))
    assert pipeline.stop() == 0


def test_state_that_is_older_than_what_the_changelog_remembers(pipeline: Pipeline, films: Dataset) -> None:
    assert pipeline.stop() == 0
    for file in pipeline.state.rglob("*"):
        os.utime(file, (time.time() - 3 * 86_400,) * 2)
    go_on(pipeline, films, "72 hours old")


def test_a_machine_crash_that_takes_the_tails_of_the_logs(pipeline: Pipeline, films: Dataset) -> None:
    pipeline.kill()
    for folder in (pipeline.state, pipeline.kv_path):
        for file in newest(folder, "*.log"):
            os.truncate(file, file.stat().st_size // 2)
    go_on(pipeline, films, "lacks committed writes")


def test_a_disk_that_is_full(pipeline: Pipeline, films: Dataset) -> None:
    """The stand-in is a limit on the size of files, which fails the same writes."""
    assert pipeline.stop() == 0
    shutil.rmtree(pipeline.state)
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[FIRST : FIRST + 1_000])
    pipeline.start(["bash", "-c", 'ulimit -f 8; exec "$@"', "-", *UEMB, "worker"])
    assert pipeline.wait(60) == 1
    lag = pipeline.lag()
    assert lag > 0
    go_on(pipeline, films, "see whether the disk is full")


def test_a_changelog_that_was_emptied_is_no_reason_to_hang(pipeline: Pipeline, films: Dataset) -> None:
    assert pipeline.stop() == 0
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    ends = [TopicPartition(pipeline.changelog, p, -1) for p in range(pipeline.partitions)]
    set_config(pipeline.bootstrap, pipeline.changelog, cleanup_policy="delete")
    emptied = False
    while not emptied:  # the broker that has the partition learns of its new policy in its own time
        try:
            emptied = bool([future.result() for future in admin.delete_records(ends).values()])
        except KafkaException as exc:
            if exc.args[0].code() != KafkaError.POLICY_VIOLATION:
                raise
    set_config(pipeline.bootstrap, pipeline.changelog, cleanup_policy="compact")
    # local state goes on, and what is published from here on is in the changelog again
    pipeline.start()
    pipeline.until_ready()
    assert pipeline.stop() == 0
    assert {len(pipeline.read(pipeline.changelog))} == {pipeline.partitions}


@pytest.mark.parametrize("fault", ["recreated", pytest.param("cut", marks=pytest.mark.slow)])
def test_committed_offsets_outside_of_their_topic_stop_the_worker(
    fault: str, pipeline: Pipeline, films: Dataset
) -> None:
    assert pipeline.stop() == 0
    view = pipeline.topics["view"]
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[FIRST:ALL])
    if fault == "recreated":
        recreate_topic(pipeline.bootstrap, view, pipeline.partitions)
    else:
        admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
        for future in admin.delete_records([TopicPartition(view, p, -1) for p in range(4)]).values():
            future.result()
    before = pipeline.committed(view)
    pipeline.start()
    assert pipeline.wait() == 1
    said = [line for line in pipeline.log.read_text().splitlines() if line.startswith("uemb: ")]
    assert len(said) == 1
    assert view in said[0]
    assert "--reset-offsets" in said[0]
    forgotten = [OFFSET_INVALID] * pipeline.partitions  # with a topic that is deleted, in the broker's own time
    assert pipeline.committed(view) in (before, forgotten)
    # what the message asks for
    group = Consumer({"bootstrap.servers": pipeline.bootstrap, "group.id": pipeline.app_id, "log_level": 2})
    places = [TopicPartition(view, p) for p in range(pipeline.partitions)]
    firsts = [TopicPartition(view, x.partition, group.get_watermark_offsets(x)[0]) for x in places]
    group.commit(offsets=firsts, asynchronous=False)
    group.close()
    pipeline.start()
    pipeline.until_committed()
    assert pipeline.stop() == 0


def test_a_topic_that_is_made_anew_under_a_running_worker_stops_it(pipeline: Pipeline, films: Dataset) -> None:
    view = pipeline.topics["view"]
    recreate_topic(pipeline.bootstrap, view, pipeline.partitions)
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([row for row in films.events[FIRST:ALL] if row.type == "view"])
    assert pipeline.wait(90) != 0
    assert view in pipeline.tail()
