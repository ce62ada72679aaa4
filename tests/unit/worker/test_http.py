"""The server in its own thread: what it answers to whom, and that nobody who is silent or slow holds up others."""

import contextlib
import gc
import http.client
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fuzzing import counts, fuzz
from prometheus_client import CollectorRegistry

from stream.config import Address
from stream.errors import ConfigError
from stream.worker import http as served
from stream.worker.http import Answer, HttpServer
from stream.worker.pages import metrics

LARGE = b"x" * (8 << 20)


def broken(_: object) -> Answer:
    msg = "user 42 is not to be told"
    raise ValueError(msg)


PAGES = {
    "/metrics": lambda headers: Answer(200, headers.get("accept", "none").encode(), "text/special"),
    "/large": lambda _: Answer(200, LARGE),
    "/unwell": lambda _: Answer(503, b"{}", "application/json"),
    "/broken": broken,
}


@pytest.fixture
def server() -> Iterator[HttpServer]:
    made = HttpServer(Address("127.0.0.1", 0), PAGES)
    yield made
    made.stop()


def ask(server: HttpServer, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    connection.request(method, target, body, {"Accept": "text/plain"})
    answer = connection.getresponse()
    found = answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return found


def raw(server: HttpServer, data: bytes) -> bytes:
    with socket.create_connection(server.address, timeout=30) as client:
        client.sendall(data)
        said = b""
        while more := client.recv(1 << 16):
            said += more
    return said


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_page_is_given_the_headers_and_its_answer_is_sent_as_it_is(server: HttpServer) -> None:
    status, body, headers = ask(server, "GET", "/metrics?name=x")
    assert (status, body, headers["content-type"]) == (200, b"text/plain", "text/special")
    assert (headers["content-length"], headers["connection"]) == ("10", "close")
    assert ask(server, "GET", "/unwell")[:2] == (503, b"{}")


def test_head_is_get_without_the_body(server: HttpServer) -> None:
    status, body, headers = ask(server, "HEAD", "/large")
    assert (status, body, headers["content-length"]) == (200, b"", str(len(LARGE)))


@pytest.mark.parametrize("target", ["/", "/metric", "/metrics/", "//metrics", "/../metrics", "*"])
def test_other_paths_are_not_there(server: HttpServer, target: str) -> None:
    assert ask(server, "GET", target)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get"])
def test_other_methods_are_not_allowed(server: HttpServer, method: str) -> None:
    status, _, headers = ask(server, method, "/metrics", b"x" * 100_000)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "data",
    [b"\r\n\r\n", b"GET /metrics\r\n\r\n", b"GET  /metrics HTTP/1.1\r\n\r\n", b"\xff\x00\x01 / HTTP/2\r\n\r\n"],
)
def test_what_is_no_request_is_refused(server: HttpServer, data: bytes) -> None:
    assert raw(server, data).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_a_request_without_an_end_is_refused(server: HttpServer) -> None:
    assert raw(server, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20_000).startswith(b"HTTP/1.1 400 ")


def test_a_page_that_fails_says_nothing_of_why(server: HttpServer) -> None:
    status, body, _ = ask(server, "GET", "/broken")
    assert (status, body) == (500, b"it could not be made; see the log\n")
    assert ask(server, "GET", "/unwell")[0] == 503, "it serves on"


def test_a_large_answer_arrives_whole(server: HttpServer) -> None:
    assert ask(server, "GET", "/large")[1] == LARGE


def test_who_says_nothing_holds_up_nobody_and_costs_no_thread(server: HttpServer) -> None:
    before = threading.active_count()
    with ExitStack() as clients:
        for _ in range(50):
            clients.enter_context(socket.create_connection(server.address, timeout=30))
        for _ in range(20):
            began = time.monotonic()
            assert ask(server, "GET", "/unwell")[0] == 503
            assert time.monotonic() - began < served.CLIENT_S, "it waited for those who say nothing"
        assert threading.active_count() == before
        assert len(server._connections) <= served.MAX_CONNECTIONS + 2  # those that give way


def test_who_takes_no_answer_holds_up_nobody(server: HttpServer) -> None:
    with ExitStack() as clients:
        for _ in range(served.MAX_CONNECTIONS - 1):
            client = clients.enter_context(socket.create_connection(server.address, timeout=30))
            client.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        eventually(lambda: len(server._connections) == served.MAX_CONNECTIONS - 1 and not server._waiting)
        assert ask(server, "GET", "/unwell")[0] == 503


def test_who_says_nothing_is_hung_up_on(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CLIENT_S", 0.05)
    assert raw(server, b"GET /met").startswith(b"HTTP/1.1 408 ")
    eventually(lambda: not server._connections)


def test_an_address_that_is_taken_is_one_line_that_names_the_setting(server: HttpServer) -> None:
    with pytest.raises(ConfigError, match=rf"UEMB_HTTP={server.address}: can't listen there") as raised:
        HttpServer(server.address, PAGES)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"UEMB_HTTP=192\.0\.2\.1:9464: can't listen there"):
        HttpServer(Address("192.0.2.1", 9464), PAGES)


def test_the_port_is_free_again_after_the_stop(server: HttpServer) -> None:
    with socket.create_connection(server.address, timeout=30) as client:
        server.stop()
        with contextlib.suppress(ConnectionResetError):  # who was not let in yet
            assert client.recv(1) == b""
    server.stop()
    again = HttpServer(server.address, PAGES)
    assert ask(again, "GET", "/unwell")[0] == 503
    again.stop()


REQUESTS = [
    b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9464\r\nAccept: text/plain\r\n\r\n",
    b"HEAD /large?x=%00 HTTP/1.0\r\nHost: evil.example\r\nContent-Length: 99999999999\r\n\r\nbody",
]
REQUEST_TOKENS = (
    *(
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b" ",
        b":",
        b"\0",
        b"\xff",
        b"HTTP/9.9",
        b"HTTP/1.1",
        b"x" * 20_000,
        b"GET",
        b"PRI * ",
    ),
    *(
        b"http://evil.example/metrics",
        b"/../",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"\x16\x03\x01",
    ),
)


@pytest.mark.parametrize("count", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_whatever_is_asked_is_answered_and_not_logged(
    count: int, server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")

    def target(data: bytes) -> None:
        with socket.create_connection(server.address, timeout=30) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            said = b""
            with contextlib.suppress(ConnectionResetError):  # what it has not read may be in the way of its answer
                while more := client.recv(1 << 20):
                    said += more
            status = said[:12]
            assert not said or status.removeprefix(b"HTTP/1.1 ") in (b"200", b"400", b"404", b"405", b"503"), status

    fuzz(target, REQUESTS, REQUEST_TOKENS, count)
    assert ask(server, "GET", "/unwell")[0] == 503
    eventually(lambda: not server._connections)
    assert [r for r in caplog.records if r.name != "asyncio" or r.levelno > logging.INFO] == []


def test_who_hangs_up_at_once_is_nobody(server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    """Before it was let in, after it asked, in the middle of an answer: with a reset each time."""
    for asked in (b"", b"GET /lar", b"GET /large HTTP/1.1\r\n\r\n"):
        for _ in range(30):
            with socket.create_connection(server.address, timeout=30) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(asked)
    assert ask(server, "GET", "/unwell")[0] == 503
    eventually(lambda: not server._connections)
    gc.collect()  # tasks that failed unheard say so now
    assert caplog.records == []


@counts
def test_any_format_of_metrics_may_be_asked_for(count: int) -> None:
    """The client's parser fails on some versions, and repeats others in the answer's header."""
    page = metrics(CollectorRegistry())

    def target(data: bytes) -> None:
        answer = page({"accept": data.decode("latin-1")})
        assert answer.status == 200
        assert answer.content_type.isascii()
        assert answer.content_type.isprintable()

    seeds = [
        b"text/plain;version=1.0.0;escaping=underscores",
        b"application/openmetrics-text; version=1.0.0, text/html",
    ]
    fuzz(
        target, seeds, (b";", b",", b"=", b"version=x", b"version=2.0.0\nX: y", b"\n", b"\0", b"9" * 5_000), count // 10
    )
