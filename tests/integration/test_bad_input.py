"""Dead letters of large values; records on partitions where their keys don't belong."""

import hashlib
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from odd_records import MARK, NOISE, NOW_MS, PARTITIONS, Sender
from pipeline import Pipeline, event_json
from topic_admin import set_config

from stream.keys import partition_of
from stream.retrieval.reader import EmbeddingReader


def test_large_values_are_kept_whole_and_those_the_topic_refuses_are_referred_to(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline = make_pipeline()
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    view = NewTopic(pipeline.topics["view"], PARTITIONS, 1, config={"max.message.bytes": "3000000"})
    admin.create_topics([view])[view.topic].result()
    sender = Sender(pipeline.bootstrap)
    pipeline.start()
    pipeline.until_ready()
    long = MARK.encode() * 2_500_000
    for value in (long, NOISE):
        sender.send(pipeline.topics["view"], b"1", value)
    sender.flush()
    pipeline.until_committed(30)
    assert [letter.value() for letter in pipeline.read(pipeline.dlq)] == [long, NOISE]
    set_config(pipeline.bootstrap, pipeline.dlq, max_message_bytes=9_000)
    noise = random.Random(5).randbytes(20_000)
    reference = pipeline.read(pipeline.dlq)[-1]
    while reference.value() is not None:  # a broker takes its time to follow a setting
        sender.send(pipeline.topics["view"], b"1", noise)
        sender.flush()
        pipeline.until_committed(30)
        reference = pipeline.read(pipeline.dlq)[-1]
    assert reference.key() == b"1"
    headers = dict(reference.headers())
    assert headers["dlq.reason"] == b"not_json"
    assert headers["dlq.value_sha256"] == hashlib.sha256(noise).hexdigest().encode()
    assert headers["dlq.value_size"] == b"20000"
    assert pipeline.stop() == 0


def test_a_header_s_name_of_any_bytes_stops_nobody(make_pipeline: Callable[..., Pipeline]) -> None:
    """Brokers take it from any producer, and the worker's client can't read it."""
    kcat = shutil.which("kcat")
    if kcat is None:
        pytest.skip("no other client: install kcat")
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    there = str(partition_of(b"1", PARTITIONS))
    for value in (event_json(1, 7, "view", NOW_MS), b"{", event_json(1, 8, "view", NOW_MS)):
        words = ["-P", "-b", pipeline.bootstrap, "-t", pipeline.topics["view"], "-p", there, "-k", "1"]
        named = [*(word.encode() for word in [kcat, *words]), b"-H", b"\xff=x"]
        subprocess.run(named, input=value, check=True, timeout=60)
    pipeline.until_committed(30)
    (letter,) = pipeline.read(pipeline.dlq)
    assert (letter.value(), letter.headers()[0]) == (b"{", ("\\xff", b"x"))
    assert pipeline.check(1)["rejected"] == 1
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        assert reader.get("1").history_len == 2
    assert pipeline.stop() == 0


def send_expanding(pipeline: Pipeline, topic: str, value: bytes, codec: str) -> None:
    """Send a record of user 1 in a batch of its own, which the codec makes small."""
    producer = Producer(
        {
            "bootstrap.servers": pipeline.bootstrap,
            "partitioner": "murmur2_random",
            "compression.type": codec,
            "message.max.bytes": 1_000_000_000,
            "queue.buffering.max.kbytes": 1_000_000,
            "log_level": 2,
        }
    )
    producer.produce(topic, value, b"1", timestamp=NOW_MS)
    assert producer.flush(60) == 0


@pytest.mark.slow
def test_batches_that_expand_too_far_are_referred_to_and_cost_no_memory(make_pipeline: Callable[..., Pipeline]) -> None:
    """Some kilobytes that stand for 900 MB of zeros, and valid events after which come 200 MB of blanks."""
    pipeline = make_pipeline()
    view = pipeline.topics["view"]
    there = partition_of(b"1", PARTITIONS)

    pipeline.start()
    pipeline.until_ready()
    for item, codec in enumerate(("zstd", "gzip", "lz4")):
        send_expanding(pipeline, view, event_json(1, item, "view", NOW_MS), codec)
        event = event_json(1, 100 + item, "view", NOW_MS)
        send_expanding(pipeline, view, bytes(900 << 20) if codec == "zstd" else event + b" " * (200 << 20), codec)
    send_expanding(pipeline, pipeline.deletions, bytes(900 << 20), "zstd")
    send_expanding(pipeline, view, event_json(1, 3, "view", NOW_MS), "zstd")
    pipeline.until_committed(60)
    letters = [
        dict(letter.headers()) | {"key": letter.key(), "value": letter.value()}
        for letter in pipeline.read(pipeline.dlq)
    ]
    assert {letter["dlq.reason"] for letter in letters} == {b"expands_beyond_limit"}
    assert {(letter["key"], letter["value"], letter["dlq.partition"]) for letter in letters} == {
        (None, None, b"%d" % there)
    }
    places = sorted({(letter["dlq.topic"].decode(), int(letter["dlq.offset"])) for letter in letters})  # once or more
    assert places == sorted([(view, 1), (view, 3), (view, 5), (pipeline.deletions, 0)])
    assert pipeline.process is not None
    status = Path(f"/proc/{pipeline.process.pid}/status").read_text()
    assert int(status.split("VmHWM:")[1].split()[0]) < 600 << 10, "expanded after all"
    report = pipeline.check(1)
    assert (report["rejected"], report["letterless"]) == (4, 0)
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        assert reader.get("1").history_len == 4
    assert pipeline.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["zstd", "gzip"])
def test_batches_that_expand_nearly_too_far_are_read_by_all(codec: str, make_pipeline: Callable[..., Pipeline]) -> None:
    """The worker and `uemb verify` have different clients, and must draw the line in one place."""
    pipeline = make_pipeline()
    view = pipeline.topics["view"]
    pipeline.start()
    pipeline.until_ready()
    event = event_json(1, 7, "view", NOW_MS)
    send_expanding(pipeline, view, event + b" " * (120 << 20), codec)
    send_expanding(pipeline, view, event_json(1, 8, "view", NOW_MS), codec)
    pipeline.until_committed(60)
    assert pipeline.check(1)["rejected"] == 0
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        assert reader.get("1").history_len == 2
    assert pipeline.stop() == 0


def test_a_misplaced_record_is_committed_once_its_topic_has_shown_a_well_placed_one(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline = make_pipeline()
    sender = Sender(pipeline.bootstrap)
    view = pipeline.topics["view"]
    pipeline.start()
    pipeline.until_ready()
    there = partition_of(b"1", PARTITIONS)
    sender.send(view, b"1", event_json(1, 7, "view", NOW_MS), (there + 1) % PARTITIONS)
    sender.flush()
    pipeline.until(lambda: bool(pipeline.read(pipeline.dlq)), "the misplaced record is dead-lettered")
    assert committed(pipeline, view) == 0
    sender.send(view, b"1", event_json(1, 7, "view", NOW_MS), there)
    sender.flush()
    pipeline.until_committed(10)
    assert committed(pipeline, view) == 2
    assert pipeline.stop() == 0


def test_a_topic_whose_producer_partitions_wrongly_stops_the_worker(make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    sender = Sender(pipeline.bootstrap)
    pipeline.start()
    pipeline.until_ready()
    sender.send(pipeline.topics["like"], b"1", event_json(1, 7, "like", NOW_MS))
    sender.flush()
    pipeline.until_committed()
    for n in range(1_000):
        key = str(n).encode()
        wrong = (partition_of(key, PARTITIONS) + 1 + n % 3) % PARTITIONS
        sender.send(pipeline.topics["view"], key, event_json(n, 7, "view", NOW_MS), wrong)
    sender.flush()
    assert pipeline.wait() == 2
    log = pipeline.log.read_text(errors="replace")
    assert "Traceback" not in log
    said = [line for line in log.splitlines() if line.startswith("uemb: ")]
    assert len(said) == 1
    assert pipeline.topics["view"] in said[0]
    assert "wrong partitions" in said[0]
    assert "murmur2" in said[0]
    assert committed(pipeline, pipeline.topics["view"]) == 0
    assert committed(pipeline, pipeline.topics["like"]) == 1


def committed(pipeline: Pipeline, topic: str) -> int:
    """Records of a topic below the committed offsets of its partitions."""
    consumer = Consumer({"bootstrap.servers": pipeline.bootstrap, "group.id": pipeline.app_id, "log_level": 2})
    try:
        places = [TopicPartition(topic, p) for p in range(PARTITIONS)]
        return sum(max(0, place.offset) for place in consumer.committed(places, timeout=60))
    finally:
        consumer.close()
