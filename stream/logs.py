"""What a process writes of itself: log lines that are held back when they repeat, and the one line of an error.

Ids, keys, headers and names are other people's text. It is shown as it is, but for characters that would act on a
terminal or on the order of what stands beside them.
"""

import logging
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Final

import click

#: What the Kafka client says, it says again ten times a second until it is mended; we pass it on once in so long.
REPEAT_S: Final = 10.0
_REMEMBERED: Final = 256

#: Told how far something is: how much is done, and of how much, None while that is not known.
OnProgress = Callable[[int, int | None], None]

#: Control, format (bidirectional and invisible), line and paragraph separators, and halves of surrogate pairs.
ACTIVE: Final = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs"})


def escaped(text: str) -> str:
    r"""Text on one line in which nothing acts: `\x1b`, `\n` and the like for what would.

    >>> print(escaped("a\x1b[31mb\u202ec"))
    a\x1b[31mb\u202ec
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ACTIVE else c for c in text)


def print_error(text: str) -> None:
    """The one line on stderr with which a command fails."""
    click.echo(f"uemb: {escaped(' '.join(text.split()))}", err=True)


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


def setup_logging(level: str, process: int | None = None) -> None:
    """One line a message on stderr; libraries speak up from warnings on, and about nothing that we report ourselves.

    Args:
        level: least severe line of ours.
        process: number of this process among several that write to the same place.
    """
    of_one = "" if process is None else f" [{process}]"
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format=f"%(asctime)s{of_one} %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("stream").setLevel(level.upper())
    if level != "debug":
        for handler in logging.getLogger().handlers:
            handler.addFilter(NotAgain())
    # Tasks that Faust leaves behind when it is stopped end in exceptions that nobody awaits.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL if level != "debug" else logging.DEBUG)
    for noisy in ("faust", "mode", "aiokafka"):
        logging.getLogger(noisy).setLevel(logging.WARNING if level != "debug" else logging.DEBUG)
