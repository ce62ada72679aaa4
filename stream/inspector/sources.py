"""What is looked at again and again, each thing in a thread of its own: one that does not answer holds up no other."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from stream.errors import UembError
from stream.foreign_text import one_line
from stream.logs import OncePerMinute

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())

Seen = TypeVar("Seen")


def now_ms() -> int:
    """Wall clock, in epoch ms."""
    return time.time_ns() // 1_000_000


class Reading(NamedTuple, Generic[Seen]):
    """What a look at something has found last.

    Attributes:
        seen: what that was; None before the first look that found anything.
        age_s: how long ago the look began that found it; infinite before the first.
        error: why the last look found nothing; None where it did.
    """

    seen: Seen | None
    age_s: float
    error: str | None


class Source(Generic[Seen]):
    """Looks at something `every_s`, in a thread, until `stop`.

    Args:
        name: of the thread.
        look: takes as long as it takes; what it raises is told by the next `reading`.
        every_s: from the beginning of one look to that of the next, where they take less.
    """

    def __init__(self, name: str, look: Callable[[], Seen], every_s: float = 1.0) -> None:
        self._look = look
        self._every_s = every_s
        self._seen: Seen | None = None
        self._at_s = -float("inf")
        self._error: str | None = None
        self._stopped = threading.Event()
        # A daemon: a client that waits for brokers must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"uemb-inspect-{name}", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more after this look; see `has_ended`."""
        self._stopped.set()

    def has_ended(self, until_s: float = 0.0) -> bool:
        """Whether it looks no more; waits until then (monotonic s). What a look that hangs uses is to be left alone."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, until_s - time.monotonic()))
        return not self._thread.is_alive()

    @property
    def reading(self) -> Reading[Seen]:
        """What is known now."""
        return Reading(self._seen, time.monotonic() - self._at_s, self._error)

    def _run(self) -> None:
        while not self._stopped.is_set():
            began_s = time.monotonic()
            try:
                self._seen, self._at_s, self._error = self._look(), began_s, None
            except UembError as exc:
                self._error = one_line(str(exc))
            except Exception as exc:  # whatever fails, what was seen before is shown with its age
                log.exception("%s failed", self._thread.name)
                self._error = one_line(f"{type(exc).__name__}: {exc}")
            self._stopped.wait(max(0.05, self._every_s - (time.monotonic() - began_s)))
