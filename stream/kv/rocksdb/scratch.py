"""A temporary table that may be larger than memory: gone when it is closed."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from rocksdict import AccessType, Options, Rdict, WriteBatch, WriteOptions


class Scratch:
    """Bytes by bytes on disk, in order; nothing is synced, for nothing is kept."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="uemb-")
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(32 << 20)
        options.set_keep_log_file_num(1)
        options.set_stats_dump_period_sec(0)
        self._db = Rdict(f"{self._folder}/db", options, access_type=AccessType.read_write())
        self._write = WriteOptions()
        self._write.disable_wal = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self.remove()

    def remove(self) -> None:
        """Take the files away, whoever still has them open: for a process that ends."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values in the order of `keys`."""
        return list(self._db[list(keys)]) if keys else []

    def put(self, entries: Mapping[bytes, bytes]) -> None:
        """Write entries."""
        batch = WriteBatch(raw_mode=True)
        for key, value in entries.items():
            batch.put(key, value)
        self._db.write(batch, self._write)

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove entries."""
        batch = WriteBatch(raw_mode=True)
        for key in keys:
            batch.delete(key)
        self._db.write(batch, self._write)

    def under(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Entries whose keys begin with `prefix`, in order and without it, as of now."""
        for key, value in self._db.items(from_key=prefix):
            if not key.startswith(prefix):
                return
            yield key[len(prefix) :], value
