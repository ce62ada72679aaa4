"""Metrics: what each is called and means, plain numbers that are added to, and what Prometheus is shown of them.

Whoever counts adds to plain Python objects, without locks. They are read when somebody asks, which may be in another
thread; so a series is there for as long as what it is about. Prometheus' client is imported only then.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

#: Seconds, from a tenth of a millisecond to a minute: those of stages, and of whole ways.
SECONDS: Final = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class Histogram:
    """Observations, counted by size. One thread adds; others may read at any time, and miss the last one at most.

    >>> sizes = Histogram((1, 10))
    >>> sizes.observe(1)
    >>> sizes.observe(7, 2)
    >>> sizes.cumulative(), sizes.total
    ([('1', 1), ('10', 3), ('+Inf', 3)], 15.0)

    Args:
        bounds: largest size of each class but the last, rising.
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.total = 0.0

    def observe(self, size: float, times: int = 1) -> None:
        """Count so many observations of a size."""
        self._counts[bisect_left(self._bounds, size)] += times
        self.total += size * times

    def cumulative(self) -> list[tuple[str, int]]:
        """How many were no larger than each bound, as Prometheus writes it."""
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))


#: What a metric's series are at, by the values of its labels: a tuple of texts, as long as there are labels.
Samples = Mapping[Any, float | Histogram]


@dataclass(frozen=True)
class Metric:
    """A metric as Prometheus shows it.

    Attributes:
        name: with the suffix of its kind (``_total``, ``_info``).
        kind: of Prometheus' kinds.
        description: one line.
        labels: what tells its series apart.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    description: str
    labels: tuple[str, ...] = ()

    def family(self, samples: Samples) -> "Family":
        """The metric with its series."""
        from prometheus_client import metrics_core

        kinds: dict[str, Any] = {
            "counter": metrics_core.CounterMetricFamily,
            "gauge": metrics_core.GaugeMetricFamily,
            "histogram": metrics_core.HistogramMetricFamily,
            "info": metrics_core.InfoMetricFamily,
        }
        labels = () if self.kind == "info" else self.labels
        family: Family = kinds[self.kind](self.name.removesuffix("_info"), self.description, labels=labels)
        for values, sample in samples.items():
            if self.kind == "info":
                family.add_metric((), dict(zip(self.labels, values, strict=True)))  # type: ignore[attr-defined]
            elif isinstance(sample, Histogram):
                family.add_metric(values, sample.cumulative(), sample.total)  # type: ignore[attr-defined]
            else:
                family.add_metric(values, sample)  # type: ignore[attr-defined]
        return family


class Registry(Protocol):
    """A ``prometheus_client.CollectorRegistry``, as far as we need it."""

    def register(self, collector: Any) -> None:
        """Ask a collector at each scrape."""
        ...


class Collector:
    """What a registry of Prometheus' client asks at each scrape.

    Args:
        metrics: all that there are.
        read: gives the present samples, by metric name; a metric that it leaves out has no series.
    """

    def __init__(self, metrics: Sequence[Metric], read: Callable[[], Mapping[str, Samples]]) -> None:
        self._metrics = metrics
        self._read = read

    def describe(self) -> "Iterator[Family]":
        """All metrics, without series."""
        for metric in self._metrics:
            yield metric.family({})

    def collect(self) -> "Iterator[Family]":
        """All metrics with their present series."""
        samples = self._read()
        for metric in self._metrics:
            yield metric.family(samples.get(metric.name, {}))
