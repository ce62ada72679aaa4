"""The embedded store between real processes: kills, wipes, fencing, and readers that must notice.

This file is also the program of the other process: commands as JSON lines in, one JSON line out for each.
"""

import asyncio
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_entries import eventually

from stream.core.records import EmbeddingRecord, encode, kv_prefix
from stream.errors import Fenced, StoreError, StoreLocked, UembError
from stream.keys import fallback_key, partition_of, user_cache_key, watermark_key
from stream.kv.protocol import Serving
from stream.kv.rocksdb import partition as rocksdb_partition
from stream.kv.rocksdb import reader as rocksdb_reader
from stream.kv.rocksdb.reader import RocksReader
from stream.kv.rocksdb.writer import RocksKV
from stream.retrieval.reader import EmbeddingReader

ROOT = Path(__file__).resolve().parents[2]
USER_VERSION, ITEM_VERSION = "mix-0123abcd", "items_v42"
DIM = 16
#: Writes that readers look on: enough for tables to come and go many times.
CHURN_REVISIONS = 200


def record(user_id: str, epoch: int, revision: int) -> EmbeddingRecord:
    seed = sum(user_id.encode()) + 1000 * revision
    vector = np.random.default_rng(seed).normal(size=DIM)
    unit = (vector / np.linalg.norm(vector)).astype(np.float32)
    return EmbeddingRecord(
        user_id=user_id,
        epoch=epoch,
        revision=revision,
        status="ok",
        reason="",
        history_len=5,
        unknown_items=0,
        as_of=1_700_000_000_000,
        user_embedding_version=USER_VERSION,
        item_embedding_version=ITEM_VERSION,
        vector=unit,
        norm=1.0,
    )


def key_of(user_id: str) -> bytes:
    return user_cache_key(user_id, ITEM_VERSION, USER_VERSION).encode()


def entries(users: list[str], partition: int, partitions: int, epoch: int, revision: int) -> dict[bytes, bytes]:
    out = {
        key_of(user): kv_prefix(epoch, revision) + encode(record(user, epoch, revision))
        for user in users
        if partition_of(user.encode(), partitions) == partition
    }
    progress = {"offsets": {}, "kafka_time_ms": 1, "lag_ms": 0, "heartbeat_ms": time.time_ns() // 1_000_000}
    return {**out, watermark_key(partition).encode(): kv_prefix(epoch, revision) + json.dumps(progress).encode()}


class Worker:
    """The writing side, as the other process runs it."""

    def __init__(self, path: str) -> None:
        self.kv = RocksKV(path, lock_patience_s=5)
        self.partitions = 0

    async def meta(self, partitions: int) -> None:
        fallback = encode(record("fallback", 0, 0))
        await self.kv.update_meta(
            lambda meta: replace(
                meta,
                app="app",
                partitions=partitions,
                current=Serving(USER_VERSION, ITEM_VERSION, -1),
                fallbacks={fallback_key(ITEM_VERSION, USER_VERSION): fallback},
            )
        )
        self.partitions = partitions

    async def open(self, *partitions: int) -> None:
        for partition in partitions:
            await self.kv.open_partition(partition)

    async def put(self, users: list[str], partition: int, epoch: int, revision: int) -> int:
        return await self.kv.put(partition, entries(users, partition, self.partitions, epoch, revision))

    async def small_tables(self) -> None:
        """Let memtables be full after a few writes."""
        rocksdb_partition._WRITE_BUFFER_BYTES = 64 << 10

    async def churn(self, users: list[str], revisions: int, flush: bool) -> int:
        """Write rising revisions to partition 0, so that tables come and go; with `flush` also out of turn."""
        for revision in range(1, revisions + 1):
            await self.kv.put(0, entries(users, 0, self.partitions, 1, revision))
            if flush and revision % 5 == 0:
                self.kv._partitions[0].db.flush()
            if flush and revision % 50 == 0:
                self.kv._partitions[0].db.compact_range(None, None)
        return revisions

    async def flush(self) -> None:
        """Write what is in memory to a table and begin a new log."""
        self.kv._partitions[0].db.flush()

    async def compact(self) -> None:
        """Make one table of all."""
        self.kv._partitions[0].db.compact_range(None, None)

    async def rotate(self, users: list[str], revision: int, files: int) -> int:
        """Write a few of many users at a time, so that most are found in tables, until so many more files were made."""
        every = entries(users, 0, self.partitions, 1, 1)
        keys = list(every)

        def newest() -> int:
            return max(int(f.stem) for f in (self.kv.path / "p-00000").glob("[0-9]*.*"))

        enough = newest() + files
        while revision % 10 or newest() < enough:
            revision += 1
            at = revision * 100 % len(keys)
            await self.kv.put(0, {key: kv_prefix(1, revision) + every[key][16:] for key in keys[at : at + 100]})
        return revision

    async def close(self) -> None:
        await self.kv.close()


async def serve(path: str) -> None:
    worker = Worker(path)
    for line in sys.stdin:
        name, args = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": await getattr(worker, name)(*args)}
        except UembError as exc:
            answer = {"error": type(exc).__name__, "text": str(exc)}
        print(json.dumps(answer), flush=True)


class Process:
    """A worker in a process of its own."""

    def __init__(self, path: Path) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, __file__, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        )

    def send(self, name: str, *args: Any) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps([name, args]) + "\n")
        self.popen.stdin.flush()

    def answer(self) -> Any:
        assert self.popen.stdout is not None
        answer = json.loads(self.popen.stdout.readline())
        assert "error" not in answer, answer
        return answer["ok"]

    def call(self, name: str, *args: Any) -> Any:
        self.send(name, *args)
        return self.answer()

    def kill(self) -> None:
        self.popen.kill()
        self.end()

    def end(self) -> None:
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()
        self.popen.wait(10)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def start() -> Process:
        started.append(Process(tmp_path / "kv"))
        return started[-1]

    yield start
    for process in started:
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGCONT)
            process.kill()


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Callable[[], RocksReader]]:
    opened: list[RocksReader] = []

    def start() -> RocksReader:
        opened.append(RocksReader(tmp_path / "kv"))
        return opened[-1]

    yield start
    for reader in opened:
        reader.close()


def revisions(reader: RocksReader, users: list[str]) -> list[int | None]:
    found = reader.get([(user.encode(), key_of(user)) for user in users])
    return [None if entry is None else int.from_bytes(entry[8:16], "big") for entry in found]


def fails(reader: RocksReader, user: str) -> bool:
    try:
        revisions(reader, [user])
    except StoreError:
        return True
    return False


def shows(reader: RocksReader, users: list[str], expected: list[int | None]) -> bool:
    try:
        return revisions(reader, users) == expected
    except StoreError:
        return False


def test_a_write_is_readable_elsewhere_and_so_are_a_thousand(spawn: Callable[[], Process], tmp_path: Path) -> None:
    users = [str(i) for i in range(1000)]
    worker = spawn()
    worker.call("meta", 4)
    worker.call("open", 0, 1, 2, 3)
    began = time.time()  # no time goes by for the reader: how long a machine takes for all this is none of its business
    with EmbeddingReader.open(f"rocksdb://{tmp_path}/kv", timeout_s=5, clock=lambda: began) as reader:
        assert reader.get(17).reason == "missing"
        for partition in range(4):
            assert worker.call("put", users, partition, 1, 1) == 0
        # A vector may be seen a moment before its partition's watermark, and is stale until then.
        eventually(lambda: all(seen.status == "ok" and not seen.stale for seen in reader.get_many(users)[1]))
        vectors, answers = reader.get_many(users)
        assert vectors.shape == (1000, DIM)
        assert vectors.dtype == np.float32
        for user, row, answer in zip(users, vectors, answers, strict=True):
            assert (answer.user_id, answer.status, answer.revision, answer.stale) == (user, "ok", 1, False)
            np.testing.assert_array_equal(row, record(user, 1, 1).vector)
            np.testing.assert_array_equal(row, answer.vector)
    worker.call("close")


def test_a_killed_owner_loses_nothing_and_the_next_one_opens_at_once(
    spawn: Callable[[], Process], read: Callable[[], RocksReader], tmp_path: Path
) -> None:
    users = [str(i) for i in range(300)]
    worker = spawn()
    worker.call("meta", 1)
    worker.call("open", 0)
    reader = read()
    for revision in range(1, 20):
        worker.call("put", users, 0, 1, revision)
    worker.kill()

    async def take_over() -> None:
        kv = RocksKV(tmp_path / "kv", lock_patience_s=0)  # free at once
        await kv.open_partition(0)
        found = await kv.get(0, [key_of(user) for user in users])
        assert {entry and entry[:16] for entry in found} == {kv_prefix(1, 19)}
        await kv.put(0, {key_of("0"): kv_prefix(2, 20)})
        eventually(lambda: shows(reader, users, [20] + [19] * 299))
        await kv.close()

    asyncio.run(take_over())


@pytest.mark.parametrize("wiped", ["store", "partition", "folder"])
def test_a_wiped_and_rebuilt_database_is_noticed_though_its_owner_died(
    spawn: Callable[[], Process], read: Callable[[], RocksReader], tmp_path: Path, wiped: str
) -> None:
    users = ["1", "2", "3"]
    first = spawn()
    first.call("meta", 1)
    first.call("open", 0)
    first.call("put", users, 0, 1, 7)
    reader = read()
    assert revisions(reader, users) == [7, 7, 7]
    first.kill()
    if wiped == "store":
        shutil.rmtree(tmp_path / "kv")
    else:
        shutil.rmtree(tmp_path / "kv" / "p-00000")
        if wiped == "partition":
            (tmp_path / "kv" / "p-00000.seq").unlink()
    # The same number of writes as before, and the process is gone before anyone looks again.
    second = spawn()
    second.call("meta", 1)
    second.call("open", 0)
    second.call("put", users[:2], 0, 1, 4)
    second.kill()
    eventually(lambda: shows(reader, users, [4, 4, None]))


def test_a_store_that_is_gone_is_an_error_and_not_old_vectors(
    spawn: Callable[[], Process], read: Callable[[], RocksReader], tmp_path: Path
) -> None:
    worker = spawn()
    worker.call("meta", 1)
    worker.call("open", 0)
    worker.call("put", ["1"], 0, 1, 1)
    reader = read()
    with EmbeddingReader.open(f"rocksdb://{tmp_path}/kv", timeout_s=5) as embeddings:
        assert embeddings.get("1").status == "ok"
        worker.kill()
        shutil.rmtree(tmp_path / "kv")
        eventually(lambda: fails(reader, "1"))
        assert reader.watermark(b"1") is None
        eventually(lambda: embeddings.get("1").reason == "store_down")
        assert embeddings.get("1").stale


def test_an_older_epoch_is_fenced_by_what_another_process_wrote(spawn: Callable[[], Process], tmp_path: Path) -> None:
    worker = spawn()
    worker.call("meta", 1)
    worker.call("open", 0)
    worker.call("put", ["1"], 0, 5, 1)
    worker.kill()

    async def late() -> None:
        kv = RocksKV(tmp_path / "kv")
        await kv.open_partition(0)
        with pytest.raises(Fenced):
            await kv.put(0, entries(["1"], 0, 1, 4, 99))
        assert await kv.put(0, entries(["1"], 0, 1, 5, 2)) == 0
        await kv.close()

    asyncio.run(late())


def test_a_paused_owner_still_owns(spawn: Callable[[], Process], tmp_path: Path) -> None:
    worker = spawn()
    worker.call("meta", 1)
    worker.call("open", 0)
    worker.popen.send_signal(signal.SIGSTOP)

    async def wait() -> None:
        kv = RocksKV(tmp_path / "kv", lock_patience_s=0.3)
        with pytest.raises(StoreLocked, match=r"^[^\n]*held by another process[^\n]*$"):
            await kv.open_partition(0)
        worker.popen.send_signal(signal.SIGCONT)
        worker.call("close")
        await kv.open_partition(0)
        await kv.close()

    asyncio.run(wait())


def test_partitions_that_appear_later_are_picked_up(
    spawn: Callable[[], Process], read: Callable[[], RocksReader]
) -> None:
    users = [str(i) for i in range(40)]
    of = {p: [u for u in users if partition_of(u.encode(), 3) == p] for p in range(3)}
    worker = spawn()
    worker.call("meta", 3)
    reader = read()
    assert fails(reader, users[0])
    for opened in range(3):
        worker.call("open", opened)
        worker.call("put", users, opened, 1, 1)
        for partition in range(3):
            if partition <= opened:
                eventually(lambda mine=of[partition]: shows(reader, mine, [1] * len(mine)))  # type: ignore[misc]
            else:
                assert fails(reader, of[partition][0])


@pytest.mark.parametrize("flush", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_reader_ever_sees_a_vector_go_backward(
    spawn: Callable[[], Process], read: Callable[[], RocksReader], flush: bool
) -> None:
    users = [str(i) for i in range(100)]
    worker = spawn()
    worker.call("meta", 1)
    worker.call("small_tables")
    worker.call("open", 0)
    worker.call("put", users, 0, 1, 0)
    reader = read()
    worker.send("churn", users, CHURN_REVISIONS, flush)
    stop = threading.Event()
    wrong: list[str] = []
    looks = [0] * 4

    def follow(number: int) -> None:
        last = [0] * len(users)
        while not stop.is_set():
            try:
                now = [-1 if revision is None else revision for revision in revisions(reader, users)]
            except StoreError as exc:
                wrong.append(str(exc))
                return
            if any(new < old for new, old in zip(now, last, strict=True)):
                wrong.append(f"{last} then {now}")
                return
            last = now
            looks[number] += 1

    threads = [threading.Thread(target=follow, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    written = worker.answer()
    eventually(lambda: shows(reader, users, [written] * len(users)))
    eventually(lambda: bool(wrong) or min(looks) > 50)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert written == CHURN_REVISIONS


def remove(folder: Path) -> None:
    """Remove it, whatever a reader that is just opening it writes there meanwhile."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_lookups_from_many_threads_survive_reopening(
    spawn: Callable[[], Process], read: Callable[[], RocksReader], tmp_path: Path
) -> None:
    worker = spawn()
    worker.call("meta", 1)
    worker.call("open", 0)
    worker.call("put", ["1", "2"], 0, 1, 1)
    reader = read()
    stop = threading.Event()
    wrong: list[BaseException | str] = []

    def ask() -> None:
        while not stop.is_set():
            try:
                found = revisions(reader, ["1", "2"])
            except StoreError:
                continue  # while it is gone
            except BaseException as exc:
                wrong.append(exc)
                return
            if found not in ([round_, round_] for round_ in range(1, 6)) and found != [None, None]:
                wrong.append(str(found))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for revision in range(2, 6):
        worker.call("close")
        remove(tmp_path / "kv" / "p-00000")
        worker.call("open", 0)
        worker.call("put", ["1", "2"], 0, 1, revision)
        eventually(lambda now=revision: shows(reader, ["1", "2"], [now, now]))  # type: ignore[misc]
    reader.close()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_opening_anew_never_shows_less_than_what_was_open(
    spawn: Callable[[], Process],
    read: Callable[[], RocksReader],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """RocksDB may open a secondary on files that are moving as they were a moment ago; here it is made to."""
    worker = spawn()
    worker.call("meta", 1)
    worker.call("open", 0)
    worker.call("put", ["1", "2"], 0, 1, 5)
    earlier = tmp_path / "earlier"
    shutil.copytree(tmp_path / "kv" / "p-00000", earlier)
    worker.call("put", ["1", "2"], 0, 1, 9)
    reader = read()
    assert revisions(reader, ["1", "2"]) == [9, 9]
    stale: list[str] = []
    real = rocksdb_reader.Rdict

    def behind(path: str, *args: object, **options: object) -> object:
        stale.append(path)
        return real(str(earlier), *args, **options)

    monkeypatch.setattr(rocksdb_reader, "Rdict", behind)
    monkeypatch.setattr(rocksdb_reader, "_RENEW_FILES", -1)
    eventually(lambda: len(stale) >= 3 or revisions(reader, ["1", "2"]) != [9, 9])
    assert revisions(reader, ["1", "2"]) == [9, 9]
    monkeypatch.setattr(rocksdb_reader, "Rdict", real)
    worker.call("put", ["1", "2"], 0, 1, 10)
    eventually(lambda: shows(reader, ["1", "2"], [10, 10]))


def test_a_log_that_is_flushed_and_removed_while_a_reader_opens_is_not_missed(
    spawn: Callable[[], Process],
    read: Callable[[], RocksReader],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A secondary that read the manifest before the flush and the logs after it has a hole that its count hides."""
    worker = spawn()
    worker.call("meta", 1)
    worker.call("open", 0)
    folder, holed = tmp_path / "kv" / "p-00000", tmp_path / "holed"
    worker.call("put", ["1", "2"], 0, 1, 5)
    worker.call("flush")
    worker.call("put", ["1"], 0, 1, 9)
    reader = read()
    eventually(lambda: shows(reader, ["1", "2"], [9, 5]))
    shutil.copytree(folder, holed)
    worker.call("flush")
    worker.call("put", ["2"], 0, 1, 10)
    for log in holed.glob("*.log"):
        log.unlink()
    for log in folder.glob("*.log"):
        shutil.copy(log, holed)
    eventually(lambda: shows(reader, ["1", "2"], [9, 10]))
    opened: list[str] = []
    real = rocksdb_reader.Rdict

    def racing(path: str, *args: object, **options: object) -> object:
        opened.append(path)
        if len(opened) > 1:
            return real(path, *args, **options)
        worker.call("compact")  # changes the manifest as a flush does, and the count not
        return real(str(holed), *args, **options)

    monkeypatch.setattr(rocksdb_reader, "Rdict", racing)
    monkeypatch.setattr(rocksdb_reader, "_RENEW_FILES", -1)
    monkeypatch.setattr(rocksdb_reader, "_OPEN_TRIES", 1)  # the copy can't catch up
    eventually(lambda: len(opened) >= 2 or revisions(reader, ["1", "2"]) != [9, 10])
    assert revisions(reader, ["1", "2"]) == [9, 10]


def test_a_reader_lets_go_of_removed_files_by_opening_anew_and_loses_none_it_needs(
    spawn: Callable[[], Process], read: Callable[[], RocksReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = rocksdb_reader.Rdict

    def counting(path: str, *args: object, **options: object) -> object:
        opened.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr(rocksdb_reader, "Rdict", counting)
    monkeypatch.setattr(rocksdb_reader, "_RENEW_FILES", 25)
    users = [str(i) for i in range(5000)]
    worker = spawn()
    worker.call("meta", 1)
    worker.call("small_tables")
    worker.call("open", 0)
    reader = read()
    assert worker.popen.stdout is not None
    written, last = 0, [0] * 100
    while len(opened) < 8:  # a busy machine shows a reader fewer of the changes: as many as it takes
        worker.send("rotate", users, written, 100)
        while not select.select([worker.popen.stdout], [], [], 0)[0]:
            now = [revision or 0 for revision in revisions(reader, users[::50])]  # never an error
            back = [(user, old, new) for user, old, new in zip(users[::50], last, now, strict=True) if new < old]
            assert back == []
            last = now
        written = worker.answer()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
