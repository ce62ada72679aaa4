"""Another item version without downtime: published, covered, served, rolled back, retired; on the real Kafka."""

import asyncio
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline import Pipeline
from redis_server import RedisServer
from topic_admin import recreate_topic

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.kv.protocol import Meta
from stream.kv.stores import open_writer
from stream.learning.build import build_space
from stream.retrieval.reader import EmbeddingReader

pytestmark = pytest.mark.kafka
FIRST = 5_000


@pytest.fixture(scope="module")
def second_folder(films: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Item vectors learned anew from all of the films' stream, in more dimensions."""
    folder = tmp_path_factory.mktemp("second") / "v2"
    build_space(films.events, folder, "films_v2", dim=64, share=1.0)
    return folder


def send(pipeline: Pipeline, films: Dataset, start: int, end: int) -> None:
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[start:end])
    pipeline.until_committed()


def versions(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Rows of `uemb items status` by version."""
    document = json.loads(pipeline.uemb("items", "status", "--json"))
    return {row["version"]: row for row in document["versions"]}


def users_of(films: Dataset, end: int) -> set[str]:
    return {row.user_id for row in films.events[:end]}


@pytest.mark.slow
@pytest.mark.parametrize("store", ["rocksdb", "redis"])
def test_a_version_from_its_publication_to_the_removal_of_the_one_before(
    store: str,
    films: Dataset,
    second_folder: Path,
    make_pipeline: Callable[..., Pipeline],
    request: pytest.FixtureRequest,
) -> None:
    redis: RedisServer | None = request.getfixturevalue("redis") if store == "redis" else None
    pipeline = make_pipeline(**({"kv_url": redis.url} if redis else {}))
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, films, 0, FIRST)
    users = users_of(films, FIRST)
    assert "is not known" in pipeline.uemb("items", "activate", "films_v2", code=2)
    assert "is served already" in pipeline.uemb("items", "activate", "films_v1")
    assert "no earlier item version" in pipeline.uemb("items", "rollback", code=2)

    pipeline.uemb("items", "publish", str(second_folder), "--wait")
    assert "published already" in pipeline.uemb("items", "publish", str(second_folder))  # twice is once
    rows = versions(pipeline)
    assert (rows["films_v1"]["state"], rows["films_v2"]["state"]) == ("served", "prepare")
    assert rows["films_v2"]["covered"] == rows["films_v2"]["partitions"] == 4
    assert rows["films_v2"]["done"] == len(users)
    compared = json.loads(pipeline.uemb("items", "status", "films_v2", "--compare", "20", "--json"))["comparison"]
    assert [compared[side]["dim"] for side in ("served", "other")] == [48, 64]
    assert compared["compared"] + round(20 * compared["other"]["fallback_share"]) == 20
    assert 0.2 < compared["overlap"] < 1  # learned from nearly the same events, but not the same
    pipeline.check(len(users))
    assert pipeline.verified_items == {"films_v1", "films_v2"}

    with (
        EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as following,
        EmbeddingReader.open(pipeline.kv_url, item_version="films_v2", timeout_s=1.0) as pinned,
    ):
        user = Counter(row.user_id for row in films.events[:FIRST]).most_common(1)[0][0]  # few events are a fallback
        assert following.get(user).item_embedding_version == "films_v1"
        assert len(pinned.get(user).vector) == 64
        pipeline.uemb("items", "activate", "films_v2")
        pipeline.until(lambda: following.get(user).item_embedding_version == "films_v2", "readers change over")
        assert np.array_equal(following.get(user).vector, pinned.get(user).vector)
        send(pipeline, films, FIRST, FIRST + 2_000)  # both are kept current
        users = users_of(films, FIRST + 2_000)
        pipeline.check(len(users))
        assert "is served" in pipeline.uemb("items", "retire", "films_v2", code=2)
        pipeline.uemb("items", "rollback")
        pipeline.until(lambda: following.get(user).item_embedding_version == "films_v1", "readers go back")
        pipeline.uemb("items", "rollback")
        pipeline.until(lambda: following.get(user).item_embedding_version == "films_v2", "and forth")
        pipeline.uemb("items", "retire", "films_v1", "--wait")
        found = following.get(user)
        while found.reason in ("timeout", "store_down"):  # a second is not long on a busy machine
            found = following.get(user)
        assert found.status == "ok", found.reason

    send(pipeline, films, FIRST + 2_000, FIRST + 3_000)
    pipeline.check(len(users_of(films, FIRST + 3_000)))
    assert pipeline.verified_items == {"films_v2"}
    output = pipeline.last_output()
    gone = {key: value for key, value in output.items() if ":films_v1:" in key}
    assert set(gone.values()) == {None}
    assert len(gone) == len(users)
    assert set(pipeline.entries({key.rsplit(":", 1)[1]: key for key in gone}).values()) == {None}
    assert pipeline.stop() == 0
    pipeline.start()  # UEMB_ITEMS still names the retired one
    pipeline.until_ready()
    assert set(versions(pipeline)) == {"films_v1", "films_v2"}
    assert "item versions films_v2 (" in pipeline.tail()
    assert pipeline.stop() == 0


def damaged(folder: Path, into: Path, damage: str) -> Path:
    """A copy of an item space with something wrong."""
    shutil.copytree(folder, into)
    vectors = into / "vectors.npy"
    data = bytearray(vectors.read_bytes())
    if damage == "hash":
        data[-1] ^= 1
        vectors.write_bytes(data)
    else:
        vectors.unlink()
    if damage == "pipe":
        os.mkfifo(vectors)
    return into


@pytest.mark.parametrize("damage", [*(pytest.param(d, marks=pytest.mark.slow) for d in ("hash", "missing")), "pipe"])
def test_a_version_that_breaks_after_it_was_checked_is_refused_and_serving_goes_on(
    damage: str, films: Dataset, second_folder: Path, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    pipeline = make_pipeline(session_timeout_s=10)
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, films, 0, 1_000)
    folder = tmp_path / "v2"
    shutil.copytree(second_folder, folder)
    record = json.dumps(
        {"version": "films_v2", "uri": str(folder), "sha256": ItemSpace.load(folder).sha256, "state": "prepare"}
    )
    shutil.rmtree(folder)
    damaged(second_folder, folder, damage)
    assert "vectors.npy" in pipeline.uemb("items", "publish", str(folder), code=2)  # the command looks first
    pipeline.say(pipeline.item_versions, b"films_v2", record.encode())
    pipeline.until(lambda: versions(pipeline)["films_v2"]["refused"] is not None, "it is refused")
    assert "vectors.npy" in versions(pipeline)["films_v2"]["refused"]
    assert "was refused" in pipeline.uemb("items", "activate", "films_v2", "--force", code=2)
    send(pipeline, films, 1_000, 2_000)
    pipeline.check(len(users_of(films, 2_000)))
    assert pipeline.verified_items == {"films_v1"}
    shutil.rmtree(folder)
    shutil.copytree(second_folder, folder)
    pipeline.process.send_signal(signal.SIGSTOP)  # the refusal is of the record before: it says nothing of this one
    assert "published again" in pipeline.uemb("items", "publish", str(folder))  # mended
    assert versions(pipeline)["films_v2"]["refused"] is None
    pipeline.process.send_signal(signal.SIGCONT)
    pipeline.uemb("items", "status", "films_v2", "--wait")
    pipeline.check(len(users_of(films, 2_000)))
    assert pipeline.verified_items == {"films_v1", "films_v2"}
    assert pipeline.stop() == 0


def test_records_that_say_nothing_are_passed_over(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    nonsense = [b"", b"{", b"[]", b'{"version": "v"}', b'{"version": "current", "state": "prepare"}', None]
    for value in nonsense:
        pipeline.say(pipeline.item_versions, b"v", value)
        pipeline.say(pipeline.item_status, b"v", value)
    send(pipeline, films, 0, 1_000)
    assert set(versions(pipeline)) == {"films_v1"}
    pipeline.check(len(users_of(films, 1_000)))
    assert pipeline.stop() == 0
    assert pipeline.log.read_text().count("it is passed over") == 2 * len(nonsense) - 2  # a null withdraws


@pytest.mark.slow
@pytest.mark.parametrize("what", ["encoder", "folder"])
def test_another_encoder_or_folder_covers_the_users_who_are_silent_before_it_is_served(
    what: str, films: Dataset, second_folder: Path, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, films, 0, 2_000)
    users = sorted(users_of(films, 2_000))
    assert pipeline.stop() == 0
    changed = {"UEMB_ENCODER": "avg"} if what == "encoder" else {"UEMB_ITEMS": str(second_folder)}
    before = dict(pipeline.environment)
    for environment in ({**before, **changed}, before):  # and back: what was covered once is not current any more
        pipeline.environment = environment
        pipeline.start()
        pipeline.until_ready()
        with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
            new = environment is not before
            wanted = {"encoder": ("mix-", "avg-"), "folder": ("films_v1", "films_v2")}[what][new]

            def is_served(reader: EmbeddingReader = reader, user: str = users[0], wanted: str = wanted) -> bool:
                found = reader.get(user)
                return wanted in f"{found.user_embedding_version} {found.item_embedding_version}"

            pipeline.until(is_served, "it is served")
            assert {found.reason for found in reader.get_many(users)[1]} <= {"", "too_short_history", "no_known_items"}
        pipeline.check(len(users))
        if new:
            send(pipeline, films, 2_000, 2_500)
            users = sorted(users_of(films, 2_500))
        elif what == "encoder":
            check_retired_user_version(pipeline)
        assert pipeline.stop() == 0


def check_retired_user_version(pipeline: Pipeline) -> None:
    """What the encoder before has left on topic and in the store is removed, and nothing else."""

    def last(user_version: str) -> dict[str, bytes | None]:
        return {k: v for k, v in pipeline.last_output().items() if k.split(":")[1] == user_version}

    served, left = json.loads(pipeline.uemb("encoder", "status", "--json"))["encoders"]
    name = left["user_version"]
    assert (served["user_version"], served["state"]) == ("mix-edd8f311", "served")
    assert (name[:4], left["state"], left["removed"]) == ("avg-", "left", 0)
    assert all(last(name).values())
    erased = next(iter(last(name))).split(":", 3)[3]
    pipeline.uemb("delete", erased, "--wait")  # reaches what nobody keeps current, too
    pipeline.until_committed()
    assert [key for key, value in last(name).items() if value is None] == [f"uemb:{name}:films_v1:{erased}"]
    with EmbeddingReader.open(pipeline.kv_url, user_version=name, item_version="films_v1", timeout_s=1.0) as reader:
        assert reader.get(erased).reason == "missing"
        assert reader.get(next(key for key, value in last(name).items() if value).split(":", 3)[3]).reason != "missing"
    ours = {key for key, value in last("mix-edd8f311").items() if value}
    assert "is served; activate another" in pipeline.uemb("encoder", "retire", "mix-edd8f311", code=2)
    assert "is not known" in pipeline.uemb("encoder", "retire", "mix-0", code=2)
    pipeline.uemb("encoder", "retire", name, "--wait")
    gone = last(name)
    assert set(gone.values()) == {None}
    assert set(pipeline.entries({key.split(":", 3)[3]: key for key in gone}).values()) == {None}
    assert all(last("mix-edd8f311")[key] for key in ours)
    with EmbeddingReader.open(pipeline.kv_url, user_version=name, item_version="films_v1", timeout_s=1.0) as reader:
        pipeline.until(lambda: reader.get(1).reason == "version_missing", "its fallback is gone")
    assert f"{name}: retired, removed in 4 of 4" in pipeline.uemb("encoder", "status")


def test_an_activation_counts_after_the_control_topic_was_made_anew(
    films: Dataset, second_folder: Path, redis: RedisServer, make_pipeline: Callable[..., Pipeline]
) -> None:
    """Its offsets begin again below the one that the store remembers, and what a running worker has read is void."""
    pipeline = make_pipeline(kv_url=redis.url)
    pipeline.start()
    pipeline.until_ready()
    pipeline.uemb("items", "publish", str(second_folder), "--wait")
    send(pipeline, films, 0, 1_000)
    recreate_topic(pipeline.bootstrap, pipeline.item_versions, 1, "compact")
    assert pipeline.wait() == 75
    assert f"{pipeline.item_versions}: made anew" in pipeline.tail()
    asyncio.run(activated_at(1_000_000, pipeline.kv_url))
    pipeline.start()
    pipeline.until(lambda: "was made anew" in pipeline.log.read_text(), "it is warned of")
    pipeline.until_ready()
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        user = films.events[0].user_id
        assert reader.get(user).item_embedding_version == "films_v1"
        pipeline.uemb("items", "publish", str(second_folder), "--wait")
        pipeline.uemb("items", "activate", "films_v2")
        pipeline.until(lambda: reader.get(user).item_embedding_version == "films_v2", "what was activated is served")
    assert pipeline.stop() == 0


async def activated_at(offset: int, kv_url: str) -> None:
    """Have the store's present version stem from a control record far down a topic."""
    store = open_writer(kv_url)

    def change(meta: Meta) -> Meta:
        assert meta.current is not None
        return replace(meta, current=replace(meta.current, offset=offset))

    await store.update_meta(change)
    await store.close()
