"""Item vectors from files of one's own: .npy, .npz, Parquet and JSON lines, read and checked piece by piece."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.embedding import Float64
from stream.errors import ConfigError, ItemSpaceError
from stream.item_manifest import Metric
from stream.item_writer import SpaceWriter
from stream.items import ItemSpace
from stream.keys import canonical_id

PIECE_ROWS: Final = 16_384
_SHOWN_ROWS: Final = 10
PARQUET_HINT: Final = "Parquet needs pyarrow: pip install 'user-embedding-stream[parquet]'"
Progress = Callable[[int, int | None], None]


class Columns(NamedTuple):
    """Names in the file: arrays of .npz, columns of Parquet, fields of JSON lines."""

    ids: str = "item_id"
    vectors: str = "vector"


class Piece(NamedTuple):
    """Rows as they are in the file, none of them checked.

    Attributes:
        ids: whatever the file has [n].
        vectors: a matrix [n, d], or one entry a row where rows may differ in length or hold nothing.
        total: rows of the file, None where that is not known.
    """

    ids: Sequence[Any]
    vectors: NDArray[Any] | Sequence[Any]
    total: int | None


@dataclass
class BadRows:
    """Rows that are no items: how many by reason, and the numbers of the first of them."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, reason: str) -> None:
        """Take note of a row."""
        self.counts[reason] += 1
        if len(self.first) < _SHOWN_ROWS:
            self.first.append((row, reason))

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
    drop_bad: bool = False,
    on_progress: Progress | None = None,
) -> tuple[ItemSpace, BadRows]:
    """Make an item space of a file of vectors.

    Args:
        file: .npy (with `ids`), .npz, .parquet, or JSON lines.
        folder: the item space to make.
        version: its name.
        metric: see `ItemSpace`.
        ids: for .npy: ids in the order of its rows, a text file with one a line or a .npy.
        columns: names in the file.
        drop_bad: leave bad rows out instead of failing.
        on_progress: called with rows done and their total.

    Raises:
        ConfigError: the file can't be read as what it is.
        ItemSpaceError: rows are bad (their numbers, from 0), or the folder exists.
    """
    names = columns or (Columns("ids", "vectors") if file.suffix == ".npz" else Columns())
    bad, seen, done, dim = BadRows(), set[str](), 0, 0
    with SpaceWriter(folder, version, metric) as writer:
        for piece in _pieces(file, ids, names):
            dim = dim or _dim(piece.vectors)
            good, matrix = _checked(piece, done, dim, bad, seen, metric)
            if good:
                writer.append(good, matrix)
            done += len(piece.ids)
            if on_progress is not None:
                on_progress(done, piece.total)
        if bad.total and not drop_bad:
            rows = "; ".join(f"row {row} {reason}" for row, reason in bad.first)
            more = f" and {bad.total - len(bad.first):,} more" if bad.total > len(bad.first) else ""
            msg = f"{file}: {rows}{more}; mend them, or leave them out with --drop-bad"
            raise ItemSpaceError(msg)
        if not writer.count:
            msg = f"{file} holds no items"
            raise ItemSpaceError(msg)
    return ItemSpace.load(folder), bad


def _checked(
    piece: Piece, first: int, dim: int, bad: BadRows, seen: set[str], metric: Metric
) -> tuple[list[str], Float64]:
    """Canonical ids and vectors of the good rows; the others are noted in `bad`."""
    good: list[str] = []
    keep: list[int] = []
    matrix, reasons = _matrix(piece.vectors, dim, metric)
    for n, item in enumerate(piece.ids):
        try:
            name = canonical_id(item.item() if isinstance(item, np.generic) else item)
        except ValueError as exc:
            bad.add(first + n, str(exc))
            continue
        if n in reasons:
            bad.add(first + n, reasons[n])
        elif name in seen:
            bad.add(first + n, "repeats an id")
        else:
            seen.add(name)
            good.append(name)
            keep.append(n)
    return good, matrix[keep]


def _matrix(vectors: NDArray[Any] | Sequence[Any], dim: int, metric: Metric) -> tuple[Float64, dict[int, str]]:
    """Vectors [n, d] in float64, and why rows of them can't be used."""
    reasons: dict[int, str] = {}
    if isinstance(vectors, np.ndarray) and vectors.ndim == 2 and vectors.shape[1] == dim:
        matrix = vectors.astype(np.float64)
    else:
        matrix = np.zeros((len(vectors), dim))
        for n, vector in enumerate(vectors):
            try:
                row = np.asarray(vector, dtype=np.float64)
            except (TypeError, ValueError):
                reasons[n] = "has no vector of numbers"
                continue
            if row.shape == (dim,):
                matrix[n] = row
            else:
                reasons[n] = f"has no vector of {dim} numbers, as the first row has"
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


def _dim(vectors: NDArray[Any] | Sequence[Any]) -> int:
    """Dimension of the first row that has one."""
    if isinstance(vectors, np.ndarray) and vectors.ndim == 2:
        return int(vectors.shape[1])
    return next((len(v) for v in vectors if isinstance(v, list | tuple | np.ndarray) and len(v)), 0)


def _pieces(file: Path, ids: Path | None, names: Columns) -> Iterator[Piece]:
    if not file.is_file():
        msg = f"there is no file {file}"
        raise ConfigError(msg)
    kinds: dict[str, Callable[[], Iterator[Piece]]] = {
        ".npy": lambda: _from_npy(file, ids),
        ".npz": lambda: _from_npz(file, names),
        ".parquet": lambda: _from_parquet(file, names),
        ".jsonl": lambda: _from_json_lines(file, names),
        ".ndjson": lambda: _from_json_lines(file, names),
    }
    if file.suffix not in kinds:
        msg = f"{file}: the name must end in one of {', '.join(kinds)}"
        raise ConfigError(msg)
    if ids is not None and file.suffix != ".npy":
        msg = f"--ids is for .npy; {file} holds its ids itself"
        raise ConfigError(msg)
    return kinds[file.suffix]()


def _load_array(file: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.lib.format.open_memmap(file, mode="r"))
    except (OSError, ValueError, EOFError) as exc:
        msg = f"{file} is not a plain .npy array of numbers or texts"
        raise ConfigError(msg) from exc


def _from_npy(file: Path, ids: Path | None) -> Iterator[Piece]:
    if ids is None:
        msg = "a .npy holds no ids: name them with --ids FILE (text, one a line, or .npy)"
        raise ConfigError(msg)
    if not ids.is_file():
        msg = f"there is no file {ids}"
        raise ConfigError(msg)
    vectors = _load_array(file)
    if ids.suffix == ".npy":
        names: Sequence[Any] = _load_array(ids)  # type: ignore[assignment]  # read as a sequence
    else:
        names = ids.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return _slices(file, names, vectors)


def _from_npz(file: Path, names: Columns) -> Iterator[Piece]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            there = archive.files
            if {names.ids, names.vectors} <= set(there):
                return _slices(file, archive[names.ids], archive[names.vectors])
    except (OSError, ValueError, EOFError) as exc:
        msg = f"{file} is not a .npz of plain arrays"
        raise ConfigError(msg) from exc
    raise _lacks(file, names, there)


def _slices(file: Path, ids: Any, vectors: NDArray[Any]) -> Iterator[Piece]:
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        msg = f"{file}: vectors must be a matrix of numbers [n, d], not {vectors.dtype} {vectors.shape}"
        raise ConfigError(msg)
    if len(ids) != len(vectors):
        msg = f"{file}: {len(vectors)} vectors need as many ids, there are {len(ids)}"
        raise ConfigError(msg)
    total = len(ids)
    for start in range(0, total, PIECE_ROWS):
        yield Piece(ids[start : start + PIECE_ROWS], vectors[start : start + PIECE_ROWS], total)


def _from_parquet(file: Path, names: Columns) -> Iterator[Piece]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(PARQUET_HINT) from exc
    try:
        table = pq.ParquetFile(file)
        there = table.schema_arrow.names
        if not {names.ids, names.vectors} <= set(there):
            raise _lacks(file, names, there)
        total = table.metadata.num_rows
        for batch in table.iter_batches(batch_size=PIECE_ROWS, columns=[names.ids, names.vectors]):
            yield Piece(batch.column(names.ids).to_pylist(), batch.column(names.vectors).to_pylist(), total)
    except (pa.ArrowException, OSError) as exc:
        msg = f"{file} can't be read as Parquet"
        raise ConfigError(msg) from exc


def _from_json_lines(file: Path, names: Columns) -> Iterator[Piece]:
    decode = msgspec.json.Decoder().decode
    ids: list[Any] = []
    vectors: list[Any] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                try:
                    row = json.loads(line)  # Python writes NaN, which JSON has not: a bad row, not a bad file
                except (ValueError, RecursionError) as exc:
                    msg = f"{file} line {number} is not JSON"
                    raise ConfigError(msg) from exc
            if not isinstance(row, dict) or not {names.ids, names.vectors} <= set(row):
                raise _lacks(file, names, row if isinstance(row, dict) else (), f" line {number}")
            ids.append(row[names.ids])
            vectors.append(row[names.vectors])
            if len(ids) == PIECE_ROWS:
                yield Piece(ids, vectors, None)
                ids, vectors = [], []
    if ids:
        yield Piece(ids, vectors, None)


def _lacks(file: Path, names: Columns, there: Any, where: str = "") -> ConfigError:
    missing = [name for name in names if name not in there]
    return ConfigError(
        f"{file}{where} lacks {' and '.join(missing)} (it has {', '.join(map(str, there)) or 'nothing'}); "
        "name them with --id-column and --vector-column"
    )
