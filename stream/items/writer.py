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
from stream.items.manifest import ROW_TOLERANCE, Manifest, Metric, bad_space, file_sha256
from stream.keys import canonical_id, check_version_name

_NPY_HEADER_BYTES: Final = 128
_PIECE_NUMBERS: Final = 1 << 20
_IDS: Final = "ids.txt"
_VECTORS: Final = "vectors.npy"


def first_of(mask: NDArray[np.bool_]) -> int:
    """Index of the first True."""
    return int(np.argmax(mask))


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
        self._sum: Float64 | None = None
        self._longest = 0.0
        self._popularity: list[Float32] = []
        self.count = 0
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}.", dir=self._folder.parent))
        self._open()

    def _open(self) -> None:
        self._ids: BinaryIO = (self._staging / _IDS).open("wb")
        self._vectors: BinaryIO = (self._staging / _VECTORS).open("wb")
        self._vectors.write(bytes(_NPY_HEADER_BYTES))

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
            shutil.rmtree(self._staging, ignore_errors=True)

    def append(self, ids: Sequence[str | int], vectors: ArrayLike, popularity: ArrayLike | None = None) -> None:
        """Add n rows.

        Args:
            ids: item ids [n].
            vectors: [n, d].
            popularity: weight of each [n]; in all pieces or in none.
        """
        matrix = np.asarray(vectors, dtype=np.float64)
        dim = len(self._sum) if self._sum is not None else matrix.shape[-1] if matrix.ndim else 0
        if matrix.ndim != 2 or matrix.shape != (len(ids), dim) or 0 in matrix.shape:
            got = f"{len(ids)} ids need vectors of shape [{len(ids)}, {dim or 'd'}], got {matrix.shape}"
            raise bad_space(self._folder, got)
        text = b"".join(self._line(row, item) for row, item in enumerate(ids, self.count))
        rows, norms = self._stored_rows(matrix)
        if popularity is not None:
            weights = np.asarray(popularity, dtype=np.float32)
            if weights.shape != (len(ids),) or not np.isfinite(weights).all():
                raise bad_space(self._folder, "popularity must be one finite number per item")
            self._popularity.append(weights)
        self._write(text, rows, norms)

    def _write(self, text: bytes, rows: Float32, norms: Float64) -> None:
        self._ids.write(text)
        self._vectors.write(rows.astype("<f4", copy=False).tobytes())
        self._sum = rows.sum(axis=0, dtype=np.float64) + (0.0 if self._sum is None else self._sum)
        self._longest = max(self._longest, float(norms.max()))
        self.count += len(rows)

    def repeated_rows(self) -> NDArray[np.int64]:
        """Rows, in the order in which they were appended, whose id an earlier one has [k], ascending."""
        self._ids.flush()
        try:
            ItemIds.load(self._staging / _IDS, self.count)
        except RepeatedIds as exc:
            return exc.rows
        return np.empty(0, dtype=np.int64)

    def drop_rows(self, rows: NDArray[np.int64]) -> None:
        """Take rows back that were appended; not all of them.

        Args:
            rows: their numbers in the order in which they were appended [k], ascending.
        """
        if self._sum is None:
            return
        self._ids.close()
        self._vectors.flush()
        shape, dim = (self.count, len(self._sum)), len(self._sum)
        old = np.memmap(self._staging / _VECTORS, dtype="<f4", mode="r", offset=_NPY_HEADER_BYTES, shape=shape)
        names = (self._staging / _IDS).open("rb")
        self._vectors.close()
        for name in (_IDS, _VECTORS):  # what was opened above stays readable without its name
            (self._staging / name).unlink()
        self._open()
        self._sum, self._longest, self.count = None, 0.0, 0
        size = max(1, _PIECE_NUMBERS // dim)
        with names:
            for start in range(0, shape[0], size):
                stay = np.ones(min(size, shape[0] - start), dtype=np.bool_)
                here = slice(*np.searchsorted(rows, [start, start + size]).tolist())
                stay[rows[here] - start] = False
                lines = [names.readline() for _ in range(len(stay))]
                if stay.any():
                    kept = np.asarray(old[start : start + size][stay])
                    norms = check_norms(kept, self._metric, start, self._folder)
                    self._write(b"".join(lines[n] for n in np.flatnonzero(stay).tolist()), kept, norms)
        if self._popularity:
            self._popularity = [np.delete(np.concatenate(self._popularity), rows)]

    def _line(self, row: int, item: str | int) -> bytes:
        try:
            return canonical_id(item).encode() + b"\n"
        except ValueError as exc:
            raise bad_space(self._folder, f"row {row}: {exc}") from exc

    def _stored_rows(self, matrix: Float64) -> tuple[Float32, Float64]:
        if not (finite := np.asarray(np.isfinite(matrix).all(axis=1))).all():
            raise bad_space(self._folder, f"row {self.count + first_of(~finite)} is not finite")
        if self._metric == "cosine":
            norms = np.linalg.norm(matrix, axis=1)
            if (zero := np.asarray(norms == 0)).any():
                text = f"row {self.count + first_of(zero)} is zero and has no direction; drop the item"
                raise bad_space(self._folder, text)
            matrix = matrix / norms[:, None]
        with np.errstate(over="ignore"):  # what float32 can't hold is infinite there, and refused by its row
            rows = matrix.astype(np.float32)
        return rows, check_norms(rows, self._metric, self.count, self._folder)

    def _finish(self) -> None:
        if self._sum is None:
            raise bad_space(self._folder, "there are no items")
        self._ids.close()
        self._vectors.seek(0)
        self._vectors.write(_npy_header(self.count, len(self._sum)))
        self._vectors.close()
        files = {_IDS, _VECTORS}
        if self._popularity:
            weights = np.concatenate(self._popularity)
            if len(weights) != self.count:
                raise bad_space(self._folder, "popularity must be one finite number per item")
            np.save(self._staging / "popularity.npy", weights, allow_pickle=False)
            files.add("popularity.npy")
        try:
            ItemIds.load(self._staging / _IDS, self.count)
        except BadIds as exc:
            raise bad_space(self._folder, str(exc)) from exc
        manifest = Manifest(
            format=1,
            version=self._version,
            dim=len(self._sum),
            count=self.count,
            dtype="float32",
            metric=self._metric,
            max_row_norm=self._longest,
            fallback=[float(x) for x in self._fallback(self._sum)],
            sha256={name: file_sha256(self._staging / name) for name in sorted(files)},
        )
        (self._staging / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        self._staging.chmod(0o755)
        self._staging.rename(self._folder)

    def _fallback(self, total: Float64) -> Float32:
        """Normalised centroid; the seed's ``ones/√d`` where it vanishes."""
        centroid = total / self.count / self._longest
        if np.linalg.norm(centroid) < DEGENERATE_NORM:
            return fallback_user_embedding(len(total))
        return l2_normalize(centroid).astype(np.float32)


def check_norms(rows: Float32, metric: Metric, first: int, folder: Path) -> Float64:
    """Norms [n] in float64; the first row that is not finite, zero, or not of unit length is an error.

    Args:
        rows: [n, d].
        metric: what is demanded of a row.
        first: number of the first row, for the error.
        folder: for the error.
    """
    # the product of float32 rows is exact in float64 and can't overflow there
    norms: Float64 = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if (wrong := ~np.isfinite(norms)).any():
        raise bad_space(folder, f"row {first + first_of(wrong)} is not finite")
    if (wrong := norms == 0).any():
        raise bad_space(folder, f"row {first + first_of(wrong)} is zero and has no direction; drop the item")
    if metric == "cosine" and (wrong := np.abs(norms - 1) > ROW_TOLERANCE).any():
        text = f"row {first + first_of(wrong)} is not of unit length, which metric cosine demands"
        raise bad_space(folder, text)
    return norms


def _npy_header(count: int, dim: int) -> bytes:
    """Header of a float32 array in .npy format 1.0, as numpy pads it."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count}, {dim}), }}"
    prefix = b"\x93NUMPY\x01\x00" + (_NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + text.ljust(_NPY_HEADER_BYTES - 11).encode() + b"\n"
