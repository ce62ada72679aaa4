"""The pipeline on a Redis cluster: erasures, a rollout with its removals, and rebuilds by hand, seen from the store."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Producer
from pipeline import Pipeline, event_json
from redis_cluster import RedisCluster

from stream.items.space import ItemSpace
from stream.retrieval.reader import EmbeddingReader

NOW_MS = time.time_ns() // 1_000_000
USERS = [f"user-{n}" for n in range(40)]
ERASED = "user-7"


@pytest.fixture(scope="module")
def item_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty items in eight dimensions: what is tested here needs no real ones."""
    return saved(tmp_path_factory.mktemp("items") / "v1", "items_v1", 8)


def saved(folder: Path, version: str, dim: int) -> Path:
    ItemSpace.save(folder, version, range(50), np.random.default_rng(dim).normal(size=(50, dim)))
    return folder


def send(pipeline: Pipeline) -> None:
    """Some events of each user, hours ago."""
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random", "log_level": 2})
    for number, user in enumerate(USERS):
        for n in range(4):
            event = event_json(user, str((number + 7 * n) % 50), "view", NOW_MS - 7_200_000 + n)
            producer.produce(pipeline.topics["view"], event, user)
    assert producer.flush(60) == 0


def users_stored(cluster: RedisCluster) -> dict[str, int]:
    """Size of the store's entry under each key of a user; 16 bytes are a deletion."""
    return {key.decode(): len(entry) for key, entry in cluster.everything().items() if b":user-" in key}


def test_erasures_rollouts_and_rebuilds_reach_every_server(
    cluster: RedisCluster, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    pipeline = make_pipeline(kv_url=cluster.url)
    pipeline.start()
    pipeline.until_ready()
    send(pipeline)
    pipeline.until_committed(30)
    pipeline.uemb("delete", ERASED, "--wait")
    pipeline.uemb("items", "publish", str(saved(tmp_path / "v2", "items_v2", 5)), "--wait")
    both = users_stored(cluster)
    assert len(both) == 2 * len(USERS)
    assert {key.split(":")[2] for key, size in both.items() if size == 16} == {"items_v1", "items_v2"}
    assert {key.split(":")[3] for key, size in both.items() if size == 16} == {ERASED}
    pipeline.uemb("items", "activate", "items_v2")
    pipeline.uemb("items", "retire", "items_v1", "--wait")
    left = users_stored(cluster)
    assert left == {key: size for key, size in both.items() if ":items_v2:" in key}
    assert "4 partitions rebuilt" in pipeline.uemb("kv", "rebuild")
    assert pipeline.stop() == 0
    assert users_stored(cluster) == left
    cluster.empty()
    assert "4 partitions rebuilt" in pipeline.uemb("kv", "rebuild")
    assert users_stored(cluster) == left
    assert not [key for key in cluster.everything() if b":rebuild:" in key]
    with EmbeddingReader.open(cluster.url, timeout_s=1.0) as reader:
        answers = reader.get_many(USERS)[1]
    assert {answer.user_id for answer in answers if answer.reason == "erased"} == {ERASED}
    assert sum(answer.status == "ok" for answer in answers) == len(USERS) - 1
    assert {answer.item_embedding_version for answer in answers} == {"items_v2"}
