"""The embedded store as other processes read it: partitions as RocksDB secondaries, kept fresh in the background."""

import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from rocksdict import AccessType, BlockBasedOptions, Cache, Options, Rdict

from stream.errors import StateError, StoreError, UembError
from stream.keys import partition_of, partitions_of, watermark_key
from stream.kv.protocol import Meta
from stream.kv.rocksdb.layout import (
    COUNT_KEY,
    META_FILE,
    SEQ_HEADER,
    identity_path,
    partition_path,
    read_count,
    read_meta,
    seq_path,
)
from stream.logs import OncePerMinute

_LOOK_S: Final = 0.1  # between looks at the files' names; counts are looked at every poll
_BACKOFF_S: Final = (0.05, 1.0)
_STEADY_S: Final = 5.0  # open for so long, a failure is a new one
_IDLE_SHARE: Final = 2  # at most a third of one core
_BLOCK_CACHE_BYTES: Final = 64 << 20
#: A secondary keeps files open that the owner has removed since, and their disk space taken, for as long as it lives.
#: Bounding its open files instead would let it lose one that it still needs. So it is renewed after so many new files.
_RENEW_FILES: Final = 128
_OPEN_TRIES: Final = 50

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())


class _Files(NamedTuple):
    """What a secondary was opened on; open descriptors keep the inodes from being used again."""

    seq_fd: int
    identity_fd: int
    incarnation: bytes
    newest: int
    scratch: str

    def close(self) -> None:
        os.close(self.seq_fd)
        os.close(self.identity_fd)
        shutil.rmtree(self.scratch, ignore_errors=True)


class _Secondary:
    """One partition's database; `db`, `watermark` and `suspect` are for all threads, the rest for the polling one."""

    def __init__(self, path: Path, partition: int, scratch: str, cache: Cache) -> None:
        self.db: Rdict | None = None
        self.watermark: bytes | None = None
        self.suspect = False  # a lookup met an error
        self._folder = partition_path(path, partition)
        self._seq = seq_path(path, partition)
        self._watermark_key = watermark_key(partition).encode()
        self._scratch = scratch
        self._cache = cache
        self._files: _Files | None = None
        self._seen = 0  # the owner's count up to which nothing is left to do
        self._shown = 0  # the count that `db` holds
        self._opened_at = self._retry_at = 0.0
        self._backoff_s = _BACKOFF_S[0]

    def poll(self, now: float, *, look: bool) -> None:
        """Take in what the owner wrote; with `look`, also notice a database that is new, gone or another one."""
        files, db = self._files, self.db
        try:
            if files is None or db is None:
                if look and now >= self._retry_at:
                    self._open(now)
                return
            if self.suspect:
                msg = "a lookup failed"
                raise StoreError(msg)
            incarnation, count = SEQ_HEADER.unpack(os.pread(files.seq_fd, SEQ_HEADER.size, 0))
            if incarnation != files.incarnation or (look and self._outdated(files)):
                self._open(now)
            elif count != self._seen and now >= self._retry_at:
                before = _manifest(self._folder)
                db.try_catch_up_with_primary()
                shown, watermark = db.get([COUNT_KEY, self._watermark_key])
                whole = _manifest(self._folder) == before
                if read_count(shown) < count:
                    # Flushed before it was read from the log (as at every close), a write lies under older values that
                    # the secondary holds in memory, however often it catches up.
                    self._shown = max(self._shown, read_count(shown))
                    self._open(now)
                elif whole:  # else it may lack what was flushed meanwhile, and the next poll tries again
                    self._seen, self._shown, self.watermark = count, read_count(shown), watermark
        except FileNotFoundError:  # not made yet, or wiped
            self.watermark = None
            self._let_go()
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare exceptions with RocksDB's text
            log.warning("a partition of the store can't be read and is tried again: %s", exc)
            self._let_go()
            self._postpone(now)

    def close(self) -> None:
        """Let go of everything."""
        self._let_go()

    def _postpone(self, now: float) -> None:
        if now - self._opened_at > _STEADY_S:
            self._backoff_s = _BACKOFF_S[0]
        self._retry_at = now + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_S[1])

    def _outdated(self, files: _Files) -> bool:
        if not (_is(self._seq, files.seq_fd) and _is(identity_path(self._folder), files.identity_fd)):
            return True
        return _newest_file(self._folder) - files.newest > _RENEW_FILES

    def _open(self, now: float) -> None:
        """Open what is there now; what was open goes on serving until then."""
        files, count = self._open_files()
        try:
            db, whole = self._open_whole(files.scratch)
            shown, watermark = db.get([COUNT_KEY, self._watermark_key])
        except BaseException:
            files.close()
            raise
        before = self._files
        same = before is not None and self.db is not None and before.incarnation == files.incarnation
        if not whole or (same and read_count(shown) < self._shown <= count):
            # Files moved while it opened: what is open knows more, and nobody shall see a vector go backward.
            files.close()
            self._postpone(now)
            return
        if read_count(shown) < count:  # files moved while it opened, or a power failure took what had been announced
            self._postpone(now)
            count = -1
        # In one step for lookups in other threads. The old database is not closed, which fails while a lookup is in
        # it: the last lookup to let go closes it.
        self.db = db
        self.watermark, self._files, self._opened_at, self.suspect = watermark, files, now, False
        self._seen, self._shown = count, read_count(shown)
        if before is not None:
            before.close()

    def _open_whole(self, scratch: str) -> tuple[Rdict, bool]:
        """A secondary, and whether nothing is missing in its middle.

        It reads the manifest first and the logs then. A log that is flushed and removed in between is in neither, and
        the logs after it hide that; but the flush has then changed the manifest.
        """
        before = _manifest(self._folder)
        db = Rdict(str(self._folder), self._options(), access_type=AccessType.secondary(scratch))
        for _ in range(_OPEN_TRIES):
            if (after := _manifest(self._folder)) == before:
                return db, True
            before = after
            db.try_catch_up_with_primary()
        return db, False

    def _open_files(self) -> tuple[_Files, int]:
        with ExitStack() as undo:
            seq_fd = os.open(self._seq, os.O_RDONLY)
            undo.callback(os.close, seq_fd)
            header = os.pread(seq_fd, SEQ_HEADER.size, 0)
            if len(header) < SEQ_HEADER.size:
                raise FileNotFoundError  # its owner is making it
            incarnation, count = SEQ_HEADER.unpack(header)
            identity_fd = os.open(identity_path(self._folder), os.O_RDONLY)
            undo.callback(os.close, identity_fd)
            os.makedirs(self._scratch, mode=0o700, exist_ok=True)  # cleaners of temporary folders take it
            newest = _newest_file(self._folder)
            files = _Files(seq_fd, identity_fd, incarnation, newest, tempfile.mkdtemp(dir=self._scratch))
            undo.pop_all()
        return files, count

    def _options(self) -> Options:
        table = BlockBasedOptions()
        table.set_block_cache(self._cache)
        table.set_bloom_filter(10, False)  # writers make it, but without this nobody reads it
        options = Options(raw_mode=True)
        options.set_block_based_table_factory(table)
        options.set_max_open_files(-1)
        options.set_max_log_file_size(1 << 20)
        options.set_keep_log_file_num(1)
        options.set_stats_dump_period_sec(0)
        return options

    def _let_go(self) -> None:
        self.db = None
        if self._files is not None:
            self._files.close()
            self._files = None


class RocksReader:
    """Retrieval's hold on the embedded store; see `stream.kv.protocol.KVReader`. Open it after forking, not before.

    One daemon thread takes in what the owners write, usually within a few milliseconds; a lookup never waits for that.

    Args:
        path: folder of the store, readable by this process; nothing is written there.
        poll_s: pause between looks at the write counts.

    Raises:
        StoreError: there is no readable ``meta.json`` at `path`.
    """

    def __init__(self, path: str | Path, *, poll_s: float = 0.002) -> None:
        self.path = Path(path)
        self._poll_s = poll_s
        self._meta_stamp = self._stamp()
        try:
            meta = read_meta(self.path)
        except StateError as exc:
            raise StoreError(str(exc)) from exc
        if meta is None:
            msg = f"no store at {self.path}: no {META_FILE} there; start a worker first"
            raise StoreError(msg)
        self._meta = meta
        self._cache = Cache(_BLOCK_CACHE_BYTES)
        self._scratch = tempfile.mkdtemp(prefix="uemb-reader-")
        self._clean = weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)  # also at exit
        self._parts: tuple[_Secondary, ...] = ()
        self._stop = threading.Event()
        self._look_at = 0.0
        self._poll(time.monotonic())
        self._thread = threading.Thread(target=self._follow, name="uemb-kv-reader", daemon=True)
        self._thread.start()

    def meta(self) -> Meta:
        """The shared record as last seen; cheap."""
        return self._meta

    def get(self, lookups: Sequence[tuple[bytes, bytes]]) -> list[bytes | None]:
        """Entries for pairs of (canonical user id in UTF-8, key), in their order.

        Raises:
            StoreError: the database of one of the users' partitions is missing or can't be read.
        """
        parts = self._parts
        if not parts:
            msg = f"the store at {self.path} is closed, or no worker has set its partition count yet"
            raise StoreError(msg)
        if len(lookups) == 1:
            ((user_id, key),) = lookups
            return self._read(parts, partition_of(user_id, len(parts)), [key])
        places: dict[int, list[int]] = {}
        for place, partition in enumerate(partitions_of([user_id for user_id, _ in lookups], len(parts))):
            places.setdefault(partition, []).append(place)
        found: list[bytes | None] = [None] * len(lookups)
        for partition, at in places.items():
            for place, entry in zip(at, self._read(parts, partition, [lookups[i][1] for i in at]), strict=True):
                found[place] = entry
        return found

    def watermark(self, user_id: bytes) -> bytes | None:
        """Watermark of the partition that owns `user_id`, as last seen; cheap."""
        parts = self._parts
        return parts[partition_of(user_id, len(parts))].watermark if parts else None

    def close(self) -> None:
        """Stop background work and let go of the store."""
        self._stop.set()
        self._thread.join()
        parts, self._parts = self._parts, ()
        for part in parts:
            part.close()
        self._clean()

    def _read(self, parts: Sequence[_Secondary], partition: int, keys: list[bytes]) -> list[bytes | None]:
        part = parts[partition]
        db = part.db
        if db is None:
            msg = f"partition {partition} of the store at {self.path} can't be read now"
            raise StoreError(msg)
        try:
            # The list form frees the interpreter lock while RocksDB reads, the form for one key does not.
            return db.get(keys)  # type: ignore[no-any-return]
        except Exception as exc:
            part.suspect = True
            msg = f"partition {partition} of the store at {self.path} can't be read: {exc}"
            raise StoreError(msg) from exc

    def _follow(self) -> None:
        pause_s = self._poll_s
        while not self._stop.wait(pause_s):
            began = time.thread_time()
            try:
                self._poll(time.monotonic())
            except Exception:  # a reader that has stopped following would serve old vectors for ever
                log.exception("following the store failed and is tried again")
            pause_s = max(self._poll_s, _IDLE_SHARE * (time.thread_time() - began))

    def _poll(self, now: float) -> None:
        look = now >= self._look_at
        if look:
            self._look_at = now + _LOOK_S
            if (stamp := self._stamp()) != self._meta_stamp:
                self._reload_meta(stamp)
            if len(self._parts) != (self._meta.partitions or 0):
                for part in self._parts:  # another number of them means that the store was made anew
                    part.close()
                count = self._meta.partitions or 0
                self._parts = tuple(_Secondary(self.path, p, self._scratch, self._cache) for p in range(count))
        for part in self._parts:
            part.poll(now, look=look)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(self.path / META_FILE)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _reload_meta(self, stamp: tuple[int, int, int] | None) -> None:
        try:
            meta = read_meta(self.path)
        except UembError as exc:
            log.warning("the store's shared record can't be read, the last one seen stays: %s", exc)
            return
        self._meta_stamp = stamp
        if meta is not None:
            self._meta = meta


def _manifest(folder: Path) -> tuple[str, int]:
    """Name and size of the file that lists a database's tables: every flush changes it, before logs are removed."""
    name = (folder / "CURRENT").read_text().strip()
    return name, os.stat(folder / name).st_size


def _newest_file(folder: Path) -> int:
    """The highest number in a database's file names; RocksDB counts on and on."""
    return max((int(digits) for name in os.listdir(folder) if (digits := name.partition(".")[0]).isdigit()), default=0)


def _is(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False
