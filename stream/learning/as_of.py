"""Rows to train rankers on: each event with its user's vector from before it, so that no label is in its own features.

A vector is made of what is strictly older than the event: neither the event itself nor what else carries its time is in
it. It is what the worker would have published by then, had all events arrived in the order of their times.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from stream.core.encoders import REASONS, VersionedEncoder, finish
from stream.core.events import EventRow
from stream.core.formulas import Float32
from stream.core.space import Space
from stream.core.sums import Int64, RowHistories, RunningSums
from stream.errors import ConfigError
from stream.items.vector_files import PARQUET_HINT
from stream.logs import OnProgress

_BLOCK: Final = 4_096


class VectorBefore(NamedTuple):
    """An event, and what its user's record would have said right before it.

    Attributes:
        event: the event.
        vector: unit float32 [d]; the space's fallback where `status` is not ``ok``.
        status: ``ok`` or ``fallback``.
        reason: empty for ``ok``; ``no_known_items`` also where there is no history yet.
        history_len: how many interactions it is made of.
        unknown_items: how many of those are with items that the space lacks.
        as_of: event time of the newest of them, ms; None without any.
    """

    event: EventRow
    vector: Float32
    status: str
    reason: str
    history_len: int
    unknown_items: int
    as_of: int | None


def vectors_before(
    events: Iterable[EventRow], space: Space, encoder: VersionedEncoder, types: Collection[str]
) -> Iterator[VectorBefore]:
    """Each event with its user's vector from before it; users together, each in the order of time.

    Args:
        events: interactions in any order; all are held in memory.
        space: the item space.
        encoder: the encoder and history length.
        types: what enters a history. Events of other types (what was shown, say) get a vector and enter none.

    Raises:
        SpaceMismatch: the encoder was made for another item version.
    """
    encoder.check(space)
    ordered = sorted(events, key=lambda row: (row.user_id, row.ts_ms, row.item_id.encode(), row.type.encode()))
    sums = RunningSums.of(space, encoder.encoder, encoder.history_limit)
    block: list[_History] = []
    for _, of_user in groupby(ordered, key=lambda row: row.user_id):
        for history in _histories(list(of_user), space, encoder, types):
            block.append(history)
            if len(block) == _BLOCK:
                yield from _embedded(block, sums, space, encoder)
                block = []
    if block:
        yield from _embedded(block, sums, space, encoder)


class _History(NamedTuple):
    """An event, and the rows, type weights and times of the history before it, oldest first."""

    event: EventRow
    rows: Int64
    weights: "np.ndarray[Any, np.dtype[np.float64]]"
    times: Int64
    as_of: int | None


def _histories(
    events: list[EventRow], space: Space, encoder: VersionedEncoder, types: Collection[str]
) -> Iterator[_History]:
    """Of one user's events, in the order of histories."""
    entered = list(dict.fromkeys(row for row in events if row.type in types))  # a history is a set
    times = [row.ts_ms for row in entered]
    at = np.array(times, dtype=np.int64)
    rows = space.rows([row.item_id for row in entered])
    factor = encoder.encoder.type_weights
    weights = np.array([factor.get(row.type, 1.0) for row in entered])
    for event in events:
        end = bisect_left(times, event.ts_ms)
        start = max(0, end - encoder.history_limit)
        as_of = times[end - 1] if end > start else None
        yield _History(event, rows[start:end], weights[start:end], at[start:end], as_of)


def _embedded(
    block: list[_History], sums: RunningSums, space: Space, encoder: VersionedEncoder
) -> Iterator[VectorBefore]:
    lengths = [len(history.rows) for history in block]
    rows, weights, times = (np.concatenate(part) for part in list(zip(*block, strict=True))[1:4])
    base = np.array([0, *accumulate(lengths)])
    found = sums.sum_all(RowHistories(base, rows.astype(np.int32), weights, times))
    vectors, status = finish(encoder.encoder, *found, space=space)
    for n, history in enumerate(block):
        unknown = lengths[n] - int(found.known[n])
        yield VectorBefore(history.event, vectors[n], *REASONS[status[n]], lengths[n], unknown, history.as_of)


def save_parquet(
    rows: Iterable[VectorBefore],
    path: Path,
    space: Space,
    encoder: VersionedEncoder,
    on_progress: OnProgress | None = None,
) -> int:
    """Write rows to a Parquet file, whole or not at all; return how many. Its metadata name both versions.

    Raises:
        ConfigError: pyarrow is missing, the file exists, or it can't be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(PARQUET_HINT) from exc
    if path.exists():
        msg = f"{path} exists already; choose another name"
        raise ConfigError(msg)
    texts, numbers = ("user_id", "item_id", "type"), ("history_len", "unknown_items")
    schema = pa.schema(
        [
            *((name, pa.string()) for name in texts),
            ("ts", pa.int64()),
            ("status", pa.string()),
            ("reason", pa.string()),
            *((name, pa.int32()) for name in numbers),
            ("as_of", pa.int64()),
            ("vector", pa.list_(pa.float32(), space.dim)),
        ],
        metadata={"item_embedding_version": space.version, "user_embedding_version": encoder.version},
    )
    partial = path.with_name(f".{path.name}.partial")
    done = 0
    try:
        with pq.ParquetWriter(partial, schema) as file:
            for some in _blocks(rows):
                vectors = np.stack([row.vector for row in some]).reshape(-1)
                columns = [
                    *(pa.array([getattr(row.event, name) for row in some], pa.string()) for name in texts),
                    pa.array([row.event.ts_ms for row in some], pa.int64()),
                    pa.array([row.status for row in some]),
                    pa.array([row.reason for row in some]),
                    *(pa.array([getattr(row, name) for row in some], pa.int32()) for name in numbers),
                    pa.array([row.as_of for row in some], pa.int64()),
                    pa.FixedSizeListArray.from_arrays(pa.array(vectors), space.dim),
                ]
                file.write_batch(pa.record_batch(columns, schema=schema))
                done += len(some)
                if on_progress is not None:
                    on_progress(done, None)
        partial.rename(path)
    except OSError as exc:
        msg = f"{path} can't be written ({exc.strerror or exc})"
        raise ConfigError(msg) from exc
    finally:
        partial.unlink(missing_ok=True)
    return done


def _blocks(rows: Iterable[VectorBefore]) -> Iterator[list[VectorBefore]]:
    some: list[VectorBefore] = []
    for row in rows:
        some.append(row)
        if len(some) == _BLOCK:
            yield some
            some = []
    if some:
        yield some
