"""What every key-value store must do (a later one joins through the fixture `store`), and the embedded one besides."""

import asyncio
import base64
import itertools
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from stream.errors import ConfigError, Fenced, StateError, StoreError, StoreLocked
from stream.keys import partition_of, watermark_key
from stream.kv import rocksdb as embedded
from stream.kv import rocksdb_reader
from stream.kv.base import KVReader, KVWriter, Meta, Serving
from stream.kv.rocksdb import RocksKV, read_meta
from stream.kv.rocksdb_reader import RocksReader
from stream.kv.urls import open_reader, open_writer, parse_kv_url
from stream.records import kv_prefix

PATIENCE_S = 0.2


@dataclass
class Store:
    """One empty store, and as many holds on it as a test wants."""

    writer: Callable[[], KVWriter]
    reader: Callable[[], KVReader]


@pytest.fixture(params=["rocksdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    assert request.param == "rocksdb"
    writers: list[KVWriter] = []
    readers: list[KVReader] = []

    def writer() -> KVWriter:
        writers.append(RocksKV(tmp_path / "kv", lock_patience_s=PATIENCE_S))
        return writers[-1]

    def reader() -> KVReader:
        readers.append(RocksReader(tmp_path / "kv"))
        return readers[-1]

    yield Store(writer, reader)
    for each in readers:
        each.close()
    for kv in writers:
        asyncio.run(kv.close())


def entry(epoch: int, revision: int, body: bytes = b"body") -> bytes:
    return kv_prefix(epoch, revision) + body


def eventually(check: Callable[[], bool], within_s: float = 3.0) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.002)


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
        assert await kv.get(0, [b"a", b"b", b"c"]) == [None, entry(8, 1), None]

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

    async def test_partitions_are_apart(self, store: Store) -> None:
        kv = await opened(store, 0, 1, count=2)
        await kv.put(0, {b"k": entry(1, 1)})
        assert await kv.get(1, [b"k"]) == [None]

    async def test_a_partition_that_is_not_open_can_be_neither_read_nor_written(self, store: Store) -> None:
        kv = await opened(store, 0)
        await kv.close_partition(0)
        await kv.close_partition(0)
        with pytest.raises(StoreError, match="not open"):
            await kv.put(0, {b"k": entry(1, 1)})
        with pytest.raises(StoreError, match="not open"):
            await kv.get(0, [b"k"])

    async def test_one_owner_at_a_time_and_the_next_one_at_once(self, store: Store) -> None:
        first = await opened(store, 0)
        await first.put(0, {b"k": entry(1, 1)})
        second = store.writer()
        began = time.monotonic()
        with pytest.raises(StoreLocked) as caught:
            await second.open_partition(0)
        assert PATIENCE_S <= time.monotonic() - began < PATIENCE_S + 1
        assert "\n" not in str(caught.value)
        waiting = asyncio.create_task(second.open_partition(0))
        await asyncio.sleep(PATIENCE_S / 4)
        await first.close_partition(0)
        await waiting
        assert await second.get(0, [b"k"]) == [entry(1, 1)]

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
        with pytest.raises(StoreError):
            reader.get([(b"u", b"k")])
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


class TestEmbedded:
    """Holds for RocksDB on disk."""

    async def test_layout_and_modes(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path / "deep" / "kv")
        await kv.update_meta(lambda meta: replace(meta, partitions=8))
        await kv.open_partition(7)
        path = tmp_path / "deep" / "kv"
        modes = {name: stat.S_IMODE((path / name).stat().st_mode) for name in os.listdir(path)}
        assert modes == {"meta.json": 0o600, "meta.lock": 0o600, "p-00007": 0o700, "p-00007.seq": 0o600}
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        await kv.close()

    async def test_the_seq_file_holds_the_incarnation_and_counts_what_was_written(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        header = (tmp_path / "p-00000.seq").read_bytes()
        assert len(header) == 24
        assert await kv.get(0, [embedded.INCARNATION_KEY]) == [header[:16]]

        def count() -> int:
            return int.from_bytes((tmp_path / "p-00000.seq").read_bytes()[16:], "little")

        first = count()
        await kv.put(0, {b"a": entry(1, 2), b"b": entry(1, 2)})
        assert count() == first + 1
        assert await kv.put(0, {b"a": entry(1, 1)}) == 1
        assert count() == first + 1, "nothing was written"
        await kv.close()
        again = RocksKV(tmp_path)
        await again.open_partition(0)
        assert count() > first + 1, "a killed owner may have written without counting"
        assert (tmp_path / "p-00000.seq").read_bytes()[:16] == header[:16]
        await again.close()

    async def test_the_shared_record_is_plain_json(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        assert read_meta(tmp_path) is None
        await kv.update_meta(
            lambda _: Meta("app", 4, Serving("u", "i", 3), {"uemb:fallback:u:i": b"\xc3\x01"}, {"e": "h"})
        )
        assert json.loads((tmp_path / "meta.json").read_text()) == {
            "format": 1,
            "app": "app",
            "partitions": 4,
            "current": {"user_version": "u", "item_version": "i", "offset": 3},
            "fallbacks": {"uemb:fallback:u:i": base64.b64encode(b"\xc3\x01").decode()},
            "encoders": {"e": "h"},
        }

    @pytest.mark.parametrize(
        "change",
        [
            {"format": 2},
            {"format": None},
            {"fallbacks": {"k": "not base64!"}},
            {"fallbacks": None},
            {"current": {"user_version": "u"}},
            {"current": {}},
            {"partitions": 0},
            {"partitions": "many"},
            {"app": 5},
        ],
    )
    async def test_a_shared_record_that_is_not_ours_is_one_line(
        self, tmp_path: Path, change: dict[str, object]
    ) -> None:
        kv = RocksKV(tmp_path)
        await kv.update_meta(lambda _: Meta("app", 4))
        file = tmp_path / "meta.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(StateError) as caught:
            read_meta(tmp_path)
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)
        with pytest.raises(StateError):
            await kv.update_meta(lambda meta: meta)
        with pytest.raises(StoreError):
            RocksReader(tmp_path)

    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"{}"])
    def test_a_damaged_shared_record_is_one_line(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "meta.json").write_bytes(data)
        with pytest.raises(StateError, match=r"^[^\n]+$"):
            read_meta(tmp_path)

    async def test_a_crash_while_replacing_leaves_the_old_record(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kv = RocksKV(tmp_path)
        await kv.update_meta(lambda _: Meta("app", 4))

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match="No space left"):
                await kv.update_meta(lambda _: Meta("other", 5))
        assert read_meta(tmp_path) == Meta("app", 4)
        assert await kv.update_meta(lambda meta: replace(meta, app="next")) == Meta("next", 4)

    def test_a_reader_needs_a_store(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="start a worker first"):
            RocksReader(tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()

    async def test_a_reader_shows_what_was_flushed_before_it_could_be_read_from_the_log(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.update_meta(lambda _: Meta("app", 1))
        await kv.open_partition(0)
        reader = RocksReader(tmp_path, poll_s=0.25)
        await kv.put(0, {b"k": entry(1, 1)})
        eventually(lambda: reader.get([(b"u", b"k")]) == [entry(1, 1)])
        await kv.put(0, {b"k": entry(1, 2)})  # well within the pause that follows
        kv._partitions[0].db.flush()
        assert reader.get([(b"u", b"k")]) == [entry(1, 1)], "the reader was too fast to prove anything"
        eventually(lambda: reader.get([(b"u", b"k")]) == [entry(1, 2)], 1.5)
        reader.close()
        await kv.close()

    async def test_a_count_ahead_of_its_database_does_not_keep_a_reader_busy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kv = RocksKV(tmp_path)
        await kv.update_meta(lambda _: Meta("app", 1))
        await kv.open_partition(0)
        await kv.put(0, {b"k": entry(1, 1)})
        await kv.close()
        seq = tmp_path / "p-00000.seq"
        seq.write_bytes(seq.read_bytes()[:16] + (1_000_000).to_bytes(8, "little"))
        opens: list[str] = []
        real = rocksdb_reader.Rdict

        def counting(path: str, *args: object, **options: object) -> object:
            opens.append(path)
            return real(path, *args, **options)

        monkeypatch.setattr(rocksdb_reader, "Rdict", counting)
        reader = RocksReader(tmp_path)
        eventually(lambda: reader.get([(b"u", b"k")]) == [entry(1, 1)])
        await asyncio.sleep(1)
        assert 1 < len(opens) < 10
        await kv.open_partition(0)
        await kv.put(0, {b"k": entry(2, 1)})
        eventually(lambda: reader.get([(b"u", b"k")]) == [entry(2, 1)])
        assert int.from_bytes(seq.read_bytes()[16:], "little") == 1_000_002
        reader.close()
        await kv.close()

    async def test_a_database_made_anew_between_the_same_names_is_noticed(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.update_meta(lambda _: Meta("app", 1))
        await kv.open_partition(0)
        await kv.put(0, {b"k": entry(1, 5), b"gone": entry(1, 5)})
        reader = RocksReader(tmp_path)
        lookups = [(b"u", b"k"), (b"u", b"gone")]
        eventually(lambda: reader.get(lookups) == [entry(1, 5)] * 2)
        await kv.close()
        for file in (tmp_path / "p-00000").iterdir():
            if file.name != "IDENTITY":
                file.unlink()
        await kv.open_partition(0)
        await kv.put(0, {b"k": entry(1, 2)})
        eventually(lambda: reader.get(lookups) == [entry(1, 2), None], 1.0)
        reader.close()
        await kv.close()

    async def test_a_secondary_that_fails_a_lookup_is_replaced(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken:
            def get(self, keys: list[bytes]) -> list[bytes | None]:
                raise Exception("IO error: told so")  # as rocksdict raises it

        kv = RocksKV(tmp_path)
        await kv.update_meta(lambda _: Meta("app", 1))
        await kv.open_partition(0)
        await kv.put(0, {b"k": entry(1, 5)})
        reader = RocksReader(tmp_path)
        reader._parts[0].db = Broken()
        with pytest.raises(StoreError, match="told so"):
            reader.get([(b"u", b"k")])

        def mended() -> bool:
            try:
                return reader.get([(b"u", b"k")]) == [entry(1, 5)]
            except StoreError:
                return False

        eventually(mended, 1.0)
        assert "tried again" in caplog.text
        reader.close()
        await kv.close()

    async def test_waiting_for_the_owner_leaves_its_folder_alone(self, tmp_path: Path) -> None:
        owner, other = RocksKV(tmp_path), RocksKV(tmp_path, lock_patience_s=0.3)
        await owner.open_partition(0)
        before = sorted(os.listdir(tmp_path / "p-00000"))
        with pytest.raises(StoreLocked):
            await other.open_partition(0)
        assert sorted(os.listdir(tmp_path / "p-00000")) == before
        await owner.close()

    @pytest.mark.parametrize("what", ["everything", "folder", "seq"])
    async def test_an_owner_notices_that_its_store_was_wiped(
        self, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        await kv.put(0, {b"k": entry(1, 1)})
        if what != "folder":
            (tmp_path / "p-00000.seq").unlink()
        if what != "seq":
            shutil.rmtree(tmp_path / "p-00000")
        with pytest.raises(StateError, match="removed while open"):
            await kv.put(0, {b"k": entry(1, 2)})
        await kv.close()
        assert ("untidily" in caplog.text) == (what != "seq")
        await kv.open_partition(0)
        assert await kv.get(0, [b"k"]) == [entry(1, 1) if what == "seq" else None]
        await kv.close()

    @pytest.mark.parametrize("damage", ["flip", "tear"])
    async def test_a_damaged_log_is_an_error_and_a_torn_end_is_not(self, tmp_path: Path, damage: str) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        for i in range(100):
            await kv.put(0, {b"k%d" % i: entry(1, i, bytes(300))})
        killed = tmp_path / "killed"
        shutil.copytree(tmp_path / "p-00000", killed / "p-00000")  # as a kill leaves it: all in the log
        await kv.close()
        (wal,) = (killed / "p-00000").glob("*.log")
        data = bytearray(wal.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 0xFF
        else:
            del data[-20:]
        wal.write_bytes(data)
        again = RocksKV(killed)
        if damage == "flip":
            with pytest.raises(StateError, match=r"damaged[^\n]*$"):
                await again.open_partition(0)
            with pytest.raises(StateError):  # and is not taken by the first attempt
                await again.open_partition(0)
        else:
            await again.open_partition(0)
            assert await again.get(0, [b"k98", b"k99"]) == [entry(1, 98, bytes(300)), None]
            await again.close()

    async def test_a_damaged_table_file_is_an_error(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        await kv.put(0, {b"k%03d" % i: entry(1, i, os.urandom(300)) for i in range(200)})
        kv._partitions[0].db.flush()
        await kv.close()
        (table,) = (tmp_path / "p-00000").glob("*.sst")
        data = bytearray(table.read_bytes())
        data[len(data) // 3] ^= 0xFF
        table.write_bytes(data)
        with pytest.raises(StateError, match="damaged"):
            await self._read_all(tmp_path)

    @staticmethod
    async def _read_all(path: Path) -> None:
        kv = RocksKV(path)
        try:
            await kv.open_partition(0)
            await kv.get(0, [b"k%03d" % i for i in range(200)])
        finally:
            await kv.close()

    async def test_what_no_worker_wrote_does_not_stand_in_the_way(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        kv._partitions[0].db[b"k"] = b"\xff"
        assert await kv.put(0, {b"k": entry(1, 1)}) == 0
        assert await kv.get(0, [b"k"]) == [entry(1, 1)]
        await kv.close()


class TestUrls:
    """Which stores there are."""

    @pytest.mark.parametrize(
        ("url", "path"),
        [
            ("rocksdb:///var/lib/uemb/kv", "/var/lib/uemb/kv"),
            ("rocksdb:///a%20b/kv/", "/a b/kv"),
            ("ROCKSDB:///x", "/x"),
        ],
    )
    def test_absolute_paths(self, url: str, path: str) -> None:
        assert parse_kv_url(url) == ("rocksdb", Path(path))

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("redis://:secret@host/0", "KV url scheme 'redis' is not supported by this release; use rocksdb:///path"),
            ("rediss://:secret@host", "KV url scheme 'rediss' is not supported by this release; use rocksdb:///path"),
            ("/var/lib", "KV url scheme '' is not supported"),
            ("", "KV url scheme '' is not supported"),
            ("rocksdb:relative/secret", "absolute path"),
            ("rocksdb://relative/secret", "absolute path"),
            ("rocksdb:///", "absolute path"),
            ("rocksdb:///x?secret=1", "nothing after it"),
            ("rocksdb://[secret", "can't be read"),
        ],
    )
    def test_anything_else_is_one_line_without_the_url(self, url: str, says: str) -> None:
        for call in (parse_kv_url, open_writer, open_reader):
            with pytest.raises(ConfigError) as caught:
                call(url)
            assert says in str(caught.value)
            assert "secret" not in str(caught.value)
            assert "\n" not in str(caught.value)

    async def test_the_same_url_writes_and_reads(self, tmp_path: Path) -> None:
        url = f"rocksdb://{tmp_path}/kv"
        kv = open_writer(url, lock_patience_s=1)
        assert not (tmp_path / "kv").exists()
        await kv.update_meta(lambda _: Meta("app", 1))
        reader = open_reader(url)
        assert reader.meta() == Meta("app", 1)
        reader.close()
        await kv.close()
