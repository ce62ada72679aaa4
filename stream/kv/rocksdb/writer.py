"""The embedded store: one RocksDB per partition, written by the partition's owner only, and one shared JSON record."""

import asyncio
import fcntl
import logging
import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Final

from rocksdict import Cache, WriteBatch

from stream.core.records import PREFIX_BYTES
from stream.errors import StateDamaged, StoreError, StoreLocked, StoreLost
from stream.keys import partition_of
from stream.kv.meta import encode_meta
from stream.kv.protocol import Meta, fenced, user_of
from stream.kv.rocksdb.layout import META_FILE, META_LOCK, ask_path, partition_path, read_meta, replace_file, seq_path
from stream.kv.rocksdb.partition import EPOCH_BYTES, Partition, translated
from stream.security.permissions import file_mode

log = logging.getLogger(__name__)

_VECTORS: Final = b"uemb:"
_MOVED_AT_ONCE: Final = 1_000
#: One of so many entries that need not be compared is read.
_SAMPLED: Final = 32
_LOCK_POLL_S: Final = 0.02
_BLOCK_CACHE_BYTES: Final = 32 << 20


class RocksKV:
    """A worker's hold on the embedded store; see `stream.kv.protocol.KVWriter`.

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
        self._partitions: dict[int, Partition] = {}

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
                with translated(f"{META_FILE} of {self.path}"):
                    replace_file(self.path / META_FILE, encode_meta(after))
            return after
        finally:
            os.close(fd)

    async def open_partition(self, partition: int) -> None:
        """Take the partition for writing; harmless when it is open.

        Raises:
            StoreLocked: another process holds it, and went on to do so for the whole patience.
        """
        if partition in self._partitions:
            return
        what = f"partition {partition} of {self.path}"
        # Our own lock first: every failed open of a RocksDB leaves a rotated log file in the owner's folder.
        fd = await self._lock(seq_path(self.path, partition), what)
        try:
            with translated(what):
                self._partitions[partition] = Partition(partition_path(self.path, partition), fd, self._cache)
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
        """Entries as stored, in the order of `keys`; none of what was damaged, which is begun anew."""
        try:
            return self._read(partition, keys)
        except StateDamaged as exc:
            log.warning("%s, and begun anew: its owner rebuilds it", exc)
            await self._begin_anew(partition)
            return self._read(partition, keys)

    async def put(self, partition: int, entries: Mapping[bytes, bytes], *, ordered: bool = False) -> int:
        """Write each entry unless a stored one has a greater ``(epoch, revision)``; return how many were refused.

        Those that are `ordered`, and newer by their epoch than all that was there before the partition was opened, are
        written without a look at what is stored, which costs several times as much as writing.

        Raises:
            Fenced: a stored entry has a higher epoch than the one written; nothing was written.
            StoreLost: the database was damaged, or removed while open, and was begun anew; nothing was written.
            ValueError: an entry is shorter than its prefix; nothing was written.
        """
        if any(len(entry) < PREFIX_BYTES for entry in entries.values()):
            msg = f"a key-value entry needs a prefix of {PREFIX_BYTES} bytes"
            raise ValueError(msg)
        held = self._held(partition)
        if not held.is_present:
            raise await self._lost(partition, f"partition {partition} of {self.path} was removed")
        epochs = {entry[:EPOCH_BYTES] for entry in entries.values()}
        epoch = max(epochs, default=b"")
        is_newest = ordered and len(epochs) == 1 and epoch >= held.epoch and epoch > held.epoch_before
        keys = list(entries)
        try:
            # Of the newest some are read all the same: damage shows in reading.
            stored = self._read(partition, keys[::_SAMPLED] if is_newest else keys)
        except StateDamaged as exc:
            raise await self._lost(partition, str(exc)) from exc
        batch = WriteBatch(raw_mode=True)
        for (key, entry), old in zip(entries.items(), repeat(None) if is_newest else stored, strict=not is_newest):
            # Big-endian, so bytes compare as (epoch, revision). What is too short to compare was not written by us.
            if old is not None and len(old) >= PREFIX_BYTES and old[:PREFIX_BYTES] > entry[:PREFIX_BYTES]:
                if old[:EPOCH_BYTES] > entry[:EPOCH_BYTES]:
                    raise fenced(partition, old[:EPOCH_BYTES], entry[:EPOCH_BYTES])
                continue
            batch[key] = entry
        written = len(batch)
        if written:
            try:
                with translated(f"partition {partition} of {self.path}"):
                    held.write(batch, epoch)
            except StateDamaged as exc:
                raise await self._lost(partition, str(exc)) from exc
        return len(entries) - written

    async def remove(self, partition: int, keys: Sequence[bytes], epoch: int) -> None:
        """Remove keys, but for entries of a higher epoch than `epoch`; what is damaged has nothing left to remove."""
        ours = epoch.to_bytes(EPOCH_BYTES, "big")
        batch = WriteBatch(raw_mode=True)
        for key, old in zip(keys, await self.get(partition, keys), strict=True):
            if old is not None and old[:EPOCH_BYTES] <= ours:
                batch.delete(key)
        with translated(f"partition {partition} of {self.path}"):
            self._held(partition).write(batch)

    async def ask_rebuild(self, partition: int) -> None:
        """Ask the partition's owner, present or next, to write it anew from the histories."""
        with translated(f"partition {partition} of {self.path}"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(ask_path(self.path, partition), uuid.uuid4().bytes)

    async def rebuild_request(self, partition: int) -> bytes | None:
        """Mark of the newest request, None without one."""
        with translated(f"partition {partition} of {self.path}"):
            try:
                return ask_path(self.path, partition).read_bytes()
            except FileNotFoundError:
                return None

    async def rebuild_done(self, partition: int, request: bytes) -> None:
        """Answer a request; one that came later stays."""
        if await self.rebuild_request(partition) == request:
            with translated(f"partition {partition} of {self.path}"):
                ask_path(self.path, partition).unlink(missing_ok=True)

    async def is_owned(self, partition: int) -> bool:
        """Whether another process has taken the partition."""
        with translated(f"partition {partition} of {self.path}"):
            file = seq_path(self.path, partition)
            if not file.exists():
                return False
            fd = _try_lock(file)
            if fd is not None:
                os.close(fd)
            return fd is None

    async def move(self, partitions: int) -> int:
        """Copy each user's entries to its place among `partitions`, which stay where they were; return how many."""
        moved = 0
        async for partition in self._databases(partitions):
            elsewhere = self._elsewhere(partition, partitions)
            while some := list(islice(elsewhere, _MOVED_AT_ONCE)):
                by_place: dict[int, dict[bytes, bytes]] = defaultdict(dict)
                for place, key, entry in some:
                    by_place[place][key] = entry
                for place, entries in by_place.items():
                    await self.open_partition(place)
                    await self.put(place, entries)
                moved += len(some)
        return moved

    async def sweep(self, partitions: int) -> None:
        """Take entries out of places that are not their users' among `partitions`."""
        async for partition in self._databases(partitions):
            elsewhere = self._elsewhere(partition, partitions)
            while some := list(islice(elsewhere, _MOVED_AT_ONCE)):
                batch = WriteBatch(raw_mode=True)
                for _, key, _ in some:
                    batch.delete(key)
                with translated(f"partition {partition} of {self.path}"):
                    self._held(partition).write(batch)

    async def _databases(self, partitions: int) -> AsyncIterator[int]:
        """Of so many partitions, those that have a database, each open."""
        for partition in range(partitions):
            if partition_path(self.path, partition).exists():
                await self.open_partition(partition)
                yield partition

    def _elsewhere(self, partition: int, partitions: int) -> Iterator[tuple[int, bytes, bytes]]:
        """Place, key and entry of each vector that lies in a partition and does not belong there."""
        with translated(f"partition {partition} of {self.path}"):
            for key, entry in self._held(partition).db.items(from_key=_VECTORS):
                if not key.startswith(_VECTORS):
                    return
                user = user_of(key)
                if user is not None and (place := partition_of(user, partitions)) != partition:
                    yield place, key, entry

    async def close(self) -> None:
        """Give everything up."""
        for partition in list(self._partitions):
            await self.close_partition(partition)

    def _read(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        held = self._held(partition)
        with translated(f"partition {partition} of {self.path}"):
            return list(held.db.get(list(keys)))

    async def _lost(self, partition: int, why: str) -> StoreLost:
        """Begin a partition anew; return the error that has its owner claim and rebuild it."""
        await self._begin_anew(partition)
        return StoreLost(why)

    async def _begin_anew(self, partition: int) -> None:
        await self.close_partition(partition)
        await asyncio.to_thread(shutil.rmtree, partition_path(self.path, partition), ignore_errors=True)
        await self.open_partition(partition)

    def _held(self, partition: int) -> Partition:
        held = self._partitions.get(partition)
        if held is None:
            msg = f"partition {partition} of {self.path} is not open for writing"
            raise StoreError(msg)
        return held

    async def _lock(self, file: Path, what: str) -> int:
        """Open and lock `file`, waiting for another holder; the lock lasts until the returned descriptor closes."""
        deadline = time.monotonic() + self._patience_s
        while True:
            with translated(what):
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
        os.fchmod(fd, file_mode(file.parent))
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
