"""An item space's ids and rows in files that other tools read, to index them in an ANN."""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.items.space import ItemSpace
from stream.items.vector_files import PARQUET_HINT, piece_rows
from stream.logs import OnProgress


def export_items(space: ItemSpace, out: Path, on_progress: OnProgress | None = None) -> list[Path]:
    """Write the rows to index in an ANN, float32 as they are stored; return the files.

    They appear under their names when they are whole.

    Args:
        space: the item space.
        out: .npy (ids go to ``OUT.ids.txt``), .npz, .parquet or .jsonl.
        on_progress: called with rows done and their total.

    Raises:
        ConfigError: a file exists, can't be written, or the kind is none of these.
    """
    files = [out, out.with_name(f"{out.name}.ids.txt")] if out.suffix == ".npy" else [out]
    writers: dict[str, Callable[[ItemSpace, list[Path], OnProgress | None], None]] = {
        ".npy": _to_npy,
        ".npz": _to_npz,
        ".parquet": _to_parquet,
        ".jsonl": _to_json_lines,
    }
    if out.suffix not in writers:
        msg = f"{out}: the name must end in one of {', '.join(writers)}"
        raise ConfigError(msg)
    if there := [file for file in files if file.exists()]:
        msg = f"{there[0]} exists already; choose another name"
        raise ConfigError(msg)
    partial = [file.with_name(f".{file.name}.partial") for file in files]
    try:
        writers[out.suffix](space, partial, on_progress)
        for written, file in zip(partial, files, strict=True):
            written.rename(file)
    except OSError as exc:
        msg = f"{out} can't be written ({exc.strerror})"
        raise ConfigError(msg) from exc
    finally:
        for file in partial:
            file.unlink(missing_ok=True)
    return files


def _to_npy(space: ItemSpace, files: list[Path], on_progress: OnProgress | None) -> None:
    with files[0].open("wb") as rows, files[1].open("wb") as ids:
        _array_header(rows, "<f4", space.vectors.shape)
        for names, vectors in _rows(space, on_progress):
            rows.write(vectors.astype("<f4", copy=False).tobytes())
            ids.write(b"".join(name + b"\n" for name in names))


def _to_npz(space: ItemSpace, files: list[Path], on_progress: OnProgress | None) -> None:
    longest = max(len(item.decode()) for item in space.ids)
    with zipfile.ZipFile(files[0], "w") as archive:
        with archive.open("ids.npy", "w", force_zip64=True) as ids:
            _array_header(ids, f"<U{longest}", (len(space),))
            for names, _ in _rows(space, None):
                ids.write(np.array([name.decode() for name in names], dtype=f"<U{longest}").tobytes())
        with archive.open("vectors.npy", "w", force_zip64=True) as rows:
            _array_header(rows, "<f4", space.vectors.shape)
            for _, vectors in _rows(space, on_progress):
                rows.write(vectors.astype("<f4", copy=False).tobytes())


def _array_header(file: IO[bytes], kind: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})


def _to_json_lines(space: ItemSpace, files: list[Path], on_progress: OnProgress | None) -> None:
    with files[0].open("w", encoding="utf-8") as file:
        for names, vectors in _rows(space, on_progress):
            for name, vector in zip(names, vectors.tolist(), strict=True):
                file.write(json.dumps({"item_id": name.decode(), "vector": vector}, ensure_ascii=False) + "\n")


def _to_parquet(space: ItemSpace, files: list[Path], on_progress: OnProgress | None) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(PARQUET_HINT) from exc
    schema = pa.schema([("item_id", pa.string()), ("vector", pa.list_(pa.float32(), space.dim))])
    with pq.ParquetWriter(files[0], schema) as file:
        for names, vectors in _rows(space, on_progress):
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), space.dim)
            texts = pa.array([name.decode() for name in names], pa.string())
            file.write_batch(pa.record_batch([texts, column], schema=schema))


def _rows(space: ItemSpace, on_progress: OnProgress | None) -> Iterator[tuple[list[bytes], NDArray[np.float32]]]:
    size = piece_rows(space.dim)
    for start in range(0, len(space), size):
        names = space.ids[start : start + size]
        yield names, space.vectors[start : start + size]
        if on_progress is not None:
            on_progress(start + len(names), len(space))
