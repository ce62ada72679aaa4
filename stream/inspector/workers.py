"""Workers as they tell of themselves over HTTP: scraped once a second, and what changed since ten seconds ago."""

import errno
import http.client
import json
import math
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from stream.config import MAX_PORT, Address
from stream.errors import ConfigError

#: A worker that does not answer within this is shown as silent.
ANSWER_S: Final = 0.8
#: Rates and latencies are those of so many looks, once a second.
WINDOW: Final = 10
_MAX_BYTES: Final = 8 << 20
_PIECE: Final = 1 << 16
_AT_ONCE: Final = 64
_REASONS: Final = 5

Labels = tuple[tuple[str, str], ...]
#: Value by name and labels of a sample.
Samples = Mapping[str, Mapping[Labels, float]]


class Page(NamedTuple):
    """What a worker said.

    Attributes:
        at_s: when it was asked (monotonic s).
        samples: its metrics.
        ready: whether it says that it is ready.
        reasons: why it is not.
    """

    at_s: float
    samples: Samples
    ready: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class WorkerView:
    """A worker, by its address.

    Attributes:
        address: where it answers.
        pages: what it said at the last looks, oldest first; one that started anew begins anew.
        error: why it does not answer; None where it does.
        owned: partitions that it owned when it answered last.
    """

    address: str
    pages: tuple[Page, ...] = ()
    error: str | None = None
    owned: frozenset[int] = frozenset()

    @property
    def last(self) -> Page | None:
        """What it said last, if it answers."""
        return self.pages[-1] if self.pages and self.error is None else None

    def per_second(self, name: str, **labels: str) -> float:
        """How fast a counter grew, all of its series that have these labels together."""
        if self.last is None or len(self.pages) < 2:
            return 0.0
        first, last = self.pages[0], self.pages[-1]
        grown = total(last.samples, name, **labels) - total(first.samples, name, **labels)
        return max(0.0, grown / (last.at_s - first.at_s))

    def grown(self, histogram: str) -> dict[float, float]:
        """Observations of a histogram during the window, by the upper bound of their class (not cumulative)."""
        if self.last is None:
            return {}
        first, last = (_classes(page.samples, histogram) for page in (self.pages[0], self.pages[-1]))
        return {bound: count - first.get(bound, 0.0) for bound, count in last.items()}


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum of a metric's series that have these labels."""
    wanted = set(labels.items())
    return sum(value for of, value in samples.get(name, {}).items() if wanted <= set(of))


def by_label(samples: Samples, name: str, label: str) -> dict[str, float]:
    """Sums of a metric's series by the value of a label."""
    found: dict[str, float] = defaultdict(float)
    for of, value in samples.get(name, {}).items():
        found[dict(of).get(label, "")] += value
    return dict(found)


def quantile(q: float, classes: Mapping[float, float]) -> float | None:
    """The q-quantile of observations that are known by class, as Prometheus estimates it; None of none.

    >>> quantile(0.5, {0.1: 10, 0.2: 10, float("inf"): 0})
    0.1
    """
    count = sum(classes.values())
    if count <= 0:
        return None
    rank, below, lower = q * count, 0.0, 0.0
    for bound, n in sorted(classes.items()):
        if below + n >= rank and n:
            return lower if bound == float("inf") else lower + (bound - lower) * (rank - below) / n
        below, lower = below + n, lower if bound == float("inf") else bound
    return lower


def _classes(samples: Samples, histogram: str) -> dict[float, float]:
    cumulative = sorted((float(le), n) for le, n in by_label(samples, f"{histogram}_bucket", "le").items())
    found, below = {}, 0.0
    for bound, n in cumulative:
        found[bound], below = n - below, n
    return found


class Workers:
    """All workers that are looked at.

    Args:
        addresses: ``host:port``, or ``host:port-port`` for those of one host; a host name that has several addresses
            means a worker at each of them.

    Raises:
        ConfigError: one is none of these.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._asked = [one for text in addresses for one in _parsed(text)]
        self._views: dict[Address, WorkerView] = {}
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="uemb-inspect-scrape")

    def look(self) -> list[WorkerView]:
        """Ask all of them, several at a time; one that does not answer is in the answer, too."""
        places = list(dict.fromkeys(place for asked in self._threads.map(_resolved, self._asked) for place in asked))
        before = [self._views.get(place) or WorkerView(str(place)) for place in places]
        self._views = dict(zip(places, self._threads.map(_look_at, places, before), strict=True))
        return list(self._views.values())

    def close(self) -> None:
        """Ask no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _parsed(text: str) -> Iterator[Address]:
    host_port, dash, last = text.strip().rpartition("-")
    try:
        if dash and last.isdecimal() and host_port.rpartition(":")[2].isdecimal():
            first = Address.parse(host_port)
            if not first.port <= int(last) <= MAX_PORT:
                raise ValueError
            yield from (first._replace(port=port) for port in range(first.port, int(last) + 1))
        else:
            yield Address.parse(text)
    except ValueError as exc:
        msg = f"UEMB_INSPECT_WORKERS: {text!r} is no host:port, nor host:port-port"
        raise ConfigError(msg) from exc


def _resolved(asked: Address) -> list[Address]:
    try:
        found = socket.getaddrinfo(asked.host, asked.port, type=socket.SOCK_STREAM)
    except OSError:
        return [asked]  # who asks it is told so
    places = [Address(str(at[0]), asked.port) for *_, at in found]
    return (
        [asked] if len({place.host for place in places}) < 2 or _is_this_host(places) else list(dict.fromkeys(places))
    )


def _is_this_host(places: Iterable[Address]) -> bool:
    """Whether all are one machine's loopback, under its address of either kind."""
    return all(place.host in ("127.0.0.1", "::1") for place in places)


def _look_at(place: Address, view: WorkerView) -> WorkerView:
    """Ask one."""
    now_s = time.monotonic()
    try:
        status, body = _get(place, "/metrics")
        if status != http.client.OK:
            raise ValueError
        samples = _samples(body)
        _, verdict = _get(place, "/readyz")
        said = json.loads(verdict)
        page = Page(now_s, samples, bool(said["ok"]), tuple(str(one) for one in said["reasons"][:_REASONS]))
        states = by_label(samples, "uemb_partition_owned", "partition")
        owned = frozenset(int(name) for name, is_one in states.items() if is_one)
    except OSError as exc:
        return WorkerView(view.address, error=exc.strerror or str(exc), owned=view.owned)
    except (http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
        return WorkerView(view.address, error="what answers there is no worker", owned=view.owned)
    pages = view.pages
    if pages and _began(samples) != _began(pages[-1].samples):
        pages = ()
    return WorkerView(view.address, (*pages, page)[-WINDOW - 1 :], owned=owned)


def _began(samples: Samples) -> float:
    """When a process began, which tells its lives apart."""
    return total(samples, "process_start_time_seconds")


def _get(place: Address, path: str) -> tuple[int, bytes]:
    """Status and body of a page; one that comes drop by drop, or has no end, is no answer."""
    until_s = time.monotonic() + 2 * ANSWER_S
    connection = http.client.HTTPConnection(place.host, place.port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = b""
        while more := answer.read1(_PIECE):
            body += more
            if len(body) > _MAX_BYTES or time.monotonic() > until_s:
                raise TimeoutError(errno.ETIMEDOUT, "no whole answer in time")
        return answer.status, body
    finally:
        connection.close()


def _samples(body: bytes) -> dict[str, dict[Labels, float]]:
    found: dict[str, dict[Labels, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if not math.isfinite(sample.value):  # nobody counts so, and it would go on as a number
                raise ValueError(sample.name)
            found[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    return found
