"""What a process writes of itself: log lines that are held back when they repeat, and the one line of an error."""

import json
import logging
import logging.config
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Literal

from stream.foreign_text import escaped

log = logging.getLogger(__name__)

#: What the Kafka client says, it says again ten times a second until it is mended; we pass it on once in so long.
REPEAT_S: Final = 10.0
_REMEMBERED: Final = 256

#: How log lines look.
LogForm = Literal["text", "json"]

#: Told how far something is: how much is done, and of how much, None while that is not known.
OnProgress = Callable[[int, int | None], None]


def print_error(text: str) -> None:
    """The one line on stderr with which a command fails; a line of the log where that is JSON."""
    line = escaped(" ".join(text.split()))
    if any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        log.critical("%s", line)
    else:
        sys.stderr.write(f"uemb: {line}\n")


class OncePerMinute(logging.Filter):
    """Lets one record a minute of each message through; a burst of fallbacks is one line, not a flood."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is the first of its message within a minute."""
        text = record.getMessage()
        if record.created < self._next.get(text, 0.0):
            return False
        self._next[text] = record.created + 60.0
        return True


class NotAgain(logging.Filter):
    """Holds back what the Kafka client has said in the last `REPEAT_S` seconds; others speak freely.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be written."""
        if not record.name.startswith("aiokafka"):
            return True
        now_s, message = self._clock(), record.getMessage()
        if now_s - self._said.get(message, -REPEAT_S) < REPEAT_S:
            return False
        if len(self._said) >= _REMEMBERED:
            self._said.clear()
        self._said[message] = now_s
        return True


class TextLines(logging.Formatter):
    """Lines for people: time with its zone, level, logger, message; a traceback below.

    Args:
        process: number of this process among several that write to the same place.
    """

    def __init__(self, process: int | None = None) -> None:
        of_one = "" if process is None else f" [{process}]"
        super().__init__(f"%(asctime)s{of_one} %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Local time, with what it is ahead of UTC."""
        return datetime.fromtimestamp(record.created, UTC).astimezone().isoformat(" ", "milliseconds")


class JsonLines(logging.Formatter):
    """Lines for programs: each record is one JSON object on one line.

    Args:
        identity: who writes, beside the process id; what is None is left out.
    """

    def __init__(self, identity: Mapping[str, object]) -> None:
        super().__init__()
        self._identity = {name: value for name, value in identity.items() if value is not None}

    def format(self, record: logging.LogRecord) -> str:
        """The object; ASCII, so that it is one line to whoever reads it."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit: what was meant is still told
            message = str(record.msg)
        time_utc = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, object] = {
            "time": time_utc.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": message,
            "pid": record.process,
            **self._identity,
        }
        if record.exc_info and (kind := record.exc_info[0]) is not None:
            fields["exception"] = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
            fields["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return json.dumps(fields)


def log_config(
    level: str, form: LogForm = "text", process: int | None = None, **identity: str | None
) -> dict[str, object]:
    """What `logging.config.dictConfig` makes of a process one that writes to stderr, as `setup_logging` says.

    Args:
        level: least severe line of ours.
        form: how lines look.
        process: number of this process among several that write to the same place.
        identity: what else each JSON line says of this process.
    """
    is_debug = level == "debug"
    formatter = JsonLines({"process": process, **identity}) if form == "json" else TextLines(process)

    def handler() -> logging.Handler:
        made = logging.StreamHandler(sys.stderr)
        made.setFormatter(formatter)
        if not is_debug:
            made.addFilter(NotAgain())
        return made

    libraries = {"level": "DEBUG" if is_debug else "WARNING"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"stderr": {"()": handler}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "stream": {"level": level.upper()},
            **dict.fromkeys(("faust", "mode", "aiokafka"), libraries),
            # It tells of requests whole, of the login's too; named here, or it would be given its parent's level.
            "aiokafka.conn": {"level": "WARNING"},
            # Tasks that Faust leaves behind when it is stopped end in exceptions that nobody awaits.
            "asyncio": {"level": "DEBUG" if is_debug else "CRITICAL"},
        },
    }


def setup_logging(level: str, form: LogForm = "text", process: int | None = None, **identity: str | None) -> None:
    """One line a message on stderr; libraries speak up from warnings on, and about nothing that we report ourselves.

    Arguments are those of `log_config`. With JSON, what Python itself would print goes the same way.
    """
    logging.config.dictConfig(log_config(level, form, process, **identity))
    if form == "json":
        log_what_python_prints()


def log_what_python_prints() -> None:
    """Have warnings, and exceptions that nothing catches, written to the log."""
    logging.captureWarnings(capture=True)

    def uncaught(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
        log.critical("ended by an exception that nothing has caught", exc_info=(kind, exc, trace))

    def uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            log.critical("a thread has ended", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        if args.exc_value is not None:
            exc_info = (args.exc_type, args.exc_value, args.exc_traceback)
            log.error("an exception that nothing can catch", exc_info=exc_info)

    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, uncaught_in_thread, unraisable
