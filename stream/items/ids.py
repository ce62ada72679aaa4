"""Item ids as a memory-mapped text file, found again through arrays: no Python object per item.

An id is looked for in a bucket of rows, chosen by the top bits of its hash, whose ids are then compared. The hash is
Python's own: keyed anew in each process, so that nobody can choose ids that collide, and the index is made at load.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

from stream.keys import MAX_ID_BYTES, canonical_id

_CHUNK_BYTES: Final = 1 << 20  # small beside what stays: the index is made in little more memory than it takes
_CHUNK_ROWS: Final = 1 << 18
_PARTS: Final = 16  # rows are sorted in so many parts, for the same reason
_ROWS_PER_BUCKET: Final = 2
#: Ids that were asked for are remembered, up to so many; a space that is no larger is remembered whole.
_MEMO_LIMIT: Final = 1 << 18
_NEWLINE: Final = 10
UInt32 = NDArray[np.uint32]


class BadIds(ValueError):
    """The file is no list of ids; the text says which line and why."""


class RepeatedIds(BadIds):
    """Ids that are there more than once.

    Attributes:
        rows: every row whose id an earlier one has, ascending [k].
    """

    def __init__(self, rows: NDArray[np.int64]) -> None:
        super().__init__(f"row {rows[0]} repeats an id")
        self.rows = rows


class ItemIds(Sequence[bytes]):
    """The ids of a space, row order.

    Args:
        data: UTF-8 text [bytes], one id a line; `load` maps a file.
        count: number of lines that it must have.

    Attributes:
        row: row of an id in UTF-8, or the given default.

    Raises:
        BadIds: a line is no id, an id repeats, or the number of lines is another one.
    """

    row: Callable[[bytes, int], int]

    @classmethod
    def load(cls, path: Path, count: int) -> "ItemIds":
        """Map a file; may raise OSError beside what the class raises."""
        empty = not path.stat().st_size  # can't be mapped
        return cls(np.empty(0, dtype=np.uint8) if empty else np.memmap(path, dtype=np.uint8, mode="r"), count)

    @classmethod
    def of(cls, ids: Sequence[bytes]) -> "ItemIds":
        """Ids that are in memory."""
        return cls(np.frombuffer(b"".join(item + b"\n" for item in ids), dtype=np.uint8), len(ids))

    def __init__(self, data: NDArray[np.uint8], count: int) -> None:
        self._lines = _Lines(data, count)
        self._lines.check(data)
        self._index = _Index(self._lines)
        self._is_remembered = count <= _MEMO_LIMIT
        if self._is_remembered:
            self.row = {item: row for row, item in enumerate(self)}.get
        else:
            self.row = self._index.find

    def rows(self, items: Sequence[bytes]) -> NDArray[np.int64]:
        """Rows of ids in UTF-8 [n], -1 for unknown ones; many at once take a fraction of what they take singly."""
        if self._is_remembered:
            return np.fromiter((self.row(item, -1) for item in items), dtype=np.int64, count=len(items))
        return self._index.search_all(items)

    def __len__(self) -> int:
        return len(self._lines.ends)

    @overload
    def __getitem__(self, row: int) -> bytes: ...
    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...
    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return bytes(self._lines[row % len(self)])

    def __iter__(self) -> Iterator[bytes]:
        for _, lines in self._lines.chunks():
            yield from lines

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class _Lines:
    """A text, and where its lines end."""

    def __init__(self, data: NDArray[np.uint8], count: int) -> None:
        self.text = memoryview(data)  # type: ignore[arg-type]  # an array is a buffer
        self.ends = memoryview(_line_ends(data, count))  # type: ignore[arg-type]  # one by one it beats the array

    def __getitem__(self, row: int) -> memoryview:
        return self.text[self.ends[row - 1] + 1 if row else 0 : self.ends[row]]

    def chunks(self) -> Iterator[tuple[int, list[bytes]]]:
        """First row and the ids of runs of lines."""
        ends = np.asarray(self.ends)
        first = start = 0
        while first < len(ends):
            last = max(first + 1, int(np.searchsorted(ends, start + _CHUNK_BYTES)))
            end = int(ends[last - 1])
            yield first, bytes(self.text[start:end]).split(b"\n")
            first, start = last, end + 1

    def check(self, data: NDArray[np.uint8]) -> None:
        """Every line must be an id; looks at single ones only where something is wrong."""
        suspects = []
        ends = np.asarray(self.ends)
        for first in range(0, len(ends), _CHUNK_ROWS):
            here = ends[first : first + _CHUNK_ROWS].astype(np.int64)
            lengths = np.diff(here, prepend=int(ends[first - 1]) if first else -1) - 1
            wrong = (lengths < 1) | (lengths > MAX_ID_BYTES)
            if wrong.any():
                suspects.append(first + int(np.argmax(wrong)))
                break
        for start in range(0, len(data), _CHUNK_BYTES):
            part = data[start : start + _CHUNK_BYTES + 1]  # a C1 control has two bytes
            odd = ((part < 0x20) & (part != _NEWLINE)) | (part == 0x7F)
            odd[:-1] |= (part[:-1] == 0xC2) & (part[1:] >= 0x80) & (part[1:] <= 0x9F)
            if odd.any():
                suspects.append(int(np.searchsorted(ends, start + int(np.argmax(odd)))))
                break
        for first, lines in self.chunks():
            try:
                b"\n".join(lines).decode()
            except UnicodeDecodeError:
                suspects.append(first + next(n for n, line in enumerate(lines) if not _is_utf8(line)))
                break
        for row in sorted(suspects):
            try:
                canonical_id(bytes(self[row]).decode())
            except ValueError as exc:
                msg = f"line {row + 1}: {exc}"
                raise BadIds(msg) from exc


class _Index:
    """Rows in the order of their ids' hashes; a repeated id is an error."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines
        self._recent: dict[bytes, int] = {}
        self._before: dict[bytes, int] = {}
        count = len(lines.ends)
        hashes = np.empty(count, dtype=np.uint32)  # the upper half tells ids apart well enough to compare few of them
        for first, some in lines.chunks():
            whole = np.fromiter(map(hash, some), dtype=np.int64, count=len(some))
            hashes[first : first + len(some)] = whole >> 32
        bits = max(1, (max(1, count // _ROWS_PER_BUCKET) - 1).bit_length())
        starts = np.zeros((1 << bits) + 1, dtype=np.uint32)
        ordered = np.empty(count, dtype=np.uint32)
        repeats: list[int] = []
        at = 0
        for part in range(_PARTS):
            rows = _rows_of_part(hashes, part)
            sub = hashes[rows]
            order = np.argsort(sub, kind="stable")
            rows, sub = rows[order], sub[order]
            repeats += self._repeats(rows, sub)
            ordered[at : at + len(rows)] = rows
            buckets, sizes = np.unique(sub >> np.uint32(32 - bits), return_counts=True)
            starts[buckets.astype(np.int64) + 1] += sizes.astype(np.uint32)
            at += len(rows)
        if repeats:
            raise RepeatedIds(np.sort(np.array(repeats, dtype=np.int64)))
        np.cumsum(starts, out=starts)
        self._rows, self._starts = memoryview(ordered), memoryview(starts)  # type: ignore[arg-type]
        self._shift, self._mask = 64 - bits, (1 << bits) - 1

    def _repeats(self, rows: UInt32, hashes: UInt32) -> list[int]:
        """Rows whose id an earlier row has, among rows in the order of their hashes: equal ids have equal ones."""
        repeats = []
        group, seen = -1, set[bytes]()
        for n in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            if hashes[n] != group:
                group, seen = int(hashes[n]), {bytes(self._lines[int(rows[n])])}
            line = bytes(self._lines[int(rows[n + 1])])
            if line in seen:
                repeats.append(int(rows[n + 1]))
            seen.add(line)
        return repeats

    def find(self, item: bytes, default: int) -> int:
        """Row of an id, remembered in two generations: what is asked for again survives what is asked for once."""
        row = self._recent.get(item, -1)
        if row < 0:
            row = self._before.get(item, -1)
            if row < 0 and (row := self.search(item)) < 0:
                return default  # not remembered: there is no end of unknown ids
            if 2 * len(self._recent) >= _MEMO_LIMIT:
                self._before, self._recent = self._recent, {}
            self._recent[item] = row
        return row

    def search(self, item: bytes) -> int:
        """Row of an id, -1 for an unknown one."""
        bucket = hash(item) >> self._shift & self._mask
        text, ends, size = self._lines.text, self._lines.ends, len(item)
        for row in self._rows[self._starts[bucket] : self._starts[bucket + 1]]:
            end = ends[row]
            start = ends[row - 1] + 1 if row else 0
            if end - start == size and text[start:end] == item:
                return row
        return -1

    def search_all(self, items: Sequence[bytes]) -> NDArray[np.int64]:
        """Rows of ids [n], -1 for unknown ones: a bucket's ids are compared with all that are looked for in turn."""
        count = len(items)
        found = np.full(count, -1, dtype=np.int64)
        if not count:
            return found
        text, ends, starts = np.asarray(self._lines.text), np.asarray(self._lines.ends), np.asarray(self._starts)
        sought = np.frombuffer(b"".join(items), dtype=np.uint8)
        sizes = np.fromiter(map(len, items), dtype=np.int64, count=count)
        begins = np.cumsum(sizes) - sizes
        hashes = np.fromiter(map(hash, items), dtype=np.int64, count=count)
        buckets = hashes >> self._shift & self._mask
        at, last = starts[buckets].astype(np.int64), starts[buckets + 1].astype(np.int64)
        places = np.flatnonzero(at < last)
        while len(places):
            rows = np.asarray(self._rows)[at[places]].astype(np.int64)
            first = np.where(rows > 0, ends[rows - 1].astype(np.int64) + 1, 0)
            alike = np.flatnonzero(ends[rows].astype(np.int64) - first == sizes[places])
            some = places[alike]
            if len(some):
                size = sizes[some]
                of_each = np.cumsum(size) - size
                within = np.arange(int(size.sum())) - np.repeat(of_each, size)
                equal = text[np.repeat(first[alike], size) + within] == sought[np.repeat(begins[some], size) + within]
                same = np.logical_and.reduceat(equal, of_each)
                found[some[same]] = rows[alike[same]]
            at[places] += 1
            places = places[(found[places] < 0) & (at[places] < last[places])]
        return found


def _rows_of_part(hashes: UInt32, part: int) -> UInt32:
    """Rows whose hash begins with `part`, ascending."""
    found = [
        first + np.flatnonzero(hashes[first : first + _CHUNK_ROWS] // np.uint32((1 << 32) // _PARTS) == part)
        for first in range(0, len(hashes), _CHUNK_ROWS)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *found]).astype(np.uint32)


def _line_ends(data: NDArray[np.uint8], count: int) -> NDArray[np.uint32] | NDArray[np.int64]:
    """Positions of the newlines."""
    if count > len(data):  # a manifest may say anything
        msg = f"must have {count} lines, it has {len(data)} bytes"
        raise BadIds(msg)
    ends: NDArray[np.uint32] | NDArray[np.int64]
    ends = np.empty(count, dtype=np.int64) if len(data) >> 32 else np.empty(count, dtype=np.uint32)
    found = 0
    for start in range(0, len(data), _CHUNK_BYTES):
        here = np.flatnonzero(data[start : start + _CHUNK_BYTES] == _NEWLINE) + start
        if found + len(here) <= count:
            ends[found : found + len(here)] = here
        found += len(here)
    whole = not len(data) or data[-1] == _NEWLINE
    if found != count or not whole:
        msg = f"must have {count} lines, it has {found if whole else found + 1}"
        raise BadIds(msg if found != count else f"{msg}, the last without a line break")
    return ends


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
