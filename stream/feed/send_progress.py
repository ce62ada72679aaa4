"""How far a send has come, in a small file beside the data, so that an interrupted one can go on."""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec

from stream.config import Settings
from stream.errors import ConfigError
from stream.feed.send_plan import Position
from stream.feed.shape import FileShape
from stream.security.regular_files import read_regular

_FORMAT: Final = 1
#: Some hundred bytes for each of a hundred thousand files.
_MAX_BYTES: Final = 16 << 20
_SAVE_EVERY_S: Final = 1.0
_SAMPLE_BYTES: Final = 1 << 16


class _Identity(msgspec.Struct, frozen=True):
    name: str
    size: int
    sha256: str


class _Saved(msgspec.Struct, frozen=True):
    format: int
    settings: str
    files: list[_Identity]
    file: Annotated[int, msgspec.Meta(ge=0)]
    rows: Annotated[int, msgspec.Meta(ge=0, le=sys.maxsize)]


class SendProgress:
    """Remembers how far Kafka has acknowledged the rows of some files.

    The position is saved at most once a second, whole or not at all; what was acknowledged after it is sent twice.

    Args:
        path: the progress file.
        files: what is sent; their sizes, beginnings and ends (64 KiB each) must be the same when it goes on.
        settings: hash of all that decides what a row becomes, and where.
        on_note: told once when the position can't be saved any more.

    Raises:
        OSError: one of `files` can't be read.
    """

    def __init__(self, path: Path, files: Sequence[Path], settings: str, on_note: Callable[[str], object]) -> None:
        self.path = path
        self._files = [_identity(file) for file in files]
        self._settings = settings
        self._on_note = on_note
        self._position: Position | None = None
        self._due = time.monotonic() + _SAVE_EVERY_S
        self._lost = False

    def load(self) -> Position:
        """Where to go on.

        Raises:
            ConfigError: the file is damaged, or was saved for other files or settings.
        """
        again = "send again without --resume (events that arrive twice change nothing)"
        try:
            saved = msgspec.json.decode(read_regular(self.path, _MAX_BYTES), type=_Saved)
        except OSError as exc:
            msg = f"{self.path} can't be read ({exc.strerror}); {again}"
            raise ConfigError(msg) from exc
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            msg = f"{self.path} is damaged; {again}"
            raise ConfigError(msg) from exc
        if saved.format != _FORMAT or len(saved.files) != len(self._files) or saved.file >= len(self._files):
            msg = f"{self.path} was saved for other files; {again}"
            raise ConfigError(msg)
        for then, now in zip(saved.files, self._files, strict=True):
            if then != now:
                msg = f"{now.name} is not what it was when {self.path} was saved; {again}"
                raise ConfigError(msg)
        if saved.settings != self._settings:
            msg = f"{self.path} was saved under other settings (brokers, topics, types, mapping); {again}"
            raise ConfigError(msg)
        return Position(saved.file, saved.rows)

    def reached(self, position: Position) -> None:
        """Note that all up to `position` is acknowledged; save it if the last time is a second ago."""
        self._position = position
        if time.monotonic() >= self._due:
            self.save()

    def save(self) -> bool:
        """Save the position; False if there is none yet or it can't be saved."""
        if self._position is None or self._lost:
            return False
        saved = _Saved(_FORMAT, self._settings, self._files, *self._position)
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(msgspec.json.format(msgspec.json.encode(saved)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as exc:
            self._lost = True
            self._on_note(f"progress can't be saved to {self.path} ({exc.strerror}); --progress names another place")
            return False
        self._due = time.monotonic() + _SAVE_EVERY_S
        return True

    def finish(self) -> None:
        """All is sent: remove the file."""
        self.path.unlink(missing_ok=True)


def settings_hash(settings: Settings, shape: FileShape, topic: str | None) -> str:
    """Hash of what decides which record a row becomes: brokers, topics, types, and the shape of file and topic."""
    rules = settings.rules
    decided = (
        settings.bootstrap_servers,
        settings.event_topics,
        topic,
        sorted(rules.types),
        sorted(rules.ignored),
        sorted(rules.type_by_topic.items()),
        [sorted(rules.fields.items()), rules.ts_unit],
        [sorted(shape.fields.items()), shape.ts_unit, shape.type, shape.columns, shape.delimiter],
    )
    return hashlib.sha256(msgspec.json.encode(decided)).hexdigest()


def _identity(path: Path) -> _Identity:
    size = path.stat().st_size
    with path.open("rb") as file:
        sample = hashlib.sha256(file.read(_SAMPLE_BYTES))
        file.seek(max(size - _SAMPLE_BYTES, 0))
        sample.update(file.read(_SAMPLE_BYTES))
    return _Identity(path.name, size, sample.hexdigest())
