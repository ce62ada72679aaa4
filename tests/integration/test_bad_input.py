"""Bad records: each in the dead-letter topic with its reason and its bytes, and the valid ones around it processed."""

import hashlib
import json
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from kafka_broker import KafkaBroker
from pipeline import Event, Pipeline, check_end_state, delete_topics, event_json, expected

from stream.config import load_settings
from stream.events import Reason
from stream.items import ItemSpace
from stream.keys import partition_of

USER_VERSION = load_settings().versioned_encoder.version
NOW_MS = time.time_ns() // 1_000_000
MINUTE_MS = 60_000
PARTITIONS = 4
DLQ_MAX_BYTES = 65_536
#: Part of every user id and of much of the bad payload: it must not get into the log or a header.
MARK = "hush"
USERS = [f"{MARK}-{n}" for n in range(9)] + ["99887766554433", "\u00fc" * 126 + MARK]  # the last has 256 bytes
OWN_HEADERS = [("trace", b"\x00\xffid"), ("trace", b"again"), ("empty", b""), ("none", None)]
BAD_USER = f"{MARK}-1"


class Bad(NamedTuple):
    """A record that must be turned away, on view, like or deletions; without a partition it goes where its key does."""

    reason: str
    value: bytes | None
    key: bytes | None = BAD_USER.encode()
    topic: str = "view"
    partition: int | None = None


def event(**fields: object) -> bytes:
    """A valid event of `BAD_USER`, but for `fields`; ... leaves a field out."""
    right = {"user_id": BAD_USER, "item_id": 7, "type": "view", "ts": NOW_MS - MINUTE_MS}
    return json.dumps({name: value for name, value in {**right, **fields}.items() if value is not ...}).encode()


def raw(item: bytes = b"7", ts: bytes = b"%d" % (NOW_MS - MINUTE_MS), more: bytes = b"") -> bytes:
    """The same with JSON text of one's own."""
    return b'{"user_id": "%b", "item_id": %b, "type": "view", "ts": %b%b}' % (BAD_USER.encode(), item, ts, more)


def erasure(**fields: object) -> bytes:
    """A valid erasure of `BAD_USER`, but for `fields`."""
    return json.dumps(
        {n: v for n, v in {"user_id": BAD_USER, "ts": NOW_MS - MINUTE_MS, **fields}.items() if v is not ...}
    ).encode()


_THERE = partition_of(BAD_USER.encode(), PARTITIONS)
BAD = {
    "not_json": Bad("not_json", b"{%b" % MARK.encode()),
    "empty": Bad("not_json", b""),
    "csv": Bad("not_json", f"{BAD_USER},7,view,{NOW_MS}".encode(), topic="like"),
    "two_documents": Bad("not_json", event() + event()),
    "nan": Bad("not_json", raw(ts=b"NaN")),
    "infinity_in_an_extra_field": Bad("not_json", raw(more=b', "x": -Infinity')),
    "invalid_utf8": Bad("not_json", raw(item=b'"%b\xff\xfe"' % MARK.encode())),
    "utf16": Bad("not_json", event().decode().encode("utf-16")),
    "byte_order_mark": Bad("not_json", b"\xef\xbb\xbf" + event(), topic="like"),
    "lone_surrogate": Bad("not_json", raw(item=b'"%b\\ud800"' % MARK.encode())),
    "deep_nesting": Bad("not_json", raw(more=b', "x": ' + b"[" * 20_000 + b"]" * 20_000)),
    "deep_nesting_of_an_id": Bad("wrong_type", raw(item=b"[" * 20_000 + b"]" * 20_000)),
    "array": Bad("wrong_type", b"[%b]" % event()),
    "null": Bad("wrong_type", b"null"),
    "item_is_null": Bad("wrong_type", event(item_id=None)),
    "item_is_a_fraction": Bad("wrong_type", event(item_id=7.5), topic="like"),
    "item_is_a_truth_value": Bad("wrong_type", event(item_id=True)),
    "user_is_an_object": Bad("wrong_type", event(user_id={"id": BAD_USER})),
    "type_is_a_number": Bad("wrong_type", event(type=1)),
    "time_is_text": Bad("wrong_type", event(ts=MARK)),
    "time_is_a_fraction": Bad("wrong_type", event(ts=1.7e12 + 0.5)),
    "time_missing": Bad("missing_field", event(ts=...)),
    "user_missing": Bad("missing_field", event(user_id=...), topic="like"),
    "all_missing": Bad("missing_field", b"{}"),
    "null_key": Bad("null_key", event(), None, partition=_THERE),
    "null_key_and_value": Bad("null_key", None, None, "like", partition=2),
    "null_value": Bad("null_value", None),
    "key_of_another": Bad("key_mismatch", event(), f"{MARK}-2".encode()),
    "key_in_quotes": Bad("key_mismatch", event(), f'"{BAD_USER}"'.encode()),
    "key_with_zeros": Bad("key_mismatch", event(user_id=7), b"007"),
    "key_not_utf8": Bad("key_mismatch", event(), b"\xff\xfe"),
    "key_empty": Bad("key_mismatch", event(), b"", partition=0),
    "wrong_partition": Bad("wrong_partition", event(), partition=(_THERE + 1) % PARTITIONS),
    "oversize_user": Bad("invalid_id", event(user_id=MARK.ljust(257, "x")), MARK.ljust(257, "x").encode()),
    "oversize_item": Bad("invalid_id", event(item_id="\u00fc" * 126 + MARK + "x"), topic="like"),
    "empty_user": Bad("invalid_id", event(user_id=""), b"", partition=1),
    "empty_item": Bad("invalid_id", event(item_id="")),
    "control_character": Bad("invalid_id", event(item_id=f"{MARK}\0view")),
    "line_break": Bad("invalid_id", event(user_id=f"{MARK}\n1"), f"{MARK}\n1".encode()),
    "huge_integer": Bad("invalid_id", event(item_id=1 << 63)),
    "huge_integer_user": Bad("invalid_id", raw().replace(b'"%b"' % BAD_USER.encode(), b"9" * 400), b"9" * 400),
    "huger_integer": Bad("wrong_type", raw(item=b"9" * 5_000)),
    "future": Bad("future_timestamp", event(ts=NOW_MS + 5 * MINUTE_MS + 1)),
    "far_future": Bad("future_timestamp", event(ts=(1 << 48) - 1)),
    "seconds": Bad("implausible_timestamp", event(ts=NOW_MS // 1000)),
    "before_1970": Bad("implausible_timestamp", event(ts=-1), topic="like"),
    "microseconds": Bad("implausible_timestamp", event(ts=NOW_MS * 1000)),
    "huge_time": Bad("implausible_timestamp", raw(ts=b"9" * 400)),
    "unknown_type": Bad("unknown_type", event(type=f"{MARK}-buy")),
    "type_in_capitals": Bad("unknown_type", event(type="View")),
    "empty_type": Bad("unknown_type", event(type="")),
    "erasure_not_json": Bad("not_json", MARK.encode(), topic="deletions"),
    "erasure_without_time": Bad("missing_field", erasure(ts=...), topic="deletions"),
    "erasure_at_text": Bad("wrong_type", erasure(ts="now"), topic="deletions"),
    "erasure_of_another": Bad("key_mismatch", erasure(), f"{MARK}-2".encode(), "deletions"),
    "erasure_elsewhere": Bad("wrong_partition", erasure(), topic="deletions", partition=(_THERE + 2) % PARTITIONS),
    "erasure_in_the_future": Bad("future_timestamp", erasure(ts=NOW_MS + 6 * MINUTE_MS), topic="deletions"),
    "erasure_in_seconds": Bad("implausible_timestamp", erasure(ts=NOW_MS // 1000), topic="deletions"),
    "erasure_of_a_control_character": Bad(
        "invalid_id", erasure(user_id=f"{MARK}\t"), f"{MARK}\t".encode(), topic="deletions"
    ),
    "as_large_as_is_kept": Bad("not_json", MARK.encode() * (DLQ_MAX_BYTES // len(MARK))),
    "larger_than_is_kept": Bad("not_json", MARK.encode() * (DLQ_MAX_BYTES // len(MARK)) + b"!"),
    "much_larger_than_is_kept": Bad("not_json", MARK.encode() * 1_000_000),  # compressed it fits the topic's limit
}
REFERENCES = {"larger_than_is_kept", "much_larger_than_is_kept"}


class Sent(NamedTuple):
    """Where a record went."""

    topic: str
    partition: int
    offset: int


class Outcome(NamedTuple):
    """What became of `BAD` and of the valid events among them."""

    pipeline: Pipeline
    sent: Mapping[str, Sent]
    letters: list[Any]
    valid: list[Event]


class Sender:
    """A producer of whatever bytes; remembers where each named record went."""

    def __init__(self, bootstrap: str) -> None:
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "partitioner": "murmur2_random",
                "enable.idempotence": True,
                "compression.type": "lz4",
                "message.max.bytes": 20_000_000,
                "log_level": 2,
            }
        )
        self.sent: dict[str, Sent] = {}

    def send(
        self, topic: str, key: bytes | None, value: bytes | None, partition: int | None = None, name: str = ""
    ) -> None:
        def delivered(error: object, message: Any) -> None:
            assert error is None, error
            self.sent[name] = Sent(message.topic(), message.partition(), message.offset())

        where = {} if partition is None else {"partition": partition}
        headers = OWN_HEADERS if name else None
        self._producer.produce(topic, value, key, headers=headers, timestamp=NOW_MS, on_delivery=delivered, **where)
        self._producer.poll(0)

    def flush(self) -> None:
        assert self._producer.flush(20) == 0


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
