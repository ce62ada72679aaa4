"""Every kind of odd record on every topic, as 1 %, 20 % and 100 % of the traffic of one worker.

Each has its outcome in `odd_records.KINDS`: turned away for a reason (in the dead-letter topic, its bytes untouched),
applied, or unseen. The real events around them end in the reference's state, whatever the share.
"""

import json
import random
import uuid
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from kafka_broker import KafkaBroker
from odd_records import (
    APPLIED,
    BAD_USER,
    DLQ_MAX_BYTES,
    KINDS,
    MARK,
    MINUTE_MS,
    NOW_MS,
    REFUSED,
    UNSEEN,
    Kind,
    Sender,
    check_letter,
    event,
    letters_by_source,
)
from pipeline import Event, Pipeline, check_end_state, delete_topics, event_json, expected

from stream.config import load_settings
from stream.core.events import Reason
from stream.feed.dataset import Dataset
from stream.items.space import ItemSpace

USER_VERSION = load_settings().versioned_encoder.version
TOPICS = ("view", "like", "deletions")
NOT_LETTERS = (APPLIED, UNSEEN)


class Case(NamedTuple):
    """A record of a kind for a topic; its name says both."""

    name: str
    topic: str
    kind: Kind

    @property
    def outcome(self) -> str:
        return self.kind.outcome(self.topic)


ALL = [Case(f"{topic}/{name}", topic, kind) for name, kind in KINDS.items() for topic in TOPICS]
CASES = [case for case in ALL if case.outcome != REFUSED]


@pytest.fixture(scope="module")
def pipeline(kafka: KafkaBroker, item_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A running worker; its topics take large records, and one of them keeps the broker's time."""
    prefix = f"t{uuid.uuid4().hex[:10]}"
    pipeline = Pipeline(
        kafka.bootstrap,
        prefix,
        tmp_path_factory.mktemp("shares"),
        item_folder,
        dlq_max_bytes=DLQ_MAX_BYTES,
        ignored_types="impression",
    )
    large = {"max.message.bytes": "3000000"}
    configs = {
        pipeline.topics["view"]: large,
        pipeline.topics["like"]: {**large, "message.timestamp.type": "LogAppendTime"},
        pipeline.deletions: {**large, "cleanup.policy": "compact"},
    }
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 0})
    for made in admin.create_topics([NewTopic(name, 4, 1, config=c) for name, c in configs.items()]).values():
        made.result()
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
        self.films = 0  # events of real users
        self.valid: list[Event] = []
        self.erased: set[str] = {BAD_USER}
        self.letters = 0


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return Traffic()


def topic_name(pipeline: Pipeline, kind: str) -> str:
    return pipeline.deletions if kind == "deletions" else pipeline.topics[kind]


def send_valid(sender: Sender, pipeline: Pipeline, rows: list[Any], traffic: Traffic) -> None:
    for row in rows:
        sender.send(pipeline.topics[row.type], row.user_id.encode(), event_json(*row))
        traffic.valid.append((row.user_id, row.item_id, row.type, row.ts_ms))
    traffic.films += len(rows)


def send_case(sender: Sender, pipeline: Pipeline, case: Case, run: str, traffic: Traffic) -> None:
    kind = case.kind
    key, value = kind.key, kind.value
    if callable(value):
        user = kind.user(f"{case.name}-{run}")
        key, value = user.encode(), value(user)
        if case.outcome == APPLIED and case.topic != "deletions":
            traffic.valid.append((user, kind.item, "view", NOW_MS - MINUTE_MS))
    sender.send(topic_name(pipeline, case.topic), key, value, kind.partition, case.name, kind.how)


def send_first(sender: Sender, pipeline: Pipeline, run: str, traffic: Traffic) -> None:
    """Events of the users who are erased, or whose erasure is unseen."""
    for case in CASES:
        if case.topic == "deletions" and callable(case.kind.value):
            user, ts = case.kind.user(f"{case.name}-{run}"), NOW_MS - 2 * MINUTE_MS
            sender.send(pipeline.topics["view"], user.encode(), event(user_id=user, ts=ts))
            if case.outcome == APPLIED:
                traffic.erased.add(user)
            else:
                traffic.valid.append((user, "7", "view", ts))


def send_last(sender: Sender, pipeline: Pipeline) -> None:
    """Records that change nothing at the end of every partition: behind a transaction's end nothing is committed."""
    for user in pipeline.users_by_partition().values():
        for topic in pipeline.topics.values():
            sender.send(topic, user, event_json(user.decode(), 3, "impression", NOW_MS))
        sender.send(pipeline.deletions, user, None)
    sender.flush()


@pytest.mark.parametrize("percent", [1, 20, 100])
def test_odd_records_among_real_ones(
    percent: int, pipeline: Pipeline, films: Dataset, space: ItemSpace, traffic: Traffic
) -> None:
    count = len(CASES) * (100 - percent) // percent
    rows = films.events[traffic.films : traffic.films + count]
    assert len(rows) == count
    sender = Sender(pipeline.bootstrap)
    if percent == 1:  # each topic has a record where it belongs before it has one where it doesn't
        send_valid(sender, pipeline, rows[:50], traffic)
        rows = rows[50:]
        nothing = json.dumps({"user_id": BAD_USER, "ts": NOW_MS - 1_000_000_000}).encode()
        sender.send(pipeline.deletions, BAD_USER.encode(), nothing)
    send_first(sender, pipeline, str(percent), traffic)
    sender.flush()
    pipeline.until_committed(30)
    rng = random.Random(percent)
    every = max(1, len(rows) // len(CASES))
    for n, case in enumerate(rng.sample(CASES, len(CASES))):
        send_valid(sender, pipeline, rows[n * every : (n + 1) * every], traffic)
        send_case(sender, pipeline, case, str(percent), traffic)
    send_valid(sender, pipeline, rows[len(CASES) * every :], traffic)
    sender.flush()
    send_last(sender, pipeline)
    pipeline.until_committed(60)

    letters = pipeline.read(pipeline.dlq)
    found = letters_by_source(letters)
    came = {case.name: found.get(sender.sent[case.name][:3]) for case in CASES}
    reasons = {name: dict(x.headers())["dlq.reason"].decode() for name, x in came.items() if x is not None}
    assert reasons == {case.name: case.outcome for case in CASES if case.outcome not in NOT_LETTERS}
    for case in CASES:
        if (letter := came[case.name]) is not None:
            check_letter(letter, case.kind, case.topic, sender.sent[case.name])
    traffic.letters += len(reasons)
    assert len(letters) == traffic.letters, "something else was dead-lettered"

    output = pipeline.last_output()
    gone = {user: output.pop(f"uemb:{USER_VERSION}:{space.version}:{user}", None) for user in traffic.erased}
    assert set(gone.values()) == {None}
    check_end_state(pipeline, expected(traffic.valid, space), space, USER_VERSION, output)
    log = pipeline.log.read_text(errors="replace")
    assert "claimed epoch" in log
    assert MARK not in log
    assert "Traceback" not in log


def test_a_compacted_topic_holds_no_record_without_a_key(pipeline: Pipeline) -> None:
    refused = [case for case in ALL if case.outcome == REFUSED]
    assert refused
    for case in refused:
        errors: list[Any] = []
        producer = Producer({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
        sent = topic_name(pipeline, case.topic), case.kind.value, case.kind.key, 0
        producer.produce(*sent, on_delivery=lambda error, _, errors=errors: errors.append(error))
        producer.flush(60)
        assert len(errors) == 1
        assert errors[0] is not None


def test_every_reason_is_shown_and_listed() -> None:
    listed = json.loads(files("schemas").joinpath("dead_letter_reasons.v1.json").read_text())["enum"]
    shown = {case.outcome for case in CASES} - {*NOT_LETTERS}
    shown.add(Reason.EXPANDS_BEYOND_LIMIT)  # test_bad_input.py; no single record is one
    shown |= {Reason.UNKNOWN_SCHEMA, Reason.SCHEMA_MISMATCH}  # test_schema_registry.py; they take a registry
    assert shown == {str(reason) for reason in Reason} == set(listed)
