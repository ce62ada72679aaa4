"""The asyncio face: what the blocking reader says, and a loop that goes on meanwhile."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from kv_entries import eventually
from reader_store import (
    FALLBACK,
    ITEMS,
    META,
    OLD_ITEMS,
    USER,
    FakeStore,
    check_fallback,
    key,
    record,
    stored,
    unit,
)
from test_reader import ENCODER, Store

from stream.core.records import encode, kv_prefix
from stream.errors import ConfigError, StoreError
from stream.items.space import ItemSpace
from stream.keys import fallback_key, partition_of, user_cache_key
from stream.kv.protocol import Meta, Serving
from stream.retrieval import AsyncEmbeddingReader, get_or_build_user_embedding_async
from stream.retrieval.answers import UserEmbedding
from stream.retrieval.reader import EmbeddingReader, get_or_build_user_embedding


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "kv")
    yield store
    store.close()


def same(one: UserEmbedding, other: UserEmbedding) -> bool:
    """Every field equal."""
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(UserEmbedding))


def test_both_faces_give_the_same_answers(store: Store) -> None:
    store.put("7", stored(record("7")))
    store.put("8", kv_prefix(1, 1))
    store.put("9", kv_prefix(1, 1) + b"garbage")
    store.put("10", stored(record("10", OLD_ITEMS)), OLD_ITEMS)
    asked = [7, "8", 9, "10", "", None, np.int64(7), *range(100, 300)]  # more than one slice of answers

    async def read(pins: dict[str, str]) -> tuple[list[UserEmbedding], np.ndarray, dict[str, int]]:
        async with await AsyncEmbeddingReader.open(store.url, timeout_s=5, **pins) as reader:  # type: ignore[arg-type]
            one = [await reader.get(user) for user in asked]  # type: ignore[arg-type]
            vectors, many = await reader.get_many(asked)  # type: ignore[arg-type]
            assert all(same(a, b) for a, b in zip(one, many, strict=True))
            pair = [await reader.get_pair(user, OLD_ITEMS, USER) for user in (7, 10)]
            return [*many, *pair], vectors, reader.fallbacks

    for pins in ({}, {"item_version": OLD_ITEMS}, {"item_version": "items_v9"}):
        answers, vectors, counts = asyncio.run(read(pins))
        with EmbeddingReader.open(store.url, timeout_s=5, **pins) as reader:  # type: ignore[arg-type]
            for user in asked:
                reader.get(user)  # type: ignore[arg-type]
            want_vectors, want = reader.get_many(asked)  # type: ignore[arg-type]
            want += [reader.get_pair(user, OLD_ITEMS, USER) for user in (7, 10)]
            np.testing.assert_array_equal(vectors, want_vectors)
            assert all(same(a, b) for a, b in zip(answers, want, strict=True))
            assert counts == reader.fallbacks


async def test_the_loop_goes_on_while_a_store_hangs() -> None:
    fake, release, turns = FakeStore(), threading.Event(), 0
    reader = AsyncEmbeddingReader(lambda: fake, timeout_s=0.2)
    fake.before = lambda: release.wait(20) and None

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.01)

    turning = asyncio.create_task(turn())
    answers = await asyncio.gather(*(reader.get(user) for user in range(20)))
    assert {answer.reason for answer in answers} == {"timeout"}
    assert turns > 3
    check_fallback(await reader.get(7), "store_down")
    _, many = await reader.get_many(range(300))
    assert {answer.reason for answer in many} == {"store_down"}
    release.set()
    turning.cancel()
    await reader.close()
    check_fallback(await reader.get(7), "store_down")
    await reader.close()


async def test_a_partition_that_fails_costs_the_others_nothing() -> None:
    fake, users = FakeStore(), [str(user) for user in range(20)]
    for user in users:
        fake.entries[key(user)] = stored(record(user))
    reader = AsyncEmbeddingReader(lambda: fake, timeout_s=5)
    fake.broken = {1}
    _, answers = await reader.get_many(users)
    assert {a.user_id: a.reason for a in answers} == {
        user: "store_down" if partition_of(user.encode(), 2) == 1 else "" for user in users
    }
    await reader.close()


async def test_a_call_that_is_cancelled_blames_nobody() -> None:
    fake, release = FakeStore(), threading.Event()
    reader = AsyncEmbeddingReader(lambda: fake, timeout_s=5)
    fake.before = lambda: release.wait(20) and None
    call = asyncio.create_task(reader.get(7))
    await asyncio.to_thread(eventually, lambda: fake.calls == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    release.set()
    assert (await reader.get(7)).reason == "missing"
    await reader.close()


async def test_a_loop_that_was_held_up_does_not_blame_the_store() -> None:
    fake = FakeStore()
    reader = AsyncEmbeddingReader(lambda: fake, timeout_s=0.01)
    fake.delay_s = 0.001
    call = asyncio.create_task(reader.get(7))
    await asyncio.sleep(0)
    eventually(lambda: fake.calls == 1)  # holds the loop up
    threading.Event().wait(0.1)
    assert (await call).reason == "missing", "the answer was there in time"
    await reader.close()


def test_a_loop_that_ends_during_a_lookup_leaves_the_reader_whole() -> None:
    fake, release = FakeStore(), threading.Event()
    reader = EmbeddingReader(lambda: fake, timeout_s=5)
    other = AsyncEmbeddingReader(lambda: fake, timeout_s=5)
    fake.before = lambda: release.wait(20) and None

    async def begin() -> None:
        call = asyncio.create_task(other.get(7))
        await asyncio.to_thread(eventually, lambda: fake.calls == 1)
        call.cancel()

    asyncio.run(begin())
    release.set()
    assert reader.get(7).reason == "missing"
    assert asyncio.run(other.get(7)).reason == "missing", "in another loop"
    reader.close()
    asyncio.run(other.close())


async def test_opening_raises_what_the_blocking_reader_raises(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="start a worker first"):
        await AsyncEmbeddingReader.open(f"rocksdb://{tmp_path}/kv")
    with pytest.raises(ConfigError):
        await AsyncEmbeddingReader.open("mysql://x")
    reader = await AsyncEmbeddingReader.open(f"rocksdb://{tmp_path}/kv", fallback=unit(5))
    check_fallback(await reader.get(7), "store_down", unit(5))
    assert (await reader.get_many([1, 2]))[0].shape == (2, 8)
    await reader.close()


# -- versions


def two_versions() -> tuple[FakeStore, list[Meta]]:
    """A store with all users in two versions of different dimensions, and the shared record while each is served."""
    fake = FakeStore()
    dims = {ITEMS: 8, OLD_ITEMS: 5}
    fallbacks = {fallback_key(v, USER): encode(record("fallback", v, vector=unit(1, d))) for v, d in dims.items()}
    for version, dim in dims.items():
        for user in range(200):
            vector = unit(user, dim)
            fake.entries[key(str(user), version)] = stored(record(str(user), version, vector=vector))
    metas = [replace(META, current=Serving(USER, version, n), fallbacks=fallbacks) for n, version in enumerate(dims)]
    fake.shared = metas[0]
    return fake, metas


def check_one_version(vectors: np.ndarray, answers: list[UserEmbedding]) -> str | None:
    (version,) = {answer.item_embedding_version for answer in answers}
    assert {answer.status for answer in answers} == {"ok"}
    assert vectors.shape == (len(answers), 8 if version == ITEMS else 5)
    return version


async def test_a_flip_between_and_during_calls_is_atomic_per_call() -> None:
    fake, metas = two_versions()
    stop = threading.Event()

    def flip() -> None:
        number = 0
        while not stop.wait(0.0002):
            number += 1
            fake.shared = metas[number % 2]

    fake.before = lambda: setattr(fake, "shared", metas[fake.calls % 2])  # and during each
    flipping = threading.Thread(target=flip)
    flipping.start()
    seen = set()
    sync, reader = EmbeddingReader(lambda: fake, timeout_s=5), AsyncEmbeddingReader(lambda: fake, timeout_s=5)
    for _ in range(30):
        seen.add(check_one_version(*await reader.get_many(range(200))))
        seen.add(check_one_version(*sync.get_many(range(200))))
        answer = await reader.get(7)
        assert len(answer.vector) == (8 if answer.item_embedding_version == ITEMS else 5)
    stop.set()
    flipping.join()
    assert seen == {ITEMS, OLD_ITEMS}
    sync.close()
    await reader.close()


# -- building


async def test_it_builds_what_the_blocking_face_builds(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "items", ITEMS, list(range(30)), np.random.default_rng(3).normal(size=(30, 8)))
    own = record("fallback", vector=FALLBACK[ITEMS], user_embedding_version=ENCODER.version)
    meta = Meta("app", 2, Serving(ENCODER.version, ITEMS, 0), {fallback_key(ITEMS, ENCODER.version): encode(own)}, {})
    fake = FakeStore(meta)
    what = record("9", user_embedding_version=ENCODER.version)
    fake.entries[user_cache_key(9, ITEMS, ENCODER.version).encode()] = stored(what)
    sync, reader = EmbeddingReader(lambda: fake, timeout_s=5), AsyncEmbeddingReader(lambda: fake, timeout_s=5)
    parts = {"history": [1, 2, 3], "items": space, "encoder": ENCODER}
    for user, given in ((7, parts), (9, parts), (7, {}), (7, {**parts, "history": 7})):
        answer = await get_or_build_user_embedding_async(user, ITEMS, ENCODER.version, reader=reader, **given)  # type: ignore[arg-type]
        want = get_or_build_user_embedding(user, ITEMS, ENCODER.version, reader=sync, **given)  # type: ignore[arg-type]
        assert same(answer, want)
    assert reader.fallbacks == sync.fallbacks == {"missing": 2}
    sync.close()
    await reader.close()
