"""Rows of CSV and of JSON lines."""

import csv
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import IO, Final

import msgspec

from stream.core.events import JSON_ERRORS, Rejected, UserEvent, found_at, json_document, json_reject
from stream.core.field_paths import Values
from stream.errors import ConfigError
from stream.feed.shape import BadRow, FileShape, Raw
from stream.items.input_files import RecordLines, lines_of

#: What may be between the columns of CSV, the usual one first.
_DELIMITERS: Final = ",\t;|"
_LONE_RETURN: Final = re.compile(r"(?<=\r)(?!\n)")


def json_rows(file: IO[bytes], shape: FileShape, skip: int) -> Iterator[tuple[int, Raw | BadRow]]:
    """Line number and content of each row after `skip`: of each line that is not blank."""
    values = Values(shape.paths)
    decode = msgspec.json.Decoder(UserEvent).decode
    native = shape.native
    for number, line in islice(_not_blank(file), skip, None):
        try:
            if native:
                try:
                    event = decode(line)
                    yield number, (event.user_id, event.item_id, event.ts, event.type)
                    continue
                except msgspec.ValidationError as exc:  # but for a time that is a number in quotes
                    refused = exc
                try:
                    (row,) = found_at(json_document(line), values)
                except (Rejected, *JSON_ERRORS):
                    raise refused from None
                if not isinstance(row[2], str):
                    raise refused
            else:
                (row,) = found_at(json_document(line), values)
            yield number, row
        except JSON_ERRORS as exc:
            yield number, _no_json(exc, line)
        except Rejected as exc:
            yield number, BadRow.of(exc.reject)


def json_events(file: IO[bytes], shape: FileShape) -> Iterator[tuple[int, list[Raw] | BadRow]]:
    """Line number and rows of each line that is not blank, where an event may be several."""
    values = Values(shape.paths)
    for number, line in _not_blank(file):
        try:
            yield number, found_at(json_document(line), values)
        except JSON_ERRORS as exc:
            yield number, _no_json(exc, line)
        except Rejected as exc:
            yield number, BadRow.of(exc.reject)


def _not_blank(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines_of(file), 1) if not line.isspace())


def _no_json(exc: Exception, line: bytes) -> BadRow:
    row = BadRow.of(json_reject(exc))
    if line.rstrip().endswith(b"}"):
        return row
    return row._replace(detail=f"{row.detail}; each line must hold one whole object (jq -c . writes them so)")


def csv_rows(file: IO[bytes], shape: FileShape, skip: int) -> Iterator[tuple[int, Raw | BadRow]]:
    """Number of the last line and content of each row after the header and `skip` rows.

    Raises:
        ConfigError: the header lacks a column.
    """
    # Bytes that are no UTF-8 become lone surrogates, which the row's own check refuses under the right line number.
    lines = _csv_lines(line.decode("utf-8", "surrogateescape") for line in lines_of(file))
    blank = 0
    first = ""
    for first in lines:
        if first.strip():
            break
        blank += 1
    delimiter, columns, at = _columns(first, shape)
    records = RecordLines(lines if shape.columns is None else chain([first], lines))
    before = blank + (shape.columns is None)
    first_row = None if shape.columns is None else blank + 1
    reader = csv.reader(records, strict=True, delimiter=delimiter)
    for row in islice(_records(reader, records), skip, None):
        number = before + reader.line_num
        if isinstance(row, BadRow):
            yield number, row
        elif len(row) != columns:
            named = "the header" if shape.columns is None else "--columns"
            yield number, BadRow("not_csv", f"has {len(row)} columns, {named} {columns}")
        elif number == first_row and not re.search(r"\d", row[at[2]]):
            yield number, BadRow("not_csv", "holds no time; a header's names are mapped by --fields, without --columns")
        else:
            yield number, tuple([row[i].strip() for i in at])


def _csv_lines(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if "\r" in line[:-2]:
            yield from _LONE_RETURN.split(line)
        else:
            yield line


def _columns(first: str, shape: FileShape) -> tuple[str, int, list[int]]:
    """The delimiter, the number of columns, and where those of `shape.paths` are.

    Raises:
        ConfigError: they are not there, whatever the delimiter.
    """
    needed = [(path.text, path.column) for path in shape.paths]
    if shape.columns is not None and (missing := _missing(needed, shape.columns)):
        msg = f"--columns lacks {', '.join(missing)}; name all of {','.join(name for _, name in needed)}"
        raise ConfigError(msg)
    found: dict[str, list[str]] = {}
    for delimiter in shape.delimiter or _DELIMITERS:
        try:
            cells = next(csv.reader([first], strict=True, delimiter=delimiter), [])
            found[delimiter] = [name.strip() for name in cells]
        except csv.Error as exc:
            found[delimiter] = []
            problem = str(exc)
    for delimiter, cells in found.items():
        names = cells if shape.columns is None else shape.columns
        if len(cells) == len(names) and not _missing(needed, names):
            return delimiter, len(names), [_place(needs, names) for needs in needed]
    if not any(found.values()):
        msg = f"line 1: {problem}" if first.strip() else "line 1: the file is empty"
        raise ConfigError(msg)
    cells = max(found.values(), key=len)
    if shape.columns is not None:
        msg = f"line 1: has {len(cells)} columns, --columns {len(shape.columns)}; name all, _ for what is not read"
        raise ConfigError(msg)
    named = ",".join(name for _, name in needed)
    msg = (
        f"line 1: the header lacks {', '.join(_missing(needed, cells))} (CSV needs a header with {named}; a file "
        "without one needs --columns, other names --fields, another separator --delimiter)"
    )
    raise ConfigError(msg)


def _missing(needed: list[tuple[str, str]], names: list[str] | tuple[str, ...]) -> list[str]:
    return [column for text, column in needed if text not in names and column not in names]


def _place(needs: tuple[str, str], names: list[str] | tuple[str, ...]) -> int:
    text, column = needs
    return names.index(text if text in names else column)


def _records(reader: Iterator[list[str]], lines: RecordLines) -> Iterator[list[str] | BadRow]:
    """Rows that are not blank; what is no CSV is one bad row, after which reading goes on."""
    while True:
        try:
            for row in reader:
                lines.next_record()
                if row:
                    yield row
        except csv.Error as exc:
            lines.next_record()
            yield BadRow("not_csv", str(exc))
        else:
            return
