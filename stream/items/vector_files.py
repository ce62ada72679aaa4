"""Files of item vectors of one's own, read piece by piece; none of it is trusted."""

import gzip
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.core.events import MAX_VALUES, json_document
from stream.core.formulas import Float64
from stream.errors import ConfigError
from stream.foreign_text import listed
from stream.items.arrays import array_header, open_array
from stream.items.input_files import BOM, check_parquet, files_in, lines_of, open_lines
from stream.items.vector_texts import Row, csv_vector_rows, word2vec_binary_rows, word2vec_rows

PARQUET_HINT: Final = "Parquet needs pyarrow: pip install 'user-embedding-stream[parquet]'"
PIECE_ROWS: Final = 16_384
_PIECE_NUMBERS: Final = 1 << 20
_COUNT_BYTES: Final = 1 << 20


class Columns(NamedTuple):
    """Names in the file: arrays of .npz, columns of Parquet, fields of JSON lines."""

    ids: str = "item_id"
    vectors: str = "vector"


class Piece(NamedTuple):
    """Rows as they are in the file.

    Attributes:
        ids: whatever the file has [n].
        vectors: numbers [n, d], or for each row its numbers, None where it has none.
        total: rows of the file, None where that is not known.
        wrong: rows (numbers in this piece) that hold no item at all, and why.
    """

    ids: Sequence[Any]
    vectors: NDArray[Any] | Sequence[Float64 | None]
    total: int | None
    wrong: Mapping[int, str] = MappingProxyType({})


def piece_rows(dim: int) -> int:
    """Rows of a piece: what bounds its memory is their numbers."""
    return max(1, min(PIECE_ROWS, _PIECE_NUMBERS // max(1, dim)))


def pieces(file: Path, ids: Path | None, columns: Columns | None, scratch: Path) -> Iterator[Piece]:
    """The rows of a file.

    Args:
        file: its name says what it is.
        ids: ids of a .npy, or of a .npz that holds none.
        columns: names in the file; None for what the kind of file has.
        scratch: a folder for temporary files as large as the arrays of a .npz.

    Raises:
        ConfigError: it can't be read as what it is.
    """
    named = [part.lower() for part in file.suffixes if part.lower() != ".gz"]
    suffix = ".parquet" if file.is_dir() else named[-1] if named else ""
    names = columns or (Columns("ids", "vectors") if suffix == ".npz" else Columns())
    kinds: dict[str, Callable[[], Iterator[Piece]]] = {
        ".npy": lambda: _from_npy(file, ids),
        ".npz": lambda: _from_npz(file, ids, names, scratch),
        ".parquet": lambda: chain.from_iterable(_from_parquet(part, names) for part in files_in([file])),
        ".jsonl": lambda: _from_json_lines(file, names),
        ".ndjson": lambda: _from_json_lines(file, names),
        ".csv": lambda: _gathered(csv_vector_rows(file, *names)),
        ".tsv": lambda: _gathered(csv_vector_rows(file, *names)),
        ".txt": lambda: _gathered(word2vec_rows(file)),
        ".vec": lambda: _gathered(word2vec_rows(file)),
        ".bin": lambda: _gathered(word2vec_binary_rows(file)),
    }
    for path in (file, ids):
        if path is not None and not path.is_file() and not (path is file and path.is_dir()):
            msg = f"there is no file {path}"
            raise ConfigError(msg)
    if suffix not in kinds:
        msg = f"{file}: the name must end in one of {', '.join(kinds)}"
        raise ConfigError(msg)
    if ids is not None and suffix not in (".npy", ".npz"):
        msg = f"--ids is for .npy and .npz; {file} holds its ids itself"
        raise ConfigError(msg)
    return _one_line(file, kinds[suffix]())


def _one_line(file: Path, found: Iterator[Piece]) -> Iterator[Piece]:
    """What is found, or the file in the error."""
    try:
        yield from found
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        msg = f"{file} is no whole gzip file ({exc})"
        raise ConfigError(msg) from exc
    except OSError as exc:
        msg = f"{file} can't be read ({exc.strerror or exc})"
        raise ConfigError(msg) from exc
    except ConfigError as exc:
        msg = str(exc)
        raise ConfigError(msg if str(file) in msg else f"{file} {msg}") from exc


def _gathered(rows: Iterator[Row]) -> Iterator[Piece]:
    """Rows in pieces of bounded memory."""
    ids: list[Any] = []
    vectors: list[Float64 | None] = []
    wrong: dict[int, str] = {}
    numbers = 0
    for item, vector, problem in rows:
        if problem:
            wrong[len(ids)] = problem
        ids.append(item)
        vectors.append(vector)
        numbers += 0 if vector is None else len(vector)
        if len(ids) == PIECE_ROWS or numbers >= _PIECE_NUMBERS:
            yield Piece(ids, vectors, None, wrong)
            ids, vectors, wrong, numbers = [], [], {}, 0
    if ids:
        yield Piece(ids, vectors, None, wrong)


def _load_array(file: Path, problem: str = "") -> NDArray[Any]:
    try:
        return open_array(file)
    except (OSError, ValueError) as exc:
        msg = problem or f"{file} is not a plain .npy array of numbers or texts"
        raise ConfigError(msg) from exc


def _from_npy(file: Path, ids: Path | None) -> Iterator[Piece]:
    if ids is None:
        msg = "a .npy holds no ids: name them with --ids FILE (text, one a line, or .npy)"
        raise ConfigError(msg)
    yield from _with_ids(file, ids, _load_array(file))


def _with_ids(file: Path, ids: Path, vectors: NDArray[Any]) -> Iterator[Piece]:
    if ids.suffix.lower() == ".npy":
        yield from _slices(file, _load_array(ids), vectors)
        return
    with ids.open("rb") as lines:
        count = _line_count(lines)
        lines.seek(len(BOM) if lines.read(len(BOM)) == BOM else 0)
        for _, rows in _matrix_pieces(file, count, vectors):
            yield Piece([_id_line(lines.readline()) for _ in range(len(rows))], rows, len(vectors))


def _line_count(file: BinaryIO) -> int:
    """Lines, the last one with or without its line feed."""
    count, last = 0, b"\n"
    while part := file.read(_COUNT_BYTES):
        count, last = count + part.count(b"\n"), part[-1:]
    file.seek(0)
    return count + (last != b"\n")


def _id_line(line: bytes) -> str:
    return line.removesuffix(b"\n").removesuffix(b"\r").decode(errors="surrogateescape")


def _from_npz(file: Path, ids: Path | None, names: Columns, scratch: Path) -> Iterator[Piece]:
    problem = f"{file} is not a .npz of plain arrays"
    with tempfile.TemporaryDirectory(prefix=".npz.", dir=scratch) as folder:
        try:
            with zipfile.ZipFile(file) as archive:
                there = [name.removesuffix(".npy") for name in archive.namelist()]
                vectors_name = there[0] if ids is not None and len(there) == 1 else names.vectors
                wanted = [names.ids, vectors_name] if ids is None else [vectors_name]
                if not {*wanted} <= {*there}:
                    raise _lacks(file, wanted, there, more=" or the ids' file with --ids" if ids is None else "")
                for number, name in enumerate(wanted):  # out of the archive, an array can be mapped
                    _extract(archive, f"{name}.npy", Path(folder) / f"{number}.npy", file)
        except ConfigError:
            raise
        except Exception as exc:  # zipfile and its codecs raise many kinds
            raise ConfigError(problem) from exc
        found = [_load_array(Path(folder) / f"{number}.npy", problem) for number in range(len(wanted))]
        if ids is None:
            yield from _slices(file, found[0], found[1])
        else:
            yield from _with_ids(file, ids, found[0])


def _extract(archive: zipfile.ZipFile, name: str, target: Path, file: Path) -> None:
    """Take an array out of an archive, as long as its own header says and no longer.

    Raises:
        ConfigError: there is no room for it.
        ValueError: it is not as long.
    """
    with archive.open(name) as packed:
        length = array_header(packed).end
    if archive.getinfo(name).file_size != length:
        msg = "an array is not as long as its header says"
        raise ValueError(msg)
    if length > (free := shutil.disk_usage(target.parent).free):
        msg = f"{file}: its array {name} needs {length:,} bytes beside the item space, where {free:,} are free"
        raise ConfigError(msg)
    with archive.open(name) as packed, target.open("wb") as out:
        shutil.copyfileobj(packed, out, _COUNT_BYTES)


def _slices(file: Path, ids: NDArray[Any], vectors: NDArray[Any]) -> Iterator[Piece]:
    if ids.ndim != 1:
        msg = f"{file}: ids must be one a row [n], not {ids.dtype} {ids.shape}"
        raise ConfigError(msg)
    for start, rows in _matrix_pieces(file, len(ids), vectors):
        some = ids[start : start + len(rows)].tolist()
        if ids.dtype.kind == "S":
            some = [item.decode(errors="surrogateescape") for item in some]
        yield Piece(some, rows, len(vectors))


def _matrix_pieces(file: Path, ids: int, vectors: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """First row and rows of the pieces of a matrix."""
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        msg = f"{file}: vectors must be a matrix of numbers [n, d], not {vectors.dtype} {vectors.shape}"
        raise ConfigError(msg)
    if ids != len(vectors):
        msg = f"{file}: {len(vectors)} vectors need as many ids, there are {ids}"
        raise ConfigError(msg)
    size = piece_rows(vectors.shape[1])
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]


def _from_parquet(file: Path, names: Columns) -> Iterator[Piece]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(PARQUET_HINT) from exc
    try:
        table = pq.ParquetFile(file)
        check_parquet(table.metadata, file.stat().st_size)
        there = table.schema_arrow.names
        if not {*names} <= {*there}:
            raise _lacks(file, names, there)
        kind = table.schema_arrow.field(names.vectors).type
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
            msg = f"{file}: {names.vectors} holds {kind}, it must hold lists of numbers; name it with --vector-column"
            raise ConfigError(msg)
        size = piece_rows(kind.list_size if pa.types.is_fixed_size_list(kind) else _PIECE_NUMBERS // 1024)
        for batch in table.iter_batches(batch_size=size, columns=[*names]):
            vectors = _arrow_vectors(batch.column(names.vectors))
            yield Piece(batch.column(names.ids).to_pylist(), vectors, table.metadata.num_rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        msg = f"{file} can't be read as Parquet"
        raise ConfigError(msg) from exc


def _arrow_vectors(column: Any) -> NDArray[Any] | list[Float64 | None]:
    """Lists of numbers, as a matrix where all are there and of one length."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    lengths = pc.list_value_length(column).drop_null().unique().to_pylist()
    flat = column.flatten()
    if not column.null_count and not flat.null_count and len(lengths) == 1 and lengths[0]:
        return np.asarray(flat.to_numpy(zero_copy_only=False).reshape(len(column), lengths[0]))
    return [_numbers(row) for row in column.to_pylist()]


def _from_json_lines(file: Path, names: Columns) -> Iterator[Piece]:
    problem: list[ConfigError] = []
    known = False
    for piece in _gathered(_json_rows(file, names, problem)):
        known = known or len(piece.wrong) < len(piece.ids)
        if not known:
            break
        yield piece
    if not known and problem:  # not one row has these fields: they have other names
        raise problem[0]


def _json_rows(file: Path, names: Columns, problem: list[ConfigError]) -> Iterator[Row]:
    with open_lines(file) as lines:
        for number, line in enumerate(lines_of(lines), 1):
            if line.isspace():
                continue
            row = _json_row(line)
            if isinstance(row, dict) and {*names} <= {*row}:
                yield row[names.ids], _numbers(row[names.vectors]), ""
            else:
                if not problem and line.lstrip()[:1] == b"[":
                    problem.append(ConfigError(f"{file} is a JSON array; write one object a line (jq -c '.[]')"))
                elif not problem:
                    problem.append(_lacks(file, names, row if isinstance(row, dict) else (), f" line {number}"))
                yield None, None, "is not JSON" if row is ... else f"lacks {' or '.join(names)}"


def _json_row(line: bytes) -> Any:
    """What a line holds; ... when it is not JSON."""
    try:
        return json_document(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            if line.count(b",") > MAX_VALUES:
                return ...
            return json.loads(line)  # Python writes NaN, which JSON has not: the vector is bad, not the line
        except (ValueError, RecursionError):
            return ...


def _numbers(value: Any) -> Float64 | None:
    """A list of numbers as an array; None for anything else, texts and truth values that look like numbers included."""
    try:
        return np.array(msgspec.convert(value, list[float]), dtype=np.float64)
    except (msgspec.ValidationError, OverflowError):
        return None


def _lacks(file: Path, names: Sequence[str], there: Any, where: str = "", more: str = "") -> ConfigError:
    missing = [name for name in names if name not in there]
    return ConfigError(
        f"{file}{where} lacks {' and '.join(missing)} (it has {listed(there)}); "
        f"name them with --id-column and --vector-column{more}"
    )
