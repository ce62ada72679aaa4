"""Limits by design: a user with half of the traffic, a partition without any, an event now and then, small memory."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kafka_broker import PATIENT, KafkaBroker, why_unavailable
from pipeline import Event, Pipeline, check_end_state, expected

from stream.config import load_settings
from stream.core.events import EventRow
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.keys import partition_of
from stream.retrieval.reader import EmbeddingReader

USER_VERSION = load_settings().versioned_encoder.version
#: Longer than a busy machine keeps a client from a request that is under way.
IDLE_MS = 3_000


def send(pipeline: Pipeline, events: list[EventRow]) -> None:
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(events)


def check_all(pipeline: Pipeline, events: list[EventRow], space: ItemSpace) -> None:
    check_end_state(pipeline, expected(map(_event, events), space), space, USER_VERSION)
    assert pipeline.read(pipeline.dlq) == []


def _event(row: EventRow) -> Event:
    return (row.user_id, row.item_id, row.type, row.ts_ms)


def test_one_user_with_half_of_the_traffic_in_a_small_cache(
    films: Dataset, space: ItemSpace, make_pipeline: Callable[..., Pipeline]
) -> None:
    events: list[EventRow] = []
    for n, row in enumerate(films.events[::5]):  # 20,000 events of 943 users, a third of whom fit in memory
        events += [row, EventRow("hot", row.item_id, "view", films.events[0].ts_ms + n)]
    pipeline = make_pipeline(hot_users=256)
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, events)
    pipeline.until_committed()
    check_all(pipeline, events, space)
    assert pipeline.stop() == 0


def test_a_partition_without_users_is_idle_and_not_stale(
    films: Dataset, space: ItemSpace, make_pipeline: Callable[..., Pipeline]
) -> None:
    events = [row for row in films.events[:5_000] if partition_of(row.user_id.encode(), 4) != 3]
    nobody = next(u for u in map(str, range(10_000, 20_000)) if partition_of(u.encode(), 4) == 3)
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, events)
    pipeline.until_committed()
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        time.sleep(1.5)  # longer than a heartbeat takes
        found = [reader.get(user) for user in (nobody, events[0].user_id)]
    assert [(u.reason, u.stale) for u in found] == [("missing", False), ("", False)]
    check_all(pipeline, events, space)
    assert pipeline.stop() == 0


@pytest.fixture
def impatient_kafka() -> Iterator[KafkaBroker]:
    """A broker that closes connections after some seconds without use, as others do after ten minutes."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with KafkaBroker({**PATIENT, "connections.max.idle.ms": str(IDLE_MS)}) as broker:
        yield broker


@pytest.mark.slow
def test_an_event_now_and_then_after_all_connections_were_closed(
    impatient_kafka: KafkaBroker, films: Dataset, space: ItemSpace, unique: str, tmp_path: Path, item_folder: Path
) -> None:
    pipeline = Pipeline(impatient_kafka.bootstrap, unique, tmp_path, item_folder)
    try:
        pipeline.start()
        pipeline.until_ready()
        epochs = pipeline.epochs()
        for n in range(3):
            send(pipeline, films.events[n : n + 1])
            pipeline.until_committed(15)
            time.sleep(2.5 * IDLE_MS / 1000)
        check_all(pipeline, films.events[:3], space)
        assert pipeline.epochs() == epochs, "the worker lost its partitions meanwhile"
        assert pipeline.stop() == 0
    finally:
        pipeline.close()
