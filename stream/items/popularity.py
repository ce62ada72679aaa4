"""Popularity of an item space's items: candidates for users who have no vector of their own.

A list is a file beside the space's own, ``popularity-{version}.npy`` (float32 [n], row order), which is never changed;
``popularity.json`` names the list that counts, its sha256 and what it was made of. ``manifest.json`` is not touched,
because its hash is the identity under which workers know the item version: popularity is renewed every day, vectors
are not.
"""

import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.core.events import EventRow
from stream.core.formulas import Float32, Float64
from stream.core.space import Space
from stream.items.arrays import open_array
from stream.items.manifest import bad_space, file_sha256, read_whole
from stream.keys import check_version_name

NAME: Final = "popularity.json"
_CHUNK: Final = 65_536
_DAY_MS: Final = 86_400_000.0


class Description(msgspec.Struct, frozen=True):
    """``popularity.json``: what a list is and what it was made of.

    Attributes:
        format: of this file.
        version: name of the list.
        item_version: the item version whose rows it follows.
        items_sha256: of that version's ``manifest.json``.
        sha256: of the list.
        as_of: event time of the newest event, ms; ages are measured from it, so that no clock decides anything.
        events: how many were counted.
        not_counted: events of types without a weight.
        unknown_items: events with items that this version lacks.
        half_life_days: age at which an event counts half; None counts all alike.
        type_weights: what an event of a type counts.
    """

    format: Literal[1]
    version: str
    item_version: str
    items_sha256: str
    sha256: str
    as_of: int
    events: Annotated[int, msgspec.Meta(ge=1)]
    not_counted: int
    unknown_items: int
    half_life_days: float | None
    type_weights: dict[str, float]


class Tally:
    """Adds events up, in whatever order they come, in bounded memory.

    Args:
        space: the items.
        type_weights: what an event of a type counts; others are not counted.
        half_life_days: age, from the newest event, at which an event counts half; None counts all alike.
    """

    def __init__(self, space: Space, type_weights: Mapping[str, float], half_life_days: float | None) -> None:
        self.events = self.not_counted = self.unknown_items = 0
        self.as_of = 0
        self._space = space
        self._weights = type_weights
        self._half_life_ms = None if half_life_days is None else half_life_days * _DAY_MS
        self._scores: Float64 = np.zeros(len(space))
        self._chunk: list[tuple[int, int, float]] = []

    def add(self, events: Iterable[EventRow]) -> None:
        """Count events."""
        for event in events:
            weight = self._weights.get(event.type)
            if weight is None:
                self.not_counted += 1
                continue
            row = self._space.row(event.item_id.encode(), -1)
            if row < 0:
                self.unknown_items += 1
                continue
            self._chunk.append((row, event.ts_ms, weight))
            if len(self._chunk) == _CHUNK:
                self._fold()
        self._fold()

    def scores(self) -> Float32:
        """What each item's events add up to, float32 [n]."""
        return self._scores.astype(np.float32)

    def _fold(self) -> None:
        if not self._chunk:
            return
        rows = np.array([row for row, _, _ in self._chunk], dtype=np.int64)
        ts_ms = np.array([ts for _, ts, _ in self._chunk], dtype=np.int64)
        weights: Float64 = np.array([weight for _, _, weight in self._chunk])
        newest = max(self.as_of, int(ts_ms.max()))
        if self._half_life_ms is not None:
            self._scores *= 2.0 ** ((self.as_of - newest) / self._half_life_ms)
            weights *= 2.0 ** ((ts_ms - newest) / self._half_life_ms)
        self._scores += np.bincount(rows, weights, len(self._scores))
        self.as_of = newest
        self.events += len(self._chunk)
        self._chunk.clear()


def write_popularity(
    folder: Path,
    space: Space,
    version: str,
    events: Iterable[EventRow],
    *,
    type_weights: Mapping[str, float],
    half_life_days: float | None = None,
) -> Description:
    """Count `events` and make the result the space's popularity; readers see the old list or the new one.

    Args:
        folder: the item space's.
        space: what is loaded from it.
        version: name of the list; a name is given once.
        events: each interaction once, in any order.
        type_weights: see `Tally`.
        half_life_days: see `Tally`.

    Raises:
        SpaceError: the version exists or is no name, the half-life is no number, or there is nothing to count.
    """
    try:
        check_version_name(version)
    except ValueError as exc:
        raise bad_space(folder, str(exc)) from exc
    file = folder / f"popularity-{version}.npy"
    if file.exists():
        raise bad_space(folder, f"has a popularity {version} already; lists are immutable, choose a new name")
    if half_life_days is not None and not 0 < half_life_days < math.inf:
        raise bad_space(folder, "the half-life must be a positive number of days")
    tally = Tally(space, type_weights, half_life_days)
    tally.add(events)
    if not tally.events:
        raise bad_space(folder, "none of the events is of an item and a type that count")
    with tempfile.TemporaryDirectory(prefix=".popularity.", dir=folder) as staging:
        np.save(Path(staging) / "list.npy", tally.scores(), allow_pickle=False)
        made = Description(
            format=1,
            version=version,
            item_version=space.version,
            items_sha256=space.sha256,
            sha256=file_sha256(Path(staging) / "list.npy"),
            as_of=tally.as_of,
            events=tally.events,
            not_counted=tally.not_counted,
            unknown_items=tally.unknown_items,
            half_life_days=half_life_days,
            type_weights=dict(type_weights),
        )
        (Path(staging) / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(made)) + b"\n")
        (Path(staging) / "list.npy").replace(file)
        (Path(staging) / NAME).replace(folder / NAME)
    return made


def read_popularity(folder: Path, space: Space) -> tuple[Description, Float32] | None:
    """The list that counts and its scores [n], None where none was made.

    Raises:
        SpaceError: it is damaged, or was made for another item version.
    """
    if not (folder / NAME).exists():
        return None
    data = read_whole(folder / NAME)
    try:
        made = msgspec.json.decode(data, type=Description)
        file = folder / f"popularity-{check_version_name(made.version)}.npy"
        if not file.is_file() or file_sha256(file) != made.sha256:
            raise bad_space(folder, f"{file.name} is not the file that {NAME} describes; make a new list")
        scores = open_array(file)
    except (OSError, ValueError, RecursionError) as exc:  # msgspec's errors are ValueErrors
        raise bad_space(folder, f"{NAME} or its list can't be read; make a new one with `uemb items popular`") from exc
    if made.items_sha256 != space.sha256:
        raise bad_space(folder, f"{NAME} is of item version {made.item_version!r} in another form; make a new one")
    if scores.dtype != np.float32 or scores.shape != (len(space),) or not np.isfinite(scores).all():
        raise bad_space(folder, f"{NAME} needs one finite number per item; make a new one")
    return made, scores


def top_rows(scores: Float32, k: int) -> NDArray[np.int64]:
    """Rows of the `k` greatest scores above 0 [<= k], greatest first; among equals the lower row."""
    rows = np.flatnonzero(scores > 0)
    if 0 < k < len(rows):
        least = np.partition(scores[rows], -k)[-k]
        rows = rows[scores[rows] >= least]
    return rows[np.argsort(-scores[rows], kind="stable")][: max(0, k)]
