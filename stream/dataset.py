"""Interactions as the demo, `items build` and `send` know them: one row, and a named, sorted stream of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from stream.errors import UembError

DEFAULT_CACHE_DIR: Final = Path("~/.cache/user-embedding-stream")

Progress = Callable[[int, int | None], None]
Note = Callable[[str], None]


class DatasetUnavailable(UembError):
    """The real data can't be had: no network, no index, or not the bytes that were pinned."""


class EventRow(NamedTuple):
    """One interaction; ids are canonical texts, `ts_ms` is event time."""

    user_id: str
    item_id: str
    type: str
    ts_ms: int


@dataclass(frozen=True)
class Dataset:
    """A named stream.

    Attributes:
        name: what to call it on screen.
        events: sorted by `event_order`.
        titles: text for an item id, where one is known.
        synthetic: whether it was made up.
    """

    name: str
    events: list[EventRow]
    titles: dict[str, str]
    synthetic: bool


def event_order(row: EventRow) -> tuple[int, str, str]:
    """Sort key of a stream: time, user, item; texts by code point, which is UTF-8 byte order.

    Sorting is stable, so rows that agree in all three keep the order of their source.
    """
    return row.ts_ms, row.user_id, row.item_id
