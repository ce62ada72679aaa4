"""The embedded store: what holds for RocksDB on disk, beside the contract of every store."""

import asyncio
import base64
import json
import os
import shutil
import stat
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from kv_entries import entry, eventually

from stream.errors import Fenced, StateError, StoreError, StoreLocked, StoreLost
from stream.kv.protocol import Meta, Serving
from stream.kv.rocksdb import reader as rocksdb_reader
from stream.kv.rocksdb.layout import EPOCH_KEY, INCARNATION_KEY, read_meta
from stream.kv.rocksdb.reader import RocksReader
from stream.kv.rocksdb.writer import RocksKV

PATIENCE_S = 0.2


class TestEmbedded:
    """Holds for RocksDB on disk."""

    async def test_partitions_are_apart(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        await kv.open_partition(1)
        await kv.put(0, {b"k": entry(1, 1)})
        assert await kv.get(1, [b"k"]) == [None]
        await kv.close()

    async def test_one_owner_at_a_time_and_the_next_one_at_once(self, tmp_path: Path) -> None:
        first, second = RocksKV(tmp_path), RocksKV(tmp_path, lock_patience_s=PATIENCE_S)
        await first.open_partition(0)
        await first.put(0, {b"k": entry(1, 1)})
        began = time.monotonic()
        with pytest.raises(StoreLocked) as caught:
            await second.open_partition(0)
        assert time.monotonic() - began >= PATIENCE_S
        assert "\n" not in str(caught.value)
        waiting = asyncio.create_task(second.open_partition(0))
        await asyncio.sleep(PATIENCE_S / 4)
        await first.close_partition(0)
        await waiting
        assert await second.get(0, [b"k"]) == [entry(1, 1)]
        await second.close()

    async def test_a_partition_that_was_never_opened_can_not_be_read(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.update_meta(lambda meta: replace(meta, app="app", partitions=1))
        reader = RocksReader(tmp_path)
        with pytest.raises(StoreError):
            reader.get([(b"u", b"k")])
        reader.close()

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
        assert await kv.get(0, [INCARNATION_KEY]) == [header[:16]]

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
        eventually(lambda: reader.get([(b"u", b"k")]) == [entry(1, 2)])
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
        eventually(lambda: reader.get(lookups) == [entry(1, 2), None])
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

        eventually(mended)
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
        with pytest.raises(StoreLost, match="was removed"):
            await kv.put(0, {b"k": entry(1, 2), b"l": entry(1, 1)})
        assert ("untidily" in caplog.text) == (what != "seq")
        assert await kv.get(0, [b"k", b"l"]) == [None, None]  # begun anew, and by the same writer
        assert await kv.put(0, {b"k": entry(1, 2)}) == 0
        await kv.close()
        await kv.open_partition(0)
        assert await kv.get(0, [b"k"]) == [entry(1, 2)]
        await kv.close()

    @pytest.mark.parametrize("damage", ["flip", "tear"])
    async def test_a_damaged_log_is_begun_anew_and_a_torn_end_is_not(
        self, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
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
        await again.open_partition(0)
        found = await again.get(0, [b"k0", b"k98", b"k99"])
        await again.close()
        if damage == "flip":  # half of it would be worse than none, which the owner notices
            assert found == [None, None, None]
            assert "is damaged" in caplog.text
        else:
            assert found == [entry(1, 0, bytes(300)), entry(1, 98, bytes(300)), None]

    @pytest.mark.parametrize("use", ["get", "put"])
    async def test_a_damaged_table_file_is_noticed_and_begun_anew(
        self, tmp_path: Path, use: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        await kv.put(0, {b"k%03d" % i: entry(1, i, os.urandom(300)) for i in range(200)})
        kv._partitions[0].db.flush()
        await kv.close()
        (table,) = (tmp_path / "p-00000").glob("*.sst")
        data = bytearray(table.read_bytes())
        data[len(data) // 3] ^= 0xFF
        table.write_bytes(data)
        keys = [b"k%03d" % i for i in range(200)]
        await kv.open_partition(0)
        if use == "get":
            assert await kv.get(0, keys) == [None] * 200
            assert "is damaged" in caplog.text
        else:
            with pytest.raises(StoreLost, match="is damaged"):
                await kv.put(0, dict.fromkeys(keys, entry(2, 0)))
        assert await kv.put(0, dict.fromkeys(keys, entry(1, 0))) == 0
        assert await kv.get(0, keys) == [entry(1, 0)] * 200
        await kv.close()

    async def test_what_is_ordered_and_newest_is_not_compared(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = [b"k%03d" % i for i in range(100)]
        read = RocksKV._read
        looked_at: list[int] = []

        def seen_read(kv: RocksKV, partition: int, some: Sequence[bytes]) -> list[bytes | None]:
            looked_at.append(len(some))
            return read(kv, partition, some)

        monkeypatch.setattr(RocksKV, "_read", seen_read)

        async def compared(kv: RocksKV, epoch: int, revision: int, *, ordered: bool = True) -> bool:
            looked_at.clear()
            assert await kv.put(0, dict.fromkeys(keys, entry(epoch, revision)), ordered=ordered) == 0
            return looked_at == [100]

        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        assert await compared(kv, 5, 1, ordered=False)
        assert not await compared(kv, 5, 1)
        assert not await compared(kv, 5, 2)
        assert not await compared(kv, 6, 1)
        with pytest.raises(Fenced):
            await kv.put(0, {b"k000": entry(5, 3)}, ordered=True)
        assert await kv.put(0, {b"k000": entry(6, 0)}) == 1, "not ordered, and older"
        await kv.close()
        await kv.open_partition(0)
        assert await compared(kv, 6, 2), "of the same epoch, and perhaps another's"
        assert not await compared(kv, 7, 1)
        await kv.close()

    async def test_a_database_that_tells_no_epoch_is_looked_through(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        await kv.put(0, {b"a": entry(1, 9), b"b": entry(7, 9), b"c": entry(3, 9)})
        kv._partitions[0].db.delete(EPOCH_KEY)  # as earlier releases left it
        await kv.close()
        await kv.open_partition(0)
        with pytest.raises(Fenced):
            await kv.put(0, {b"b": entry(6, 1)}, ordered=True)
        await kv.put(0, {b"a": entry(8, 1)}, ordered=True)
        assert await kv.get(0, [b"a", b"b"]) == [entry(8, 1), entry(7, 9)]
        await kv.close()

    async def test_damage_is_found_under_what_is_not_compared(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        keys = [b"k%03d" % i for i in range(200)]
        await kv.put(0, {key: entry(1, 1, os.urandom(300)) for key in keys})
        kv._partitions[0].db.flush()
        await kv.close()
        (table,) = (tmp_path / "p-00000").glob("*.sst")
        data = bytearray(table.read_bytes())
        for at in range(5_000, len(data) // 2, 1_000):  # in each block but the first, which is read when it is opened
            data[at] ^= 0xFF
        table.write_bytes(data)
        await kv.open_partition(0)
        with pytest.raises(StoreLost, match="is damaged"):
            await kv.put(0, dict.fromkeys(keys, entry(2, 1)), ordered=True)
        await kv.close()

    async def test_what_no_worker_wrote_does_not_stand_in_the_way(self, tmp_path: Path) -> None:
        kv = RocksKV(tmp_path)
        await kv.open_partition(0)
        kv._partitions[0].db[b"k"] = b"\xff"
        assert await kv.put(0, {b"k": entry(1, 1)}) == 0
        assert await kv.get(0, [b"k"]) == [entry(1, 1)]
        await kv.close()
