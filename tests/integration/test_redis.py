"""The pipeline on a networked store: real Kafka, real Redis, real events; what is stored equals the reference."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import warm_start
from pipeline import UEMB, Event, Pipeline, check_end_state, expected, feeding
from redis_server import RedisServer

from stream.config import load_settings
from stream.core.records import decode
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.retrieval.reader import EmbeddingReader

USER_VERSION = load_settings().versioned_encoder.version
EVENTS = 10_000


@pytest.fixture
def events(films: Dataset) -> list[Event]:
    return [(row.user_id, row.item_id, row.type, row.ts_ms) for row in films.events[:EVENTS]]


def uemb(pipeline: Pipeline, *arguments: str) -> str:
    """Run a command to its end; return what it printed."""
    ended = warm_start.run([*UEMB, *arguments], pipeline.environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_user_and_again_after_the_store_was_wiped(
    redis: RedisServer,
    events: list[Event],
    films: Dataset,
    space: ItemSpace,
    make_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline, want = make_pipeline(kv_url=redis.url), expected(events, space)
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:EVENTS])
    pipeline.until_committed()
    check_end_state(pipeline, want, space, USER_VERSION)
    assert pipeline.read(pipeline.dlq) == []
    with EmbeddingReader.open(redis.url, timeout_s=1.0) as reader:
        vectors, answers = reader.get_many([*want, "nobody"])
        assert [answer.status for answer in answers] == [*(fields["status"] for fields in want.values()), "fallback"]
        assert not any(answer.stale for answer in answers)
        assert answers[-1].reason == "missing"
        assert vectors.shape == (len(want) + 1, space.dim)
    user = next(iter(want))
    shown = json.loads(uemb(pipeline, "get", user, "--json"))
    assert (shown["user_id"], shown["status"], shown["stale"]) == (user, want[user]["status"], False)
    epochs = pipeline.epochs()
    assert json.loads(uemb(pipeline, "kv", "rebuild", "--json"))["partitions"] == [0, 1, 2, 3]
    assert pipeline.epochs() == epochs, "another worker was started beside the one that runs"
    assert pipeline.stop() == 0
    with redis.client() as client:
        keys = list(client.scan_iter(count=1000))
        assert len(keys) > len(want) + 2 * pipeline.partitions
        assert {client.pttl(key) for key in keys} == {-1}
        before = _states(pipeline)
        client.flushall()
        assert json.loads(uemb(pipeline, "kv", "rebuild", "--json"))["partitions"] == [0, 1, 2, 3]
        assert client.keys("uemb:rebuild:*") == []
    check_end_state(pipeline, want, space, USER_VERSION)
    assert _states(pipeline) == before, "a rebuild changes the epoch and nothing else"


def test_a_killed_workers_partitions_are_taken_over(
    redis: RedisServer,
    events: list[Event],
    films: Dataset,
    space: ItemSpace,
    make_pipeline: Callable[..., Pipeline],
    tmp_path: Path,
) -> None:
    first, second = (make_pipeline(kv_url=redis.url, state_dir=tmp_path / name) for name in ("first", "second"))
    second.log = tmp_path / "second.log"
    first.start()
    first.until_ready()
    alone = first.epochs()
    second.start()
    second.until(lambda: _all_higher(second.epochs(), alone), "both own partitions")
    shared = second.epochs()
    with feeding(first, films.events[:EVENTS], 2_000) as feeder:
        second.until(lambda: second.length(second.output) > EVENTS // 10, "events flow")
        first.kill()
        assert feeder.is_alive(), "all events were sent before the kill"
        second.until(lambda: _all_higher(second.epochs(), shared), "the second owns all")
    second.until_committed()
    check_end_state(second, expected(events, space), space, USER_VERSION)
    assert second.read(second.dlq) == []
    assert second.stop() == 0


def _states(pipeline: Pipeline) -> dict[str, tuple[int, bytes]]:
    """Revision and vector of every user on the output topic."""
    records = {key: decode(value) for key, value in pipeline.last_output().items() if value is not None}
    return {key: (record.revision, record.vector.tobytes()) for key, record in records.items()}


def _all_higher(new: list[int], old: list[int]) -> bool:
    return all(n > o for n, o in zip(new, old, strict=True))
