"""Item spaces: an immutable, hash-checked folder of item ids and vectors per version.

``manifest.json`` (version, dim, count, dtype, metric, max_row_norm, fallback, sha256 per file), ``ids.txt`` (one UTF-8
id per line, row order) and ``vectors.npy`` (float32 [n, d], memory-mapped); optionally ``popularity.npy``.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream.embedding import DEGENERATE_NORM, Float32, fallback_user_embedding, is_unit, l2_normalize
from stream.errors import ItemSpaceError
from stream.keys import canonical_id, check_version_name

UNIT_TOLERANCE: Final = 1e-4
_CHUNK_ROWS: Final = 65_536

Metric = Literal["cosine", "dot"]
Progress = Callable[[int, int], None]


class Manifest(msgspec.Struct):
    """``manifest.json``."""

    format: Literal[1]
    version: str
    dim: Annotated[int, msgspec.Meta(ge=1)]
    count: Annotated[int, msgspec.Meta(ge=1)]
    dtype: Literal["float32"]
    metric: Metric
    max_row_norm: Annotated[float, msgspec.Meta(gt=0)]
    fallback: list[float]
    sha256: dict[str, str]


class ItemSpace:
    """One version of the item vectors, loaded and checked.

    Attributes:
        version: name of the version; every user vector made from it carries it.
        dim: dimension d.
        ids: canonical item ids as UTF-8, row order.
        vectors: float32 [n, d], read-only.
        metric: ``cosine`` (unit rows) or ``dot``.
        fallback: unit float32 [d] for users without a vector of their own.
        max_row_norm: length of the longest row.
        sha256: of ``manifest.json``, which holds those of the other files.
        popularity: float32 [n] or None.
    """

    def __init__(
        self,
        version: str,
        ids: list[bytes],
        vectors: Float32,
        *,
        metric: Metric,
        fallback: Float32,
        max_row_norm: float,
        sha256: str,
        popularity: Float32 | None = None,
    ) -> None:
        self.version = version
        self.ids = ids
        self.vectors = vectors
        self.metric = metric
        self.fallback = fallback
        self.max_row_norm = max_row_norm
        self.sha256 = sha256
        self.popularity = popularity
        self._row_of = {item: row for row, item in enumerate(ids)}
        self.row: Final[Callable[[bytes, int], int]] = self._row_of.get

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Dimension d of the space."""
        return int(self.vectors.shape[1])

    def rows(self, item_ids: Sequence[str | int]) -> NDArray[np.int64]:
        """Row of each item id, -1 where this version lacks it."""
        return np.array([self.row(str(i).encode(), -1) for i in item_ids], dtype=np.int64)

    @classmethod
    def load(cls, path: str | Path) -> "ItemSpace":
        """Load and check a folder: every row finite, non-zero and of the right shape, ids unique, hashes equal.

        Raises:
            ItemSpaceError: in one line, what is wrong with which file.
        """
        folder = Path(path)
        manifest, manifest_sha = _read_manifest(folder)
        for name, digest in manifest.sha256.items():
            if _sha256(folder / name) != digest:
                raise _bad(folder, f"{name} is not the file its manifest describes (sha256 differs); publish it again")
        ids = _read_ids(folder, manifest.count)
        vectors = _open_array(folder / "vectors.npy", (manifest.count, manifest.dim))
        longest = check_rows(vectors, manifest.metric, folder)
        if abs(longest - manifest.max_row_norm) > 1e-6 * longest:
            raise _bad(folder, f"max_row_norm is {manifest.max_row_norm}, the rows say {longest}")
        fallback = np.asarray(manifest.fallback, dtype=np.float32)
        if fallback.shape != (manifest.dim,) or not is_unit(fallback):
            raise _bad(folder, f"the fallback must be one unit vector of dimension {manifest.dim}")
        popularity = None
        if "popularity.npy" in manifest.sha256:
            popularity = _open_array(folder / "popularity.npy", (manifest.count,))
        return cls(
            manifest.version,
            ids,
            vectors,
            metric=manifest.metric,
            fallback=fallback,
            max_row_norm=longest,
            sha256=manifest_sha,
            popularity=popularity,
        )

    @classmethod
    def save(
        cls,
        path: str | Path,
        version: str,
        ids: Sequence[str | int],
        vectors: ArrayLike,
        *,
        metric: Metric = "cosine",
        popularity: ArrayLike | None = None,
    ) -> "ItemSpace":
        """Write a folder as a whole or not at all, and return it loaded.

        Args:
            path: folder to make; it must not exist, for versions are immutable.
            version: its name, ``[A-Za-z0-9._-]{1,64}``.
            ids: n item ids, row order.
            vectors: [n, d]; rows are normalised for ``cosine`` and kept for ``dot``.
            metric: the similarity the ANN index uses.
            popularity: optional weight per item [n].

        Raises:
            ItemSpaceError: an id or a row is not acceptable, or the folder exists.
        """
        folder = Path(path)
        if folder.exists():
            raise _bad(folder, "exists already; versions are immutable, choose a new folder")
        try:
            check_version_name(version)
            canonical = [canonical_id(i) for i in ids]
        except ValueError as exc:
            raise _bad(folder, str(exc)) from exc
        matrix = np.asarray(vectors, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != len(canonical) or 0 in matrix.shape:
            raise _bad(folder, f"{len(canonical)} ids need vectors of shape [{len(canonical)}, d], got {matrix.shape}")
        _check_unique(canonical, folder)
        if not (finite := np.asarray(np.isfinite(matrix).all(axis=1))).all():
            raise _bad(folder, f"row {_first(~finite)} is not finite")
        if metric == "cosine":
            norms = np.linalg.norm(matrix, axis=1)
            if (zero := np.asarray(norms == 0)).any():
                raise _bad(folder, f"row {_first(zero)} is zero and has no direction; drop the item")
            matrix = matrix / norms[:, None]
        if metric not in ("cosine", "dot"):
            raise _bad(folder, f"metric must be cosine or dot, not {metric!r}")
        with np.errstate(over="ignore"):  # what float32 can't hold is infinite there, and refused by its row
            matrix32 = matrix.astype(np.float32)
        longest = check_rows(matrix32, metric, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            files = {"ids.txt", "vectors.npy"}
            (staging / "ids.txt").write_bytes("".join(f"{i}\n" for i in canonical).encode())
            np.save(staging / "vectors.npy", matrix32, allow_pickle=False)
            if popularity is not None:
                weights = np.asarray(popularity, dtype=np.float32)
                if weights.shape != (len(canonical),) or not np.isfinite(weights).all():
                    raise _bad(folder, "popularity must be one finite number per item")
                np.save(staging / "popularity.npy", weights, allow_pickle=False)
                files.add("popularity.npy")
            manifest = Manifest(
                format=1,
                version=version,
                dim=int(matrix32.shape[1]),
                count=len(canonical),
                dtype="float32",
                metric=metric,
                max_row_norm=longest,
                fallback=[float(x) for x in centroid_fallback(matrix32, longest)],
                sha256={name: _sha256(staging / name) for name in sorted(files)},
            )
            (staging / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
            staging.chmod(0o755)
            staging.rename(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return cls.load(folder)


def centroid_fallback(vectors: Float32, longest: float) -> Float32:
    """Normalised centroid of rows of at most the length `longest`; the seed's ``ones/√d`` where it vanishes."""
    centroid = vectors.mean(axis=0, dtype=np.float64) / longest
    if np.linalg.norm(centroid) < DEGENERATE_NORM:
        return fallback_user_embedding(int(vectors.shape[1]))
    return l2_normalize(centroid).astype(np.float32)


def check_rows(vectors: Float32, metric: Metric, folder: Path) -> float:
    """Return the longest row's norm; the first row that is not finite, zero, or not of unit length is an error."""
    longest = 0.0
    for start in range(0, vectors.shape[0], _CHUNK_ROWS):
        norms = np.linalg.norm(vectors[start : start + _CHUNK_ROWS].astype(np.float64), axis=1)
        if (wrong := ~np.isfinite(norms)).any():
            raise _bad(folder, f"row {start + _first(wrong)} is not finite")
        if (wrong := norms == 0).any():
            raise _bad(folder, f"row {start + _first(wrong)} is zero and has no direction; drop the item")
        if metric == "cosine" and (wrong := np.abs(norms - 1) > UNIT_TOLERANCE).any():
            raise _bad(folder, f"row {start + _first(wrong)} is not of unit length, which metric cosine demands")
        longest = max(longest, float(norms.max()))
    return longest


def _bad(folder: Path, text: str) -> ItemSpaceError:
    return ItemSpaceError(f"item space {folder}: {text}")


def _first(mask: NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise _bad(path.parent, f"{path.name} can't be read ({exc.strerror})") from exc


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    digest = _sha256(folder / "manifest.json")
    try:
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
        check_version_name(manifest.version)
    except (ValueError, RecursionError) as exc:  # msgspec's errors are ValueErrors
        raise _bad(folder, "manifest.json is not a manifest of this format; make it with `uemb items`") from exc
    files = set(manifest.sha256)
    if not {"ids.txt", "vectors.npy"} <= files <= {"ids.txt", "vectors.npy", "popularity.npy"}:
        raise _bad(folder, "manifest.json must list ids.txt, vectors.npy and at most popularity.npy")
    return manifest, digest


def _check_unique(ids: Sequence[str | bytes], folder: Path) -> None:
    if len(set(ids)) != len(ids):
        seen: set[str | bytes] = set()
        row = next(row for row, item in enumerate(ids) if item in seen or seen.add(item))  # type: ignore[func-returns-value]
        raise _bad(folder, f"row {row} repeats an id")


def _read_ids(folder: Path, count: int) -> list[bytes]:
    data = (folder / "ids.txt").read_bytes()
    ids = data.split(b"\n")
    if ids.pop() != b"" or len(ids) != count:
        raise _bad(folder, f"ids.txt must have {count} lines, it has {len(ids)}")
    for row, item in enumerate(ids):
        try:
            canonical_id(item.decode())
        except ValueError as exc:
            raise _bad(folder, f"ids.txt line {row + 1}: {exc}") from exc
    _check_unique(ids, folder)
    return ids


def _open_array(path: Path, shape: tuple[int, ...]) -> Float32:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # plain arrays only: no archives, no pickled objects
    except (OSError, ValueError, EOFError) as exc:
        raise _bad(path.parent, f"{path.name} is not a plain .npy array") from exc
    if array.dtype != np.float32 or array.shape != shape:
        raise _bad(path.parent, f"{path.name} is {array.dtype} {array.shape}, the manifest says float32 {shape}")
    return np.asarray(array)
