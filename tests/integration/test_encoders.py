"""Encoders side by side on one stream: published, compared, served, rolled back, retired; on the real Kafka."""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from onnx_models import linear
from pipeline import Pipeline, seed

from stream.core.encoders import AvgEncoder, MadeFor, TimeMixEncoder, VersionedEncoder
from stream.core.events import EventRow
from stream.encoders.folder import load_encoder, save_encoder
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.learning.build import build_space
from stream.retrieval.reader import EmbeddingReader, get_or_build_user_embedding
from stream.rollout.client import encoder_record
from stream.rollout.records import ControlRecord, EncoderRecord

pytestmark = pytest.mark.kafka
MIX = "mix-edd8f311"
BY_TIME = VersionedEncoder(TimeMixEncoder(), 100).version
TUNED = "user_v8"


def learned_folder(space: ItemSpace, folder: Path) -> Path:
    """The seed's features, the last item before all."""
    weights = np.concatenate([scale * np.eye(space.dim) for scale in (0.2, 0.3, 0.5)])
    save_encoder(folder, linear(weights), MadeFor(space.version, space.sha256, space.dim))
    return folder


@pytest.fixture
def learned(space: ItemSpace, tmp_path: Path) -> Path:
    return learned_folder(space, tmp_path / "learned")


def version_of(folder: Path) -> str:
    return VersionedEncoder(load_encoder(folder), 100).version


def send(pipeline: Pipeline, films: Dataset, start: int, end: int) -> None:
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[start:end])
    pipeline.until_committed()


def encoders(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Rows of `uemb encoder status` by version."""
    document = json.loads(pipeline.uemb("encoder", "status", "--json"))
    return {row["user_version"]: row for row in document["encoders"]}


def users_of(films: Dataset, end: int) -> set[str]:
    return {row.user_id for row in films.events[:end]}


def busiest(films: Dataset, end: int) -> str:
    return Counter(row.user_id for row in films.events[:end]).most_common(1)[0][0]


@pytest.mark.slow
def test_encoders_side_by_side_from_their_publication_to_their_removal(
    films: Dataset, space: ItemSpace, learned: Path, make_pipeline: Callable[..., Pipeline]
) -> None:
    """Every kind of encoder on one stream, each verified against its formula; one after another is served."""
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, films, 0, 3_000)
    users, user, name = users_of(films, 3_000), busiest(films, 3_000), version_of(learned)
    assert "is not known" in pipeline.uemb("encoder", "activate", "avg-0", code=2)
    assert "is served already" in pipeline.uemb("encoder", "activate", MIX)
    assert "is published already" in pipeline.uemb("encoder", "publish", "mix")
    assert "no earlier encoder" in pipeline.uemb("encoder", "rollback", code=2)

    pipeline.uemb("encoder", "publish", str(learned), "--wait")
    pipeline.uemb("encoder", "publish", "mix_time", "--wait")
    params = ("--params", "decay=0.3", "--type-weights", "like=2.0", "--as", TUNED)
    pipeline.uemb("encoder", "publish", "avg", *params, "--wait")
    assert "is published already" in pipeline.uemb("encoder", "publish", "avg", *params)
    assert "names another encoder" in pipeline.uemb("encoder", "publish", "avg", "--as", TUNED, code=2)
    rows = encoders(pipeline)
    assert {version: row["state"] for version, row in rows.items()} == {
        MIX: "served",
        name: "prepare",
        BY_TIME: "prepare",
        TUNED: "prepare",
    }
    assert {(row["covered"], row["partitions"], row["item_version"]) for row in rows.values()} == {(4, 4, "films_v1")}
    assert {row["done"] for version, row in rows.items() if version != MIX} == {len(users)}
    assert rows[TUNED]["params"] == {"decay": 0.3}
    line = pipeline.uemb("encoder", "status", TUNED)
    assert "user_v8: prepare, avg (decay 0.3) with films_v1, covers 4 of 4" in line
    found = json.loads(pipeline.uemb("encoder", "status", name, "--compare", "20", "--json"))["comparison"]
    assert (found["served"]["user_version"], found["other"]["user_version"]) == (MIX, name)
    assert 0.3 < found["overlap"] < 1  # other vectors, of the same histories
    assert 0.3 < found["cosine"] < 1

    send(pipeline, films, 3_000, 4_000)  # all are kept current
    users = users_of(films, 4_000)
    pipeline.check(len(users))
    assert set(pipeline.verified) == {f"{version}:films_v1" for version in (MIX, name, BY_TIME, TUNED)}

    history = [row.item_id for row in films.events[:4_000] if row.user_id == user][-100:]
    with (
        EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as following,
        EmbeddingReader.open(pipeline.kv_url, user_version=name, timeout_s=1.0) as pinned,
    ):
        assert following.get(user).user_embedding_version == MIX
        assert pinned.get(user).user_embedding_version == name
        by_hand = VersionedEncoder(AvgEncoder(0.3, {"like": 2.0}), 100, TUNED)
        stored = get_or_build_user_embedding(user, "films_v1", TUNED, reader=following)
        assert stored.status == "ok"
        assert by_hand.version == stored.user_embedding_version
        new = get_or_build_user_embedding(
            "nobody", "films_v1", name, reader=following, history=history, items=space, encoder=load_and_name(learned)
        )
        assert new.status == "ok"
        pipeline.uemb("encoder", "activate", name)
        pipeline.until(lambda: following.get(user).user_embedding_version == name, "readers change over")
        assert np.array_equal(following.get(user).vector, pinned.get(user).vector)
        assert "is served; activate another" in pipeline.uemb("encoder", "retire", name, code=2)
        pipeline.uemb("encoder", "rollback")
        pipeline.until(lambda: following.get(user).user_embedding_version == MIX, "readers go back")
        pipeline.uemb("encoder", "activate", TUNED)
        pipeline.until(lambda: following.get(user).user_embedding_version == TUNED, "and to a third")
        pipeline.uemb("encoder", "retire", MIX, "--wait")  # that of the settings
        pipeline.uemb("encoder", "retire", name, "--wait")
        assert pinned.get(user).reason in ("version_missing", "missing")
        assert following.get(user).user_embedding_version == TUNED
    assert pipeline.stop() == 0

    pipeline.start()  # UEMB_ENCODER still names the retired one
    pipeline.until_ready()
    send(pipeline, films, 4_000, 4_500)
    pipeline.check(len(users_of(films, 4_500)))
    assert set(pipeline.verified) == {f"{BY_TIME}:films_v1", f"{TUNED}:films_v1"}
    left = {key.split(":")[1] for key, value in pipeline.last_output().items() if value is not None}
    assert left == {BY_TIME, TUNED}
    assert {version: row["state"] for version, row in encoders(pipeline).items()} == {
        MIX: "retired",
        name: "retired",
        BY_TIME: "prepare",
        TUNED: "served",
    }
    pipeline.uemb("encoder", "publish", "mix", "--wait")  # and it comes back
    pipeline.check(len(users_of(films, 4_500)))
    assert f"{MIX}:films_v1" in pipeline.verified
    assert pipeline.stop() == 0


def load_and_name(folder: Path) -> VersionedEncoder:
    return VersionedEncoder(load_encoder(folder), 100)


@pytest.mark.slow
def test_new_items_and_an_encoder_that_was_learned_from_them_are_served_as_one(
    films: Dataset, learned: Path, tmp_path: Path, make_pipeline: Callable[..., Pipeline]
) -> None:
    """From one table to two, and from the mixture to learned encoders: no reader ever sees a pair that is none."""
    one_table = tmp_path / "one-table"
    build_space(films.events, one_table, "films_v2", "ppmi", dim=32)
    second = learned_folder(ItemSpace.load(one_table), tmp_path / "learned-2")
    first_name, second_name = version_of(learned), version_of(second)
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, films, 0, 2_000)
    user = busiest(films, 2_000)
    assert "which is not published" in pipeline.uemb("encoder", "publish", str(second), code=2)
    pipeline.uemb("encoder", "publish", str(learned), "--wait")
    pipeline.uemb("encoder", "activate", first_name)
    pipeline.uemb("items", "publish", str(one_table), "--wait")
    refusal = pipeline.uemb("items", "activate", "films_v2", code=2)
    assert f"encoder {first_name} is served, and was made for item version films_v1" in refusal
    pipeline.uemb("encoder", "publish", str(second), "--wait")

    seen: list[tuple[str, str, int]] = []
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as following:

        def serves(pair: tuple[str, str]) -> bool:
            found = following.get(user)
            if found.reason not in ("timeout", "store_down"):
                now = (found.user_embedding_version, found.item_embedding_version, len(found.vector))
                if seen[-1:] != [now]:
                    seen.append(now)
            return seen[-1:] != [] and seen[-1][:2] == pair

        pipeline.until(lambda: serves((first_name, "films_v1")), "the first is served")
        seen.clear()
        pipeline.until(lambda: serves((first_name, "films_v1")), "the first is served")
        pipeline.uemb("encoder", "activate", second_name, "--wait")
        pipeline.until(lambda: serves((second_name, "films_v2")), "both at once")
        pipeline.uemb("encoder", "rollback")
        pipeline.until(lambda: serves((first_name, "films_v1")), "and back")
        pipeline.uemb("encoder", "activate", MIX)
        pipeline.until(lambda: serves((MIX, "films_v1")), "a formula on the same items")
        pipeline.uemb("items", "activate", "films_v2")
        pipeline.until(lambda: serves((MIX, "films_v2")), "and on the others")
    assert seen == [
        (first_name, "films_v1", 48),
        (second_name, "films_v2", 32),
        (first_name, "films_v1", 48),
        (MIX, "films_v1", 48),
        (MIX, "films_v2", 32),
    ]
    send(pipeline, films, 2_000, 2_500)
    pipeline.check(len(users_of(films, 2_500)))
    assert set(pipeline.verified) == {
        f"{MIX}:films_v1",
        f"{MIX}:films_v2",
        f"{first_name}:films_v1",
        f"{second_name}:films_v2",
    }
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_an_encoder_that_workers_can_not_load_is_refused_and_serving_goes_on(
    films: Dataset, learned: Path, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, films, 0, 1_000)
    name = version_of(learned)
    away = learned.with_name("away")
    # what one host has and the worker's lacks: said of a folder that is gone by the time it is looked at
    said = json.loads(pipeline.uemb("encoder", "check", str(learned), "--json"))
    assert said["features"] == ["mean", "mean:5", "last"]
    shutil.copytree(learned, away)
    record = {
        "user_version": name,
        "state": "prepare",
        "hash": load_and_name(learned).hash,
        "encoder": "learned",
        "uri": str(learned.with_name("nowhere")),
        "item_version": "films_v1",
    }
    pipeline.say(pipeline.item_versions, f"user-version:{name}".encode(), json.dumps(record).encode())
    pipeline.until(lambda: encoders(pipeline).get(name, {}).get("refused"), "it is refused")
    assert "can't be read" in encoders(pipeline)[name]["refused"]
    assert "was refused" in pipeline.uemb("encoder", "activate", name, code=2)
    other = {**record, "user_version": "user_v9", "uri": str(learned), "hash": "ab" * 32}
    pipeline.say(pipeline.item_versions, b"user-version:user_v9", json.dumps(other).encode())
    pipeline.until(lambda: encoders(pipeline).get("user_v9", {}).get("refused"), "the other is refused")
    assert "is not what was published" in encoders(pipeline)["user_v9"]["refused"]
    unknown = {"user_version": "new-1", "state": "prepare", "hash": "ab" * 32, "encoder": "attention"}
    pipeline.say(pipeline.item_versions, b"user-version:new-1", json.dumps(unknown).encode())
    pipeline.until(lambda: encoders(pipeline).get("new-1", {}).get("refused"), "a kind of a later release is refused")
    assert "upgrade this worker" in encoders(pipeline)["new-1"]["refused"]
    send(pipeline, films, 1_000, 1_500)
    pipeline.check(len(users_of(films, 1_500)))
    assert set(pipeline.verified) == {f"{MIX}:films_v1"}
    pipeline.uemb("encoder", "publish", str(learned), "--wait")  # mended, it is published again
    pipeline.check(len(users_of(films, 1_500)))
    assert set(pipeline.verified) == {f"{MIX}:films_v1", f"{name}:films_v1"}
    assert pipeline.stop() == 0


def test_a_worker_whose_own_encoder_is_learned(
    films: Dataset, learned: Path, tmp_path: Path, make_pipeline: Callable[..., Pipeline]
) -> None:
    other_items = tmp_path / "other"
    build_space(films.events[:20_000], other_items, "films_v9", "ppmi", dim=32)
    pipeline = make_pipeline(encoder="learned", encoder_folder=learned)
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, films, 0, 1_000)
    pipeline.check(len(users_of(films, 1_000)))
    assert set(pipeline.verified) == {f"{version_of(learned)}:films_v1"}
    assert pipeline.stop() == 0
    pipeline.environment["UEMB_ITEMS"] = str(other_items)
    pipeline.start()
    assert pipeline.wait() == 2
    assert "was made for item version films_v1, not for films_v9" in pipeline.tail()
    pipeline.environment["UEMB_ENCODER_FOLDER"] = str(tmp_path / "nowhere")
    assert "UEMB_ENCODER_FOLDER: encoder" in pipeline.uemb("worker", code=2)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["encoder", "items"])
def test_what_is_said_while_the_work_on_all_users_goes_on_counts_in_the_end(
    what: str, films: Dataset, space: ItemSpace, tmp_path: Path, make_pipeline: Callable[..., Pipeline]
) -> None:
    """Retired while it is being covered, published again while it is being removed: the worker follows, and lives."""
    rng = random.Random(seed())
    rows = [EventRow(str(user), films.events[user].item_id, "view", 1_700_000_000_000) for user in range(20_000)]
    published: EncoderRecord | ControlRecord
    if what == "items":
        other = ItemSpace.save(
            tmp_path / "v2", "flapping", [n.decode() for n in space.ids], space.vectors, metric="dot"
        )
        published = ControlRecord(other.version, str(tmp_path / "v2"), other.sha256, "prepare")
    else:
        published = encoder_record(VersionedEncoder(AvgEncoder(0.3), 100, "flapping"), None, "prepare")
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(rows)
    pipeline.until_committed()
    for _ in range(8):
        for state in ("prepare", "retired"):
            key, value = replace(published, state=state).encode()
            pipeline.say(pipeline.item_versions, key, value)
            time.sleep(rng.uniform(0, 0.6))  # somewhere in the work on 20,000 users, or after it
    pipeline.say(pipeline.item_versions, *published.encode())
    group = "items" if what == "items" else "encoder"
    pipeline.uemb(group, "status", "flapping", "--wait")
    pipeline.check(len(rows))
    assert any("flapping" in pair for pair in pipeline.verified)
    pipeline.uemb(group, "retire", "flapping", "--wait")
    left = [key for key, value in pipeline.last_output().items() if ":flapping:" in key and value is not None]
    assert left == []
    assert pipeline.stop() == 0
