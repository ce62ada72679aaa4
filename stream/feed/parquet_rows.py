"""Rows of Parquet files, streamed batch by batch through pyarrow (the extra `parquet`)."""

import io
from collections.abc import Iterator, Mapping
from typing import IO, Any, Final

from stream.core.events import PER_SECOND, TsUnit
from stream.core.field_paths import FieldPath
from stream.errors import ConfigError
from stream.feed.shape import FileShape, Raw
from stream.foreign_text import listed
from stream.items.input_files import check_parquet

Steps = tuple[str, ...]
_BATCH_ROWS: Final = 8192
_IDS: Final = ("text", "integer")
_TYPES: Final = ("text",)
_TIMES: Final[Mapping[TsUnit, tuple[str, ...]]] = {
    "ms": ("integer", "timestamp"),
    "s": ("integer", "number", "timestamp"),
    "us": ("integer", "timestamp"),
    "ns": ("integer", "timestamp"),
    "iso8601": ("text", "timestamp"),
}


def parquet_rows(file: IO[bytes], shape: FileShape, skip: int) -> tuple[Iterator[tuple[int, Raw]], TsUnit]:
    """Rows after `skip` with their numbers from 1 on, and the unit of their times.

    A dotted path is a column of that name, or else leads into structs. A null is None. Times of a timestamp column
    become epoch milliseconds; without a zone they are UTC.

    Raises:
        ConfigError: pyarrow is missing, the file is damaged, or a column is missing or of a type that can't be used.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        msg = "is Parquet, which needs pyarrow: pip install 'user-embedding-stream[parquet]'"
        raise ConfigError(msg) from exc
    try:
        first = pq.ParquetFile(file)
        check_parquet(first.metadata, file.seek(0, io.SEEK_END))
        schema = first.schema_arrow
        paths = [_in_table(path, schema) for path in shape.paths]
        types = [_type_at(schema, path) for path in paths]
        # a text that is there once and counts for millions of rows stays one
        texts = [".".join(path) for path, kind in zip(paths, types, strict=True) if _family(kind) == "text"]
        parquet = pq.ParquetFile(file, read_dictionary=texts)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        raise _damaged(exc) from exc
    for path, kind, admitted in zip(paths, types, (_IDS, _IDS, _TIMES[shape.ts_unit], _TYPES), strict=False):
        if _family(kind) not in admitted:
            msg = f"has a column {'.'.join(path)} of type {kind}; needed is {' or '.join(admitted)}"
            raise ConfigError(msg)
    instants = pa.types.is_timestamp(types[2])
    return _rows(parquet, paths, types, skip), "ms" if instants else shape.ts_unit


def _rows(parquet: Any, paths: list[Steps], types: list[Any], skip: int) -> Iterator[tuple[int, Raw]]:
    import pyarrow as pa

    groups: list[int] = []
    before = 0  # rows of the groups that `skip` covers whole: they are not even read
    for number in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(number).num_rows
        if not groups and before + rows <= skip:
            before += rows
        else:
            groups.append(number)
    number = before
    try:
        for batch in parquet.iter_batches(
            _BATCH_ROWS, row_groups=groups, columns=list(dict.fromkeys(map(".".join, paths)))
        ):
            if number + len(batch) <= skip:
                number += len(batch)
                continue
            columns = [_values(batch, path, kind) for path, kind in zip(paths, types, strict=True)]
            for row in zip(*columns, strict=True):
                number += 1
                if number > skip:
                    yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError, IndexError) as exc:  # of texts that aren't there
        raise _damaged(exc) from exc


def _damaged(exc: Exception) -> ConfigError:
    return ConfigError(f"is no whole Parquet file ({' '.join(str(exc).split())[:200]})")


def _in_table(path: FieldPath, schema: Any) -> Steps:
    """Steps to a column: one if there is a column of that name, else those into structs."""
    for name in (path.text, path.column):
        if schema.get_field_index(name) >= 0:
            return (name,)
    steps = tuple(step for step in path.to if isinstance(step, str))
    if path.inside is not None or steps != path.to:
        msg = f"is Parquet, where {path.text} can't be followed: elements of arrays are read from JSON lines only"
        raise ConfigError(msg)
    return steps


def _type_at(schema: Any, path: Steps) -> Any:
    import pyarrow as pa

    kind = pa.struct(schema)
    for part in path:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            msg = f"has no column {'.'.join(path)} (it has {listed(schema.names)})"
            raise ConfigError(msg)
        kind = kind.field(part).type
    return kind


def _values(batch: Any, path: Steps, kind: Any) -> list[Any]:
    """A column as Python values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    head, *rest = path
    column = batch.column(head)
    if rest:
        column = pc.struct_field(column, rest)
    if pa.types.is_timestamp(kind):
        per_second = PER_SECOND[kind.unit]
        ticks = column.cast(pa.int64()).to_pylist()
        return [None if tick is None else tick * 1000 // per_second for tick in ticks]
    if pa.types.is_dictionary(column.type):
        texts = column.dictionary.to_pylist()
        return [None if at is None else texts[at] for at in column.indices.to_pylist()]
    values: list[Any] = column.to_pylist()
    return values


def _family(kind: Any) -> str:
    """What the values of an Arrow type are to us."""
    import pyarrow.types as is_

    if is_.is_dictionary(kind):
        kind = kind.value_type
    if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind):
        return "text"
    if is_.is_integer(kind):
        return "integer"
    if is_.is_floating(kind):
        return "number"
    return "timestamp" if is_.is_timestamp(kind) else "other"
