"""Files of one's own: lines of bounded length, plain or in gzip, and folders of parts."""

import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, cast

from stream.errors import ConfigError

#: Longest line that is read: a whole file on one line would fill the memory, and a small compressed file may hold one.
MAX_LINE_BYTES: Final = 16 << 20
#: A row group in Parquet that is no larger than this is read, however small the file is; a larger one, where it is no
#: more than so many times the file. What sensible files hold becomes a tenth.
_PARQUET_GROUP_BYTES: Final = 64 << 20
_PARQUET_RATIO: Final = 100
#: Ends the name of the file that tells how far a send has come, which lies beside the data.
PROGRESS: Final = ".uemb-send.json"
BOM: Final = b"\xef\xbb\xbf"
GZIP: Final = b"\x1f\x8b"


def files_in(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and those in folders that are, as parts of a table.

    Hidden files are no parts, nor are empty ones, which writers leave for want of rows, and the notes of a send.

    Raises:
        ConfigError: a folder holds none, or folders.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        parts = sorted(part for part in path.iterdir() if part.name[0] not in "._" and PROGRESS not in part.name)
        if inner := [part.name for part in parts if part.is_dir()]:
            msg = f"{path} holds folders, as {inner[0]}, which are not looked into: name those that are to be read"
            raise ConfigError(msg)
        parts = [part for part in parts if part.is_file() and part.stat().st_size]
        if not parts:
            msg = f"{path} is a folder without files that hold anything"
            raise ConfigError(msg)
        found += parts
    return found


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of a file, their ends included.

    Raises:
        ConfigError: one is too long.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            msg = f"line {number}: is longer than {MAX_LINE_BYTES >> 20} MiB; write one record a line"
            raise ConfigError(msg)
        yield line


class RecordLines(Iterator[str]):
    """Lines for a reader that may take several for one record, as one of CSV does while a quote is open.

    Args:
        lines: of a file.

    Raises:
        ConfigError: a record is too long: quotes that never close would have it grow without end.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._chars = 0

    def __next__(self) -> str:
        line = next(self._lines)
        self._chars += len(line)
        if self._chars > MAX_LINE_BYTES:
            msg = f"holds a record of more than {MAX_LINE_BYTES >> 20} MiB; is a quote missing?"
            raise ConfigError(msg)
        return line

    def next_record(self) -> None:
        """The lines that come are another record's."""
        self._chars = 0


def check_parquet(metadata: Any, file_bytes: int) -> None:
    """Refuse a Parquet file, by its metadata, a part of which would be expanded to much more than anybody writes.

    Not column by column: pyarrow ends the process where the metadata of one is damaged.

    Raises:
        ConfigError: one would.
    """
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if size > _PARQUET_GROUP_BYTES and size > _PARQUET_RATIO * file_bytes:
            msg = f"has {file_bytes:,} bytes that expand to {size:,}; write it anew, with smaller row groups"
            raise ConfigError(msg)


def open_lines(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes, unpacked if it is gzip, from behind a byte-order mark if it has one.

    Raises:
        OSError: it can't be read, or is no whole gzip file; `EOFError` and `zlib.error` mean the same.
    """
    with path.open("rb") as start:
        packed = start.read(len(GZIP)) == GZIP
    file = cast(io.BufferedReader, gzip.open(path) if packed else path.open("rb"))  # noqa: SIM115 - the caller's to close
    try:
        if file.peek(len(BOM)).startswith(BOM):
            file.read(len(BOM))
    except BaseException:
        file.close()
        raise
    return file
