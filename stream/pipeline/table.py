"""The history table: a Faust table on one RocksDB per partition, read and written in bulk.

Restoring and claiming a partition is `stream.worker.ownership`'s; this module only moves bytes to and from disk.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, Final

import faust
from faust import tables as faust_tables
from faust.stores.base import SerializedStore
from rocksdict import AccessType, BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, ReadOptions, WriteBatch

from stream.errors import StateDamaged, StateError, StoreLocked
from stream.kafka.host import Host
from stream.kafka.producer import FAUST_LOG
from stream.keys import CLAIM_KEY, partition_of
from stream.kv.rocksdb.errors import first_line, is_damage

TABLE: Final = "user-history"
#: Keys of our own; no user id holds a control character.
OFFSET_KEY: Final = b"\0offset"

_CACHE_BYTES: Final = 32 << 20
_WRITE_BUFFER_BYTES: Final = 8 << 20

log = logging.getLogger(__name__)


class PartitionDB:
    """Local state of one partition: user id to stored history, the newest claim, and how far the changelog is in it."""

    def __init__(self, path: Path, cache: Cache) -> None:
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
        options.set_max_write_buffer_number(2)
        # Most users are not in what was written last, which takes 1 us to find out without a filter.
        options.set_memtable_whole_key_filtering(True)
        options.set_memtable_prefix_bloom_ratio(0.02)
        options.set_keep_log_file_num(2)
        options.set_max_open_files(256)
        # Compression saves a third of the disk, and costs 5 us of CPU for each event of a user who isn't in memory.
        options.set_compression_type(DBCompressionType.none())
        table = BlockBasedOptions()
        table.set_block_cache(cache)
        table.set_bloom_filter(10, block_based=False)
        options.set_block_based_table_factory(table)
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._faults():
            self._db = Rdict(str(path), options, access_type=AccessType.read_write())

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Stored values in the order of `keys`."""
        with self._faults():
            return list(self._db[list(keys)]) if keys else []

    def put(self, entries: Mapping[bytes, bytes | None], changelog_offset: int) -> None:
        """Write entries, None to remove one, and how far the changelog is contained, as one step."""
        batch = WriteBatch(raw_mode=True)
        for key, value in entries.items():
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        batch.put(OFFSET_KEY, changelog_offset.to_bytes(8, "big"))
        with self._faults():
            self._db.write(batch)

    @property
    def changelog_offset(self) -> int:
        """All changelog records below this offset are contained; 0 for an empty database."""
        data = self.get([OFFSET_KEY])[0]
        return int.from_bytes(data, "big") if data else 0

    @property
    def claim(self) -> bytes | None:
        """The newest claim of the partition."""
        return self.get([CLAIM_KEY])[0]

    def users(self) -> Iterator[tuple[bytes, bytes]]:
        """All users with their stored state."""
        with self._faults():
            for key, value in self._db.items():
                if not key.startswith(b"\0"):
                    yield key, value

    def some_users(self, after: bytes, count: int) -> list[tuple[bytes, bytes]]:
        """Up to `count` users behind `after`, in the order of their ids, with their stored state."""
        passing = ReadOptions()
        passing.fill_cache(False)  # the blocks of users in use stay where they are
        with self._faults():
            return list(islice(self._db.items(from_key=after + b"\0" if after else b"\1", read_opt=passing), count))

    def count_users(self) -> int:
        """About how many users there are, as RocksDB estimates it."""
        with self._faults():
            return int(self._db.property_int_value("rocksdb.estimate-num-keys") or 0)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn what RocksDB raises into our errors, and remember damage for the next start.

        Raises:
            StoreLocked: another process has it open.
            StateDamaged: what is stored can't be trusted.
            StateError: the disk is full, or not ours to write.
        """
        try:
            yield
        except Exception as exc:  # rocksdict raises bare exceptions with RocksDB's own text
            text = first_line(exc)
            if "lock file" in text:
                msg = f"{self.path} is open in another process; give each worker a UEMB_STATE_DIR of its own"
                raise StoreLocked(msg) from exc
            if is_damage(text):
                damage_path(self.path).touch()
                msg = f"{self.path.name}: local state is damaged ({text}); start again, all is restored"
                raise StateDamaged(msg) from exc
            msg = f"{self.path} can't be read or written ({text}); see whether the disk is full, then start again"
            raise StateError(msg) from exc

    def close(self) -> None:
        """Flush and let go of the database, so that another process can open it."""
        try:
            self._db.close()
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare exceptions
            # Closing tidies the log into tables; when that fails (a full disk) the log still holds every entry.
            log.warning("%s was closed untidily, its log keeps what was written: %s", self.path.name, exc)
        finally:
            del self._db  # what a failed close has left open


def damage_path(path: Path) -> Path:
    """File beside a database that says that it was found damaged."""
    return path.with_suffix(".damaged")


def restoring_path(path: Path) -> Path:
    """File beside a database that is being restored; its time is that of what was there before."""
    return path.with_suffix(".restoring")


def _complete_at_s(path: Path) -> float:
    """Epoch seconds at which a database was last known to hold all of the changelog; now, where there is none.

    That is the time of its last write. Opening it is one too: so what was found is kept aside until all is restored,
    lest a start that fails on the way, again and again, makes what is stored look younger than it is.
    """
    aside = restoring_path(path)
    if not aside.exists():
        times = [file.stat().st_mtime for file in path.iterdir()] if path.is_dir() else []
        newest = max(times, default=time.time())
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside.touch()
        os.utime(aside, (newest, newest))
    return aside.stat().st_mtime


class HistoryStore(SerializedStore):
    """Registered as ``uemb://`` under ``faust.stores``: the open partitions of this worker."""

    app: Host
    logger = FAUST_LOG

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cache = Cache(_CACHE_BYTES)
        self._open: dict[int, PartitionDB] = {}
        self._looked_for_damage = False

    def path(self, partition: int) -> Path:
        """Folder of a partition, where Faust's own stores would put it."""
        return Path(self.app.conf.tabledir) / f"{self.table_name}-{partition}.db"

    def open(self, partition: int, max_age_s: float = inf) -> PartitionDB:
        """Open a partition for reading and writing; what can't be trusted is wiped, for the changelog has it all.

        Args:
            partition: its number.
            max_age_s: state that was not written for longer is not trusted.
        """
        if partition in self._open:
            return self._open[partition]
        path = self.path(partition)
        self._wipe_what_was_damaged()
        if (age_s := time.time() - _complete_at_s(path)) > max_age_s:
            log.warning(
                "partition %s: local state is %.0f hours old, the changelog keeps what was removed for %.0f; it is "
                "wiped and restored", partition, age_s / 3600, max_age_s / 3600,
            )  # fmt: skip
            self.wipe(partition)
            _complete_at_s(path)
        try:
            self._open[partition] = PartitionDB(path, self._cache)
        except StateDamaged as exc:
            log.warning("%s", exc)
            self.wipe(partition)
            _complete_at_s(path)
            self._open[partition] = PartitionDB(path, self._cache)
        return self._open[partition]

    def _wipe_what_was_damaged(self) -> None:
        """Where a part was found damaged by an earlier run, distrust all: a disk seldom loses one file alone.

        Damage shows when a block is read, which may be days after the start; each would stop the worker once.
        """
        if self._looked_for_damage:
            return
        self._looked_for_damage = True
        folder = Path(self.app.conf.tabledir)
        if marks := sorted(folder.glob(f"{self.table_name}-*.damaged")):
            names = ", ".join(mark.stem for mark in marks)
            log.warning("local state was found damaged (%s); all of it is wiped and restored", names)
            for path in folder.glob(f"{self.table_name}-*.db"):
                shutil.rmtree(path, ignore_errors=True)
            for mark in marks:
                mark.unlink()

    def restored(self, partition: int) -> None:
        """What is stored holds all of the changelog: from here on, its age is that of its last write."""
        restoring_path(self.path(partition)).unlink(missing_ok=True)

    @property
    def open_partitions(self) -> list[int]:
        """Numbers of the partitions that are open."""
        return list(self._open)

    def close(self, partition: int) -> None:
        """Close a partition; harmless when it is not open."""
        if db := self._open.pop(partition, None):
            db.close()

    def wipe(self, partition: int) -> None:
        """Forget a partition's local state; the changelog has it all."""
        self.close(partition)
        shutil.rmtree(self.path(partition), ignore_errors=True)
        for aside in (damage_path, restoring_path):
            aside(self.path(partition)).unlink(missing_ok=True)

    def persisted_offset(self, tp: Any) -> int | None:
        """None: restoring is ours, Faust has nothing to catch up with."""
        return None

    def reset_state(self) -> None:
        """Forget all local state."""
        for partition in self.open_partitions:
            self.wipe(partition)

    async def backup_partition(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the changelog is the backup."""
        self._refuse()

    def restore_backup(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the changelog is the backup."""
        self._refuse()

    # -- read-only mapping, for Faust's views and for curiosity ----------------------------------------------------

    def _get(self, key: bytes) -> bytes | None:
        partition = partition_of(key, self.app.conf.topic_partitions)
        return self._open[partition].get([key])[0] if partition in self._open else None

    def _contains(self, key: bytes) -> bool:
        return self._get(key) is not None

    def _iteritems(self) -> Iterator[tuple[bytes, bytes]]:
        for db in self._open.values():
            yield from db.users()

    def _iterkeys(self) -> Iterator[bytes]:
        return (key for key, _ in self._iteritems())

    def _itervalues(self) -> Iterator[bytes | None]:
        return (value for _, value in self._iteritems())

    def _size(self) -> int:
        return sum(1 for _ in self._iterkeys())

    def _set(self, key: bytes, value: bytes | None) -> None:
        self._refuse()

    def _del(self, key: bytes) -> None:
        self._refuse()

    def _clear(self) -> None:
        self._refuse()

    def _refuse(self) -> None:
        msg = "histories change through events and erasures only; send one to its topic"
        raise StateError(msg)


class TableManager(faust_tables.TableManager):
    """Faust's, without its rest of a second at each start: our tables and agents are all made before it."""

    logger = FAUST_LOG

    async def on_start(self) -> None:
        """Follow the changelogs and start recovery."""
        await self._update_channels()
        await self.recovery.start()


class HistoryTable(faust.Table):
    """The Faust table; hands finished assignments over to the application."""

    app: Host
    logger = FAUST_LOG

    async def on_recovery_completed(self, active_tps: set[Any], standby_tps: set[Any]) -> None:
        """Take the assigned partitions before Faust lets events flow; a failure stops the worker (law 6)."""
        try:
            active = sorted(tp.partition for tp in active_tps)
            await self.app.take_partitions(active, sorted({tp.partition for tp in standby_tps} - set(active)))
        except Exception as exc:  # noqa: BLE001 - Faust drops exceptions of this callback
            await self.app.crash(exc)
        await super().on_recovery_completed(active_tps, standby_tps)
