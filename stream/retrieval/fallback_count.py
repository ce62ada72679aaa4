"""How many fallback vectors were given out, by reason: a count for metrics, and a line a minute in the log."""

import logging
import threading
import time
from typing import Final

from stream.retrieval.answers import UserEmbedding

_LOG_EVERY_S: Final = 60.0

log = logging.getLogger("stream.retrieval")


class FallbackCount:
    """Counts fallbacks by reason and says so in the log, in one line a minute without ids.

    Attributes:
        by_reason: how many so far.
    """

    def __init__(self) -> None:
        self.by_reason: dict[str, int] = {}
        self._lock = threading.Lock()
        self._reported: dict[str, int] = {}
        self._report_at = 0.0

    def after_fork(self) -> None:
        """Forget who held the lock: that thread stayed in the parent process."""
        self._lock = threading.Lock()

    def add(self, answers: list[UserEmbedding]) -> list[UserEmbedding]:
        """Count what is about to be given out."""
        reasons = [answer.reason for answer in answers if answer.status != "ok"]
        if not reasons:
            return answers
        with self._lock:
            for reason in reasons:
                self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
            now = time.monotonic()
            due = now >= self._report_at
            if due:
                self._report_at = now + _LOG_EVERY_S
                news = {r: n - self._reported.get(r, 0) for r, n in self.by_reason.items()}
                self._reported = dict(self.by_reason)
        if due:
            log.warning("fallback vectors given out: %s", ", ".join(f"{n} {r}" for r, n in sorted(news.items()) if n))
        return answers
