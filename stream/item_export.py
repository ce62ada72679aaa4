"""An item space's ids and rows in files that other tools read, to index them in an ANN."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.item_files import PARQUET_HINT, PIECE_ROWS, Progress
from stream.items import ItemSpace


def export_items(space: ItemSpace, out: Path, on_progress: Progress | None = None) -> list[Path]:
    """Write the rows to index in an ANN, float32 as they are stored; return the files.

    Args:
        space: the item space.
        out: .npy (ids go to ``OUT.ids.txt``), .npz, .parquet or .jsonl.
        on_progress: called with rows done and their total.

    Raises:
        ConfigError: a file exists, or the kind is none of these.
    """
    files = [out, out.with_name(f"{out.name}.ids.txt")] if out.suffix == ".npy" else [out]
    writers: dict[str, Callable[[], None]] = {
        ".npy": lambda: _to_npy(space, files, on_progress),
        ".npz": lambda: np.savez(out, ids=np.array([i.decode() for i in space.ids]), vectors=space.vectors),
        ".parquet": lambda: _to_parquet(space, out, on_progress),
        ".jsonl": lambda: _to_json_lines(space, out, on_progress),
    }
    if out.suffix not in writers:
        msg = f"{out}: the name must end in one of {', '.join(writers)}"
        raise ConfigError(msg)
    if there := [file for file in files if file.exists()]:
        msg = f"{there[0]} exists already; choose another name"
        raise ConfigError(msg)
    writers[out.suffix]()
    return files


def _to_npy(space: ItemSpace, files: list[Path], on_progress: Progress | None) -> None:
    array = np.lib.format.open_memmap(files[0], mode="w+", dtype=np.float32, shape=space.vectors.shape)
    with files[1].open("wb") as ids:
        for start, names, vectors in _rows(space, on_progress):
            array[start : start + len(names)] = vectors
            ids.write(b"".join(name + b"\n" for name in names))
    array.flush()


def _to_json_lines(space: ItemSpace, out: Path, on_progress: Progress | None) -> None:
    with out.open("w", encoding="utf-8") as file:
        for _, names, vectors in _rows(space, on_progress):
            for name, vector in zip(names, vectors.tolist(), strict=True):
                file.write(json.dumps({"item_id": name.decode(), "vector": vector}, ensure_ascii=False) + "\n")


def _to_parquet(space: ItemSpace, out: Path, on_progress: Progress | None) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(PARQUET_HINT) from exc
    schema = pa.schema([("item_id", pa.string()), ("vector", pa.list_(pa.float32(), space.dim))])
    with pq.ParquetWriter(out, schema) as file:
        for _, names, vectors in _rows(space, on_progress):
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), space.dim)
            texts = pa.array([name.decode() for name in names], pa.string())
            file.write_batch(pa.record_batch([texts, column], schema=schema))


def _rows(space: ItemSpace, on_progress: Progress | None) -> Iterator[tuple[int, list[bytes], NDArray[np.float32]]]:
    for start in range(0, len(space), PIECE_ROWS):
        names = space.ids[start : start + PIECE_ROWS]
        yield start, names, space.vectors[start : start + PIECE_ROWS]
        if on_progress is not None:
            on_progress(start + len(names), len(space))
