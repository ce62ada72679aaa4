"""Files of events: CSV, JSON lines or Parquet, in our shape or a producer's, row by row.

What a file holds is told by its first bytes, not by its name. CSV and JSON lines may be compressed with gzip.
"""

import gzip
import io
import select
import sys
import threading
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from stream.core.events import EventRow, Reason, Rejected, TsUnit, check_time, implausible, to_ms
from stream.errors import ConfigError
from stream.feed.parquet_rows import parquet_rows
from stream.feed.shape import NATIVE, BadRow, FileShape, Raw
from stream.feed.text_rows import csv_rows, json_events, json_rows
from stream.items.input_files import BOM, GZIP
from stream.keys import canonical_id

#: Stands for standard input.
STDIN: Final = Path("-")
_PARQUET: Final = b"PAR1"
#: How files begin that hold events in another wrapping, and how to unwrap them.
_WRAPPED: Final = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it: zstd -dc FILE | uemb send -",
    b"PK\x03\x04": "is a zip archive; unpack it: unzip -p FILE | uemb send -",
    b"BZh": "is compressed with bzip2; unpack it: bzip2 -dc FILE | uemb send -",
    b"\xfd7zXZ": "is compressed with xz; unpack it: xz -dc FILE | uemb send -",
    b"\x04\x22\x4d\x18": "is compressed with lz4; unpack it: lz4 -dc FILE | uemb send -",
    b"7z\xbc\xaf": "is a 7-Zip archive; unpack it: 7z e -so FILE | uemb send -",
    b"Obj\x01": "is Avro; write it as Parquet, CSV or JSON lines",
    b"\xff\xfe\0\0": "is in UTF-32; convert it: iconv -f UTF-32 -t UTF-8 FILE | uemb send -",
    b"\0\0\xfe\xff": "is in UTF-32; convert it: iconv -f UTF-32 -t UTF-8 FILE | uemb send -",
    b"\xff\xfe": "is in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE | uemb send -",
    b"\xfe\xff": "is in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE | uemb send -",
}
_TAR: Final = (
    "is a tar archive; unpack it: tar -xOf FILE | uemb send - (one file in it at a time, if each has a header)"
)
_BINARY: Final = "is binary, or text in UTF-16: convert it to UTF-8 (iconv -f UTF-16LE -t UTF-8 FILE | uemb send -)"
_PEEK_BYTES: Final = 4096
_TYPE_MAX_CHARS: Final = 64
_STOP_POLL_S: Final = 0.1


def read_file(path: str | Path, shape: FileShape = NATIVE) -> Iterator[EventRow]:
    """Rows of a file in their order, one at a time.

    Raises:
        ConfigError: the file can't be read, or a row is bad (its line number, never its content).
    """
    file = EventFile(path, shape)
    for number, row in file.rows():
        if isinstance(row, BadRow):
            raise file.refused(number, row)
        yield row


class EventFile:
    """One file, or standard input as ``-``.

    Args:
        path: where it is.
        shape: its names and unit.
        stop: ends a wait for standard input.
    """

    def __init__(self, path: str | Path, shape: FileShape = NATIVE, stop: threading.Event | None = None) -> None:
        self.path = Path(path)
        self._shape = shape
        self._stop = stop or threading.Event()
        self._counted = "line"

    @property
    def name(self) -> str:
        """What to call it on screen."""
        return "standard input" if self.path == STDIN else str(self.path)

    def refused(self, number: int, why: BadRow) -> ConfigError:
        """The error of a bad row that nobody asked to skip."""
        return ConfigError(f"{self.name} {self._counted} {number}: {why.detail}")

    def rows(self, skip: int = 0) -> Iterator[tuple[int, EventRow | BadRow]]:
        """Line or row number and content of all rows after `skip`, the bad ones among them and among those skipped.

        Blank lines of CSV and JSON lines are no rows.

        Raises:
            ConfigError: the file can't be read, or its header, schema or compression is wrong.
        """
        try:
            with self._open() as file:
                first = file.peek(_PEEK_BYTES)
                if first.startswith(_PARQUET):
                    self._counted = "row"
                    raws, unit = parquet_rows(file, self._shape, skip)
                    yield from _checked_rows(raws, self._shape.type, unit)
                elif first.startswith(GZIP):
                    with gzip.open(file) as unpacked:
                        yield from self._text(io.BufferedReader(unpacked), skip)
                else:
                    yield from self._text(file, skip)
        except ConfigError as exc:
            msg = f"{self.name} {exc}"
            raise ConfigError(msg) from exc
        except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
            msg = f"{self.name} is no whole gzip file ({exc})"
            raise ConfigError(msg) from exc
        except OSError as exc:
            msg = f"{self.name} can't be read ({exc.strerror or exc})"
            raise ConfigError(msg) from exc

    def _open(self) -> io.BufferedReader:
        if self.path == STDIN:
            return io.BufferedReader(_Input(self._stop))
        return self.path.open("rb")

    def _text(self, file: io.BufferedReader, skip: int) -> Iterator[tuple[int, EventRow | BadRow]]:
        head = file.peek(_PEEK_BYTES)
        for begins, what in _WRAPPED.items():
            if head.startswith(begins):
                raise ConfigError(what)
        if head[257:262] == b"ustar":
            raise ConfigError(_TAR)
        if b"\0" in head.partition(b"\n")[0]:
            raise ConfigError(_BINARY)
        if head.startswith(BOM):
            file.read(len(BOM))
        first = file.peek(_PEEK_BYTES).lstrip()[:1]
        if first == b"[":
            msg = "line 1: is a JSON array; write one object a line (jq -c '.[]')"
            raise ConfigError(msg)
        shape = self._shape
        if first == b"{" and shape.several:  # how many rows are in a line can't be told without reading it
            yield from islice(_whole(json_events(file, shape), shape.type, shape.ts_unit), skip, None)
            return
        raws = (json_rows if first == b"{" else csv_rows)(file, shape, skip)
        yield from _checked_rows(raws, shape.type, shape.ts_unit)


class _Input(io.RawIOBase):
    """Standard input that ends when we are asked to stop: a plain read would wait for the next line."""

    def __init__(self, stop: threading.Event) -> None:
        self._file: Any = io.FileIO(sys.stdin.fileno(), closefd=False)
        self._stop = stop

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        while not self._stop.is_set():
            if select.select([self._file], [], [], _STOP_POLL_S)[0]:
                count: int | None = self._file.readinto(buffer)
                return count
        return 0


def _checked_rows(
    raws: Iterator[tuple[int, Raw | BadRow]], fixed_type: str | None, unit: TsUnit
) -> Iterator[tuple[int, EventRow | BadRow]]:
    for number, raw in raws:
        if isinstance(raw, BadRow):
            yield number, raw
            continue
        try:
            row: EventRow | BadRow = _checked(raw, fixed_type, unit)
        except Rejected as exc:
            row = BadRow.of(exc.reject)
        yield number, row


def _whole(
    events: Iterator[tuple[int, list[Raw] | BadRow]], fixed_type: str | None, unit: TsUnit
) -> Iterator[tuple[int, EventRow | BadRow]]:
    """The rows of each event, or its first fault: a worker turns the whole of it away, too."""
    for number, raws in events:
        if isinstance(raws, BadRow):
            yield number, raws
            continue
        rows = list(_checked_rows(((number, raw) for raw in raws), fixed_type, unit))
        bad = next((row for row in rows if isinstance(row[1], BadRow)), None)
        yield from rows if bad is None else [bad]


def _checked(raw: Raw, fixed_type: str | None, unit: TsUnit) -> EventRow:
    if None in raw:
        raise Rejected(Reason.MISSING_FIELD, "a field is null")
    kind = raw[3] if fixed_type is None else fixed_type
    ts_ms = to_ms(raw[2], unit)
    if check_time(ts_ms, -1):
        raise Rejected(Reason.IMPLAUSIBLE_TIMESTAMP, implausible(ts_ms, unit))
    if not isinstance(kind, str) or not kind.isprintable() or not 1 <= len(kind) <= _TYPE_MAX_CHARS:
        raise Rejected(Reason.WRONG_TYPE, f"type must be 1 to {_TYPE_MAX_CHARS} printable characters")
    return EventRow(_id("user_id", raw[0]), _id("item_id", raw[1]), kind, ts_ms)


def _id(name: str, value: Any) -> str:
    try:
        return canonical_id(value)
    except ValueError as exc:
        raise Rejected(Reason.INVALID_ID, f"{name}: {exc}") from None
