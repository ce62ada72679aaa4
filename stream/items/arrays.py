"""Plain .npy arrays, mapped: nothing of what a file says of itself is trusted."""

import io
import math
from pathlib import Path
from typing import IO, Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Longest header that numpy reads by itself; but it reads what a header says of its own length first.
MAX_HEADER_BYTES: Final = 10_000
_LENGTH_BYTES: Final = {1: 2, 2: 4, 3: 4}


class NoArray(ValueError):
    """No plain array of numbers or texts is there."""


class ArrayHeader(NamedTuple):
    """What a .npy says of itself; `offset` is where its numbers begin, `end` where they end."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    offset: int
    end: int


def array_header(file: IO[bytes]) -> ArrayHeader:
    """Read the header of a .npy at the beginning of a file.

    Raises:
        NoArray: there is none, or one of pickled objects, or one that no array can have.
    """
    data = file.read(np.lib.format.MAGIC_LEN + _LENGTH_BYTES[3])
    version = data[np.lib.format.MAGIC_LEN - 2] if len(data) > np.lib.format.MAGIC_LEN else 0
    size = _LENGTH_BYTES.get(version, 0)
    length = int.from_bytes(data[np.lib.format.MAGIC_LEN :][:size], "little")
    if not size or length > MAX_HEADER_BYTES:
        raise NoArray
    whole = io.BytesIO(data + file.read(np.lib.format.MAGIC_LEN + size + length - len(data)))
    try:
        np.lib.format.read_magic(whole)
        read = np.lib.format.read_array_header_1_0 if version == 1 else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(whole)
    except Exception as exc:
        raise NoArray from exc
    end = whole.tell() + dtype.itemsize * math.prod(shape)
    if dtype.hasobject or min(shape, default=0) < 0 or end >= 1 << 62:
        raise NoArray
    return ArrayHeader(shape, is_fortran, dtype, whole.tell(), end)


def open_array(path: Path) -> NDArray[Any]:
    """Map the array of a file, read-only.

    Raises:
        NoArray: it is no plain array, or shorter than its header says.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        header = array_header(file)
        if file.seek(0, io.SEEK_END) < header.end:
            raise NoArray
    order: Literal["F", "C"] = "F" if header.is_fortran else "C"
    mapped = np.memmap(path, header.dtype, mode="r", offset=header.offset, shape=header.shape, order=order)
    return np.asarray(mapped)
