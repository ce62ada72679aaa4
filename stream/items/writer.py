"""Writing an item space piece by piece, in bounded memory, as a whole or not at all."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream.core.formulas import DEGENERATE_NORM, Float32, Float64, fallback_user_embedding, l2_normalize
from stream.items.ids import BadIds, ItemIds, RepeatedIds
from stream.items.manifest import (
    HISTORY_VECTORS,
    IDS,
    POPULARITY,
    ROW_TOLERANCE,
    VECTORS,
    Manifest,
    Metric,
    bad_space,
    file_sha256,
)
from stream.keys import canonical_id, check_version_name

_NPY_HEADER_BYTES: Final = 128
_PIECE_NUMBERS: Final = 1 << 20


def first_of(mask: NDArray[np.bool_]) -> int:
    """Index of the first True."""
    return int(np.argmax(mask))


class _Rows:
    """One matrix of the folder, written piece by piece.

    Attributes:
        sum: of its rows [d], None without any.
        longest: length of its longest row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sum: Float64 | None = None
        self.longest = 0.0
        self._count = 0
        self._file: BinaryIO = path.open("wb")
        self._file.write(bytes(_NPY_HEADER_BYTES))

    def append(self, rows: Float32, norms: Float64) -> None:
        """Add rows [n, d] of these lengths [n]."""
        self._file.write(rows.astype("<f4", copy=False).tobytes())
        self.sum = rows.sum(axis=0, dtype=np.float64) + (0.0 if self.sum is None else self.sum)
        self.longest = max(self.longest, float(norms.max()))
        self._count += len(rows)

    def finish(self) -> None:
        """Make a whole .npy of it."""
        if self.sum is not None:
            self._file.seek(0)
            self._file.write(_npy_header(self._count, len(self.sum)))
        self._file.close()

    def taken_out(self) -> Float32:
        """What was written [n, d], which stays readable when its name is given to another file."""
        self._file.close()
        shape = (self._count, 0 if self.sum is None else len(self.sum))
        return np.memmap(self.path, dtype="<f4", mode="r", offset=_NPY_HEADER_BYTES, shape=shape)

    def close(self) -> None:
        """Give it up."""
        self._file.close()


class SpaceWriter:
    """Makes the folder of one version; it appears when the block is left without an error.

    Args:
        path: folder to make; it must not exist, for versions are immutable.
        version: its name, ``[A-Za-z0-9._-]{1,64}``.
        metric: ``cosine`` (rows are normalised) or ``dot`` (kept as they are).

    Raises:
        ItemSpaceError: an id or a row is not acceptable, or the folder exists.
    """

    def __init__(self, path: str | Path, version: str, metric: Metric = "cosine") -> None:
        self._folder = Path(path)
        if self._folder.exists():
            raise bad_space(self._folder, "exists already; versions are immutable, choose a new folder")
        try:
            check_version_name(version)
        except ValueError as exc:
            raise bad_space(self._folder, str(exc)) from exc
        if metric not in ("cosine", "dot"):
            raise bad_space(self._folder, f"metric must be cosine or dot, not {metric!r}")
        self._version = version
        self._metric: Metric = metric
        self._popularity: list[Float32] = []
        self.count = 0
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}.", dir=self._folder.parent))
        self._open()

    def _open(self) -> None:
        self._ids: BinaryIO = (self._staging / IDS).open("wb")
        self._vectors = _Rows(self._staging / VECTORS)
        self._history: _Rows | None = None  # from the first piece that has one

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if exc is None:
                self._finish()
        finally:
            self._ids.close()
            self._vectors.close()
            if self._history is not None:
                self._history.close()
            shutil.rmtree(self._staging, ignore_errors=True)

    def append(
        self,
        ids: Sequence[str | int],
        vectors: ArrayLike,
        popularity: ArrayLike | None = None,
        history_vectors: ArrayLike | None = None,
    ) -> None:
        """Add n rows.

        Args:
            ids: item ids [n].
            vectors: [n, d].
            popularity: weight of each [n]; in all pieces or in none.
            history_vectors: what the items count as in a history [n, d]; in all pieces or in none.
        """
        known = self._vectors.sum
        matrix = np.asarray(vectors, dtype=np.float64)
        dim = len(known) if known is not None else matrix.shape[-1] if matrix.ndim else 0
        self._check_shape(matrix, len(ids), dim, "vectors")
        text = b"".join(self._line(row, item) for row, item in enumerate(ids, self.count))
        rows, norms = self._stored_rows(matrix, "row")
        if (history_vectors is None) != (self._history is None) and self.count:
            raise bad_space(self._folder, "history vectors must be there for all items or for none")
        if history_vectors is not None:
            history = np.asarray(history_vectors, dtype=np.float64)
            self._check_shape(history, len(ids), dim, "history vectors")
            history_rows = self._stored_rows(history, "history row")
            self._history = self._history or _Rows(self._staging / HISTORY_VECTORS)
            self._history.append(*history_rows)
        if popularity is not None:
            weights = np.asarray(popularity, dtype=np.float32)
            if weights.shape != (len(ids),) or not np.isfinite(weights).all():
                raise bad_space(self._folder, "popularity must be one finite number per item")
            self._popularity.append(weights)
        self._write(text, rows, norms)

    def _check_shape(self, matrix: Float64, count: int, dim: int, what: str) -> None:
        if matrix.ndim != 2 or matrix.shape != (count, dim) or 0 in matrix.shape:
            got = f"{count} ids need {what} of shape [{count}, {dim or 'd'}], got {matrix.shape}"
            raise bad_space(self._folder, got)

    def _write(self, text: bytes, rows: Float32, norms: Float64) -> None:
        self._ids.write(text)
        self._vectors.append(rows, norms)
        self.count += len(rows)

    def repeated_rows(self) -> NDArray[np.int64]:
        """Rows, in the order in which they were appended, whose id an earlier one has [k], ascending."""
        self._ids.flush()
        try:
            ItemIds.load(self._staging / IDS, self.count)
        except RepeatedIds as exc:
            return exc.rows
        return np.empty(0, dtype=np.int64)

    def drop_rows(self, rows: NDArray[np.int64]) -> None:
        """Take rows back that were appended; not all of them.

        Args:
            rows: their numbers in the order in which they were appended [k], ascending.
        """
        if self._vectors.sum is None:
            return
        self._ids.close()
        names = (self._staging / IDS).open("rb")
        old = self._vectors.taken_out()
        old_history = None if self._history is None else self._history.taken_out()
        for file in self._staging.iterdir():  # what was opened above stays readable without its name
            file.unlink()
        self._open()
        self.count = 0
        size = max(1, _PIECE_NUMBERS // old.shape[1])
        with names:
            for start in range(0, len(old), size):
                stay = np.ones(min(size, len(old) - start), dtype=np.bool_)
                here = slice(*np.searchsorted(rows, [start, start + size]).tolist())
                stay[rows[here] - start] = False
                lines = [names.readline() for _ in range(len(stay))]
                if stay.any():
                    kept = np.asarray(old[start : start + size][stay])
                    norms = check_norms(kept, self._metric, start, self._folder)
                    self._write(b"".join(lines[n] for n in np.flatnonzero(stay).tolist()), kept, norms)
                    if old_history is not None:
                        self._history = self._history or _Rows(self._staging / HISTORY_VECTORS)
                        kept = np.asarray(old_history[start : start + size][stay])
                        self._history.append(kept, check_norms(kept, self._metric, start, self._folder, "history row"))
        if self._popularity:
            self._popularity = [np.delete(np.concatenate(self._popularity), rows)]

    def _line(self, row: int, item: str | int) -> bytes:
        try:
            return canonical_id(item).encode() + b"\n"
        except ValueError as exc:
            raise bad_space(self._folder, f"row {row}: {exc}") from exc

    def _stored_rows(self, matrix: Float64, what: str) -> tuple[Float32, Float64]:
        if not (finite := np.asarray(np.isfinite(matrix).all(axis=1))).all():
            raise bad_space(self._folder, f"{what} {self.count + first_of(~finite)} is not finite")
        if self._metric == "cosine":
            norms = np.linalg.norm(matrix, axis=1)
            if (zero := np.asarray(norms == 0)).any():
                text = f"{what} {self.count + first_of(zero)} is zero and has no direction; drop the item"
                raise bad_space(self._folder, text)
            matrix = matrix / norms[:, None]
        with np.errstate(over="ignore"):  # what float32 can't hold is infinite there, and refused by its row
            rows = matrix.astype(np.float32)
        return rows, check_norms(rows, self._metric, self.count, self._folder, what)

    def _finish(self) -> None:
        total, history = self._vectors.sum, self._history
        if total is None:
            raise bad_space(self._folder, "there are no items")
        self._ids.close()
        self._vectors.finish()
        files = {IDS, VECTORS}
        if history is not None:
            history.finish()
            files.add(HISTORY_VECTORS)
        if self._popularity:
            weights = np.concatenate(self._popularity)
            if len(weights) != self.count:
                raise bad_space(self._folder, "popularity must be one finite number per item")
            np.save(self._staging / POPULARITY, weights, allow_pickle=False)
            files.add(POPULARITY)
        try:
            ItemIds.load(self._staging / IDS, self.count)
        except BadIds as exc:
            raise bad_space(self._folder, str(exc)) from exc
        manifest = Manifest(
            format=1,
            version=self._version,
            dim=len(total),
            count=self.count,
            dtype="float32",
            metric=self._metric,
            max_row_norm=self._vectors.longest,
            fallback=[float(x) for x in self._fallback(total)],
            sha256={name: file_sha256(self._staging / name) for name in sorted(files)},
            history_max_row_norm=None if history is None else history.longest,
        )
        (self._staging / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        self._staging.chmod(0o755)
        self._staging.rename(self._folder)

    def _fallback(self, total: Float64) -> Float32:
        """Normalised centroid; the seed's ``ones/√d`` where it vanishes."""
        centroid = total / self.count / self._vectors.longest
        if np.linalg.norm(centroid) < DEGENERATE_NORM:
            return fallback_user_embedding(len(total))
        return l2_normalize(centroid).astype(np.float32)


def check_norms(rows: Float32, metric: Metric, first: int, folder: Path, what: str = "row") -> Float64:
    """Norms [n] in float64; the first row that is not finite, zero, or not of unit length is an error.

    Args:
        rows: [n, d].
        metric: what is demanded of a row.
        first: number of the first row, for the error.
        folder: for the error.
        what: what a row is called, for the error.
    """
    # the product of float32 rows is exact in float64 and can't overflow there
    norms: Float64 = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if (wrong := ~np.isfinite(norms)).any():
        raise bad_space(folder, f"{what} {first + first_of(wrong)} is not finite")
    if (wrong := norms == 0).any():
        raise bad_space(folder, f"{what} {first + first_of(wrong)} is zero and has no direction; drop the item")
    if metric == "cosine" and (wrong := np.abs(norms - 1) > ROW_TOLERANCE).any():
        text = f"{what} {first + first_of(wrong)} is not of unit length, which metric cosine demands"
        raise bad_space(folder, text)
    return norms


def _npy_header(count: int, dim: int) -> bytes:
    """Header of a float32 array in .npy format 1.0, as numpy pads it."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count}, {dim}), }}"
    prefix = b"\x93NUMPY\x01\x00" + (_NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + text.ljust(_NPY_HEADER_BYTES - 11).encode() + b"\n"
