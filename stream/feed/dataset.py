"""Interactions as the demo, `items build` and `send` know them: one row, and a named, sorted stream of rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from stream.core.events import EventRow
from stream.errors import ConfigError, UembError
from stream.feed.shape import BadRow

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

    def rows(self, skip: int = 0) -> Iterator[tuple[int, EventRow]]:
        """Number and content of all events after `skip`, as those of a file."""
        return enumerate(islice(self.events, skip, None), skip + 1)

    def refused(self, number: int, why: BadRow) -> ConfigError:
        """The error of an event that a worker of these settings would not take."""
        return ConfigError(f"{self.name} event {number}: {why.detail}")
