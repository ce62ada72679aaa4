"""The store in memory beyond the contract: how long it lives, who owns what, and what a test can say to it."""

import asyncio
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from kv_entries import entry, eventually

from stream.core.records import kv_entry, kv_prefix
from stream.errors import ConfigError, Fenced, StoreError
from stream.keys import epoch_key, partition_of, user_cache_key, watermark_key
from stream.kv.memory import MemoryStore
from stream.kv.stores import open_reader, open_writer
from stream.retrieval.reader import EmbeddingReader

FALLBACK = [0.6, 0.8]
make = partial(MemoryStore, "films_v1", "mix-1", fallback=FALLBACK)


@pytest.fixture
def store() -> MemoryStore:
    return make()


@pytest.fixture
def reader(store: MemoryStore) -> Iterator[EmbeddingReader]:
    with EmbeddingReader.open(store.url, timeout_s=5) as reader:
        yield reader


def lookup(user: str) -> tuple[bytes, bytes]:
    return user.encode(), user_cache_key(user, "films_v1", "mix-1").encode()


# -- how long it lives


def test_it_lives_as_long_as_somebody_holds_it_or_a_hold_on_it() -> None:
    url = make(name="short").url
    gc.collect()
    with pytest.raises(StoreError, match="no store"):
        open_reader(url)
    make(name="short")  # the name is free
    for opens in (open_reader, open_writer):
        store = make(name="short")
        held = opens(store.url)
        del store
        gc.collect()
        open_reader(url).close()
        del held
        gc.collect()
        with pytest.raises(StoreError, match="no store"):
            open_reader(url)


def test_of_many_that_want_one_name_one_gets_it() -> None:
    def attempt(_: int) -> MemoryStore | None:
        try:
            return make(name="wanted")
        except ConfigError:
            return None

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(attempt, range(200)))
    assert sum(store is not None for store in made) == 1
    with pytest.raises(ConfigError, match=r"^there is a store at memory://wanted already; choose another name$"):
        make(name="wanted")


def test_a_reader_with_a_fallback_waits_for_it() -> None:
    with EmbeddingReader.open("memory://later", fallback=[0.0, 1.0], timeout_s=5) as reader:
        assert reader.get(1).reason == "store_down"
        store = make(name="later")
        store.put(1, [1.0, 0.0])
        eventually(lambda: reader.get(1).status == "ok")


@pytest.mark.parametrize(
    "wrong",
    [{"name": "a/b"}, {"name": ""}, {"item_version": "a b"}, {"user_version": "current"}, {"partitions": 0}]
    + [{"fallback": vector} for vector in ([0.0, 0.0], [np.nan], [[1.0]], "vector", None)],
)
def test_what_can_not_be_right_is_refused_in_one_line(wrong: dict[str, object]) -> None:
    right = {"item_version": "i", "user_version": "u", "fallback": FALLBACK}
    with pytest.raises(ConfigError, match=r"^[^\n]+$"):
        MemoryStore(**{**right, **wrong})  # type: ignore[arg-type]


# -- what a test says to it


def test_a_vector_is_scaled_and_the_rest_of_the_record_is_what_was_said(
    store: MemoryStore, reader: EmbeddingReader
) -> None:
    store.put(42, [3.0, -4.0], as_of=1_700_000_000_000, history_len=7)
    answer = reader.get("42")
    np.testing.assert_allclose(answer.vector, [0.6, -0.8], rtol=1e-6)
    assert answer.vector.dtype == np.float32
    assert (answer.status, answer.reason, answer.as_of, answer.history_len) == ("ok", "", 1_700_000_000_000, 7)
    assert (answer.user_embedding_version, answer.item_embedding_version) == ("mix-1", "films_v1")
    store.put("7", FALLBACK, reason="too_short_history", history_len=1)
    assert (reader.get(7).status, reader.get(7).reason) == ("fallback", "too_short_history")


@pytest.mark.parametrize(
    ("user", "vector"), [("", FALLBACK), (1, [1.0]), (1, [0.0, 0.0]), (1, [np.inf, 0.0]), (1, "ab"), (1, [FALLBACK])]
)
def test_what_is_no_user_or_no_vector_changes_nothing(store: MemoryStore, user: int | str, vector: object) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        store.put(user, vector)  # type: ignore[arg-type]
    assert store._places == {}


def test_each_call_is_a_revision(store: MemoryStore, reader: EmbeddingReader) -> None:
    for revision in (1, 2):
        store.put(1, [1.0, 0.0])
        assert (reader.get(1).epoch, reader.get(1).revision) == (1, revision)
    store.erase(1)
    assert (reader.get(1).reason, reader.get(1).revision) == ("erased", 3)
    store.put(1, [1.0, 0.0])
    assert (reader.get(1).status, reader.get(1).revision) == ("ok", 4)
    store.erase("stranger")
    assert reader.get("stranger").reason == "erased"


def test_what_is_down_fails_and_comes_back(store: MemoryStore) -> None:
    kv, reader = open_writer(store.url), open_reader(store.url)
    store.down = True
    store.put(1, [1.0, 0.0])  # what a test says is heard
    calls = [kv.open_partition(0), kv.update_meta(lambda meta: meta), kv.rebuild_request(0), kv.is_owned(0)]
    for call in calls:
        with pytest.raises(StoreError, match="is down"):
            asyncio.run(call)  # type: ignore[arg-type]
    for read in (lambda: reader.get([lookup("1")]), lambda: open_reader(store.url)):
        with pytest.raises(StoreError, match="is down"):
            read()
    store.down = False
    assert reader.get([lookup("1")]) != [None]


def test_a_reader_says_so_and_asks_again(store: MemoryStore, reader: EmbeddingReader) -> None:
    store.put(1, [1.0, 0.0])
    store.down = True
    assert (reader.get(1).status, reader.get(1).reason) == ("fallback", "store_down")
    store.down = False
    eventually(lambda: reader.get(1).status == "ok")


def test_a_pipeline_is_as_far_behind_as_the_test_says(store: MemoryStore) -> None:
    store.put(1, [1.0, 0.0])
    with EmbeddingReader.open(store.url, timeout_s=5, max_lag_s=2.0) as reader:
        seen = []
        for store.lag_s in (0.0, 1.5, 2.5, None):
            answer = reader.get(1)
            assert answer.status == "ok"
            seen.append((answer.stale, answer.lag_s))
    assert seen == [(False, 0.0), (False, 1.5), (True, 2.5), (True, None)]


async def test_a_watermark_that_was_written_counts_more(store: MemoryStore) -> None:
    kv, reader = open_writer(store.url), open_reader(store.url)
    await kv.open_partition(0)
    await kv.put(0, {watermark_key(0).encode(): entry(1, 1)})
    assert reader.watermark(b"1") == entry(1, 1)


def test_users_have_places_among_its_partitions() -> None:
    store = make(partitions=4)
    users = [str(user) for user in range(40)]
    for user in users:
        store.put(user, [1.0, 0.0])
    for partition, place in store._places.items():
        assert set(place) == {lookup(user)[1] for user in users if partition_of(user.encode(), 4) == partition}
    assert None not in open_reader(store.url).get([lookup(user) for user in users])


# -- several at once


async def test_the_newest_claim_fences_all_others(store: MemoryStore) -> None:
    old, new = open_writer(store.url), open_writer(store.url)
    claim = epoch_key(0).encode()
    for kv, epoch in ((old, 4), (new, 5)):
        await kv.open_partition(0)
        await kv.put(0, {claim: kv_prefix(epoch, 0)})
    with pytest.raises(Fenced, match="epoch 5, ours is 4"):
        await old.put(0, {b"never written": entry(4, 1)})
    assert await new.get(0, [b"never written"]) == [None]
    store.put(1, [1.0, 0.0])
    found = await new.get(0, [lookup("1")[1]])
    assert kv_entry(found[0] or b"")[:2] == (5, 1), "under the claim"


async def test_who_has_a_partition_open_owns_it(store: MemoryStore) -> None:
    kv, other = open_writer(store.url), open_writer(store.url)
    assert not await other.is_owned(0)
    await kv.open_partition(0)
    assert await other.is_owned(0)
    assert not await other.is_owned(1)
    assert not await kv.is_owned(0), "by nobody else"
    await kv.close()
    assert not await other.is_owned(0)
    await kv.open_partition(0)
    del kv
    gc.collect()
    assert not await other.is_owned(0), "who is gone owns nothing"


def test_threads_lose_no_change(store: MemoryStore, reader: EmbeddingReader) -> None:
    writers = [open_writer(store.url) for _ in range(4)]

    def change(number: int) -> None:
        store.put(1, [1.0, number])
        writer = writers[number % 4]
        asyncio.run(writer.update_meta(lambda meta: replace(meta, encoders={**meta.encoders, f"e{number}": "h"})))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(100)))
    assert reader.get(1).revision == 100
    assert len(open_reader(store.url).meta().encoders) == 100
