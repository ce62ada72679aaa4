"""`uemb health` against a server that answers as a worker does, one that is none, and nobody."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stream.cli.root import cli
from stream.config import Address
from stream.worker.http import Answer, HttpServer

WELL = Answer(200, b'{"ok": true, "reasons": []}', "application/json")
UNREADY = Answer(503, b'{"ok": false, "reasons": ["restoring partition 3", "stopping"]}', "application/json")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    made = HttpServer(Address("127.0.0.1", 0), {"/healthz": lambda _: WELL, "/readyz": lambda _: UNREADY})
    monkeypatch.setenv("UEMB_HTTP", str(made.address))
    yield made
    made.stop()


def health(*args: str) -> Result:
    return CliRunner().invoke(cli, ["health", *args])


@pytest.mark.usefixtures("server")
def test_alive_and_ready() -> None:
    alive, ready = health(), health("--ready")
    assert (alive.exit_code, alive.output) == (0, "alive\n")
    assert (ready.exit_code, ready.output) == (1, "not ready: restoring partition 3; stopping\n")


@pytest.mark.usefixtures("server")
def test_the_document() -> None:
    ran = health("--ready", "--json")
    assert ran.exit_code == 1
    assert json.loads(ran.output) == {"ok": False, "reasons": ["restoring partition 3", "stopping"]}


def test_another_address(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UEMB_HTTP", "")
    assert health("--address", str(server.address)).output == "alive\n"


def test_nobody_answers(server: HttpServer) -> None:
    server.stop()
    ran = health()
    assert ran.exit_code == 1
    assert ran.output == f"not alive: {server.address}: no worker answers (Connection refused)\n"
    assert json.loads(health("--json").output)["ok"] is False


@pytest.mark.parametrize("body", [b"hello", b"[]", b'{"ok": 1}', b'{"ok": true, "reasons": 3}', b"\xff"])
def test_somebody_else_answers(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HttpServer(Address("127.0.0.1", 0), {"/healthz": lambda _: Answer(200, body)})
    ran = health("--address", str(server.address))
    server.stop()
    assert (ran.exit_code, ran.output) == (1, f"not alive: {server.address}: what answers there is no worker\n")


@pytest.mark.parametrize(
    ("http", "args", "why"),
    [
        ("", (), "UEMB_HTTP names no port"),
        ("127.0.0.1:0", (), "UEMB_HTTP names no port"),
        ("127.0.0.1:9", ("--address", "9464"), "write host:port"),
        ("127.0.0.1:9", ("--address", "localhost:0"), "names no port"),
        ("127.0.0.1:9", ("now",), "unexpected extra argument"),
    ],
)
def test_wrong_usage(http: str, args: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UEMB_HTTP", http)
    ran = health(*args)
    assert ran.exit_code == 2
    assert why in ran.output


def test_settings_of_nobody_are_needed(server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe runs in the worker's environment, wherever that is; it opens nothing."""
    monkeypatch.chdir(tmp_path)
    assert health().exit_code == 0
    assert list(tmp_path.iterdir()) == []
