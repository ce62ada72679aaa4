"""A real Redis for tests: one process on a free port of this machine, with nothing on disk unless asked for."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from closing import Closing
from kafka_broker import free_ports
from redis import Redis
from redis.exceptions import RedisError

START_TIMEOUT_S: Final = 20.0
_SETTINGS: Final = {
    "bind": "127.0.0.1",
    "save": '""',
    "appendonly": "no",
    "enable-debug-command": "local",
    "loglevel": "notice",
}


def why_no_redis() -> str | None:
    """The reason why no Redis can be had on this machine, or None."""
    return None if shutil.which("redis-server") else "no Redis: install redis-server"


class RedisServer(Closing):
    """A running server: killed, paused and restarted at will, on the same port; data survives only where it is kept."""

    def __init__(self, **settings: str) -> None:
        """Start it; `settings` are lines of its configuration, ``_`` for ``-`` in their names."""
        self._settings = {**_SETTINGS, **{name.replace("_", "-"): value for name, value in settings.items()}}
        self._dir = Path(tempfile.mkdtemp(prefix="redis-test-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self.password = settings.get("requirepass")
        try:
            for attempt in range(3):
                (self.port,) = free_ports(1)
                with contextlib.suppress(RuntimeError) if attempt < 2 else contextlib.nullcontext():
                    self.start()
                    break
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Where a store is on it."""
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def client(self) -> Any:
        """A connection of the test's own."""
        return Redis(port=self.port, password=self.password, protocol=2, socket_timeout=10)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {"port": str(self.port), "dir": str(self._dir), **self._settings}
        file = self._dir / "redis.conf"
        file.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        with (self._dir / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["redis-server", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # Reads the end of its input when this process ends, in whatever way, and takes the server with it.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -9 "$0"; rm -rf "$1"', str(self._process.pid), str(self._dir)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._reap()
                last_words = (self._dir / "log").read_text(errors="replace")[-2000:]
                msg = f"Redis did not start:\n{last_words}"
                raise RuntimeError(msg)
            time.sleep(0.005)

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        self._reap()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a paused server go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill it and remove its data; any number of times."""
        self._reap()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
            with self.client() as client:
                return bool(client.ping())
        except (OSError, RedisError):
            return False

    def _reap(self) -> None:
        # The guard goes first: the number of a process that was waited for may be given to another.
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            if self._guard.stdin is not None:
                self._guard.stdin.close()
            self._guard = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
