"""Interactions to feed in: their types, files of one's own, and the choice between real and synthetic data."""

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from stream.errors import ConfigError, UembError
from stream.keys import canonical_id

DEFAULT_CACHE_DIR: Final = Path("~/.cache/user-embedding-stream")

#: Bounds of an event time in the contract's schema, milliseconds.
_TS_MS: Final = (315_532_800_000, 281_474_976_710_655)
_FIELDS: Final = ("user_id", "item_id", "type", "ts")
_TYPE_MAX_CHARS: Final = 64

Progress = Callable[[int, int | None], None]
Note = Callable[[str], None]


class DatasetUnavailable(UembError):
    """The real data can't be had: no network, no index, or not the bytes that were pinned."""


class EventRow(NamedTuple):
    """One interaction; ids are canonical texts, `ts_ms` is event time."""

    user_id: str
    item_id: str
    type: str
    ts_ms: int


@dataclass(frozen=True)
class Dataset:
    """A named stream.

    Attributes:
        name: what to call it on screen.
        events: sorted by `event_order`.
        titles: text for an item id, where one is known.
        synthetic: whether it was made up.
    """

    name: str
    events: list[EventRow]
    titles: dict[str, str]
    synthetic: bool


def event_order(row: EventRow) -> tuple[int, str, str]:
    """Sort key of a stream: time, user, item; texts by code point, which is UTF-8 byte order.

    Sorting is stable, so rows that agree in all three keep the order of their source.
    """
    return row.ts_ms, row.user_id, row.item_id


def load(
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
    events_file: str | Path | None = None,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> Dataset:
    """The file if one is given, else MovieLens-100K, else (one line through `on_note`) the synthetic stream.

    Raises:
        ConfigError: the file can't be read or holds a bad row.
    """
    from stream.movielens import movielens  # here: both build on this module's types
    from stream.synthetic import synthetic

    if events_file is not None:
        return load_file(events_file)
    try:
        return movielens(cache_dir, on_progress)
    except DatasetUnavailable as exc:
        if on_note is not None:
            on_note(f"{exc}; using a synthetic stream instead")
        return synthetic()


class _Line(msgspec.Struct):
    user_id: int | str
    item_id: int | str
    type: str
    ts: int


def load_file(path: str | Path) -> Dataset:
    """Events of one's own, sorted by `event_order`; for the format see `read_file`.

    Raises:
        ConfigError: the file can't be read, holds no events, or has a bad row.
    """
    events = sorted(read_file(path), key=event_order)
    if not events:
        msg = f"{path} holds no events"
        raise ConfigError(msg)
    return Dataset(Path(path).name, events, {}, synthetic=False)


def read_file(path: str | Path) -> Iterator[EventRow]:
    """Rows of a file in their order, one at a time.

    CSV has a header with `user_id`, `item_id`, `type` and `ts` (epoch milliseconds) in any order; JSON lines (the first
    character is a brace) have the same fields. Other columns and fields are ignored.

    Raises:
        ConfigError: the file can't be read, or a row is bad (its line number, never its content).
    """

    def bad(number: int, why: object) -> ConfigError:
        return ConfigError(f"{path} line {number}: {why}")

    try:
        # Bytes that are no UTF-8 become lone surrogates, which the row's own check refuses under the right line number.
        with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.read(1)
            file.seek(0)
            for number, line in _json_lines(file, bad) if first == "{" else _csv_lines(file, bad):
                try:
                    row = _checked(line)
                except ValueError as exc:
                    raise bad(number, exc) from exc
                yield row
    except OSError as exc:
        msg = f"{path} can't be read ({exc.strerror})"
        raise ConfigError(msg) from exc


_Bad = Callable[[int, object], ConfigError]


def _json_lines(file: Iterable[str], bad: _Bad) -> Iterator[tuple[int, _Line]]:
    decode = msgspec.json.Decoder(_Line).decode
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            yield number, decode(line)
        except UnicodeEncodeError as exc:
            raise bad(number, "not UTF-8 text") from exc
        except msgspec.DecodeError as exc:
            raise bad(number, exc) from exc


def _csv_lines(file: Iterable[str], bad: _Bad) -> Iterator[tuple[int, _Line]]:
    reader = csv.reader(file, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if missing := [name for name in _FIELDS if name not in header]:
            raise bad(
                1, f"the header lacks {', '.join(missing)} (CSV needs {','.join(_FIELDS)}; else write JSON lines)"
            )
        at = [header.index(name) for name in _FIELDS]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise bad(reader.line_num, f"has {len(row)} columns, the header {len(header)}")
            user, item, kind, ts = (row[i].strip() for i in at)
            if not (ts.isascii() and ts.isdecimal()):
                raise bad(reader.line_num, "ts must be a whole number of epoch milliseconds")
            yield reader.line_num, _Line(user, item, kind, int(ts))
    except csv.Error as exc:
        raise bad(reader.line_num, exc) from exc


def _checked(line: _Line) -> EventRow:
    if not _TS_MS[0] <= line.ts <= _TS_MS[1]:
        msg = f"ts must be epoch milliseconds from {_TS_MS[0]} (1980) to {_TS_MS[1]}; is it in seconds?"
        raise ValueError(msg)
    if not line.type.isprintable() or not 1 <= len(line.type) <= _TYPE_MAX_CHARS:
        msg = f"type must be 1 to {_TYPE_MAX_CHARS} printable characters"
        raise ValueError(msg)
    return EventRow(canonical_id(line.user_id), canonical_id(line.item_id), line.type, line.ts)
