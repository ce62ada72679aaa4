"""Making an item space of vectors of one's own: each row checked, bad ones named or left out, in bounded memory."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stream.core.formulas import Float64
from stream.errors import ConfigError, ItemSpaceError
from stream.items.manifest import Metric
from stream.items.space import ItemSpace
from stream.items.vector_files import Columns, Piece, pieces
from stream.items.writer import SpaceWriter
from stream.keys import canonical_id
from stream.logs import OnProgress

_SHOWN_ROWS: Final = 10
_SAME_ORDER: Final = "both must hold the same items in the same order"


@dataclass
class BadRows:
    """Rows that are no items: how many by reason, their numbers, and why of the first of them."""

    counts: Counter[str] = field(default_factory=Counter)
    rows: "array[int]" = field(default_factory=lambda: array("q"))
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, reason: str) -> None:
        """Take note of a row."""
        self.counts[reason] += 1
        self.rows.append(row)
        if len(self.first) < _SHOWN_ROWS:
            self.first.append((row, reason))

    def add_repeats(self, appended: NDArray[np.int64]) -> None:
        """Take note of rows that repeat an id, given by their numbers among the rows that were good until then [k]."""
        before = np.frombuffer(self.rows, dtype=np.int64) - np.arange(len(self.rows))
        rows = (appended + np.searchsorted(before, appended, side="right")).tolist()
        self.counts["repeats an id"] += len(rows)
        self.first = sorted([*self.first, *((row, "repeats an id") for row in rows[:_SHOWN_ROWS])])[:_SHOWN_ROWS]

    @property
    def total(self) -> int:
        """How many."""
        return sum(self.counts.values())


def import_items(
    file: Path,
    folder: Path,
    version: str,
    *,
    metric: Metric = "cosine",
    ids: Path | None = None,
    columns: Columns | None = None,
    history_vectors: Path | None = None,
    drop_bad: bool = False,
    on_progress: OnProgress | None = None,
) -> tuple[ItemSpace, BadRows]:
    """Make an item space of a file of vectors.

    Args:
        file: .npy (with `ids`), .npz, .parquet, or JSON lines.
        folder: the item space to make.
        version: its name.
        metric: see `ItemSpace`.
        ids: for .npy: ids in the order of its rows, a text file with one a line or a .npy.
        columns: names in the file.
        history_vectors: a file of what the items count as in a history: the same items in the same order.
        drop_bad: leave bad rows out instead of failing.
        on_progress: called with rows done and their total.

    Raises:
        ConfigError: the file can't be read as what it is.
        ItemSpaceError: rows are bad (their numbers, from 0), or the folder exists.
    """
    bad, done, dim = BadRows(), 0, 0
    with SpaceWriter(folder, version, metric) as writer:
        beside = None
        if history_vectors is not None:
            own_ids = history_vectors.suffix.lower() not in (".npy", ".npz")
            beside = _Beside(history_vectors, pieces(history_vectors, None if own_ids else ids, columns, folder.parent))
        for piece in pieces(file, ids, columns, folder.parent):
            dim = dim or _dim(piece.vectors)
            history = None if beside is None else beside.of(piece.ids, done, file)
            good, matrix, history_matrix = _checked(piece, history, done, dim, bad, metric)
            if good:
                writer.append(good, matrix, history_vectors=history_matrix)
            done += len(piece.ids)
            if on_progress is not None:
                on_progress(done, piece.total)
        if beside is not None:
            beside.check_end(done, file)
        if len(repeats := writer.repeated_rows()):
            bad.add_repeats(repeats)
        if bad.total and not drop_bad:
            rows = "; ".join(f"row {row} {reason}" for row, reason in bad.first)
            more = f" and {bad.total - len(bad.first):,} more" if bad.total > len(bad.first) else ""
            msg = f"{file}: {rows}{more}; mend them, or leave them out with --drop-bad"
            raise ItemSpaceError(msg)
        if not writer.count:
            msg = f"{file} holds no items"
            raise ItemSpaceError(msg)
        if len(repeats):
            writer.drop_rows(repeats)
    return ItemSpace.load(folder), bad


class _Beside:
    """The other file's rows, dealt out in as many as the first file's pieces have."""

    def __init__(self, file: Path, found: Iterator[Piece]) -> None:
        self._file = file
        self._found = found
        self._left: list[tuple[Any, Any]] = []

    def of(self, ids: Sequence[Any], first: int, other: Path) -> list[Any]:
        """Vectors of these items, which must come next; `first` is the number of the first of them.

        Raises:
            ConfigError: another item comes next, or none.
        """
        while len(self._left) < len(ids) and (piece := next(self._found, None)) is not None:
            wrong = piece.wrong
            self._left += [
                (item, None if n in wrong else vector)
                for n, (item, vector) in enumerate(zip(piece.ids, piece.vectors, strict=True))
            ]
        mine, self._left = self._left[: len(ids)], self._left[len(ids) :]
        if len(mine) < len(ids):
            msg = f"{self._file} ends after {first + len(mine)} rows, {other} goes on; {_SAME_ORDER}"
            raise ConfigError(msg)
        for n, (item, (its, _)) in enumerate(zip(ids, mine, strict=True), first):
            if str(item) != str(its):
                msg = f"{self._file}: row {n} is another item than in {other}; {_SAME_ORDER}"
                raise ConfigError(msg)
        return [None if vector is None else np.asarray(vector) for _, vector in mine]

    def check_end(self, rows: int, other: Path) -> None:
        """Nothing is left.

        Raises:
            ConfigError: the other file had fewer rows.
        """
        if self._left or next(self._found, None) is not None:
            msg = f"{self._file} goes on where {other} ends, after {rows} rows; {_SAME_ORDER}"
            raise ConfigError(msg)


def _checked(
    piece: Piece, history: list[Any] | None, first: int, dim: int, bad: BadRows, metric: Metric
) -> tuple[list[str], Float64, Float64 | None]:
    """Canonical ids, vectors and history vectors of the good rows; the others are noted in `bad`."""
    good: list[str] = []
    keep: list[int] = []
    matrix, reasons = _matrix(piece.vectors, dim, metric)
    history_matrix = None
    if history is not None:
        history_matrix, why = _matrix(history, dim, metric)
        reasons = {n: f"of the history vectors {reason}" for n, reason in why.items()} | reasons
    reasons |= piece.wrong
    for n, item in enumerate(piece.ids):
        try:
            name = "" if n in piece.wrong else canonical_id(item)
        except ValueError as exc:
            bad.add(first + n, str(exc))
            continue
        if n in reasons:
            bad.add(first + n, reasons[n])
        else:
            good.append(name)
            keep.append(n)
    return good, matrix[keep], None if history_matrix is None else history_matrix[keep]


def _matrix(
    vectors: NDArray[Any] | Sequence[Float64 | None], dim: int, metric: Metric
) -> tuple[Float64, dict[int, str]]:
    """Vectors [n, d] in float64, and why rows of them can't be used."""
    reasons: dict[int, str] = {}
    if isinstance(vectors, np.ndarray) and vectors.shape[1] == dim:
        matrix = vectors.astype(np.float64)
    else:
        matrix = np.zeros((len(vectors), dim))
        for n, vector in enumerate(vectors):
            if vector is None:
                reasons[n] = "has no vector of numbers"
            elif len(vector) != dim:
                reasons[n] = f"has no vector of {dim} numbers, as the first row has"
            else:
                matrix[n] = vector
    with np.errstate(over="ignore"):
        finite = np.asarray(np.isfinite(matrix.astype(np.float32)).all(axis=1))
    for n in np.flatnonzero(~finite).tolist():
        reasons.setdefault(n, "is not finite in float32")
    lengths = np.linalg.norm(np.where(finite[:, None], matrix, 1.0), axis=1)
    if metric == "dot":  # stored as it is, so what float32 rounds to zero is zero
        lengths = np.where(np.abs(matrix).max(axis=1, initial=0.0).astype(np.float32) == 0, 0.0, lengths)
    for n in np.flatnonzero(lengths == 0).tolist():
        reasons.setdefault(n, "is zero and has no direction")
    return matrix, reasons


def _dim(vectors: NDArray[Any] | Sequence[Float64 | None]) -> int:
    """Dimension of the first row that has one."""
    return next((len(vector) for vector in vectors if vector is not None and len(vector)), 0)
