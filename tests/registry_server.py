"""A real schema registry for tests: Apicurio's, which has Confluent's API, from Maven Central, run by Java.

`RegistryServer()` keeps its schemas in a folder of its own, so that it has them again after a restart. `Gate` stands in
front of one, and demands a login, speaks TLS, or fails, as the registry of a company may.
"""

import atexit
import os
import shutil
import signal
import ssl
import subprocess
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from closing import Closing
from kafka_broker import (
    MAVEN_TIMEOUT_S,
    START_TIMEOUT_S,
    BrokerError,
    _complete,
    _home,
    _move_in,
    _run,
    _tail,
    _wait_until,
    free_ports,
    why_unavailable,
)

VERSION: Final = "3.0.9"  # the last for Java 17
_NAME: Final = f"apicurio-registry-app-{VERSION}"
_API: Final = "/apis/ccompat/v7"
#: As for brokers: little work before it serves.
_QUICK_JAVA: Final = ("-Xmx384m", "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")


def why_no_registry() -> str | None:
    """The reason why none can be had on this machine, or None."""
    if shutil.which("java") is None or (shutil.which("mvn") is None and not _complete(_cache())):
        return why_unavailable() or "no schema registry: install Java 17 and Maven"
    return None


class RegistryServer(Closing):
    """A running registry: stopped, paused and started again at will, with the same schemas and port."""

    def __init__(self) -> None:
        """Start it."""
        self._app: Final = _installed()
        self._dir = Path(tempfile.mkdtemp(prefix="registry-test-"))
        self._process: subprocess.Popen[bytes] | None = None
        (self.port,) = free_ports(1)
        self.url: Final = f"http://127.0.0.1:{self.port}{_API}"
        atexit.register(self.close)
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {
            "quarkus.http.host": "127.0.0.1",
            "quarkus.http.port": self.port,
            "quarkus.log.level": "WARN",
            "apicurio.storage.kind": "sql",
            "apicurio.storage.sql.kind": "h2",
            "apicurio.datasource.url": f"jdbc:h2:file:{self._dir}/schemas;WRITE_DELAY=0",
        }
        words = [f"-D{name}={value}" for name, value in settings.items()]
        log = self._dir / "log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [shutil.which("java") or "java", *_QUICK_JAVA, *words, "-jar", str(self._app / f"{_NAME}-runner.jar")],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self._dir,
            )

        def answers() -> bool:
            if self._process is None or self._process.poll() is not None:
                msg = f"the registry ended while it started:\n{_tail(log.read_text(errors='replace'))}"
                raise BrokerError(msg)
            try:
                with urllib.request.urlopen(f"{self.url}/subjects", timeout=2):
                    return True
            except OSError:
                return False

        _wait_until(answers, START_TIMEOUT_S, "the registry does not answer")

    def stop(self) -> None:
        """End it at once: nobody answers at its port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """SIGSTOP: connections are taken, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and remove its schemas; any number of times."""
        atexit.unregister(self.close)
        self.stop()
        shutil.rmtree(self._dir, ignore_errors=True)


class Gate(Closing):
    """Passes requests on to a registry, once it likes them.

    Attributes:
        url: where it listens.
        authorization: the header that it demands; None for none.
        status: what it answers instead of passing on; None: it passes on.
        behind: paths of what it does not have yet, when it is asked for the first time.
        requests: paths that it was asked for.
    """

    def __init__(self, upstream: str, *, certificate: tuple[Path, Path] | None = None) -> None:
        """Listen; over TLS with a certificate and its key."""
        self.authorization: str | None = None
        self.status: int | None = None
        self.behind: set[str] = set()
        self.requests: list[str] = []
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._pass_on(None)

            def do_POST(self) -> None:
                self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_: Any) -> None:
                pass

            def _pass_on(self, body: bytes | None) -> None:
                gate.requests.append(self.path)
                if gate.status is not None:
                    self._answer(gate.status, b"<html>no registry</html>")
                elif self.path in gate.behind:
                    gate.behind.remove(self.path)
                    self._answer(404, b'{"error_code": 40403, "message": "Schema not found"}')
                elif gate.authorization not in (None, self.headers["Authorization"]):
                    self._answer(401, b'{"error_code": 401, "message": "Unauthorized"}')
                else:
                    headers = {"Content-Type": self.headers["Content-Type"] or "application/json"}
                    try:
                        with urllib.request.urlopen(
                            urllib.request.Request(upstream + self.path, body, headers), timeout=30
                        ) as answer:
                            self._answer(answer.status, answer.read())
                    except urllib.error.HTTPError as exc:
                        self._answer(exc.code, exc.read())

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        scheme = "http"
        if certificate is not None:
            scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _cache() -> Path:
    return _home().parent / _NAME


def _installed() -> Path:
    """The folder with the registry's jars, fetched by Maven on first use."""
    home = _cache()
    if not _complete(home):
        mvn = shutil.which("mvn")
        if mvn is None:
            msg = "no mvn to fetch the registry with"
            raise BrokerError(msg)
        home.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
        try:
            artifact = f"-Dartifact=io.apicurio:apicurio-registry-app:{VERSION}:tar.gz:all"
            words = ["-q", "-B", "-ntp", "dependency:copy", artifact, f"-DoutputDirectory={work}"]
            _run([mvn, *words], timeout_s=MAVEN_TIMEOUT_S)
            archive = work / f"{_NAME}-all.tar.gz"
            with tarfile.open(archive) as tar:
                tar.extractall(work / "libs", filter="data")
            os.unlink(archive)
            (work / "complete").write_text(f"{_NAME}-runner.jar\n")
            _move_in(work, home)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return home / "libs"


def running_registry() -> RegistryServer:
    """One for the tests of a file; skips them where none can be had."""
    if reason := why_no_registry():
        pytest.skip(reason)
    return RegistryServer()
