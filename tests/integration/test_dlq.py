"""`uemb dlq`: dead letters counted, shown, and replayed once the cause is mended."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import warm_start
from kafka_broker import KafkaBroker
from pipeline import UEMB, Event, Pipeline, check_end_state, event_json, expected
from sender import Sender
from topic_admin import delete_topic

from stream.cli.dlq import replay as dlq_replay
from stream.cli.dlq.replay import Replayer
from stream.config import Settings, load_settings
from stream.core.events import EventRow
from stream.errors import DeliveryError
from stream.feed.dataset import Dataset
from stream.items.space import ItemSpace
from stream.kafka import log_reader as topic_reader
from stream.kafka.dead_letters import Header
from stream.kafka.letter_reader import Filter, read_letters
from stream.kafka.log_reader import LogConsumer
from stream.keys import partition_of

USER_VERSION = load_settings().versioned_encoder.version


@pytest.fixture(scope="module")
def kafka(own_kafka: KafkaBroker) -> KafkaBroker:
    """One that may be paused and killed."""
    return own_kafka


def uemb(pipeline: Pipeline, *args: str, code: int = 0) -> str:
    """Output of `uemb dlq`; its error line when it fails."""
    ended = warm_start.run([*UEMB, "dlq", *args], pipeline.environment)
    assert ended.returncode == code, ended.stderr
    if code:
        assert ended.stderr.count("\n") == 1
        return ended.stderr
    return ended.stdout


def documents(pipeline: Pipeline, *args: str) -> list[Any]:
    return [json.loads(line) for line in uemb(pipeline, *args, "--json").splitlines()]


def _event(row: EventRow) -> Event:
    return (row.user_id, row.item_id, row.type, row.ts_ms)


@pytest.fixture
def rows(films: Dataset) -> list[EventRow]:
    """Events of which every third is of a type that is admitted only later."""
    return [
        row._replace(type="share") if n % 3 == 0 else row._replace(type="view")
        for n, row in enumerate(films.events[:600])
    ]


def test_letters_are_replayed_after_a_fix(
    rows: list[EventRow], space: ItemSpace, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline(event_types="view:1,like:2")
    view = pipeline.topics["view"]
    pipeline.start()
    pipeline.until_ready()
    send = Sender(pipeline.bootstrap)
    misplaced = []
    for n, row in enumerate(rows):
        key, where = row.user_id.encode(), {}
        if n % 10 == 1 and row.type == "view":
            misplaced.append(row)
            where = {"partition": (partition_of(key, 4) + 1) % 4}
        send(view, key, event_json(row.user_id, row.item_id, row.type, row.ts_ms), headers=[("trace", b"a")], **where)
    no_key = event_json(rows[0].user_id, "7", "view", rows[0].ts_ms)
    send(view, None, no_key, partition=0)
    send(view, b"1", b"{" + b"x" * 500)
    send.flush()
    pipeline.until_committed()
    shares = [row for row in rows if row.type == "share"]
    counts = {d["reason"]: d["count"] for d in documents(pipeline, "list")}
    want = {"unknown_type": len(shares), "wrong_partition": len(misplaced), "null_key": 1, "not_json": 1}
    assert counts == want
    assert "  unknown_type  " + view in uemb(pipeline, "list")
    assert [d["count"] for d in documents(pipeline, "list", "--reason", "not_json", "--topic", view)] == [1]
    assert documents(pipeline, "list", "--topic", pipeline.topics["like"]) == []
    assert documents(pipeline, "list", "--until", "2020-01-01") == []
    assert len(documents(pipeline, "list", "--since", "2020-01-01T00:00:00Z", "--records")) == sum(want.values())

    # one letter whole; lists never show payload
    (record,) = documents(pipeline, "list", "--records", "--reason", "not_json")
    assert record["bytes"] == 501
    assert "xxx" not in json.dumps(record)
    (shown,) = documents(pipeline, "show", record["letter"])
    assert shown["value"] == "{" + "x" * 500
    assert shown["key"] == "1"
    assert ["dlq.reason", "not_json"] in shown["headers"]

    # nothing is sent by a rehearsal; what has no key stays where it is
    assert documents(pipeline, "replay", "--dry-run") == [
        {"sent": sum(want.values()) - 1, "dry_run": True, "left": {"keyless": 1}}
    ]
    assert pipeline.lag() == 0

    # the fix: the type is admitted now. Misplaced records go where their key belongs.
    assert pipeline.stop() == 0
    pipeline.environment["UEMB_EVENT_TYPES"] = "view:1,like:2,share:3"
    pipeline.start()
    pipeline.until_ready()
    for _ in range(2):  # the second time changes nothing
        for reason, sent in (("unknown_type", len(shares)), ("wrong_partition", len(misplaced))):
            (report,) = documents(pipeline, "replay", "--reason", reason)
            assert report == {"sent": sent, "dry_run": False, "left": {}}
        pipeline.until_committed()
        check_end_state(pipeline, expected(map(_event, rows), space), space, USER_VERSION)
    assert {d["reason"]: d["count"] for d in documents(pipeline, "list")} == want
    replayed = [r for r in pipeline.read(view) if "dlq.replayed" in dict(r.headers() or ())]
    assert len(replayed) == 2 * (len(shares) + len(misplaced))
    assert all([name for name, _ in r.headers()] == ["trace", "dlq.replayed"] for r in replayed)
    assert pipeline.stop() == 0


def test_references_are_fetched_again_and_foreign_letters_stay(
    rows: list[EventRow], space: ItemSpace, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline(dlq_max_bytes=65_536, ignored_types="impression")
    view = pipeline.topics["view"]
    pipeline.start()
    pipeline.until_ready()
    send = Sender(pipeline.bootstrap)
    row = rows[1]
    large = event_json(row.user_id, row.item_id, "share", row.ts_ms)[:-1] + b', "x": "%b"}' % (b"y" * 100_000)
    send(view, row.user_id.encode(), large)
    impression = event_json(row.user_id, row.item_id, "impression", row.ts_ms)
    send(view, row.user_id.encode(), impression)
    # what is ignored must be where its key belongs, too: its producer may send events one day
    send(view, row.user_id.encode(), impression, partition=(partition_of(row.user_id.encode(), 4) + 1) % 4)
    send.flush()
    pipeline.until_committed()
    forged = [("dlq.reason", b"unknown_type"), ("dlq.partition", b"0"), ("dlq.offset", b"0")]
    send(pipeline.dlq, b"1", b"{}", headers=[*forged, ("dlq.topic", pipeline.output.encode())])
    send(pipeline.dlq, b"1", b"no letter at all")
    send.flush()
    counts = {(d["reason"], d["topic"]): d["count"] for d in documents(pipeline, "list")}
    ours = {("unknown_type", view): 1, ("wrong_partition", view): 1}
    assert counts == {**ours, ("unknown_type", pipeline.output): 1, ("not a letter", ""): 1}
    before = len(pipeline.read(pipeline.output))
    assert pipeline.stop() == 0
    pipeline.environment["UEMB_EVENT_TYPES"] = "view:1,like:2,share:3"
    pipeline.start()
    pipeline.until_ready()
    (report,) = documents(pipeline, "replay", "--reason", "unknown_type")
    assert report == {"sent": 1, "dry_run": False, "left": {"foreign": 1}}
    pipeline.until_committed()
    assert len(pipeline.read(pipeline.output)) == before + 1
    share = (row.user_id, row.item_id, "share", row.ts_ms)
    check_end_state(pipeline, expected([share], space), space, USER_VERSION)
    assert pipeline.stop() == 0


def test_a_record_keeps_headers_of_ours_and_may_be_replayed_alone(make_pipeline: Callable[..., Pipeline]) -> None:
    """Its producer may use our names, or pass on what was dead-lettered elsewhere."""
    pipeline = make_pipeline()
    view = pipeline.topics["view"]
    pipeline.start()
    pipeline.until_ready()
    send = Sender(pipeline.bootstrap)
    own = [("dlq.reason", b"not_json"), ("dlq.value_sha256", b"0" * 64), ("dlq.topic", b"elsewhere"), ("x", None)]
    for number in range(20):
        send(view, b"1", None, headers=[*own, ("dlq.replayed", b"9:9"), ("number", b"%d" % number)])
    send.flush()
    pipeline.until_committed()
    records = documents(pipeline, "list", "--records", "--reason", "null_value")
    assert [record["bytes"] for record in records] == [0] * 20
    chosen = records[7]["letter"]
    for found in (
        documents(pipeline, "list", "--records", "--letter", chosen),
        documents(pipeline, "list", "--records", "--since", "1", "--letter", chosen),
    ):
        assert found == [records[7]]
    (shown,) = documents(pipeline, "show", chosen)
    assert shown["value"] is None
    assert ["number", "7"] in shown["headers"]
    for replays in (1, 2):  # it is still at fault: each replay adds a letter
        (report,) = documents(pipeline, "replay", "--letter", chosen)
        assert report == {"sent": 1, "dry_run": False, "left": {}}
        pipeline.until_committed()
        assert len(documents(pipeline, "list", "--records")) == 20 + replays
    again = pipeline.read(view)[-1]
    assert (again.key(), again.value()) == (b"1", None)
    assert again.headers() == [*own, ("number", b"7"), ("dlq.replayed", chosen.encode())]
    assert documents(pipeline, "list", "--records", "--letter", "0:99999") == []
    assert pipeline.stop() == 0


@pytest.fixture
def letters(make_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch) -> tuple[Pipeline, Settings]:
    """Letters of large values and one that is a reference, of a worker that has ended; and its settings."""
    pipeline = make_pipeline(dlq_max_bytes=500_000)
    pipeline.start()
    pipeline.until_ready()
    send = Sender(pipeline.bootstrap)
    send(pipeline.topics["view"], b"1", b"{" + b"x" * 600_000)
    for number in range(8):
        send(pipeline.topics["view"], b"1", random.Random(number).randbytes(400_000))
    send.flush()
    pipeline.until_committed()
    assert pipeline.stop() == 0
    for name, value in pipeline.environment.items():
        if name.startswith("UEMB_"):
            monkeypatch.setenv(name, value)
    return pipeline, load_settings()


def test_reading_starts_where_the_letters_may_be(letters: tuple[Pipeline, Settings]) -> None:
    told: list[tuple[int, int | None]] = []
    found = list(read_letters(letters[1], Filter(), lambda *at: told.append(at)))
    assert max(told) == (9, 9)
    told.clear()
    assert list(read_letters(letters[1], Filter(letters=frozenset([(found[4].partition, found[4].offset)])))) == [
        found[4]
    ]
    since = Filter(since_ms=found[4].timestamp_ms)
    late = list(read_letters(letters[1], since, lambda *at: told.append(at)))
    assert late == [letter for letter in found if letter.timestamp_ms >= found[4].timestamp_ms]
    assert max(told) == (len(late), len(late))
    assert list(read_letters(letters[1], Filter(since_ms=found[-1].timestamp_ms + 1))) == []


def test_a_topic_that_ends_to_be_read_is_an_error(
    letters: tuple[Pipeline, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_reader.read, "__defaults__", (None, 3, None))
    monkeypatch.setattr(topic_reader, "_BATCH", 1)  # and no more than a fetch is read ahead
    few = {"queued.max.messages.kbytes": 1}
    monkeypatch.setattr(topic_reader, "LogConsumer", lambda config: LogConsumer({**config, **few}))
    reading = read_letters(letters[1], Filter())
    next(reading)
    delete_topic(letters[0].bootstrap, letters[0].dlq)
    with pytest.raises(DeliveryError, match="can't be read"):
        list(reading)


def test_a_reference_whose_topic_is_silent_is_no_reference_to_nothing(
    letters: tuple[Pipeline, Settings], kafka: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_reader, "TIMEOUT_S", 3)
    monkeypatch.setattr(dlq_replay, "TIMEOUT_S", 3)
    found = list(read_letters(letters[1], Filter()))
    (reference,) = [letter for letter in found if letter.text(Header.VALUE_SHA256)]
    with Replayer(letters[1], dry_run=True) as replayer:
        assert replayer.replay([reference]).sent == 1
        kafka.pause()
        try:
            with pytest.raises(DeliveryError, match=r"view can't be read \("):
                replayer.replay([reference])
        finally:
            kafka.resume()
    delete_topic(letters[0].bootstrap, letters[0].topics["view"])
    with Replayer(letters[1], dry_run=True) as replayer:
        assert replayer.replay([reference]).left == {"gone": 1}


def test_errors_are_one_line(make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    assert pipeline.dlq in uemb(pipeline, "list", code=2)
    assert "unknown_type" in uemb(pipeline, "list", "--reason", "nonsense", code=2)
    assert "--since" in uemb(pipeline, "replay", "--since", "yesterday", code=2)
    assert "partition:offset" in uemb(pipeline, "show", "seven", code=2)
    assert "partition:offset" in uemb(pipeline, "replay", "--letter", "7", code=2)
