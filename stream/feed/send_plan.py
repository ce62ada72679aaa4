"""What `uemb send` sends: the rows of its files in their order, checked as a worker would, each with its position."""

import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from stream.core.events import EventRow
from stream.errors import ConfigError
from stream.feed.event_writer import EventWriter
from stream.feed.send_run import Outgoing
from stream.feed.shape import BadRow


class Position(NamedTuple):
    """How far a list of files has been read: all files before `file`, and `rows` of it, good and bad."""

    file: int
    rows: int


BEGINNING: Final = Position(0, 0)


class Source(Protocol):
    """A `stream.feed.event_files.EventFile`, or a `stream.feed.dataset.Dataset`."""

    def rows(self, skip: int = 0) -> Iterator[tuple[int, EventRow | BadRow]]:
        """Number and content of all rows after `skip`."""
        ...

    def refused(self, number: int, why: BadRow) -> ConfigError:
        """The error of a bad row that nobody asked to skip."""
        ...


class SendPlan:
    """The records of some files.

    Args:
        files: what to send, in this order.
        writer: makes records of rows.
        skip_bad: pass over bad rows and count them; else the first one ends the sending.
        stop: once set, what is read is an end cut short, and not judged.

    Attributes:
        skipped: rows that were passed over, by reason.
        first_skipped: place and reason of the first of them.
    """

    def __init__(self, files: Sequence[Source], writer: EventWriter, *, skip_bad: bool, stop: threading.Event) -> None:
        self._files = files
        self._writer = writer
        self._skip_bad = skip_bad
        self._stop = stop
        self.skipped: Counter[str] = Counter()
        self.first_skipped = ""

    def records(self, start: Position = BEGINNING) -> Generator[Outgoing, None, None]:
        """All records after `start`.

        Raises:
            ConfigError: a file can't be read, or a row is bad and bad rows are not skipped.
        """
        record = self._writer.record
        for at, file in enumerate(self._files[start.file :], start.file):
            skip = start.rows if at == start.file else 0
            for rows, (number, row) in enumerate(file.rows(skip), skip + 1):
                made = row if isinstance(row, BadRow) else record(row, int(time.time() * 1000))
                if not isinstance(made, BadRow):
                    yield Outgoing(*made, Position(at, rows))
                elif self._stop.is_set():
                    return
                else:
                    self._refuse(file.refused(number, made), made.reason)

    def _refuse(self, error: ConfigError, reason: str) -> None:
        if not self._skip_bad:
            raise error
        self.skipped[reason] += 1
        self.first_skipped = self.first_skipped or str(error)
