"""Python processes that start as copies of one that has imported what a worker needs, which else takes each a second.

A copy has the arguments, the environment, the files and the session that it was given, and nothing else of its own;
what an interpreter only takes at its very start, such as `LD_PRELOAD`, has it started from nothing, as any other
program is. This file is also the program of the process that is copied: one for each process of a run.
"""

import atexit
import contextlib
import gc
import inspect
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final

_IMPORTED: Final = (
    "faust.assignor",
    "faust.tables.objects",
    "faust.tables.sets",
    "faust.worker",
    "stream.cli.root",
    "stream.cli.items",
    "stream.cli.verify.command",
    "stream.kv.redis.writer",
    "stream.kv.rocksdb.writer",
    "stream.kv.stores",
    "stream.retrieval.reader",
    "stream.worker.app",
    "stream.worker.run",
)
#: What is read when it is needed, and so may be another than that of the process that is copied; some libraries that
#: tests import leave a variable of OpenMP's behind.
_FREE: Final = ("UEMB_", "PYTEST_", "KMP_", "HOME", "COLUMNS")
_MOST_BYTES: Final = 1 << 18
_EXIT: Final = struct.Struct("i")


class Process:
    """A copy, as `subprocess.Popen` shows a process."""

    def __init__(self, pid: int, ended: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = ended

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return its exit code."""
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            told = os.read(self._ended, _EXIT.size)
            os.close(self._ended)
            assert told, "the process that is copied has ended"
            self.returncode = os.waitstatus_to_exitcode(*_EXIT.unpack(told))
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Original:
    """The process that is copied, started with the first copy; it ends with this one, however that ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def copy(self, command: Sequence[str], environment: Mapping[str, str], files: Sequence[int]) -> Process:
        request = json.dumps([list(command[1:]), dict(environment), os.getcwd()]).encode()
        ended, tells = os.pipe()
        try:
            with self._lock:
                requests = self._requests or self._start()
                socket.send_fds(requests, [request], [*files, tells])
                answer = requests.recv(32)
        finally:
            os.close(tells)
        assert answer, "the process that is copied has ended; its last words are on stderr"
        return Process(int(answer), ended)

    def _start(self) -> socket.socket:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        atexit.register(self._end)
        return self._requests

    def _end(self) -> None:
        assert self._requests is not None
        assert self._process is not None
        self._requests.close()
        self._process.wait()


_original: Final = _Original()
_environment: Final = dict(os.environ)


def _may_be_copied(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    if command[0] != sys.executable or not (command[1] == "-c" or command[1].endswith(".py")):
        return False
    names = _environment.keys() | environment.keys()
    return all(name.startswith(_FREE) or _environment.get(name) == environment.get(name) for name in names)


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    out: IO[Any],
    err: IO[Any] | None = None,
    into: IO[Any] | None = None,
) -> "Process | subprocess.Popen[bytes]":
    """Start a process in a session of its own; `err` is `out` unless given, and without `into` there is no input."""
    with open(os.devnull, "rb") as nothing:
        files = [file.fileno() for file in (into or nothing, out, err or out)]
        if _may_be_copied(command, environment):
            return _original.copy(command, environment, files)
        given = dict(zip(("stdin", "stdout", "stderr"), files, strict=True))
        return subprocess.Popen(list(command), env=dict(environment), start_new_session=True, **given)


def run(
    command: Sequence[str], environment: Mapping[str, str], timeout_s: float = 200, *, text: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run a process to its end, with `text` as its input; what it wrote is text too.

    Raises:
        subprocess.TimeoutExpired: it did not end in time and was killed; holds what it wrote.
    """
    with tempfile.TemporaryFile("w+") as into, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def written() -> tuple[str, str]:
            out.seek(0)
            err.seek(0)
            return out.read(), err.read()

        into.write(text)
        into.seek(0)
        process = start(command, environment, out, err, into)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise subprocess.TimeoutExpired(command, timeout_s, *written()) from None
        return subprocess.CompletedProcess(command, code, *written())


# -- the process that is copied -----------------------------------------------------------------------------------


def _next_copy(requests: socket.socket) -> tuple[list[str], dict[str, str], str, list[int]]:
    """Return in each copy, with its command, environment, folder and files; never in the original."""
    for name in _IMPORTED:
        import_module(name)
    inspect.getmodule(inspect.currentframe())  # Faust's agents ask, and it goes through all modules that are new to it
    gc.collect()
    gc.freeze()
    tells: dict[int, int] = {}
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            woken.recv(1024)
            _tell_of_the_dead(tells)
        if requests in ready:
            request, files, _, _ = socket.recv_fds(requests, _MOST_BYTES, 4)
            if not request:
                os._exit(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there are threads: those of BLAS, which knows of copies
                pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for held in (requests, woken, wake):
                    held.close()
                for fd in (files.pop(), *tells.values()):
                    os.close(fd)
                return (*json.loads(request), files)
            tells[pid] = files.pop()
            for fd in files:
                os.close(fd)
            requests.send(str(pid).encode())


def _tell_of_the_dead(tells: dict[int, int]) -> None:
    while tells:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(tells[pid], _EXIT.pack(status))
        os.close(tells.pop(pid))


def _as_started(command: list[str], environment: dict[str, str], folder: str, files: list[int]) -> tuple[Any, Any]:
    """Give this copy what is its own; return its code, and the names that are to be there."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if command[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *command[2:]]
        return compile(command[1], "<string>", "exec"), main.__dict__
    script = Path(command[0])
    sys.path[0], sys.argv, main.__file__ = str(script.parent), command, str(script)
    return compile(script.read_text(), script, "exec"), main.__dict__


if __name__ == "__main__":
    exec(*_as_started(*_next_copy(socket.socket(fileno=int(sys.argv[1])))))
