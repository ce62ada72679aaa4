"""Workers as they tell of themselves: what is made of two scrapes, and of those who say nothing."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka_broker import free_ports

from stream.config import Address
from stream.errors import ConfigError
from stream.inspector import workers as workers_seen
from stream.inspector.workers import WINDOW, Workers, by_label, quantile, total
from stream.worker.http import Answer, HttpServer


class Told:
    """A worker's pages, as a test has them."""

    def __init__(self, port: int = 0) -> None:
        self.records = {"a": 0, "b": 0}
        self.buckets = {"0.1": 0, "0.5": 0, "+Inf": 0}
        self.began = 1.0
        self.server = HttpServer(
            Address("127.0.0.1", port),
            {
                "/metrics": lambda _: self._metrics(),
                "/readyz": lambda _: Answer(503, b'{"ok": false, "reasons": ["r"]}'),
            },
        )

    def _metrics(self) -> Answer:
        lines = [f"process_start_time_seconds {self.began}", "# TYPE uemb_records_total counter"]
        lines += [f'uemb_records_total{{topic="{topic}",outcome="applied"}} {n}' for topic, n in self.records.items()]
        lines += ["# TYPE uemb_event_age_seconds histogram"]
        counts = itertools.accumulate(self.buckets.values())
        lines += [f'uemb_event_age_seconds_bucket{{le="{le}"}} {n}' for le, n in zip(self.buckets, counts, strict=True)]
        return Answer(200, "\n".join([*lines, ""]).encode(), "text/plain")


@pytest.fixture
def worker() -> Iterator[Told]:
    told = Told()
    yield told
    told.server.stop()


def test_rates_are_those_of_the_last_looks(worker: Told) -> None:
    workers = Workers([str(worker.server.address)])
    (view,) = workers.look()
    assert view.last is not None
    assert (view.last.ready, view.last.reasons) == (False, ("r",))
    assert view.per_second("uemb_records_total") == 0
    for _ in range(WINDOW + 3):
        worker.records["a"] += 30
        worker.records["b"] += 10
        worker.buckets["0.5"] += 4
        (view,) = workers.look()
    assert len(view.pages) == WINDOW + 1
    took_s = view.pages[-1].at_s - view.pages[0].at_s
    assert view.per_second("uemb_records_total") == pytest.approx(40 * WINDOW / took_s)
    assert view.per_second("uemb_records_total", topic="b") == pytest.approx(10 * WINDOW / took_s)
    assert view.grown("uemb_event_age_seconds") == {0.1: 0, 0.5: 4 * WINDOW, float("inf"): 0}
    assert by_label(view.last.samples, "uemb_records_total", "topic")["b"] == 10 * (WINDOW + 3)
    workers.close()


def test_a_worker_that_began_anew_begins_anew(worker: Told) -> None:
    workers = Workers([str(worker.server.address)])
    worker.records["a"] = 1_000
    workers.look()
    worker.records["a"], worker.began = 3, 2.0
    (view,) = workers.look()
    assert view.per_second("uemb_records_total") == 0
    worker.records["a"] = 5
    (view,) = workers.look()
    assert view.last is not None
    assert total(view.last.samples, "uemb_records_total") == 5
    assert view.per_second("uemb_records_total") > 0
    workers.close()


def test_one_that_does_not_answer_is_told_and_comes_back() -> None:
    (port,) = free_ports(1)
    workers = Workers([f"127.0.0.1:{port}"])
    (view,) = workers.look()
    assert (view.last, view.error) == (None, "Connection refused")
    worker = Told(port)
    (view,) = workers.look()
    assert view.error is None
    assert view.last is not None
    worker.server.stop()
    (view,) = workers.look()
    assert view.last is None
    assert view.pages == ()
    workers.close()


def test_what_is_no_worker_is_told() -> None:
    other = HttpServer(Address("127.0.0.1", 0), {"/metrics": lambda _: Answer(200, b"<html>")})
    try:
        workers = Workers([str(other.address)])
        (view,) = workers.look()
        assert view.error == "what answers there is no worker"
        workers.close()
    finally:
        other.stop()


@pytest.mark.parametrize(
    "line", ["uemb_records_total NaN", 'uemb_partition_owned{partition="x"} 1', "uemb_records_total +Inf", "\xff"]
)
def test_what_no_worker_says_silences_no_other(worker: Told, line: str) -> None:
    odd = HttpServer(
        Address("127.0.0.1", 0),
        {
            "/metrics": lambda _: Answer(200, f"{line}\n".encode("latin-1")),
            "/readyz": lambda _: Answer(200, b'{"ok": true, "reasons": []}'),
        },
    )
    try:
        workers = Workers([str(odd.address), str(worker.server.address)])
        assert [view.error for view in workers.look()] == ["what answers there is no worker", None]
        workers.close()
    finally:
        odd.stop()


def test_an_answer_that_comes_drop_by_drop_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_seen, "ANSWER_S", 0.3)
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            client, _ = listening.accept()
            with client, contextlib.suppress(OSError):
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not stopped.wait(0.05):
                    client.sendall(b"#")

        dripping = threading.Thread(target=drip)
        dripping.start()
        workers = Workers([f"127.0.0.1:{listening.getsockname()[1]}"])
        (view,) = workers.look()
        assert view.error == "no whole answer in time"
        stopped.set()
        dripping.join()
        workers.close()


def test_ports_of_a_host_are_a_range() -> None:
    assert [str(one) for one in Workers(["h:9464-9466", "[::1]:7", "a-b:8"])._asked] == [
        "h:9464", "h:9465", "h:9466", "[::1]:7", "a-b:8"
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["h", "h:5-4", "h:5-99999", "h:5-x", "http://h:5/metrics", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="UEMB_INSPECT_WORKERS"):
        Workers([text])


@given(st.lists(st.floats(0, 9), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_lies_in_the_class_of_the_true_one(sizes: list[float], q: float) -> None:
    bounds = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, float("inf")]
    places = np.searchsorted(bounds, sizes)
    classes = {bound: int((places == n).sum()) for n, bound in enumerate(bounds)}
    found = quantile(q, classes)
    true = float(np.quantile(sizes, q, method="inverted_cdf"))
    upper = bounds[int(np.searchsorted(bounds, true))]
    assert found is not None
    assert upper - 1 <= found <= upper


def test_of_nothing_there_is_no_quantile() -> None:
    assert quantile(0.5, {}) is None
    assert quantile(0.5, {1.0: 0}) is None
    assert quantile(0.5, {1.0: 0, float("inf"): 3}) == 1.0
