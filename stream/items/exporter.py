"""An item space's ids and rows in files that other tools read, to index them in an ANN."""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.items.ids import ItemIds
from stream.items.space import ItemSpace
from stream.items.vector_files import PARQUET_HINT, piece_rows
from stream.logs import OnProgress


def export_items(
    space: ItemSpace, out: Path, on_progress: OnProgress | None = None, *, history: bool = False
) -> list[Path]:
    """Write the rows to index in an ANN, float32 as they are stored; return the files.

    They appear under their names when they are whole.

    Args:
        space: the item space.
        out: .npy (ids go to ``OUT.ids.txt``), .npz, .parquet or .jsonl.
        on_progress: called with rows done and their total.
        history: write what items count as in a history instead, with which nothing is searched.

    Raises:
        ConfigError: a file exists, can't be written, the kind is none of these, or there is no history side.
    """
    files = [out, out.with_name(f"{out.name}.ids.txt")] if out.suffix == ".npy" else [out]
    writers: dict[str, Callable[[_Table, list[Path], OnProgress | None], None]] = {
        ".npy": _to_npy,
        ".npz": _to_npz,
        ".parquet": _to_parquet,
        ".jsonl": _to_json_lines,
    }
    if out.suffix not in writers:
        msg = f"{out}: the name must end in one of {', '.join(writers)}"
        raise ConfigError(msg)
    if history and not space.two_sided:
        msg = f"items of {space.version} count in a history as in the index; export without --history"
        raise ConfigError(msg)
    if there := [file for file in files if file.exists()]:
        msg = f"{there[0]} exists already; choose another name"
        raise ConfigError(msg)
    partial = [file.with_name(f".{file.name}.partial") for file in files]
    try:
        table = _Table(space.ids, space.history_vectors if history else space.vectors)
        writers[out.suffix](table, partial, on_progress)
        for written, file in zip(partial, files, strict=True):
            written.rename(file)
    except OSError as exc:
        msg = f"{out} can't be written ({exc.strerror})"
        raise ConfigError(msg) from exc
    finally:
        for file in partial:
            file.unlink(missing_ok=True)
    return files


class _Table(NamedTuple):
    """Ids [n] and rows [n, d]."""

    ids: ItemIds
    vectors: NDArray[np.float32]


def _to_npy(table: _Table, files: list[Path], on_progress: OnProgress | None) -> None:
    with files[0].open("wb") as rows, files[1].open("wb") as ids:
        _array_header(rows, "<f4", table.vectors.shape)
        for names, vectors in _rows(table, on_progress):
            rows.write(vectors.astype("<f4", copy=False).tobytes())
            ids.write(b"".join(name + b"\n" for name in names))


def _to_npz(table: _Table, files: list[Path], on_progress: OnProgress | None) -> None:
    longest = max(len(item.decode()) for item in table.ids)
    with zipfile.ZipFile(files[0], "w") as archive:
        with archive.open("ids.npy", "w", force_zip64=True) as ids:
            _array_header(ids, f"<U{longest}", (len(table.vectors),))
            for names, _ in _rows(table, None):
                ids.write(np.array([name.decode() for name in names], dtype=f"<U{longest}").tobytes())
        with archive.open("vectors.npy", "w", force_zip64=True) as rows:
            _array_header(rows, "<f4", table.vectors.shape)
            for _, vectors in _rows(table, on_progress):
                rows.write(vectors.astype("<f4", copy=False).tobytes())


def _array_header(file: IO[bytes], kind: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})


def _to_json_lines(table: _Table, files: list[Path], on_progress: OnProgress | None) -> None:
    with files[0].open("w", encoding="utf-8") as file:
        for names, vectors in _rows(table, on_progress):
            for name, vector in zip(names, vectors.tolist(), strict=True):
                file.write(json.dumps({"item_id": name.decode(), "vector": vector}, ensure_ascii=False) + "\n")


def _to_parquet(table: _Table, files: list[Path], on_progress: OnProgress | None) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(PARQUET_HINT) from exc
    schema = pa.schema([("item_id", pa.string()), ("vector", pa.list_(pa.float32(), table.vectors.shape[1]))])
    with pq.ParquetWriter(files[0], schema) as file:
        for names, vectors in _rows(table, on_progress):
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), table.vectors.shape[1])
            texts = pa.array([name.decode() for name in names], pa.string())
            file.write_batch(pa.record_batch([texts, column], schema=schema))


def _rows(table: _Table, on_progress: OnProgress | None) -> Iterator[tuple[list[bytes], NDArray[np.float32]]]:
    size = piece_rows(table.vectors.shape[1])
    for start in range(0, len(table.vectors), size):
        names = table.ids[start : start + size]
        yield names, table.vectors[start : start + size]
        if on_progress is not None:
            on_progress(start + len(names), len(table.vectors))
