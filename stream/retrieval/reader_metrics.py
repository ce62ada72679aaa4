"""What readers tell a registry of Prometheus' client: how they answered, and how long calls took."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final
from weakref import WeakKeyDictionary

from stream.errors import ConfigError
from stream.metrics import SECONDS, Collector, Histogram, Metric, Registry, Samples
from stream.retrieval.answers import UserEmbedding

METRICS: Final = (
    Metric(
        "uemb_reader_requests_total", "counter", "users asked for, by what they were answered", ("status", "reason")
    ),
    Metric("uemb_reader_stale_total", "counter", "of these, answers that were marked stale"),
    Metric("uemb_reader_seconds", "histogram", "how long calls took, of one user or many"),
)
#: A call that is answered from memory takes some ten microseconds.
_BOUNDS: Final = (1e-5, 2.5e-5, 5e-5, *SECONDS[:13])


class ReaderMetrics:
    """Counts of all readers of this process that share a registry; any number of threads add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[tuple[str, str], int] = {}
        self._stale = 0
        self._seconds = Histogram(_BOUNDS)

    def after_fork(self) -> None:
        """Forget who held the lock: that thread stayed in the parent process."""
        self._lock = threading.Lock()

    def add(self, answers: Sequence[UserEmbedding], began_s: float) -> None:
        """Count the answers of a call that began then (monotonic s)."""
        took_s = time.monotonic() - began_s
        with self._lock:
            self._seconds.observe(took_s)
            for answer in answers:
                kind = answer.status, answer.reason
                self._answers[kind] = self._answers.get(kind, 0) + 1
                self._stale += answer.stale

    def read(self) -> Mapping[str, Samples]:
        """Present samples by metric."""
        return {
            "uemb_reader_requests_total": dict(self._answers),
            "uemb_reader_stale_total": {(): self._stale},
            "uemb_reader_seconds": {(): self._seconds},
        }


_of_registries: "WeakKeyDictionary[Registry, ReaderMetrics]" = WeakKeyDictionary()
_registering = threading.Lock()


def metrics_of(registry: Registry) -> ReaderMetrics:
    """The metrics that readers share in a registry; made, and registered, for the first of them.

    Raises:
        ConfigError: the registry has metrics of these names that are others.
    """
    with _registering:
        found = _of_registries.get(registry)
        if found is None:
            found = ReaderMetrics()
            try:
                registry.register(Collector(METRICS, found.read))
            except ValueError as exc:
                msg = f"the registry has other metrics of the readers' names ({exc}); give readers one of their own"
                raise ConfigError(msg) from exc
            _of_registries[registry] = found
    return found
