"""The demo's processes: the worker as a child of its own, and what Ctrl-C means."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from stream.cli.terminal import err
from stream.config import ENV_PREFIX
from stream.core.watermark import decode_watermark
from stream.errors import ExitCode, UembError
from stream.feed.sender import TOPIC_PREFIX
from stream.keys import one_user_per_partition
from stream.kv.protocol import KVReader
from stream.kv.stores import open_reader

PARTITIONS: Final = 4  # the embedded broker knows no other number
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 15.0
_ANY_PORT: Final = "127.0.0.1:0"
_UEMB: Final = (sys.executable, "-c", "from stream.cli import main; main()")


class Pipeline:
    """The worker process and a view on its progress."""

    def __init__(self, bootstrap: str, folder: Path, items: Path, kinds: Sequence[str]) -> None:
        self.kv_url = f"rocksdb://{folder / 'kv'}"
        self._log = (folder / "worker.log").open("wb")
        self._topics = {f"{TOPIC_PREFIX}{kind}" for kind in kinds}
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)},
            f"{ENV_PREFIX}BOOTSTRAP_SERVERS": bootstrap,
            f"{ENV_PREFIX}EVENT_TOPICS": ",".join(sorted(self._topics)),
            f"{ENV_PREFIX}EVENT_TYPES": ",".join(f"{kind}:{code}" for code, kind in enumerate(kinds, 1)),
            f"{ENV_PREFIX}ITEMS": str(items),
            f"{ENV_PREFIX}KV_URL": self.kv_url,
            f"{ENV_PREFIX}STATE_DIR": str(folder / "state"),
            f"{ENV_PREFIX}HTTP": _ANY_PORT,
        }
        # A session of its own: Ctrl-C reaches this process only, which stops the worker in order.
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            [*_UEMB, "worker"],
            env=self._environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._inspector: subprocess.Popen[bytes] | None = None
        self._store: KVReader | None = None
        self._probes = one_user_per_partition(PARTITIONS)

    def check(self) -> None:
        """Raise `UembError` with the worker's last words if it has ended."""
        if self._process.poll() is not None:
            lines = Path(self._log.name).read_text(errors="replace").strip().splitlines()
            msg = f"the worker ended with code {self._process.returncode}: {lines[-1] if lines else 'no output'}"
            raise UembError(msg)

    def wait_until_ready(self, stop: "Stop") -> None:
        """Wait until the worker owns all partitions, or until Ctrl-C, which may have reached the worker first."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            stop.check()
            self.check()
            try:
                self._store = self._store or open_reader(self.kv_url)
                if all(self._store.watermark(user) for user in self._probes):
                    return
            except UembError:
                pass  # nothing there yet
            if time.monotonic() > deadline:
                msg = f"the worker was not ready after {START_TIMEOUT_S:g} s; see {self._log.name}"
                raise UembError(msg)
            time.sleep(0.05)

    def processed(self) -> int:
        """Records of the event topics whose effects are durable."""
        total = 0
        for user in self._probes:
            found = decode_watermark(self._store.watermark(user)) if self._store else None
            if found is not None:
                total += sum(offset for topic, offset in found.offsets.items() if topic in self._topics)
        return total

    def inspect(self, titles: Path, stop: "Stop") -> str:
        """Start an inspector beside the worker; return where its page is.

        Raises:
            UembError: it ended.
        """
        worker = _found(Path(self._log.name), r"metrics and health: http://(\S+)/metrics")
        arguments = ["--address", _ANY_PORT, "--titles", str(titles), *(("--worker", worker) if worker else ())]
        log = Path(self._log.name).with_name("inspector.log")
        with log.open("wb") as out:
            command = [*_UEMB, "inspect", *arguments]
            started = subprocess.Popen(  # noqa: S603 - our own command
                command, env=self._environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._inspector = started
        while (url := _found(log, r"inspector: (http://\S+/)")) is None:
            stop.check()
            if started.poll() is not None:
                msg = f"the inspector ended with code {started.returncode}; see {log}"
                raise UembError(msg)
            time.sleep(0.05)
        return url

    def stop(self) -> None:
        """Stop the worker in order, at once if that takes long."""
        if self._store is not None:
            self._store.close()
            self._store = None
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._log.close()

    def kill(self) -> None:
        """End the worker now."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    @property
    def _processes(self) -> "list[subprocess.Popen[bytes]]":
        return [self._process, *([] if self._inspector is None else [self._inspector])]


def _found(log: Path, pattern: str) -> str | None:
    """What a log says."""
    found = re.search(pattern, log.read_text(errors="replace"))
    return None if found is None else found[1]


class Stop:
    """Ctrl-C: the first one winds the demo up, the second ends the worker at once."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.callbacks: list[Callable[[], None]] = []
        self._count = 0

    def on_signal(self, *_: object) -> None:
        """Count a Ctrl-C; act on the second."""
        self._count += 1
        self.event.set()
        if self._count == 1:
            err.print("stopping; once more to stop at once")
        else:
            for callback in self.callbacks:
                callback()
            os._exit(ExitCode.INTERRUPTED)

    def check(self) -> None:
        """Leave through `KeyboardInterrupt` when Ctrl-C was pressed."""
        if self.event.is_set():
            raise KeyboardInterrupt

    def wait(self) -> None:
        """Wait for Ctrl-C."""
        self.event.wait()


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Let Ctrl-C and SIGTERM set the yielded `Stop` for as long as the block runs; once set, for good."""
    stop = Stop()
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        if not stop.event.is_set():  # else a second Ctrl-C that comes now still ends with the exit code of one
            for number, handler in before.items():
                signal.signal(number, handler)
