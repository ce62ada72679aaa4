"""Who may ask the inspector, and what its page is made of; behind it no broker answers, as on a bad day."""

import asyncio
import contextlib
import hashlib
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from kafka_broker import free_ports
from kv_entries import eventually

from stream import MemoryStore
from stream.config import Address, Settings
from stream.errors import ConfigError
from stream.inspector import server as served
from stream.inspector.inspector import Inspector
from stream.inspector.server import Server

STATIC = Path(str(files("stream.inspector").joinpath("static")))
#: Of uPlot 1.6.32, as npm has it.
UPLOT = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


class Running:
    """A server in a thread of its own."""

    def __init__(self, inspector: Inspector, host: str = "127.0.0.1", **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = Server(inspector, Address(host, 0), options.pop("token", None), **options)
        self.address: Address = self.run(self.server.start())

    def run(self, doing: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result(60)

    def stop(self) -> None:
        self.run(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Status, body and headers of an answer; names of headers are given with underscores."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read(), {name.lower(): text for name, text in answer.getheaders()}
        finally:
            connection.close()

    def error(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, str]:
        status, said, _ = self.ask(path, method, body, **headers)
        text = json.loads(said)["error"]
        assert len(text.splitlines()) == 1
        return status, text


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    (port,) = free_ports(1)
    store = MemoryStore("films_v1", "mix-1", fallback=[0.6, 0.8])
    settings = Settings(bootstrap_servers=f"127.0.0.1:{port}", kv_url=store.url)
    made = Inspector(settings, [f"127.0.0.1:{port}"], {})
    made.start()
    yield made
    made.stop()


@pytest.fixture
def run(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    monkeypatch.setattr(served, "TICK_S", 0.05)
    with contextlib.ExitStack() as undo:

        def start(**options: Any) -> Running:
            running = Running(inspector, **options)
            undo.callback(running.stop)
            return running

        yield start


def test_every_answer_says_what_a_page_may_do(run: Callable[..., Running]) -> None:
    running = run()
    asked = [("/", 200), ("/static/app.js", 200), ("/api/about", 200), ("/api/letter?place=x", 422), ("/nowhere", 404)]
    for path, status in [*asked, ("/static/../server.py", 404)]:
        found, _, headers = running.ask(path)
        assert found == status, path
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "trusted-types 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assert running.ask("/", "POST")[0] == 405


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]:80"])
def test_a_name_that_is_not_ours_is_refused(run: Callable[..., Running], host: str) -> None:
    """A page that rebinds its own name to this machine asks under that name."""
    assert run().error("/api/about", Host=host)[0] == 421


def test_names_of_ours_are_taken(run: Callable[..., Running]) -> None:
    running = run(names=("Inspect.shop.example",))
    for host in ("127.0.0.1:9470", "localhost", "[::1]:9470", "Inspect.Shop.example:443"):
        assert running.ask("/api/about", Host=host)[0] == 200, host


def test_pages_of_others_may_not_ask(run: Callable[..., Running]) -> None:
    running = run()
    host = str(running.address)
    for origin in ("http://evil.example", "null", f"http://{host}1", "http://localhost"):
        assert running.error("/api/about", Origin=origin)[0] == 403, origin
    assert running.error("/api/about", Sec_Fetch_Site="cross-site")[0] == 403
    assert running.ask("/api/about", Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200
    assert running.ask("/", Sec_Fetch_Site="cross-site")[0] == 200  # a link leads here


def test_a_token_opens_and_nothing_else(run: Callable[..., Running]) -> None:
    running = run(token="s3cret")
    for given in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic s3cret"},
        {"Authorization": "Bearer"},
    ):
        status, _, headers = running.ask("/api/about", **given)
        assert (status, headers.get("www-authenticate")) == (401, "Bearer")
    assert running.error("/api/news")[0] == 401
    assert running.ask("/api/about", Authorization="Bearer s3cret")[0] == 200
    assert running.ask("/static/app.js")[0] == 200  # which asks for the token


def test_what_strangers_send_is_not_logged(run: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    running = run(token="s3cret")
    odd = [
        b"GET /api/about HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer MARK\x01\r\nConnection: close\r\n\r\n",
        b"GET /api/about HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer MARK\xc3\xb6\xff\r\n"
        b"Connection: close\r\n\r\n",
        b"GET /api/about?user=MARK HTTP/9.x\r\n\r\n",
        b"POST /api/user HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer s3cret\r\nContent-Encoding: gzip\r\n"
        b"Content-Type: application/json\r\nContent-Length: 4\r\nConnection: close\r\n\r\nMARK",
        b"POST /api/user HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer s3cret\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\nConnection: close\r\n\r\nMARK\r\n",
        b"HEAD /api/news HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer s3cret\r\nConnection: close\r\n\r\n",
    ]
    for request in odd:
        with socket.create_connection(running.address, timeout=60) as client:
            client.sendall(request)
            said = b""
            while more := client.recv(1 << 16):
                said += more
        assert re.match(rb"HTTP/1\.\d 4\d\d ", said), (request, said)
    assert "MARK" not in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("token", ["ö", "a b", "a\n"])
def test_a_token_that_no_header_holds_is_refused(inspector: Inspector, token: str) -> None:
    with pytest.raises(ConfigError, match="ASCII"):
        Server(inspector, Address("127.0.0.1", 0), token)


def test_others_reach_it_with_a_token_only(inspector: Inspector) -> None:
    for token in (None, ""):
        with pytest.raises(ConfigError, match="UEMB_INSPECT_TOKEN"):
            Server(inspector, Address("0.0.0.0", 0), token)
    Server(inspector, Address("0.0.0.0", 0), "s3cret")


def test_an_address_that_is_taken_is_one_line(run: Callable[..., Running], inspector: Inspector) -> None:
    address = run().address

    async def again() -> None:
        server = Server(inspector, address, None)
        try:
            await server.start()
        finally:
            await server.stop()

    with pytest.raises(ConfigError, match=r"can't listen there \(.+\); choose another"):
        asyncio.run(again())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "truncated"),
        (b"[" * 100_000, ""),
        (b"{}", "user"),
        (b'{"user": "5", "add": [{"item": "x", "type": "view"}]}', "ts_ms"),
        (b'{"user": "5", "add": [{"item": "", "type": "view", "ts_ms": 5}]}', "length"),
        (b'{"user": "5", "without": 5}', "without"),
        (b'"\xff"', ""),
    ],
)
def test_what_is_no_question_is_one_line(run: Callable[..., Running], body: bytes, says: str) -> None:
    status, text = run().error("/api/user", "POST", body, Content_Type="application/json")
    assert status == 422
    assert says in text


def test_a_question_must_be_json_of_bounded_length(run: Callable[..., Running]) -> None:
    running = run()
    assert running.error("/api/user", "POST", b"{}", Content_Type="text/plain")[0] == 415
    assert running.error("/api/user", "POST", b" " * (2 << 20), Content_Type="application/json")[0] == 413


def test_without_brokers_questions_are_answered_with_that(run: Callable[..., Running]) -> None:
    running = run()
    status, text = running.error("/api/user", "POST", b'{"user": "5"}', Content_Type="application/json")
    assert status == 503
    assert "broker" in text or "being read" in text


def read_news(client: socket.socket) -> Iterator[dict[str, Any]]:
    text = b""
    while more := client.recv(1 << 16):
        text += more
        while (end := text.find(b"\n\n")) >= 0:
            event, text = text[:end], text[end + 2 :]
            if found := re.search(rb"^data: (.*)$", event, re.MULTILINE):
                yield json.loads(found[1])


def open_news(running: Running) -> socket.socket:
    client = socket.create_connection(running.address, timeout=60)
    client.sendall(b"GET /api/news HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    return client


def test_news_tell_what_is_away(run: Callable[..., Running]) -> None:
    with open_news(run()) as client:
        for news in read_news(client):  # it takes a moment until each was looked at
            silent = [one for one in news["workers"] if not one["answers"]]
            if silent and news["store"]["answers"] and news["sources"]["versions"]["stale"]:
                break
    assert silent[0]["reasons"] == ["Connection refused"]
    assert news["serving"] == {"user_version": "mix-1", "item_version": "films_v1", "wanted": None}
    assert news["rates"]["events_per_s"] is None


def test_so_many_pages_get_news_and_a_slow_one_holds_up_nobody(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "MAX_STREAMS", 5)
    running = run()
    with contextlib.ExitStack() as undo:
        slow = [undo.enter_context(open_news(running)) for _ in range(4)]  # none of which is read
        quick = undo.enter_context(open_news(running))
        told = read_news(quick)
        seen = [next(told)["at_ms"] for _ in range(4)]
        assert sorted(set(seen)) == seen
        eventually(lambda: running.error("/api/news") == (503, "too many pages are open; close some"))
        slow[0].close()
        slow[0] = undo.enter_context(open_news(running))

        def is_told() -> bool:
            return next(read_news(slow[0]), None) is not None

        def open_again() -> bool:  # until the server has noticed that one has gone
            if is_told():
                return True
            slow[0] = undo.enter_context(open_news(running))
            return False

        eventually(open_again)


def test_a_page_that_takes_nothing_is_hung_up_on(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its news are held up to a bound; what it has not taken by then it will not take."""
    monkeypatch.setattr(served, "_CLIENT_S", 0.2)
    monkeypatch.setattr(served, "TICK_S", 0.001)
    running = run()
    running.server._inspector = Talkative()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(tuple(running.address))
    client.sendall(b"GET /api/news HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    with client:
        eventually(lambda: running.server._streams == 1)
        eventually(lambda: running.server._streams == 0)


class Talkative:
    """An inspector with a lot of news, each different."""

    def __init__(self) -> None:
        self._count = 0

    def now(self) -> dict[str, Any]:
        self._count += 1
        return {"at_ms": self._count, "rates": {}, "worst_lag_s": None, "text": "x" * 200_000}


def test_the_page_asks_nobody_else_and_makes_nothing_of_text() -> None:
    names = {file.name for file in STATIC.iterdir()}
    for file in STATIC.iterdir():
        text = file.read_text()
        if file.name.startswith("uPlot"):
            continue
        outside = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not outside, file.name
        for risky in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "on="):
            assert risky not in text, (file.name, risky)
        assert not re.search(r"<[^>]+ (style|on\w+)=", text), file.name
    page = (STATIC / "index.html").read_text()
    for path in re.findall(r"(?:src|href)=\"(/[^\"]+)\"", page):
        assert path.removeprefix("/static/") in names, path
    for file in STATIC.glob("*.js"):
        for name in re.findall(r"from \"\./([^\"]+)\"", file.read_text()):
            assert name in names, (file.name, name)


def test_the_charts_are_the_library_as_it_was_released() -> None:
    assert {name: hashlib.sha256((STATIC / name).read_bytes()).hexdigest() for name in UPLOT} == UPLOT
