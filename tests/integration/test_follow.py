"""The example of following the topic, run as it stands on a real one: updates, an erasure, and replays out of order."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Producer
from documents import run_example
from pipeline import Pipeline, expected

from stream.config import load_settings
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.retrieval.user_matrix import UserMatrix

USER_VERSION = load_settings().versioned_encoder.version
ERASED = "7"
#: More than one event each, so that the topic holds records that are old.
USERS = ("1", "2", "5", "6", "42", ERASED)


def check(users: UserMatrix, want: dict[str, np.ndarray]) -> None:
    """Exactly these users, each with its vector."""
    assert {user for user in users.ids if user is not None} == want.keys()
    for user, vector in want.items():
        np.testing.assert_allclose(users.vectors[users.row(user)], vector, rtol=0, atol=1e-6)


def test_the_example_keeps_a_matrix_of_users_current(
    films: Dataset,
    space: ItemSpace,
    item_folder: Path,
    make_pipeline: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    rows = [row for user in USERS for row in [row for row in films.events if row.user_id == user][:30]]
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(rows)
    pipeline.until_committed()
    erasure = json.dumps({"user_id": ERASED, "ts": time.time_ns() // 1_000_000}).encode()
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random", "log_level": 2})
    producer.produce(pipeline.deletions, erasure, ERASED)
    assert producer.flush(60) == 0
    pipeline.until_committed()
    assert pipeline.stop() == 0

    monkeypatch.setenv("UEMB_ITEMS", str(item_folder))
    monkeypatch.setenv("UEMB_BOOTSTRAP_SERVERS", pipeline.bootstrap)
    monkeypatch.setenv("UEMB_OUTPUT_TOPIC", pipeline.output)
    names: dict[str, Any] = {}
    run_example("stream/retrieval/README.md", "follow", names)

    reference = expected([(r.user_id, r.item_id, r.type, r.ts_ms) for r in rows], space)
    assert {fields["status"] for fields in reference.values()} == {"ok"}
    want = {user: fields["vector"] for user, fields in reference.items() if user != ERASED}
    assert len(want) == len(USERS) - 1
    users = names["users"]
    check(users, want)
    film = space.vectors[space.ids.index(b"50")]
    assert names["audience"] == sorted(want, key=lambda user: -float(want[user] @ film))

    messages = pipeline.read(pipeline.output)
    assert [m.value() for m in messages].count(None) == 1
    assert len(messages) > 10 * len(USERS)
    replayed = UserMatrix(space.dim, space.version, USER_VERSION)
    rng = random.Random(5)
    logs = [[m for m in messages if m.partition() == number] for number in range(pipeline.partitions)]
    places = [0] * len(logs)
    while any(place < len(log) for place, log in zip(places, logs, strict=True)):
        number = rng.randrange(len(logs))
        for message in logs[number][places[number] : places[number] + 20]:
            replayed.apply(message.key(), message.value())
        places[number] = max(0, places[number] + rng.choice([20, 20, 20, -30]))
    check(replayed, want)
    for message in messages:
        replayed.apply(message.key(), message.value())
    check(replayed, want)
