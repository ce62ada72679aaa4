"""Bad records: each in the dead-letter topic with its reason and its bytes, and the valid ones around it processed."""

import hashlib
import json
import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from bad_records import (
    BAD,
    DLQ_MAX_BYTES,
    MARK,
    MINUTE_MS,
    NOW_MS,
    OWN_HEADERS,
    PARTITIONS,
    REFERENCES,
    USERS,
    Sender,
    Sent,
)
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from kafka_broker import KafkaBroker
from pipeline import Event, Pipeline, check_end_state, delete_topics, event_json, expected

from stream.config import load_settings
from stream.events import Reason
from stream.items import ItemSpace
from stream.keys import partition_of

USER_VERSION = load_settings().versioned_encoder.version


class Outcome(NamedTuple):
    """What became of `BAD` and of the valid events among them."""

    pipeline: Pipeline
    sent: Mapping[str, Sent]
    letters: list[Any]
    valid: list[Event]


@pytest.fixture(scope="module")
def item_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty items in eight dimensions: what is tested here needs no real ones."""
    folder = tmp_path_factory.mktemp("items") / "v1"
    ItemSpace.save(folder, "items_v1", range(50), np.random.default_rng(3).normal(size=(50, 8)))
    return folder


@pytest.fixture(scope="module")
def space(item_folder: Path) -> ItemSpace:
    """The item space in `item_folder`."""
    return ItemSpace.load(item_folder)


@pytest.fixture(scope="module")
def outcome(kafka: KafkaBroker, item_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """All of `BAD` in random order, valid events before, between and after, through one worker."""
    prefix = f"t{uuid.uuid4().hex[:10]}"
    pipeline = Pipeline(
        kafka.bootstrap,
        prefix,
        tmp_path_factory.mktemp("bad"),
        item_folder,
        dlq_max_bytes=DLQ_MAX_BYTES,
        ignored_types="impression",
    )
    topics = {**pipeline.topics, "deletions": pipeline.deletions}
    rng = random.Random(11)
    valid: list[Event] = []
    sender = Sender(kafka.bootstrap)

    def send_valid() -> None:
        user, item, kind = rng.choice(USERS), str(rng.randrange(60)), rng.choice(["view", "like"])
        ts = NOW_MS + 5 * MINUTE_MS - rng.randrange(1_000_000)  # up to the permitted lead
        # an integer id is the same as its text; unknown fields and blanks mean nothing
        value = event_json(int(user) if user.isdigit() and rng.random() < 0.5 else user, int(item), kind, ts)
        sender.send(topics[kind], user.encode(), rng.choice([value, value[:-1] + b', "extra": [1.5, {"a": null}]}\n']))
        valid.append((user, item, kind, ts))

    try:
        pipeline.start()
        pipeline.until_ready()
        # an erasure of nothing: each topic has a record where it belongs before it has one where it doesn't
        nothing = {"user_id": USERS[0], "ts": NOW_MS - 1000 * MINUTE_MS}
        sender.send(pipeline.deletions, USERS[0].encode(), json.dumps(nothing).encode())
        for _ in range(20):
            send_valid()
        sender.flush()
        pipeline.until_committed(30)
        for name in rng.sample(sorted(BAD), len(BAD)):
            for _ in range(3):
                send_valid()
            bad = BAD[name]
            sender.send(topics[bad.topic], bad.key, bad.value, bad.partition, name)
        sender.send(topics["view"], USERS[2].encode(), event_json(USERS[2], 3, "impression", NOW_MS))
        for _ in range(20):
            send_valid()
        sender.flush()
        pipeline.until_committed(30)
        yield Outcome(pipeline, sender.sent, pipeline.read(pipeline.dlq), valid)
        assert pipeline.stop() == 0
    finally:
        pipeline.kill()
        delete_topics(kafka.bootstrap, prefix)


@pytest.mark.parametrize("name", BAD)
def test_dead_letter(name: str, outcome: Outcome) -> None:
    bad, sent = BAD[name], outcome.sent[name]
    place = [("dlq.topic", sent.topic), ("dlq.partition", str(sent.partition)), ("dlq.offset", str(sent.offset))]
    mine = [r for r in outcome.letters if {(n, v.encode()) for n, v in place} <= set(r.headers())]
    assert len(mine) == 1
    headers = mine[0].headers()
    assert headers[: len(OWN_HEADERS)] == OWN_HEADERS
    added = dict(headers[len(OWN_HEADERS) :])
    assert len(added) == len(headers) - len(OWN_HEADERS), "a header was added twice"
    detail = added.pop("dlq.detail").decode()
    want = {"dlq.reason": bad.reason, **dict(place), "dlq.timestamp": str(NOW_MS)}
    if name in REFERENCES:
        assert bad.value is not None
        want |= {"dlq.value_sha256": hashlib.sha256(bad.value).hexdigest(), "dlq.value_size": str(len(bad.value))}
    assert {n: v.decode() for n, v in added.items()} == want, detail
    assert detail
    assert detail.isprintable()
    assert MARK not in detail
    assert mine[0].key() == bad.key
    assert mine[0].value() == (None if name in REFERENCES else bad.value)


def test_nothing_else_is_dead_lettered(outcome: Outcome) -> None:
    assert len(outcome.letters) == len(BAD)


def test_every_reason_is_shown_and_listed() -> None:
    listed = json.loads(files("schemas").joinpath("dead_letter_reasons.v1.json").read_text())["enum"]
    assert {bad.reason for bad in BAD.values()} == {str(reason) for reason in Reason} == set(listed)


def test_the_valid_events_around_them_are_processed(outcome: Outcome, space: ItemSpace) -> None:
    assert len(outcome.valid) > 3 * len(BAD)
    check_end_state(outcome.pipeline, expected(outcome.valid, space), space, USER_VERSION)


def test_the_log_holds_no_ids_and_no_payload(outcome: Outcome) -> None:
    log = outcome.pipeline.log.read_text(errors="replace")
    assert "claimed epoch" in log
    assert MARK not in log
    assert USERS[9] not in log
    assert "Traceback" not in log


def test_values_that_compress_well_are_kept_and_those_the_topic_refuses_are_referred_to(
    make_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline = make_pipeline()
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    sender = Sender(pipeline.bootstrap)
    pipeline.start()
    pipeline.until_ready()
    long = MARK.encode() * 2_500_000
    sender.send(pipeline.topics["view"], b"1", long)
    sender.flush()
    pipeline.until_committed(30)
    assert [letter.value() for letter in pipeline.read(pipeline.dlq)] == [long]
    limit = ConfigEntry("max.message.bytes", "9000", incremental_operation=AlterConfigOpType.SET)
    change = ConfigResource(ConfigResource.Type.TOPIC, pipeline.dlq, incremental_configs=[limit])
    for future in admin.incremental_alter_configs([change]).values():
        future.result()
    noise = random.Random(5).randbytes(20_000)
    sender.send(pipeline.topics["view"], b"1", noise)
    sender.flush()
    pipeline.until_committed(30)
    reference = pipeline.read(pipeline.dlq)[-1]
    assert (reference.key(), reference.value()) == (b"1", None)
    headers = dict(reference.headers())
    assert headers["dlq.reason"] == b"not_json"
    assert headers["dlq.value_sha256"] == hashlib.sha256(noise).hexdigest().encode()
    assert headers["dlq.value_size"] == b"20000"
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
    pipeline.until(lambda: bool(pipeline.read(pipeline.dlq)), "the misplaced record is dead-lettered", 20)
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
        return sum(max(0, place.offset) for place in consumer.committed(places, timeout=10))
    finally:
        consumer.close()
