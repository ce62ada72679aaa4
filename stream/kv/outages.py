"""Which parts of a store count as down: after a failure nobody asks for a second, then one asks for all."""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Final

DOWN_S: Final = 1.0  # for so long after a failure lookups are answered at once


class Outages:
    """A circuit breaker per part of a store; safe to use from several threads.

    A part that failed is closed to all for `DOWN_S`. The first to ask afterwards is let through, and everyone else
    goes on being refused until that one has found out: a store that comes back must not meet all callers at once.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether anything counts as down."""
        return bool(self._until)

    def admits(self, part: Hashable) -> bool:
        """Whether a caller may ask; who is let through reports what came of it."""
        if part not in self._until:
            return True
        with self._lock:
            until, now = self._until.get(part), self._clock()
            if until is None:
                return True
            if until > now:
                return False
            self._until[part] = now + DOWN_S
            return True

    def untried(self, part: Hashable) -> None:
        """Let the next caller try: the one that was let through had nothing to ask after all."""
        with self._lock:
            if part in self._until:
                self._until[part] = self._clock()

    def failed(self, part: Hashable) -> None:
        """Take note of a failure."""
        with self._lock:
            self._until[part] = self._clock() + DOWN_S

    def answered(self, part: Hashable) -> None:
        """Take note of an answer: the part is not down."""
        if part in self._until:
            with self._lock:
                self._until.pop(part, None)
