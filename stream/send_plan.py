"""What `uemb send` sends: the rows of its files in their order, checked as a worker would, each with its position."""

import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Final, NamedTuple

from stream.config import Settings, load_settings
from stream.errors import ConfigError
from stream.event_files import EventFile
from stream.event_shape import BadRow, FileShape
from stream.event_writer import EventWriter
from stream.events import TsUnit
from stream.feed_run import Record


class Position(NamedTuple):
    """How far a list of files has been read: all files before `file`, and `rows` of it, good and bad."""

    file: int
    rows: int


BEGINNING: Final = Position(0, 0)


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

    def __init__(
        self, files: Sequence[EventFile], writer: EventWriter, *, skip_bad: bool, stop: threading.Event
    ) -> None:
        self._files = files
        self._writer = writer
        self._skip_bad = skip_bad
        self._stop = stop
        self.skipped: Counter[str] = Counter()
        self.first_skipped = ""

    def records(self, start: Position = BEGINNING) -> Generator[Record, None, None]:
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
                    yield Record(*made, Position(at, rows))
                elif self._stop.is_set():
                    return
                else:
                    self._refuse(file.refused(number, made), made.reason)

    def _refuse(self, error: ConfigError, reason: str) -> None:
        if not self._skip_bad:
            raise error
        self.skipped[reason] += 1
        self.first_skipped = self.first_skipped or str(error)


def shape_of_files(
    settings: Settings, fields: str | None, ts_unit: TsUnit | None, kind: str | None, topic: str | None
) -> FileShape:
    """What the files look like: as events on the topics do, but for what the options say.

    Args:
        settings: describe the topics.
        fields: ``ours=theirs,…`` instead of the whole `event_fields`.
        ts_unit: instead of `event_ts_unit`.
        kind: type of all rows.
        topic: takes all rows; its type of its own, if it has one, is theirs.

    Raises:
        ConfigError: an option is wrong, or contradicts the settings.
    """
    try:
        named = settings if fields is None else load_settings(event_fields=fields)
    except ConfigError as exc:
        raise ConfigError(str(exc).replace("UEMB_EVENT_FIELDS", "--fields")) from exc
    if topic is not None and topic not in settings.event_topics:
        msg = f"--topic must be one of UEMB_EVENT_TOPICS ({', '.join(settings.event_topics)})"
        raise ConfigError(msg)
    own = settings.event_type_by_topic.get(topic) if topic is not None else None
    if kind is not None and own is not None and kind != own:
        msg = f"--type {kind}: all events of the topic {topic} are of the type {own} (UEMB_EVENT_TYPE_BY_TOPIC)"
        raise ConfigError(msg)
    kind = kind or own
    if kind is not None and kind not in settings.event_types:
        msg = f"the type {kind} is not among UEMB_EVENT_TYPES, so a worker would not take these events"
        raise ConfigError(msg)
    return FileShape(named.event_fields, ts_unit or settings.event_ts_unit, kind)
