"""`uemb verify`: silent where all is in order, and loud about each way in which a store can be wrong."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from kafka_broker import KafkaBroker
from pipeline import Pipeline, delete_topics, event_json
from sender import Sender

from stream.config import load_settings
from stream.core.history import History
from stream.core.history_codec import HistoryCodec, stored_order
from stream.core.records import decode, encode, kv_entry, kv_prefix
from stream.feed.dataset import Dataset
from stream.items.space import ItemSpace
from stream.keys import partition_of
from stream.kv.rocksdb.writer import RocksKV

USER_VERSION = load_settings().versioned_encoder.version
ERASED = "259"  # who has the first event


def skip(pipeline: Pipeline) -> None:
    """Commit all input without processing it, as a worker that lost it would."""
    group = Consumer({"bootstrap.servers": pipeline.bootstrap, "group.id": pipeline.app_id})
    places = [TopicPartition(t, p) for t in pipeline.inputs for p in range(pipeline.partitions)]
    ends = [TopicPartition(x.topic, x.partition, group.get_watermark_offsets(x)[1]) for x in places]
    group.commit(offsets=ends, asynchronous=False)
    group.close()


def feed(pipeline: Pipeline, films: Dataset, count: int) -> int:
    """Events, a rejected record and an erasure; return how many users there are."""
    send = Sender(pipeline.bootstrap)
    rows = films.events[:count]
    for row in rows:
        send(pipeline.topics[row.type], row.user_id, event_json(*row))
    send(pipeline.topics["view"], "1", b"{")
    send(pipeline.deletions, ERASED, json.dumps({"user_id": ERASED, "ts": rows[-1].ts_ms}).encode())
    send.flush()
    pipeline.until_committed()
    return len({row.user_id for row in rows})


@pytest.fixture(scope="module")
def ended(
    kafka: KafkaBroker, films: Dataset, item_folder: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pipeline]:
    """A worker's work, and the worker has ended."""
    pipeline = Pipeline(kafka.bootstrap, "verify-ended", tmp_path_factory.mktemp("verify"), item_folder)
    try:
        pipeline.start()
        pipeline.until_ready()
        feed(pipeline, films, 3_000)
        assert pipeline.stop() == 0
        yield pipeline
    finally:
        pipeline.close()
        delete_topics(kafka.bootstrap, "verify-ended")


@pytest.mark.parametrize("output_format", ["avro", pytest.param("json", marks=pytest.mark.slow)])
def test_what_a_worker_did_is_in_order_while_it_runs_and_after(
    output_format: str, films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline(output_format=output_format)
    pipeline.start()
    pipeline.until_ready()
    users = feed(pipeline, films, 5_000)
    want = {"users": users, "whole": users, "partial": 0, "busy": 0, "differ": 0, "rejected": 1, "letterless": 0}
    want |= {"letters_checked": True, "other_versions": 0, "differences": []}
    assert pipeline.verify() == {"ok": True, **want}
    send = Sender(pipeline.bootstrap)
    for row in films.events[5_000:25_000]:
        send(pipeline.topics[row.type], row.user_id, event_json(*row))
    during = pipeline.verify("--patience", "30")  # 20,000 events are on their way
    assert (during["differ"], during["busy"], during["letterless"]) == (0, 0, 0)
    send.flush()
    pipeline.until_committed()
    assert pipeline.stop() == 0
    after = pipeline.verify()
    assert after["users"] == after["whole"] == len({row.user_id for row in films.events[:25_000]})


def test_input_that_is_not_committed_is_busy(ended: Pipeline, films: Dataset) -> None:
    send = Sender(ended.bootstrap)
    users = {row.user_id for row in films.events[3_000:3_050]}
    for row in films.events[3_000:3_050]:
        send(ended.topics[row.type], row.user_id, event_json(*row))
    send.flush()
    report = ended.verify("--patience", "1")
    assert (report["busy"], report["differ"]) == (len(users), 0)
    ended.start()
    ended.until_committed()
    assert ended.stop() == 0
    assert ended.verify()["busy"] == 0


def test_progress_is_told_in_percent(ended: Pipeline) -> None:
    assert ": 100 %\n" in ended.uemb("verify", "--partition", "0")


def test_input_that_retention_took_is_not_demanded_but_what_is_left_is(
    films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    users = feed(pipeline, films, 3_000)
    assert pipeline.stop() == 0
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap})
    view = pipeline.topics["view"]
    taken = [TopicPartition(view, p, 200) for p in range(4)]
    for future in admin.delete_records(taken).values():
        future.result()
    report = pipeline.verify()
    assert (report["partial"], report["differ"]) == (users, 0)
    send = Sender(pipeline.bootstrap)
    send(view, "1", event_json(1, 7, "view", 900_000_000_000))
    send.flush()
    skip(pipeline)
    report = pipeline.verify(code=1)
    assert report["differ"] == 1
    assert "lacks interactions" in report["differences"][0]["what"]


# -- each way to be wrong, one after another on the same stores -----------------------------------------------------


def key_of(space: ItemSpace, user: str) -> str:
    return f"uemb:{USER_VERSION}:{space.version}:{user}"


def stored(pipeline: Pipeline, key: str, user: str) -> bytes:
    entry = pipeline.entries({user: key})[user]
    assert entry is not None
    return entry


def overwrite(pipeline: Pipeline, user: str, entries: dict[str, bytes | None]) -> None:
    """Write to the store as no worker would."""
    partition = partition_of(user.encode(), pipeline.partitions)

    async def write() -> None:
        kv = RocksKV(pipeline.kv_path)
        await kv.open_partition(partition)
        db = kv._partitions[partition].db
        for key, entry in entries.items():
            if entry is None:
                del db[key.encode()]
            else:
                db[key.encode()] = entry
        await kv.close()

    asyncio.run(write())


def store_without(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    overwrite(pipeline, user, {key_of(space, user): None})


def store_with_another_vector(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    epoch, revision, body = kv_entry(stored(pipeline, key_of(space, user), user))
    record = decode(body)
    vector = record.vector.astype(np.float64)
    vector[0] += 3e-6
    vector /= np.linalg.norm(vector)
    other = encode(replace(record, vector=vector.astype(np.float32)))
    overwrite(pipeline, user, {key_of(space, user): kv_prefix(epoch, revision) + other})


def store_with_another_prefix(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    epoch, revision, body = kv_entry(stored(pipeline, key_of(space, user), user))
    overwrite(pipeline, user, {key_of(space, user): kv_prefix(epoch, revision + 1) + body})


def store_damaged(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    overwrite(pipeline, user, {key_of(space, user): stored(pipeline, key_of(space, user), user)[:-9]})


def output_with_an_older_record(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    first = next(r for r in pipeline.read(pipeline.output) if r.key().decode() == key_of(space, user))
    partition = partition_of(user.encode(), pipeline.partitions)
    producer = Producer({"bootstrap.servers": pipeline.bootstrap})
    producer.produce(pipeline.output, first.value(), first.key(), partition)
    producer.flush(60)


def output_with_a_tombstone(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    partition = partition_of(user.encode(), pipeline.partitions)
    producer = Producer({"bootstrap.servers": pipeline.bootstrap})
    producer.produce(pipeline.output, None, key_of(space, user).encode(), partition)
    producer.flush(60)


def changelog_with_an_older_record(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    last = [r.value() for r in pipeline.read(pipeline.changelog) if r.key() == user.encode()][-1]
    codec = HistoryCodec(load_settings().event_types)
    history = History.decode(last, codec, 100)
    epoch, revision = stored_order(last)
    older = History(codec, 100, history.keys, revision=revision - 1).encode(epoch)
    assert stored_order(older) == (epoch, revision - 1)
    producer = Producer({"bootstrap.servers": pipeline.bootstrap})
    producer.produce(pipeline.changelog, older, user.encode(), partition_of(user.encode(), 4))
    producer.flush(60)


def an_event_that_was_skipped(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    send = Sender(pipeline.bootstrap)
    send(pipeline.topics["like"], user, event_json(user, 50, "like", 900_000_000_000))
    send.flush()
    skip(pipeline)


def an_erasure_that_was_skipped(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    send = Sender(pipeline.bootstrap)
    send(pipeline.deletions, user, json.dumps({"user_id": user, "ts": 900_000_000_000}).encode())
    send.flush()
    skip(pipeline)


def a_user_nobody_sent(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    records = [r for r in pipeline.read(pipeline.changelog) if r.key() == user.encode()]
    stranger = next(f"x{n}" for n in range(99) if partition_of(f"x{n}".encode(), 4) == records[-1].partition())
    producer = Producer({"bootstrap.servers": pipeline.bootstrap})
    producer.produce(pipeline.changelog, records[-1].value(), stranger.encode(), records[-1].partition())
    producer.flush(60)


def a_reject_without_a_letter(pipeline: Pipeline, space: ItemSpace, user: str) -> None:
    send = Sender(pipeline.bootstrap)
    send(pipeline.topics["like"], user, b"not JSON")
    send.flush()
    skip(pipeline)


FAULTS: dict[Callable[[Pipeline, ItemSpace, str], None], str] = {
    store_without: "store: no entry",
    store_with_another_vector: "store: the vector is off by",
    store_with_another_prefix: "store: the prefix is another",
    store_damaged: "store: damaged",
    output_with_an_older_record: "output: an older record came last",
    output_with_a_tombstone: "output: no record",
    changelog_with_an_older_record: "changelog: an older record came last",
    an_event_that_was_skipped: "changelog: 1 interactions differ",
    an_erasure_that_was_skipped: "output: a record where none may be",
    a_user_nobody_sent: "interactions differ from the input's",
    a_reject_without_a_letter: "no dead letter",
}


@pytest.fixture(scope="module")
def known() -> list[dict[str, Any]]:
    """Differences that earlier cases have made."""
    return []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda case: case.__name__)
def test_each_fault_is_found(
    fault: Callable[[Pipeline, ItemSpace, str], None],
    ended: Pipeline,
    space: ItemSpace,
    films: Dataset,
    known: list[dict[str, Any]],
) -> None:
    # each case has a user of its own, who was not erased
    users = [user for user in dict.fromkeys(row.user_id for row in films.events[100:2_000]) if user != ERASED]
    user = users[2 + list(FAULTS).index(fault)]
    fault(ended, space, user)
    new = [d for d in ended.verify("--show", "100", "--patience", "0.2", code=1)["differences"] if d not in known]
    known += new
    assert len(new) == 1, new
    assert FAULTS[fault] in new[0]["what"]
    assert new[0]["partition"] == partition_of(user.encode(), 4)
