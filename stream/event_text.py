"""Rows of CSV and of JSON lines."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import IO, Any, Final

import msgspec

from stream.errors import ConfigError
from stream.event_shape import BadRow, FileShape, Raw
from stream.events import JSON_ERRORS, Reason, Rejected, TsUnit, UserEvent, follow, json_reject

_WHOLE_MAX_DIGITS: Final = 18


def json_rows(file: IO[bytes], shape: FileShape, skip: int) -> Iterator[tuple[int, Raw | BadRow]]:
    """Line number and content of each line that is not blank, after `skip` of them."""
    paths = shape.paths
    decode = msgspec.json.Decoder(UserEvent).decode
    decode_any = msgspec.json.Decoder().decode
    native = shape.native
    lines = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
    for number, line in islice(lines, skip, None):
        try:
            if native:
                event = decode(line)
                yield number, (event.user_id, event.item_id, event.ts, event.type)
            else:
                document = decode_any(line)
                yield number, tuple([follow(document, path) for path in paths])
        except JSON_ERRORS as exc:
            yield number, BadRow.of(json_reject(exc))
        except Rejected as exc:
            yield number, BadRow.of(exc.reject)


def csv_rows(file: IO[bytes], shape: FileShape, skip: int) -> Iterator[tuple[int, Raw | BadRow]]:
    """Number of the last line and content of each row after the header and `skip` rows.

    Raises:
        ConfigError: the header lacks a column.
    """
    # Bytes that are no UTF-8 become lone surrogates, which the row's own check refuses under the right line number.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    try:
        yield from _csv_rows(csv.reader(text, strict=True), shape, skip)
    finally:
        text.detach()  # the file is the caller's to close


def _csv_rows(reader: Any, shape: FileShape, skip: int) -> Iterator[tuple[int, Raw | BadRow]]:
    columns, at = _header(reader, shape)
    number_of = _TIMES[shape.ts_unit]
    for row in islice(_records(reader), skip, None):
        if isinstance(row, BadRow):
            yield reader.line_num, row
        elif len(row) != columns:
            yield reader.line_num, BadRow("not_csv", f"has {len(row)} columns, the header {columns}")
        else:
            user, item, ts, *kind = [row[i].strip() for i in at]
            try:
                yield reader.line_num, (user, item, number_of(ts), *kind)
            except Rejected as exc:
                yield reader.line_num, BadRow.of(exc.reject)


def _header(reader: Iterator[list[str]], shape: FileShape) -> tuple[int, list[int]]:
    """The number of columns, and where those of `shape.paths` are."""
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as exc:
        msg = f"line 1: {exc}"
        raise ConfigError(msg) from exc
    if missing := [name for name in shape.paths if name not in header]:
        msg = f"line 1: the header lacks {', '.join(missing)} (CSV needs a header with {','.join(shape.paths)})"
        raise ConfigError(msg)
    return len(header), [header.index(name) for name in shape.paths]


def _records(reader: Iterator[list[str]]) -> Iterator[list[str] | BadRow]:
    """Rows that are not blank; what is no CSV is one bad row, after which reading goes on."""
    while True:
        try:
            for row in reader:
                if row:
                    yield row
        except csv.Error as exc:
            yield BadRow("not_csv", str(exc))
        else:
            return


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise Rejected(Reason.WRONG_TYPE, "ts must be a whole number of epoch milliseconds")
    if len(text) > _WHOLE_MAX_DIGITS:  # Python refuses numbers of thousands of digits
        raise Rejected(Reason.IMPLAUSIBLE_TIMESTAMP, "ts must be epoch milliseconds")
    return int(text)


def _seconds(text: str) -> int | float:
    try:
        return int(text) if len(text) <= _WHOLE_MAX_DIGITS and text.isdecimal() else float(text)
    except ValueError:
        raise Rejected(Reason.WRONG_TYPE, "ts must be a number of epoch seconds") from None


_TIMES: Final[Mapping[TsUnit, Callable[[str], int | float | str]]] = {"ms": _whole, "s": _seconds, "iso8601": str}
