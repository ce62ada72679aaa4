"""Every kind of bad record on every topic that can hold it, as 1 %, 20 % and 100 % of the traffic of one worker.

Each has its outcome: turned away for a reason (in the dead-letter topic, its bytes untouched), applied, or unseen. The
real events around them end in the reference's state, whatever the share.
"""

import hashlib
import json
import random
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bad_records import BAD, BAD_USER, DLQ_MAX_BYTES, MARK, NOW_MS, OWN_HEADERS, Bad, Sender, event, raw
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic
from kafka_broker import KafkaBroker
from pipeline import Event, Pipeline, check_end_state, delete_topics, event_json, expected

from stream.config import load_settings
from stream.dataset import Dataset
from stream.items import ItemSpace

USER_VERSION = load_settings().versioned_encoder.version
ERASES = "applied"
LARGE = 3_000_000
NOISE = random.Random(2).randbytes(2_000_000)
HEADERS_64K = [("h", b"x" * 65_000)]

#: What becomes of the event topics' kinds on the deletion topic, where it is another thing: an erasure has a user and a
#: time and may have other fields, so what is wrong with an item or a type is nothing there.
ON_DELETIONS = {
    **dict.fromkeys(
        [
            *("item_is_null", "item_is_a_fraction", "item_is_a_truth_value"),
            *("type_is_a_number", "oversize_item", "empty_item", "control_character", "huge_integer", "huger_integer"),
            *("unknown_type", "type_in_capitals", "empty_type"),
        ],
        ERASES,
    ),
    "deep_nesting_of_an_id": "not_json",  # in a field that is skipped
    "null_value": ERASES,  # withdrawn: counted, changes nothing
    # a compacted topic holds no record without a key: its broker refuses them
    "null_key": None,
    "null_key_and_value": None,
}
#: The same the other way round: an event needs an item and a type.
ON_EVENTS = {
    name: "not_json" if bad.reason == "not_json" else "wrong_type" if bad.reason == "wrong_type" else "missing_field"
    for name, bad in BAD.items()
    if bad.topic == "deletions"
}
MORE = {
    "large_and_incompressible": Bad("not_json", NOISE),
    "beyond_all_numbers": Bad("wrong_type", raw(ts=b"1e400")),
    "minus_zero_as_time": Bad("implausible_timestamp", raw(ts=b"-0")),
}


class Case(NamedTuple):
    """A record for a topic, and what becomes of it: a reason, or `ERASES`."""

    name: str
    topic: str
    bad: Bad
    outcome: str


def cases() -> list[Case]:
    out = []
    for name, bad in {**BAD, **MORE}.items():
        for topic in ("view", "like", "deletions"):
            is_event, on_event = bad.topic != "deletions", topic != "deletions"
            outcome: str | None = bad.reason
            if is_event and not on_event:
                outcome = ON_DELETIONS.get(name, bad.reason)
            elif not is_event and on_event:
                outcome = ON_EVENTS[name]
            if name == "large_and_incompressible" and topic != "view":
                outcome = None  # the other topics have the broker's limit of 1 MiB
            if outcome is not None:
                out.append(Case(name, topic, bad, outcome))
    return out


CASES = cases()


@pytest.fixture(scope="module")
def pipeline(kafka: KafkaBroker, item_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A running worker that has seen a well-placed record on each of its topics."""
    prefix = f"t{uuid.uuid4().hex[:10]}"
    pipeline = Pipeline(
        kafka.bootstrap, prefix, tmp_path_factory.mktemp("shares"), item_folder, dlq_max_bytes=DLQ_MAX_BYTES
    )
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 0})
    view = NewTopic(pipeline.topics["view"], 4, 1, config={"max.message.bytes": str(LARGE)})
    admin.create_topics([view])[view.topic].result()
    try:
        pipeline.start()
        pipeline.until_ready()
        yield pipeline
        assert pipeline.stop() == 0
    finally:
        pipeline.close()
        delete_topics(kafka.bootstrap, prefix)


class Traffic:
    """What was sent so far."""

    def __init__(self) -> None:
        self.valid: list[Event] = []
        self.due: Counter[tuple[str, str]] = Counter()  # letters by topic and reason
        self.letters = 0


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return Traffic()


def send_valid(sender: Sender, pipeline: Pipeline, rows: list[Any], traffic: Traffic) -> None:
    for row in rows:
        sender.send(pipeline.topics[row.type], row.user_id.encode(), event_json(*row))
        traffic.valid.append((row.user_id, row.item_id, row.type, row.ts_ms))


def topic_name(pipeline: Pipeline, kind: str) -> str:
    return pipeline.deletions if kind == "deletions" else pipeline.topics[kind]


def check_users(pipeline: Pipeline, traffic: Traffic, space: ItemSpace) -> None:
    output = pipeline.last_output()
    erased = f"uemb:{USER_VERSION}:{space.version}:{BAD_USER}"
    assert output.pop(erased, None) is None
    check_end_state(pipeline, expected(traffic.valid, space), space, USER_VERSION, output)


@pytest.mark.parametrize("percent", [1, 20, 100])
def test_bad_records_among_real_ones(
    percent: int, pipeline: Pipeline, films: Dataset, space: ItemSpace, traffic: Traffic
) -> None:
    count = len(CASES) * (100 - percent) // percent
    start = len(traffic.valid)
    rows = films.events[start : start + count]
    assert len(rows) == count
    sender = Sender(pipeline.bootstrap)
    if percent == 1:  # each topic has a record where it belongs before it has one where it doesn't
        send_valid(sender, pipeline, rows[:50], traffic)
        rows = rows[50:]
        nothing = json.dumps({"user_id": BAD_USER, "ts": NOW_MS - 1_000_000_000}).encode()
        sender.send(pipeline.deletions, BAD_USER.encode(), nothing)
        sender.flush()
        pipeline.until_committed(30)
    rng = random.Random(percent)
    sent: list[tuple[Case, str]] = []
    every = max(1, len(rows) // len(CASES))
    for n, case in enumerate(rng.sample(CASES, len(CASES))):
        send_valid(sender, pipeline, rows[n * every : (n + 1) * every], traffic)
        name = f"{case.topic}/{case.name}"
        sender.send(topic_name(pipeline, case.topic), case.bad.key, case.bad.value, case.bad.partition, name)
        sent.append((case, name))
    send_valid(sender, pipeline, rows[len(CASES) * every :], traffic)
    sender.flush()
    pipeline.until_committed(60)

    letters = pipeline.read(pipeline.dlq)
    found = {}
    for letter in letters:
        headers = dict(letter.headers())
        found[headers["dlq.topic"].decode(), int(headers["dlq.partition"]), int(headers["dlq.offset"])] = letter
    assert len(found) == len(letters), "a record has two letters"
    outcomes = {name: case.outcome for case, name in sent}
    came = {name: found.get(tuple(sender.sent[name])) for name in outcomes}
    assert {
        n: dict(x.headers())["dlq.reason"].decode() if x is not None else ERASES for n, x in came.items()
    } == outcomes
    for case, name in sent:
        letter, value = came[name], case.bad.value
        if letter is None:
            continue
        assert letter.headers()[: len(OWN_HEADERS)] == OWN_HEADERS
        assert letter.key() == case.bad.key
        if value is not None and len(value) > DLQ_MAX_BYTES:
            assert letter.value() is None
            assert dict(letter.headers())["dlq.value_sha256"].decode() == hashlib.sha256(value).hexdigest()
        else:
            assert letter.value() == value
    traffic.letters += sum(outcome != ERASES for outcome in outcomes.values())
    assert len(letters) == traffic.letters, "something else was dead-lettered"
    check_users(pipeline, traffic, space)
    log = pipeline.log.read_text(errors="replace")
    assert MARK not in log
    assert "Traceback" not in log


def test_a_compacted_topic_holds_no_record_without_a_key(pipeline: Pipeline) -> None:
    errors: list[Any] = []
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    producer.produce(pipeline.deletions, b"{}", None, 0, on_delivery=lambda error, _: errors.append(error))
    producer.flush(10)
    assert errors
    assert errors[0] is not None


def test_odd_records_that_are_events_all_the_same(pipeline: Pipeline, space: ItemSpace, traffic: Traffic) -> None:
    """Applied: odd JSON, large headers, every codec, a committed transaction. Unseen: an aborted one."""
    view = pipeline.topics["view"]
    ts = NOW_MS - 60_000
    odd = {
        "odd-minus-zero": (raw(item=b"-0"), "0"),
        "odd-twice": (raw(item=b"1", more=b', "item_id": 2'), "2"),
        "odd-extra": (raw(item=b"3", more=b', "x": {"y": [1e-7, "\\ud83d\\ude00", null]}'), "3"),
        "odd-escaped": (raw(item=b'"\\u0034"'), "4"),
        "odd-spaces": (b" \n\t" + raw(item=b"5") + b"\r\n", "5"),
    }
    sender = Sender(pipeline.bootstrap)
    for user, (value, item) in odd.items():
        sender.send(view, user.encode(), value.replace(BAD_USER.encode(), user.encode()))
        traffic.valid.append((user, item, "view", ts))
    sender.flush()

    def produce(producer: Producer, user: str, **more: Any) -> None:
        value = event(user_id=user, item_id=6)
        producer.produce(view, value, user.encode(), timestamp=NOW_MS, **more)

    base = {"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random", "log_level": 2}
    for codec in ("none", "gzip", "snappy", "lz4", "zstd"):
        producer = Producer({**base, "compression.type": codec, "linger.ms": 50})
        for n in range(20):
            produce(producer, f"odd-{codec}-{n}")
            traffic.valid.append((f"odd-{codec}-{n}", "6", "view", ts))
        assert producer.flush(20) == 0
    producer = Producer(base)
    produce(producer, "odd-headers", headers=HEADERS_64K)
    traffic.valid.append(("odd-headers", "6", "view", ts))
    assert producer.flush(20) == 0
    transactional = Producer({**base, "transactional.id": pipeline.app_id})
    transactional.init_transactions(20)
    for user, ends in (("odd-committed", True), ("odd-aborted", False)):
        transactional.begin_transaction()
        for n in range(10):
            produce(transactional, f"{user}-{n}")
            if ends:
                traffic.valid.append((f"{user}-{n}", "6", "view", ts))
        transactional.flush(20)
        try:
            transactional.commit_transaction(20) if ends else transactional.abort_transaction(20)
        except KafkaException as exc:
            raise AssertionError(exc) from exc
    # a record after the transaction's end: with it committed, all before it was passed
    produce(producer, "odd-last")
    traffic.valid.append(("odd-last", "6", "view", ts))
    assert producer.flush(20) == 0
    want = expected(traffic.valid, space)
    pipeline.until(lambda: len(pipeline.last_output()) >= len(want), "all users have their vectors")
    check_users(pipeline, traffic, space)
    letters = pipeline.read(pipeline.dlq)
    assert len(letters) == traffic.letters


def test_a_bad_record_with_large_headers_keeps_them(pipeline: Pipeline, traffic: Traffic) -> None:
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random", "log_level": 2})
    producer.produce(pipeline.topics["view"], b"{", BAD_USER.encode(), headers=HEADERS_64K)
    assert producer.flush(20) == 0
    pipeline.until(lambda: len(pipeline.read(pipeline.dlq)) == traffic.letters + 1, "it has its letter")
    last = max(pipeline.read(pipeline.dlq), key=lambda letter: letter.timestamp()[1])
    assert last.headers()[0] == HEADERS_64K[0]
