"""``manifest.json`` of an item space: what a version is, and the hashes of its files."""

import hashlib
import stat
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from stream.errors import ItemSpaceError
from stream.security.regular_files import read_regular

#: Furthest from 1 that the length of a row of a cosine space may be.
ROW_TOLERANCE: Final = 1e-4

Metric = Literal["cosine", "dot"]
#: A fallback vector of a hundred thousand numbers in text takes some two megabytes.
_SMALL_BYTES: Final = 16 << 20


IDS: Final = "ids.txt"
VECTORS: Final = "vectors.npy"
HISTORY_VECTORS: Final = "history_vectors.npy"
POPULARITY: Final = "popularity.npy"


class Manifest(msgspec.Struct, omit_defaults=True):
    """``manifest.json``.

    Attributes:
        format: of this file.
        version: name of the version.
        dim: d.
        count: n.
        dtype: of the vectors.
        metric: similarity that the index uses.
        max_row_norm: length of the longest row of ``vectors.npy``.
        fallback: unit vector [d] for users without one.
        sha256: of each file.
        history_max_row_norm: length of the longest row of ``history_vectors.npy``, where there is one.
    """

    format: Literal[1]
    version: str
    dim: Annotated[int, msgspec.Meta(ge=1)]
    count: Annotated[int, msgspec.Meta(ge=1)]
    dtype: Literal["float32"]
    metric: Metric
    max_row_norm: Annotated[float, msgspec.Meta(gt=0)]
    fallback: list[float]
    sha256: dict[str, str]
    history_max_row_norm: Annotated[float, msgspec.Meta(gt=0)] | None = None


def bad_space(folder: Path, text: str) -> ItemSpaceError:
    """An error about a folder."""
    return ItemSpaceError(f"item space {folder}: {text}")


def file_sha256(path: Path) -> str:
    """Hash (hex) of a file of an item space.

    Raises:
        ItemSpaceError: it can't be read, or is no regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise bad_space(path.parent, f"{path.name} is no regular file")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise bad_space(path.parent, f"{path.name} can't be read ({exc.strerror})") from exc


def read_whole(path: Path) -> bytes:
    """A small file of an item space.

    Raises:
        ItemSpaceError: it can't be read, is no regular file, or is larger than a small one.
    """
    try:
        return read_regular(path, _SMALL_BYTES)
    except OSError as exc:
        raise bad_space(path.parent, f"{path.name} can't be read ({exc.strerror})") from exc
