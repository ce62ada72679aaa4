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

_CHUNK_BYTES: Final = 8 << 20
_PARTS: Final = 16  # rows are sorted in so many parts: the memory that sorting takes stays small
_ROWS_PER_BUCKET: Final = 2
#: Ids that were asked for are remembered, up to so many; a space that is no larger is remembered whole.
_MEMO_LIMIT: Final = 1 << 18
_NEWLINE: Final = 10


class BadIds(ValueError):
    """The file is no list of ids; the text says which line and why."""


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
        self._text = memoryview(data)  # type: ignore[arg-type]  # an array is a buffer
        self._ends = _line_ends(data, count)
        self._check_lines(data)
        hashes = np.empty(count, dtype=np.int64)
        for first, lines in self._chunks():
            hashes[first : first + len(lines)] = np.fromiter(map(hash, lines), dtype=np.int64, count=len(lines))
        self._index(hashes.view(np.uint64))
        self._memo: dict[bytes, int] = {}
        if count <= _MEMO_LIMIT:
            self._memo = {item: row for row, item in enumerate(self)}
            self.row = self._memo.get
        else:
            self.row = self._find

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> bytes: ...
    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...
    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return bytes(self._line(row % len(self)))

    def __iter__(self) -> Iterator[bytes]:
        for _, lines in self._chunks():
            yield from lines

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _line(self, row: int) -> memoryview:
        return self._text[int(self._ends[row - 1]) + 1 if row else 0 : int(self._ends[row])]

    def _chunks(self) -> Iterator[tuple[int, list[bytes]]]:
        """First row and the ids of runs of lines."""
        first = start = 0
        while first < len(self._ends):
            last = max(first + 1, int(np.searchsorted(self._ends, start + _CHUNK_BYTES)))
            end = int(self._ends[last - 1])
            yield first, bytes(self._text[start:end]).split(b"\n")
            first, start = last, end + 1

    def _check_lines(self, data: NDArray[np.uint8]) -> None:
        """Every line must be an id; looks at single ones only where something is wrong."""
        starts = np.concatenate(([0], self._ends[:-1].astype(np.int64) + 1))
        lengths = self._ends - starts
        suspects = [np.flatnonzero((lengths < 1) | (lengths > MAX_ID_BYTES))[:1]]
        for start in range(0, len(data), _CHUNK_BYTES):
            part = data[start : start + _CHUNK_BYTES + 1]  # a C1 control has two bytes
            odd = ((part < 0x20) & (part != _NEWLINE)) | (part == 0x7F)
            odd[:-1] |= (part[:-1] == 0xC2) & (part[1:] >= 0x80) & (part[1:] <= 0x9F)
            if odd.any():
                suspects.append(np.searchsorted(self._ends, [start + int(np.argmax(odd))]))
                break
        for first, lines in self._chunks():
            try:
                b"\n".join(lines).decode()
            except UnicodeDecodeError:
                suspects.append(np.array([first + next(n for n, line in enumerate(lines) if not _is_utf8(line))]))
                break
        for row in sorted({int(row) for found in suspects for row in found}):
            try:
                canonical_id(bytes(self._line(row)).decode())
            except ValueError as exc:
                msg = f"line {row + 1}: {exc}"
                raise BadIds(msg) from exc

    def _index(self, hashes: NDArray[np.uint64]) -> None:
        """Order rows by hash, and note where each bucket begins."""
        count = len(hashes)
        bits = max(1, (max(1, count // _ROWS_PER_BUCKET) - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        filled = np.zeros((1 << bits) + 1, dtype=np.uint32)
        self._rows = np.empty(count, dtype=np.uint32)
        at = 0
        for part in range(_PARTS):
            rows = np.flatnonzero((hashes >> np.uint64(60)) == part)
            sub = hashes[rows]
            order = np.argsort(sub, kind="stable")
            rows, sub = rows[order], sub[order]
            self._check_unique(rows, sub)
            self._rows[at : at + len(rows)] = rows
            buckets, sizes = np.unique(sub >> self._shift, return_counts=True)
            filled[buckets.astype(np.int64) + 1] += sizes.astype(np.uint32)
            at += len(rows)
        self._starts = np.cumsum(filled, dtype=np.uint32)
        self._shift_by = 64 - bits

    def _check_unique(self, rows: NDArray[np.int64], hashes: NDArray[np.uint64]) -> None:
        """Equal ids have equal hashes; the first row that repeats one is an error."""
        repeats = []
        for n in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            before = n
            while before >= 0 and hashes[before] == hashes[n + 1]:
                if self._line(int(rows[before])) == self._line(int(rows[n + 1])):
                    repeats.append(int(rows[n + 1]))
                before -= 1
        if repeats:
            msg = f"row {min(repeats)} repeats an id"
            raise BadIds(msg)

    def _find(self, item: bytes, default: int) -> int:
        row = self._memo.get(item)
        if row is None:
            if len(self._memo) >= _MEMO_LIMIT:
                self._memo.clear()
            row = self._memo[item] = self._search(item)
        return row if row >= 0 else default

    def _search(self, item: bytes) -> int:
        bucket = (hash(item) & 0xFFFFFFFFFFFFFFFF) >> self._shift_by
        for row in self._rows[self._starts[bucket] : self._starts[bucket + 1]].tolist():
            if self._line(row) == item:
                return int(row)
        return -1


def _line_ends(data: NDArray[np.uint8], count: int) -> NDArray[np.uint32] | NDArray[np.int64]:
    """Positions of the newlines."""
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
