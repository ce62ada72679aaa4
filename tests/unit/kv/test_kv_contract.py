"""What every key-value store must do: one suite, each store joins through the fixture `store`."""

import asyncio
import itertools
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from kv_entries import entry, eventually

from stream.core.records import kv_entry, kv_prefix
from stream.errors import ConfigError, Fenced, StoreError
from stream.keys import epoch_key, partition_of, watermark_key
from stream.kv.memory import MemoryStore
from stream.kv.protocol import KVReader, KVWriter, Meta, Serving
from stream.kv.stores import open_reader, open_writer


@dataclass
class Store:
    """One empty store, and as many holds on it as a test wants.

    Attributes:
        whole: whether nothing of a batch is written when an entry of a higher epoch stands against one of it. A cluster
            writes the others: no two of its keys can be seen in one step.
    """

    writer: Callable[[], KVWriter]
    reader: Callable[[], KVReader]
    whole: bool


@pytest.fixture
def memory() -> MemoryStore:
    """An empty store in memory behind which no pipeline runs."""
    store = MemoryStore("i", "u", fallback=[1.0])
    store.lag_s = None
    return store


@pytest.fixture(
    params=["rocksdb", "memory", *(pytest.param(name, marks=pytest.mark.redis) for name in ("redis", "cluster"))],
)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    url = f"rocksdb://{tmp_path}/kv" if request.param == "rocksdb" else request.getfixturevalue(request.param).url
    writers: list[KVWriter] = []
    readers: list[KVReader] = []

    def writer() -> KVWriter:
        writers.append(open_writer(url, lock_patience_s=0.2))
        return writers[-1]

    def reader() -> KVReader:
        readers.append(open_reader(url))
        return readers[-1]

    yield Store(writer, reader, request.param != "cluster")
    for each in readers:
        each.close()
    for kv in writers:
        await kv.close()


async def opened(store: Store, *partitions: int, count: int = 1) -> KVWriter:
    kv = store.writer()
    await kv.update_meta(lambda meta: replace(meta, app="app", partitions=count))
    for partition in partitions:
        await kv.open_partition(partition)
    return kv


class TestContract:
    """Holds for every store."""

    async def test_entries_come_back_as_written_in_the_order_asked_for(self, store: Store) -> None:
        kv = await opened(store, 0)
        written = {b"k%d" % i: entry(1, i, os.urandom(300)) for i in range(200)}
        assert await kv.put(0, written) == 0
        keys = [b"k7", b"absent", b"k199", b"k0", b"k7"]
        assert await kv.get(0, keys) == [written.get(key) for key in keys]
        assert await kv.get(0, []) == []
        assert await kv.put(0, {}) == 0

    async def test_an_entry_never_goes_backward_in_whatever_order_writes_arrive(self, store: Store) -> None:
        kv = await opened(store, 0)
        orders = [(1, 5), (1, 6), (2, 1), (2, 300), (256, 0)]
        for n, arrival in enumerate(itertools.permutations(orders)):
            highest = (0, 0)
            for order in arrival:
                write = {b"p%d" % n: entry(*order)}
                if order[0] < highest[0]:
                    with pytest.raises(Fenced):
                        await kv.put(0, write)
                else:
                    assert await kv.put(0, write) == int(order < highest)
                highest = max(highest, order)
                assert await kv.get(0, [b"p%d" % n]) == [entry(*highest)]

    async def test_an_equal_write_is_accepted(self, store: Store) -> None:
        kv = await opened(store, 0)
        await kv.put(0, {b"k": entry(3, 4, b"first")})
        assert await kv.put(0, {b"k": entry(3, 4, b"again")}) == 0
        assert await kv.get(0, [b"k"]) == [entry(3, 4, b"again")]

    async def test_refused_entries_are_counted_and_their_neighbours_written(self, store: Store) -> None:
        kv = await opened(store, 0)
        await kv.put(0, {b"a": entry(2, 9), b"b": entry(2, 9)})
        assert await kv.put(0, {b"a": entry(2, 8), b"b": entry(2, 10), b"c": entry(2, 1)}) == 1
        assert await kv.get(0, [b"a", b"b", b"c"]) == [entry(2, 9), entry(2, 10), entry(2, 1)]

    async def test_a_newer_owner_fences_the_whole_batch(self, store: Store) -> None:
        kv = await opened(store, 0)
        await kv.put(0, {b"b": entry(8, 1)})
        with pytest.raises(Fenced, match="epoch 8, ours is 7"):
            await kv.put(0, {b"a": entry(7, 1), b"b": entry(7, 99), b"c": entry(7, 1)})
        others = [None, None] if store.whole else [entry(7, 1)] * 2
        assert await kv.get(0, [b"a", b"c", b"b"]) == [*others, entry(8, 1)]

    async def test_a_deletion_is_kept_and_stands_against_older_writes(self, store: Store) -> None:
        kv = await opened(store, 0)
        await kv.put(0, {b"k": entry(1, 1)})
        await kv.put(0, {b"k": kv_prefix(1, 2)})
        assert await kv.put(0, {b"k": entry(1, 1)}) == 1
        assert await kv.get(0, [b"k"]) == [kv_prefix(1, 2)]

    async def test_an_entry_without_a_prefix_is_refused_with_its_batch(self, store: Store) -> None:
        kv = await opened(store, 0)
        with pytest.raises(ValueError, match="prefix"):
            await kv.put(0, {b"a": entry(1, 1), b"b": b"short"})
        assert await kv.get(0, [b"a", b"b"]) == [None, None]

    async def test_a_partition_that_is_not_open_can_be_neither_read_nor_written(self, store: Store) -> None:
        kv = await opened(store, 0)
        await kv.close_partition(0)
        await kv.close_partition(0)
        with pytest.raises(StoreError, match="not open"):
            await kv.put(0, {b"k": entry(1, 1)})
        with pytest.raises(StoreError, match="not open"):
            await kv.get(0, [b"k"])

    async def test_changes_of_the_shared_record_are_never_lost(self, store: Store) -> None:
        def add(number: int) -> Callable[[Meta], Meta]:
            return lambda meta: replace(meta, encoders={**meta.encoders, f"uemb:encoder:v{number}": "h"})

        writers = [store.writer() for _ in range(4)]
        await asyncio.gather(*(writers[i % 4].update_meta(add(i)) for i in range(20)))
        meta = await writers[0].update_meta(lambda meta: meta)
        assert set(meta.encoders) == {f"uemb:encoder:v{i}" for i in range(20)}

    async def test_the_shared_record_keeps_every_field_and_survives_a_failed_change(self, store: Store) -> None:
        kv = store.writer()
        full = Meta(
            "app", 12, Serving("u", "i", -1), {"uemb:fallback:u:i": bytes(range(256))}, {"uemb:encoder:u": "ab"}
        )
        assert await kv.update_meta(lambda _: full) == full

        def refuse(meta: Meta) -> Meta:
            assert meta == full
            raise ConfigError("another application's")

        with pytest.raises(ConfigError):
            await kv.update_meta(refuse)
        assert await store.writer().update_meta(lambda meta: meta) == full
        assert store.reader().meta() == full

    async def test_a_reader_follows_entries_watermarks_and_the_shared_record(self, store: Store) -> None:
        kv = await opened(store, 0, 1, count=2)
        reader = store.reader()
        users = [b"%d" % i for i in range(50)]
        lookups = [(user, b"key:" + user) for user in users]
        assert reader.get(lookups) == [None] * 50
        assert reader.watermark(users[0]) is None
        for partition in (0, 1):
            mine = {b"key:" + u: entry(1, 1, u) for u in users if partition_of(u, 2) == partition}
            assert mine
            await kv.put(partition, {**mine, watermark_key(partition).encode(): entry(1, partition)})
        eventually(lambda: reader.get(lookups) == [entry(1, 1, user) for user in users])
        eventually(lambda: all(reader.watermark(u) == entry(1, partition_of(u, 2)) for u in users))
        await kv.update_meta(lambda meta: replace(meta, current=Serving("u", "i", 7)))
        eventually(lambda: reader.meta().current == Serving("u", "i", 7))

    async def test_a_reader_sees_a_partition_that_opens_later(self, store: Store) -> None:
        kv = await opened(store)
        reader = store.reader()
        await kv.open_partition(0)
        await kv.put(0, {b"k": entry(1, 1)})

        def there() -> bool:
            try:
                return reader.get([(b"u", b"k")]) == [entry(1, 1)]
            except StoreError:
                return False

        eventually(there)

    async def test_a_reader_that_was_closed_says_so(self, store: Store) -> None:
        await opened(store, 0)
        reader = store.reader()
        reader.close()
        reader.close()
        with pytest.raises(StoreError):
            reader.get([(b"u", b"k")])

    async def test_a_claim_and_what_is_written_under_it(self, store: Store) -> None:
        kv = await opened(store, 0)
        claim, watermark = epoch_key(0).encode(), watermark_key(0).encode()
        assert await kv.put(0, {claim: kv_prefix(4, 0)}) == 0
        assert await kv.put(0, {b"k": entry(4, 1), watermark: entry(4, 1)}) == 0
        assert await kv.put(0, {b"k": entry(4, 2), watermark: entry(4, 2)}) == 0
        with pytest.raises(Fenced, match="epoch 4, ours is 3"):
            await kv.put(0, {claim: kv_prefix(3, 0)})
        assert await kv.get(0, [claim, b"k", watermark]) == [kv_prefix(4, 0), entry(4, 2), entry(4, 2)]
        await kv.close_partition(0)
        await kv.open_partition(0)
        assert await kv.put(0, {claim: kv_prefix(5, 0)}) == 0
        assert await kv.put(0, {b"k": entry(5, 2), watermark: entry(5, 1)}) == 0
        assert await kv.get(0, [claim, b"k", watermark]) == [kv_prefix(5, 0), entry(5, 2), entry(5, 1)]

    async def test_bytes_compare_as_unsigned_numbers(self, store: Store) -> None:
        kv = await opened(store, 0)
        rising = [
            (0x7F, 0xFF),
            (0x80, 0),
            (0xFF, 1),
            (0x100, 0),
            (2**53, 7),
            (2**53 + 1, 6),
            (2**63, 5),
            (2**64 - 1, 4),
        ]
        for n, (epoch, revision) in enumerate(rising):
            assert await kv.put(0, {b"k": entry(epoch, revision)}) == 0
            for below in rising[:n]:
                with pytest.raises(Fenced, match=f"epoch {epoch}, ours is {below[0]}\\)"):
                    await kv.put(0, {b"k": entry(*below)})
        for revision in (0, 127, 128, 255, 256, 2**53, 2**53 + 1, 2**63, 2**64 - 1):
            assert await kv.put(0, {b"r": entry(1, revision)}) == 0
            if revision:
                assert await kv.put(0, {b"r": entry(1, revision - 1)}) == 1
        assert await kv.get(0, [b"k", b"r"]) == [entry(2**64 - 1, 4), entry(1, 2**64 - 1)]

    @pytest.mark.parametrize("seed", range(3))
    async def test_any_sequence_of_batches_ends_as_a_dictionary_that_compares_would(
        self, store: Store, seed: int
    ) -> None:
        kv, chance = await opened(store, 0), random.Random(seed)
        model: dict[bytes, tuple[int, int]] = {}
        outcomes = Counter[str]()
        for number in range(300):
            highest = 1 + number // 100  # so that most batches are not fenced
            batch = {
                b"k%d" % key: (max(1, highest - (chance.random() < 0.02)), chance.randrange(6))
                for key in chance.sample(range(8), chance.randrange(1, 5))
            }
            entries = {key: entry(*order, b"%d" % number) for key, order in batch.items()}
            accepted = {key: order for key, order in batch.items() if order >= model.get(key, (0, 0))}
            if any(key in model and model[key][0] > epoch for key, (epoch, _) in batch.items()):
                with pytest.raises(Fenced):
                    await kv.put(0, entries)
                outcomes["fenced"] += 1
                model.update({} if store.whole else accepted)
            else:
                assert await kv.put(0, entries) == len(batch) - len(accepted)
                outcomes["refused"] += len(batch) - len(accepted)
                model.update(accepted)
            stored = await kv.get(0, list(model))
            assert {key: kv_entry(found or b"")[:2] for key, found in zip(model, stored, strict=True)} == model
        assert min(outcomes["fenced"], outcomes["refused"]) > 0, outcomes

    async def test_a_batch_of_any_size(self, store: Store) -> None:
        kv = await opened(store, 0)
        for size in (999, 1000, 1001, 5000):
            entries = {b"%d-%d" % (size, i): entry(1, i, b"%d" % i) for i in range(size)}
            assert await kv.put(0, entries) == 0
            assert await kv.get(0, list(entries)) == list(entries.values())
            older = {key: entry(1, 0) for key in entries}
            assert await kv.put(0, older) == size - 1

    async def test_what_is_removed_is_gone_but_for_what_a_newer_owner_wrote(self, store: Store) -> None:
        kv = await opened(store, 0)
        await kv.put(0, {b"a": entry(2, 9), b"b": entry(3, 1), b"c": entry(2, 1)})
        await kv.remove(0, [b"a", b"b", b"absent"], 2)
        assert await kv.get(0, [b"a", b"b", b"c"]) == [None, entry(3, 1), entry(2, 1)]

    async def test_a_move_takes_every_user_to_where_readers_of_more_partitions_look(self, store: Store) -> None:
        kv = await opened(store, 0, 1, count=2)
        users = [b"%d" % i for i in range(60)]
        lookups = [(user, b"uemb:u:i:" + user) for user in users]
        want = [entry(1, i + 1) for i in range(60)]
        for (user, key), stored in zip(lookups, want, strict=True):
            await kv.put(partition_of(user, 2), {key: stored})
        moved = [await kv.move(4) for _ in range(2)]
        assert len(set(moved)) == 1, "again, and nothing has changed"
        await kv.update_meta(lambda meta: replace(meta, partitions=4))
        for partition in range(4):
            await kv.open_partition(partition)
        for _ in range(2):
            held = [(await kv.get(partition_of(user, 4), [key]))[0] for user, key in lookups]
            assert held == want
            await kv.sweep(4)
        if moved[0]:  # partitions are places
            moved_on = [key for user, key in lookups if partition_of(user, 2) == 0 and partition_of(user, 4) == 2]
            assert moved_on
            assert await kv.get(0, moved_on) == [None] * len(moved_on)
        reader = store.reader()
        eventually(lambda: reader.get(lookups) == want)

    async def test_a_request_for_a_rebuild_stays_until_it_is_answered(self, store: Store) -> None:
        kv, other = await opened(store, 0), store.writer()
        assert await kv.rebuild_request(0) is None
        await other.ask_rebuild(0)
        first = await kv.rebuild_request(0)
        assert first
        assert await kv.rebuild_request(1) is None
        await other.ask_rebuild(0)
        second = await kv.rebuild_request(0)
        assert second not in (None, first)
        await kv.rebuild_done(0, first)
        assert await kv.rebuild_request(0) == second, "a request that came later stays"
        await kv.close()
        assert await other.rebuild_request(0) == second
        await other.rebuild_done(0, second or b"")
        assert await other.rebuild_request(0) is None
        await other.rebuild_done(0, second or b"")
