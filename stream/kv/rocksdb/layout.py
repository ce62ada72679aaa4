"""Files of the embedded store, as writer and readers find them.

Layout under the store's path (folders 0700 and files 0600; 2750 and 0640 where a group may read)::

    meta.json     the reserved keys that belong to no partition; replaced whole, under meta.lock
    p-00003/      RocksDB of partition 3
    p-00003.seq   24 bytes: incarnation of that database, count of its writes; locked (flock) by the owner
    p-00003.ask   there while somebody asks the owner to write the partition anew

Readers in other processes watch the ``.seq`` files: a moved count means news, another incarnation another database.
"""

import os
import re
import struct
from pathlib import Path
from typing import Final

from stream.errors import StoreError
from stream.kv.meta import decode_meta
from stream.kv.protocol import Meta
from stream.security.permissions import file_mode
from stream.security.regular_files import read_regular

META_FILE: Final = "meta.json"
META_LOCK: Final = "meta.lock"
#: A fallback record for each pair of versions is most of it.
_META_MAX_BYTES: Final = 64 << 20
_OURS: Final = re.compile(r"meta\.(json|lock|tmp)|p-\d{5,}(\.seq|\.ask|\.tmp)?")

#: Incarnation (16 bytes) and write count of a ``.seq`` file.
SEQ_HEADER: Final = struct.Struct("<16sQ")
COUNT_OFFSET: Final = 16
COUNT_BYTES: Final = 8

#: Where a database keeps its own incarnation and write count; no key of ours begins with a zero byte.
INCARNATION_KEY: Final = b"\x00incarnation"
#: The highest epoch that anything was written under, big-endian.
EPOCH_KEY: Final = b"\x00epoch"
#: Part of every write, so that a reader can tell whether a secondary really shows it (RocksDB's sometimes don't).
COUNT_KEY: Final = b"\x00count"


def partition_path(path: Path, partition: int) -> Path:
    """Folder of a partition's database."""
    return path / f"p-{partition:05d}"


def is_of_store(name: str) -> bool:
    """Whether a file or folder of this name is one of the above."""
    return _OURS.fullmatch(name) is not None


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
        data = read_regular(file, _META_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as exc:
        msg = f"{file} can't be read ({exc.strerror})"
        raise StoreError(msg) from exc
    return decode_meta(data, str(file), "stop the workers, remove the store and start them again, they rebuild it")


def replace_file(file: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new one."""
    staging = file.with_suffix(".tmp")
    fd = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as out:
        os.fchmod(fd, file_mode(file.parent))
        out.write(data)
        out.flush()
        os.fsync(fd)
    staging.rename(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
