"""What a task is at and since when, for those who look, from another thread too, whether it is stuck."""

import time


class Activity:
    """One task's.

    Attributes:
        since_s: when it began with that (monotonic s); None while it has nothing to do.
        awaits: what it waits for that may take its time; empty while it waits for nothing like that.
    """

    __slots__ = ("awaits", "since_s")

    def __init__(self) -> None:
        self.since_s: float | None = None
        self.awaits = ""

    def begin(self, awaits: str = "") -> None:
        """Work, or wait, from here on."""
        self.awaits = awaits
        self.since_s = time.monotonic()

    def rest(self) -> None:
        """There is nothing to do."""
        self.since_s = None
        self.awaits = ""
