"""Several workers on one host, looked after by one process: started again when they die, stopped together.

A child's standard input is a pipe whose other end only its parent holds: it ends with the parent, however that ends.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from stream.config import ENV_PREFIX, MAX_PORT, Settings
from stream.errors import ConfigError, ExitCode
from stream.logs import print_error

log = logging.getLogger(__name__)

#: After a death, wait so long before the next start; twice as long after each further one.
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
#: A process that has lived for so long was well: what comes after counts anew.
WELL_S: Final = 60.0
#: So many deaths in a row, without having been well, are a fault that another start does not mend.
MOST_DEATHS: Final = 5
_LOOK_S: Final = 0.1
_SIGNAL_BASE: Final = 128


@dataclass
class Child:
    """One process, through its lives.

    Attributes:
        command: what is run.
        environment: in which.
        process: the present life; None before the first, and between two.
        started_at: when that began (monotonic s).
        due_at: when the next is to begin.
        deaths: how many there were in a row.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    due_at: float = 0.0
    deaths: int = 0


def worker_processes(settings: Settings, count: int) -> list[Child]:
    """The workers of a host, each with a folder and a port of its own, and its part of the users that are in memory.

    Raises:
        ConfigError: there is less than one user for each of them, or no port.
    """
    if settings.hot_users < count:
        msg = f"UEMB_HOT_USERS={settings.hot_users} can't be shared by {count} processes; raise it"
        raise ConfigError(msg)
    http = settings.http_address
    if http is not None and http.port + count - 1 > MAX_PORT:
        msg = f"UEMB_HTTP={http}: {count} processes take as many ports from there on, and there are none; lower it"
        raise ConfigError(msg)
    children = []
    for number in range(count):
        own = {
            f"{ENV_PREFIX}STATE_DIR": str(settings.state_dir / f"process-{number}"),
            f"{ENV_PREFIX}HOT_USERS": str(settings.hot_users // count),
        }
        if settings.group_instance_id is not None:
            own[f"{ENV_PREFIX}GROUP_INSTANCE_ID"] = f"{settings.group_instance_id}-{number}"
        if http is not None and http.port:
            own[f"{ENV_PREFIX}HTTP"] = str(http._replace(port=http.port + number))
        command = [sys.executable, "-c", "from stream.cli import main; main()", "worker", "--child", str(number)]
        children.append(Child(command, {**os.environ, **own}))
    return children


def supervise(children: Sequence[Child]) -> int:
    """Run all until SIGTERM or SIGINT, or until one can't be helped; return the exit status of the worst."""
    return _Supervisor(children).run()


@dataclass
class _Supervisor:
    children: Sequence[Child]
    asked: list[int] = field(default_factory=list)
    worst: int = 0

    def run(self) -> int:
        """See `supervise`."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self.asked and not self.worst:
                now = time.monotonic()
                for number, child in enumerate(self.children):
                    self._look(number, child, now)
                time.sleep(_LOOK_S)
            self._stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.worst

    def _on_signal(self, number: int, _: object) -> None:
        self.asked.append(number)
        if len(self.asked) > 1:  # a second one ends them at once
            self._signal_all(number)

    def _look(self, number: int, child: Child, now: float) -> None:
        """Start a child that is due, or take note of its death."""
        if child.process is None:
            if now >= child.due_at:
                child.process = subprocess.Popen(child.command, env=child.environment, stdin=subprocess.PIPE)  # noqa: S603 - our own
                child.started_at = now
            return
        code = child.process.poll()
        if code is None:
            return
        self._buried(child.process)
        child.process = None
        status = _status(code)
        child.deaths = 1 if now - child.started_at >= WELL_S else child.deaths + 1
        if status == ExitCode.WRONG or child.deaths >= MOST_DEATHS:
            why = "what it was told is wrong" if status == ExitCode.WRONG else f"{child.deaths} times in a row"
            print_error(f"process {number} ended with {status}: {why}; the others are stopped")
            self.worst = status or ExitCode.FAULT
            return
        pause = min(FIRST_PAUSE_S * 2 ** (child.deaths - 1), LONGEST_PAUSE_S)
        child.due_at = now + pause
        log.warning("process %s ended with %s; it is started again in %g s", number, status, pause)

    def _signal_all(self, number: int) -> None:
        for child in self.children:
            if child.process is not None and child.process.poll() is None:
                child.process.send_signal(number)

    def _stop(self) -> None:
        """Have all stop in order; a worker bounds by itself how long that takes."""
        self._signal_all(signal.SIGTERM)
        for child in self.children:
            if child.process is not None:
                code = child.process.wait()
                if code != -signal.SIGTERM:  # else it had only begun, and has nothing to save: it did as it was told
                    self.worst = max(self.worst, _status(code), key=_rank)
                self._buried(child.process)

    def _buried(self, process: "subprocess.Popen[bytes]") -> None:
        if process.stdin is not None:
            process.stdin.close()


def _status(code: int) -> int:
    """Exit status as a shell has it."""
    return _SIGNAL_BASE - code if code < 0 else code


def _rank(status: int) -> tuple[int, int]:
    """How bad an exit status is: what no start mends, then faults, then what another start may mend."""
    ranks: dict[int, int] = {ExitCode.WRONG: 3, ExitCode.TRY_AGAIN: 1, ExitCode.OK: 0}
    return ranks.get(status, 2), status


def stop_when_orphaned() -> None:
    """Have this process stop in order when the one that looks after it is no more."""

    def wait() -> None:
        while os.read(0, 1):  # nothing is ever written: it ends when the parent does
            pass
        log.warning("the process that looks after this one is gone; stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="orphaned", daemon=True).start()
