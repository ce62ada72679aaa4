"""The embedded store: one RocksDB per partition, written by the partition's owner only, and one shared JSON record.

Layout under the store's path (folders 0700, our own files 0600)::

    meta.json     the reserved keys that belong to no partition; replaced whole, under meta.lock
    p-00003/      RocksDB of partition 3
    p-00003.seq   24 bytes: incarnation of that database, count of its writes; locked (flock) by the owner
    p-00003.ask   there while somebody asks the owner to write the partition anew

Readers in other processes watch the ``.seq`` files: a moved count means news, another incarnation another database.
"""

import asyncio
import fcntl
import logging
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rocksdict import BlockBasedOptions, Cache, DBCompressionType, DBRecoveryMode, Options, Rdict, WriteBatch

from stream.errors import Fenced, StateError, StoreError, StoreLocked
from stream.kv.base import Meta, fenced
from stream.kv.meta import decode_meta, encode_meta
from stream.records import PREFIX_BYTES

META_FILE: Final = "meta.json"
META_LOCK: Final = "meta.lock"

#: Incarnation (16 bytes) and write count of a ``.seq`` file.
SEQ_HEADER: Final = struct.Struct("<16sQ")
COUNT_OFFSET: Final = 16
COUNT_BYTES: Final = 8

#: Where a database keeps its own incarnation and write count; no key of ours begins with a zero byte.
INCARNATION_KEY: Final = b"\x00incarnation"
#: Part of every write, so that a reader can tell whether a secondary really shows it (RocksDB's sometimes don't).
COUNT_KEY: Final = b"\x00count"

log = logging.getLogger(__name__)

_EPOCH_BYTES: Final = 8
_LOCK_POLL_S: Final = 0.02
_BLOCK_CACHE_BYTES: Final = 32 << 20
_WRITE_BUFFER_BYTES: Final = 8 << 20


def partition_path(path: Path, partition: int) -> Path:
    """Folder of a partition's database."""
    return path / f"p-{partition:05d}"


def seq_path(path: Path, partition: int) -> Path:
    """File that tells readers about a partition's database."""
    return path / f"p-{partition:05d}.seq"


def ask_path(path: Path, partition: int) -> Path:
    """File that asks the owner for a rebuild."""
    return path / f"p-{partition:05d}.ask"


def identity_path(folder: Path) -> Path:
    """File that RocksDB makes once per database; unlike the folder's, its link count tells of removal everywhere."""
    return folder / "IDENTITY"


def read_count(stored: bytes | None) -> int:
    """Write count from what a database holds under `COUNT_KEY`."""
    return 0 if stored is None else int.from_bytes(stored, "little")


def read_meta(path: str | Path) -> Meta | None:
    """The shared record of the store at `path`, or None where there is none.

    Raises:
        StateError: the record is damaged, or of a format that this release does not know.
        StoreError: the file can't be read.
    """
    file = Path(path) / META_FILE
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        msg = f"{file} can't be read ({exc.strerror})"
        raise StoreError(msg) from exc
    return decode_meta(data, str(file), "stop the workers, remove the store and start them again, they rebuild it")


def _replace(file: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new one."""
    staging = file.with_suffix(".tmp")
    fd = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(fd)
    staging.rename(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn what RocksDB and the file system raise into our errors."""
    try:
        yield
    except (StoreError, StateError, Fenced):
        raise
    except OSError as exc:
        msg = f"{what}: {exc.strerror or exc}"
        raise StoreError(msg) from exc
    except Exception as exc:  # rocksdict raises bare exceptions with RocksDB's own text
        text = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        if "Corruption" in text:
            msg = f"{what}: database damaged ({text}); remove its folder and restart, its owner rebuilds it"
            raise StateError(msg) from exc
        msg = f"{what}: {text}"
        raise StoreError(msg) from exc


def _options(cache: Cache) -> Options:
    table = BlockBasedOptions()
    table.set_block_cache(cache)
    table.set_bloom_filter(10, False)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(table)
    options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(2)
    options.set_target_file_size_base(32 << 20)
    options.set_compression_type(DBCompressionType.none())  # float32 noise does not compress
    options.set_paranoid_checks(True)
    # A kill may tear the WAL's last record, which was then never acknowledged; any other damage is an error. RocksDB's
    # default would open with whatever precedes the damage, absolute consistency would refuse after a plain kill.
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_max_background_jobs(2)
    options.set_max_log_file_size(1 << 20)
    options.set_keep_log_file_num(2)
    options.set_stats_dump_period_sec(0)
    return options


class _Partition:
    """One open database, and the file that tells readers about it; both locked until `close`."""

    __slots__ = ("_count", "_folder", "_identity_fd", "_seq_fd", "db")

    def __init__(self, folder: Path, seq_fd: int, cache: Cache) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._seq_fd = seq_fd
        self.db = Rdict(str(folder), _options(cache))
        try:
            incarnation, counted = self.db.get([INCARNATION_KEY, COUNT_KEY])
            if incarnation is None:
                incarnation = self.db[INCARNATION_KEY] = uuid.uuid4().bytes
            header = os.pread(seq_fd, SEQ_HEADER.size, 0)
            announced = SEQ_HEADER.unpack(header)[1] if len(header) == SEQ_HEADER.size else 0
            # Counted on as news: an owner that was killed may have written without announcing it.
            self._count = max(announced, read_count(counted)) + 1
            self.db[COUNT_KEY] = self._count.to_bytes(COUNT_BYTES, "little")
            os.pwrite(seq_fd, SEQ_HEADER.pack(incarnation, self._count), 0)
            self._identity_fd = os.open(identity_path(folder), os.O_RDONLY)
        except BaseException:
            self.db.close()
            raise

    def check_present(self) -> None:
        """Notice that the store was wiped under its owner, whose writes would go to files that nobody can find.

        Raises:
            StateError: the folder or the file beside it is gone.
        """
        if not (os.fstat(self._identity_fd).st_nlink and os.fstat(self._seq_fd).st_nlink):
            msg = f"{self._folder} was removed while open; restart the worker, it rebuilds the partition"
            raise StateError(msg)

    def write(self, batch: WriteBatch) -> None:
        """Write a batch, and tell readers that there is news."""
        count = (self._count + 1).to_bytes(COUNT_BYTES, "little")
        batch[COUNT_KEY] = count
        self.db.write(batch)
        self._count += 1
        os.pwrite(self._seq_fd, count, COUNT_OFFSET)

    def close(self) -> None:
        """Close at once instead of at garbage collection, or the next owner would meet the lock."""
        try:
            self.db.close()
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare exceptions
            # Closing tidies the log into tables; when that fails (a full disk) the log still holds every entry.
            log.warning("%s was closed untidily, its log keeps what was written: %s", self._folder.name, exc)
        finally:
            del self.db  # what a failed close has left open
            os.close(self._identity_fd)
            os.close(self._seq_fd)


class RocksKV:
    """A worker's hold on the embedded store; see `stream.kv.base.KVWriter`.

    Reads and writes run in the event loop's thread: 100 entries take about 0.2 ms, and rocksdict holds the interpreter
    lock while it writes, so a thread would not free the loop. Callers keep batches to some thousands of entries.
    Writes are in the operating system's hands when `put` returns; they survive a kill, and what a power failure takes
    shows in the watermark (law 10).

    Args:
        path: folder of the store; made when missing.
        lock_patience_s: how long to wait for a lock that another process holds.
    """

    def __init__(self, path: str | Path, *, lock_patience_s: float = 10.0) -> None:
        self.path = Path(path)
        self._patience_s = lock_patience_s
        self._cache = Cache(_BLOCK_CACHE_BYTES)
        self._partitions: dict[int, _Partition] = {}

    async def update_meta(self, change: Callable[[Meta], Meta]) -> Meta:
        """Read, change and replace the shared record as one step; an exception of `change` leaves it as it was.

        Raises:
            StateError: the record is damaged or of an unknown format.
            StoreLocked: another process kept the record locked.
        """
        fd = await self._lock(self.path / META_LOCK, f"{META_FILE} of {self.path}")
        try:
            before = read_meta(self.path)
            after = change(before or Meta())
            if after != before:
                with _translated(f"{META_FILE} of {self.path}"):
                    _replace(self.path / META_FILE, encode_meta(after))
            return after
        finally:
            os.close(fd)

    async def open_partition(self, partition: int) -> None:
        """Take the partition for writing; harmless when it is open.

        Raises:
            StoreLocked: another process holds it, and went on to do so for the whole patience.
            StateError: its database is damaged.
        """
        if partition in self._partitions:
            return
        what = f"partition {partition} of {self.path}"
        # Our own lock first: every failed open of a RocksDB leaves a rotated log file in the owner's folder.
        fd = await self._lock(seq_path(self.path, partition), what)
        try:
            with _translated(what):
                self._partitions[partition] = _Partition(partition_path(self.path, partition), fd, self._cache)
        except StoreError as exc:
            os.close(fd)
            if "lock" in str(exc).lower():
                msg = f"{what} is open in a process that is not a worker of this release; stop it and start again"
                raise StoreLocked(msg) from exc
            raise
        except BaseException:
            os.close(fd)
            raise

    async def close_partition(self, partition: int) -> None:
        """Give the partition up, so that the next owner can open it at once; harmless when it is not open."""
        held = self._partitions.pop(partition, None)
        if held is not None:
            await asyncio.to_thread(held.close)  # it writes out what the log holds

    async def get(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """Entries as stored, in the order of `keys`."""
        held = self._held(partition)
        with _translated(f"partition {partition} of {self.path}"):
            return list(held.db.get(list(keys)))

    async def put(self, partition: int, entries: Mapping[bytes, bytes]) -> int:
        """Write each entry unless a stored one has a greater ``(epoch, revision)``; return how many were refused.

        Raises:
            Fenced: a stored entry has a higher epoch than the one written; nothing was written.
            StateError: the database is damaged, or was removed while open.
            ValueError: an entry is shorter than its prefix; nothing was written.
        """
        held = self._held(partition)
        with _translated(f"partition {partition} of {self.path}"):
            held.check_present()
            stored = held.db.get(list(entries))
        batch = WriteBatch(raw_mode=True)
        for (key, entry), old in zip(entries.items(), stored, strict=True):
            if len(entry) < PREFIX_BYTES:
                msg = f"a key-value entry needs a prefix of {PREFIX_BYTES} bytes"
                raise ValueError(msg)
            # Big-endian, so bytes compare as (epoch, revision). What is too short to compare was not written by us.
            if old is not None and len(old) >= PREFIX_BYTES and old[:PREFIX_BYTES] > entry[:PREFIX_BYTES]:
                if old[:_EPOCH_BYTES] > entry[:_EPOCH_BYTES]:
                    raise fenced(partition, old[:_EPOCH_BYTES], entry[:_EPOCH_BYTES])
                continue
            batch[key] = entry
        written = len(batch)
        if written:
            with _translated(f"partition {partition} of {self.path}"):
                held.write(batch)
        return len(entries) - written

    async def ask_rebuild(self, partition: int) -> None:
        """Ask the partition's owner, present or next, to write it anew from the histories."""
        with _translated(f"partition {partition} of {self.path}"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(ask_path(self.path, partition), uuid.uuid4().bytes)

    async def rebuild_request(self, partition: int) -> bytes | None:
        """Mark of the newest request, None without one."""
        with _translated(f"partition {partition} of {self.path}"):
            try:
                return ask_path(self.path, partition).read_bytes()
            except FileNotFoundError:
                return None

    async def rebuild_done(self, partition: int, request: bytes) -> None:
        """Answer a request; one that came later stays."""
        if await self.rebuild_request(partition) == request:
            with _translated(f"partition {partition} of {self.path}"):
                ask_path(self.path, partition).unlink(missing_ok=True)

    async def is_owned(self, partition: int) -> bool:
        """Whether another process has taken the partition."""
        with _translated(f"partition {partition} of {self.path}"):
            file = seq_path(self.path, partition)
            if not file.exists():
                return False
            fd = _try_lock(file)
            if fd is not None:
                os.close(fd)
            return fd is None

    async def close(self) -> None:
        """Give everything up."""
        for partition in list(self._partitions):
            await self.close_partition(partition)

    def _held(self, partition: int) -> _Partition:
        held = self._partitions.get(partition)
        if held is None:
            msg = f"partition {partition} of {self.path} is not open for writing"
            raise StoreError(msg)
        return held

    async def _lock(self, file: Path, what: str) -> int:
        """Open and lock `file`, waiting for another holder; the lock lasts until the returned descriptor closes."""
        deadline = time.monotonic() + self._patience_s
        while True:
            with _translated(what):
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = _try_lock(file)
            if fd is not None:
                return fd
            if time.monotonic() >= deadline:
                msg = f"{what} is still held by another process after {self._patience_s:g} s; stop that process first"
                raise StoreLocked(msg)
            await asyncio.sleep(_LOCK_POLL_S)


def _try_lock(file: Path) -> int | None:
    """Open and lock `file`; None when another holds it."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who wiped the store between the two calls has left us the lock of a file that is gone.
        if os.path.samestat(os.fstat(fd), file.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
