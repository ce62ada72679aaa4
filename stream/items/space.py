"""Item spaces: an immutable, hash-checked folder of item ids and vectors per version.

``manifest.json`` (version, dim, count, dtype, metric, max_row_norm, fallback, sha256 per file), ``ids.txt`` (one UTF-8
id per line, row order) and ``vectors.npy`` (float32 [n, d], memory-mapped); optionally ``history_vectors.npy`` (the
same shape), ``popularity.npy``, and lists that were made later (`stream.items.popularity`).

Items of a history may count as other vectors than the index holds, as in models that learn a table for either side:
a user's vector is then made of `history_vectors`, lies in the index's space all the same, and searches `vectors`.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream.core.formulas import Float32, is_unit
from stream.items.arrays import MAX_HEADER_BYTES, open_array
from stream.items.ids import BadIds, ItemIds
from stream.items.manifest import (
    HISTORY_VECTORS,
    IDS,
    POPULARITY,
    VECTORS,
    Manifest,
    Metric,
    bad_space,
    file_sha256,
    read_whole,
)
from stream.items.popularity import read_popularity, top_rows
from stream.items.writer import SpaceWriter, check_norms
from stream.keys import MAX_ID_BYTES, check_version_name

_CHUNK_ROWS: Final = 65_536
_CHUNK_NUMBERS: Final = 1 << 20


class ItemSpace:
    """One version of the item vectors, loaded and checked.

    Attributes:
        version: name of the version; every user vector made from it carries it.
        dim: dimension d.
        ids: canonical item ids as UTF-8, row order, memory-mapped.
        vectors: what the index holds: float32 [n, d], read-only.
        history_vectors: what items count as in a history: the same shape; `vectors` itself where no others were made.
        metric: ``cosine`` (unit rows) or ``dot``.
        fallback: unit float32 [d] for users without a vector of their own.
        max_row_norm: length of the longest row of `history_vectors`.
        sha256: of ``manifest.json``, which holds those of the other files.
        popularity: float32 [n] or None, as the version was made with.
    """

    def __init__(
        self,
        version: str,
        ids: ItemIds,
        vectors: Float32,
        *,
        metric: Metric,
        fallback: Float32,
        max_row_norm: float,
        sha256: str,
        popularity: Float32 | None = None,
        history_vectors: Float32 | None = None,
        folder: Path | None = None,
    ) -> None:
        self.version = version
        self.ids = ids
        self.vectors = vectors
        self.history_vectors = vectors if history_vectors is None else history_vectors
        self.metric = metric
        self.fallback = fallback
        self.max_row_norm = max_row_norm
        self.sha256 = sha256
        self.popularity = popularity
        self._folder = folder
        self._popular: tuple[str | None, Float32] | None = None
        self.row: Final[Callable[[bytes, int], int]] = ids.row
        self.rows_of: Final[Callable[[Sequence[bytes]], NDArray[np.int64]]] = ids.rows

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Dimension d of the space."""
        return int(self.vectors.shape[1])

    @property
    def two_sided(self) -> bool:
        """Whether items count as other vectors in a history than in the index."""
        return self.history_vectors is not self.vectors

    def rows(self, item_ids: Sequence[str | int]) -> NDArray[np.int64]:
        """Row of each item id, -1 where this version lacks it."""
        # what is no text in UTF-8 is no id, and not known
        return self.rows_of([str(i).encode(errors="surrogatepass") for i in item_ids])

    def nearest(self, vectors: Float32, k: int) -> tuple[NDArray[np.int64], Float32]:
        """The `k` items with the greatest inner products with each of `vectors` [m, d], whole, some rows at a time.

        Returns:
            int64 [m, k] rows and float32 [m, k] products, the greatest first; fewer where there are fewer items.
        """
        scores = np.zeros((len(vectors), 0), dtype=np.float32)
        rows = np.zeros((len(vectors), 0), dtype=np.int64)
        for start in range(0, len(self), _CHUNK_ROWS):
            of_block = vectors @ self.vectors[start : start + _CHUNK_ROWS].T
            if k < of_block.shape[1]:  # to sort all of them would take ten times as long
                some = np.sort(np.argpartition(-of_block, k - 1, axis=1)[:, :k], axis=1)
            else:
                some = np.broadcast_to(np.arange(of_block.shape[1]), of_block.shape)
            scores = np.concatenate([scores, np.take_along_axis(of_block, some, axis=1)], axis=1)
            rows = np.concatenate([rows, some + start], axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
        return rows, scores

    @property
    def popularity_version(self) -> str | None:
        """Name of the popularity list; None without one, or where it is the one the version was made with.

        Raises:
            ItemSpaceError: the list is damaged.
        """
        return self._popularity_list()[0]

    def popular(self, k: int) -> list[tuple[str, float]]:
        """Ids and scores of the `k` most popular items, most popular first; items with nothing to say are left out.

        Of the list that `uemb items popular` made last before the first call, else of what the version was made with.

        Raises:
            ItemSpaceError: there is no popularity, or its list is damaged.
        """
        scores = self._popularity_list()[1]
        if scores is None:
            folder = self._folder or Path(self.version)
            raise bad_space(folder, "has no popularity; make a list with `uemb items popular`")
        return [(self.ids[row].decode(), float(scores[row])) for row in top_rows(scores, k).tolist()]

    def _popularity_list(self) -> tuple[str | None, Float32 | None]:
        if self._popular is None:
            made = None if self._folder is None else read_popularity(self._folder, self)
            if made is not None:
                self._popular = made[0].version, made[1]
            elif self.popularity is not None:
                self._popular = None, self.popularity
            else:
                return None, None
        return self._popular

    @classmethod
    def load(cls, path: str | Path) -> "ItemSpace":
        """Load and check a folder: every row finite, non-zero and of the right shape, ids unique, hashes equal.

        Raises:
            ItemSpaceError: in one line, what is wrong with which file.
        """
        folder = Path(path)
        manifest, manifest_sha = _read_manifest(folder)
        for name, digest in manifest.sha256.items():
            _check_size(folder, name, manifest)
            if file_sha256(folder / name) != digest:
                raise bad_space(
                    folder, f"{name} is not the file its manifest describes (sha256 differs); publish it again"
                )
        ids = _read_ids(folder, manifest.count)
        vectors, longest = _open_vectors(folder, VECTORS, manifest, manifest.max_row_norm)
        history_vectors = None
        if (told := manifest.history_max_row_norm) is not None:
            history_vectors, longest = _open_vectors(folder, HISTORY_VECTORS, manifest, told)
        fallback = np.asarray(manifest.fallback, dtype=np.float32)
        if fallback.shape != (manifest.dim,) or not is_unit(fallback):
            raise bad_space(folder, f"the fallback must be one unit vector of dimension {manifest.dim}")
        popularity = None
        if POPULARITY in manifest.sha256:
            popularity = _open_array(folder / POPULARITY, (manifest.count,))
        return cls(
            manifest.version,
            ids,
            vectors,
            metric=manifest.metric,
            fallback=fallback,
            max_row_norm=longest,
            sha256=manifest_sha,
            popularity=popularity,
            history_vectors=history_vectors,
            folder=folder,
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
        history_vectors: ArrayLike | None = None,
    ) -> "ItemSpace":
        """Write a folder as a whole or not at all, and return it loaded.

        Args:
            path: folder to make; it must not exist, for versions are immutable.
            version: its name, ``[A-Za-z0-9._-]{1,64}``.
            ids: n item ids, row order.
            vectors: [n, d]; rows are normalised for ``cosine`` and kept for ``dot``.
            metric: the similarity the ANN index uses.
            popularity: optional weight per item [n].
            history_vectors: what items count as in a history [n, d], where that is not `vectors`; the same rules hold.

        Raises:
            ItemSpaceError: an id or a row is not acceptable, or the folder exists.
        """
        matrix = np.asarray(vectors)
        if matrix.ndim != 2 or matrix.shape[0] != len(ids) or 0 in matrix.shape:
            text = f"{len(ids)} ids need vectors of shape [{len(ids)}, d], got {matrix.shape}"
            raise bad_space(Path(path), text)
        weights = None if popularity is None else np.asarray(popularity, dtype=np.float32)
        if weights is not None and weights.shape != (len(ids),):
            raise bad_space(Path(path), "popularity must be one finite number per item")
        history = None if history_vectors is None else np.asarray(history_vectors)
        if history is not None and history.shape != matrix.shape:
            text = f"history vectors must have the shape {matrix.shape} of the vectors, not {history.shape}"
            raise bad_space(Path(path), text)
        with SpaceWriter(path, version, metric) as writer:
            for start in range(0, len(ids), _CHUNK_ROWS):
                piece = slice(start, start + _CHUNK_ROWS)
                writer.append(
                    ids[piece],
                    matrix[piece],
                    None if weights is None else weights[piece],
                    None if history is None else history[piece],
                )
        return cls.load(path)


def _open_vectors(folder: Path, name: str, manifest: Manifest, told: float) -> tuple[Float32, float]:
    """A matrix [n, d] of the folder, and the norm of its longest row, which the manifest has `told`."""
    vectors = _open_array(folder / name, (manifest.count, manifest.dim))
    size = max(1, _CHUNK_NUMBERS // manifest.dim)
    pieces = range(0, manifest.count, size)
    what = "row" if name == VECTORS else "history row"
    longest = max(float(check_norms(vectors[n : n + size], manifest.metric, n, folder, what).max()) for n in pieces)
    if abs(longest - told) > 1e-6 * longest:
        of = "max_row_norm" if name == VECTORS else "history_max_row_norm"
        raise bad_space(folder, f"{of} is {told}, the rows say {longest}")
    return vectors, longest


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    data = read_whole(folder / "manifest.json")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        check_version_name(manifest.version)
    except (ValueError, msgspec.MsgspecError, RecursionError) as exc:
        raise bad_space(folder, "manifest.json is not a manifest of this format; make it with `uemb items`") from exc
    files = set(manifest.sha256)
    needed = {IDS, VECTORS} if manifest.history_max_row_norm is None else {IDS, VECTORS, HISTORY_VECTORS}
    if not needed <= files <= {*needed, POPULARITY}:
        text = f"manifest.json must list {', '.join(sorted(needed))} and at most {POPULARITY}"
        raise bad_space(folder, f"{text}; {HISTORY_VECTORS} needs history_max_row_norm")
    return manifest, sha256(data).hexdigest()


def _check_size(folder: Path, name: str, manifest: Manifest) -> None:
    """Refuse a file that is larger than the manifest lets it be before all of it is hashed, which may take hours."""
    if name == IDS:
        largest = manifest.count * (MAX_ID_BYTES + 1)
    else:
        largest = manifest.count * (1 if name == POPULARITY else manifest.dim) * 4 + 2 * MAX_HEADER_BYTES
    try:
        size = (folder / name).stat().st_size
    except OSError:
        return  # said by who reads it
    if size > largest:
        raise bad_space(folder, f"{name} has {size:,} bytes, of what its manifest describes at most {largest:,}")


def _read_ids(folder: Path, count: int) -> ItemIds:
    try:
        return ItemIds.load(folder / IDS, count)
    except BadIds as exc:
        raise bad_space(folder, f"ids.txt {exc}") from exc


def _open_array(path: Path, shape: tuple[int, ...]) -> Float32:
    try:
        array = open_array(path)
    except (OSError, ValueError) as exc:
        raise bad_space(path.parent, f"{path.name} is not a plain .npy array") from exc
    if array.dtype != np.float32 or array.shape != shape:
        raise bad_space(path.parent, f"{path.name} is {array.dtype} {array.shape}, the manifest says float32 {shape}")
    return array
