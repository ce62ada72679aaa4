"""Interactions as the demo, `items build` and `send` know them: one row, and a named, sorted stream of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stream.core.events import EventRow
from stream.errors import UembError

DEFAULT_CACHE_DIR: Final = Path("~/.cache/user-embedding-stream")

Note = Callable[[str], None]


class DatasetUnavailable(UembError):
    """The real data can't be had: no network, no index, or not the bytes that were pinned."""


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
