"""One partition's database of the embedded store: open, write, close, and what its errors mean."""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rocksdict import BlockBasedOptions, Cache, DBCompressionType, DBRecoveryMode, Options, Rdict, WriteBatch

from stream.errors import Fenced, StateDamaged, StateError, StoreError
from stream.kv.rocksdb.errors import first_line, is_damage
from stream.kv.rocksdb.layout import (
    COUNT_BYTES,
    COUNT_KEY,
    COUNT_OFFSET,
    EPOCH_KEY,
    INCARNATION_KEY,
    SEQ_HEADER,
    identity_path,
    read_count,
)
from stream.security.permissions import is_shared, make_below

log = logging.getLogger(__name__)

#: Of an entry, what comes first.
EPOCH_BYTES: Final = 8
_WRITE_BUFFER_BYTES: Final = 8 << 20


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what RocksDB and the file system raise into our errors.

    Raises:
        StateDamaged: what is stored can't be trusted.
        StoreError: anything else.
    """
    try:
        yield
    except (StoreError, StateError, Fenced):
        raise
    except OSError as exc:
        msg = f"{what}: {exc.strerror or exc}"
        raise StoreError(msg) from exc
    except Exception as exc:  # rocksdict raises bare exceptions with RocksDB's own text
        text = first_line(exc)
        if is_damage(text):
            msg = f"{what} is damaged ({text})"
            raise StateDamaged(msg) from exc
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


#: Written anew by the library, always with the same, wherever a database is opened: by readers, too.
_LIBRARY_FILE: Final = "rocksdict-config.json"


class Partition:
    """One open database, and the file that tells readers about it; both locked until `close`.

    What can't be opened is wiped: its owner finds the watermark missing then, and rebuilds it.

    Attributes:
        db: the database.
        epoch_before: the highest epoch that anything was written under before it was opened, big-endian.
        epoch: the same, of now.
    """

    __slots__ = ("_count", "_folder", "_identity_fd", "_seq_fd", "db", "epoch", "epoch_before")

    def __init__(self, folder: Path, seq_fd: int, cache: Cache) -> None:
        make_below(folder)
        self._folder = folder
        self._seq_fd = seq_fd
        try:
            incarnation, counted, epoch = self._open(cache)
        except StateDamaged as exc:
            log.warning("%s of the store is begun anew: its owner rebuilds it", exc)
            shutil.rmtree(folder)
            make_below(folder)
            incarnation, counted, epoch = self._open(cache)
        self.epoch = self.epoch_before = epoch
        if is_shared(folder):
            (folder / _LIBRARY_FILE).chmod(0o660)
        try:
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

    def _open(self, cache: Cache) -> tuple[bytes | None, bytes | None, bytes]:
        """Open the database; return its incarnation, write count and epoch, whose reading may be what meets damage."""
        with translated(self._folder.name):
            self.db = Rdict(str(self._folder), _options(cache))
            try:
                incarnation, counted, epoch = self.db.get([INCARNATION_KEY, COUNT_KEY, EPOCH_KEY])
                if epoch is None:  # it is new, or of a release that did not note it
                    entries = (entry[:EPOCH_BYTES] for key, entry in self.db.items() if not key.startswith(b"\0"))
                    epoch = max(entries, default=bytes(EPOCH_BYTES))
            except BaseException:
                self.db.close()
                raise
            return incarnation, counted, epoch

    @property
    def is_present(self) -> bool:
        """False when the store was wiped under its owner, whose writes would go to files that nobody can find."""
        return bool(os.fstat(self._identity_fd).st_nlink and os.fstat(self._seq_fd).st_nlink)

    def write(self, batch: WriteBatch, epoch: bytes = b"") -> None:
        """Write a batch, whose entries' highest epoch is given, and tell readers that there is news."""
        count = (self._count + 1).to_bytes(COUNT_BYTES, "little")
        batch[COUNT_KEY] = count
        if epoch > self.epoch:
            batch[EPOCH_KEY] = epoch
        self.db.write(batch)
        self._count += 1
        self.epoch = max(self.epoch, epoch)
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
