"""Runs one worker in this process: signals, logging, and an exit code that tells the truth."""

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

from stream.app import EmbeddingApp
from stream.errors import DeliveryError, UembError

log = logging.getLogger(__name__)

#: A shutdown that takes longer is cut short; everything not committed is processed again. Kubernetes kills after 30 s.
STOP_TIMEOUT_S: Final = 24.0
#: The same from a fault on, which often is that the brokers don't answer: there is little left to save then.
FAULT_STOP_TIMEOUT_S: Final = 15.0
#: Supervisors often signal the process and its group: two signals this close are one wish.
SAME_SIGNAL_S: Final = 0.5
GC_THRESHOLDS: Final = (50_000, 20, 100)
#: What the Kafka client says, it says again ten times a second until it is mended; we pass it on once in so long.
REPEAT_S: Final = 10.0
_REMEMBERED: Final = 256


class NotAgain(logging.Filter):
    """Holds back what the Kafka client has said in the last `REPEAT_S` seconds; others speak freely.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be written."""
        if not record.name.startswith("aiokafka"):
            return True
        now_s, message = self._clock(), record.getMessage()
        if now_s - self._said.get(message, -REPEAT_S) < REPEAT_S:
            return False
        if len(self._said) >= _REMEMBERED:
            self._said.clear()
        self._said[message] = now_s
        return True


def setup_logging(level: str) -> None:
    """One line a message on stderr; libraries speak up from warnings on, and about nothing that we report ourselves."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("stream").setLevel(level.upper())
    if level != "debug":
        for handler in logging.getLogger().handlers:
            handler.addFilter(NotAgain())
    # Tasks that Faust leaves behind when it is stopped end in exceptions that nobody awaits.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL if level != "debug" else logging.DEBUG)
    for noisy in ("faust", "mode", "aiokafka"):
        logging.getLogger(noisy).setLevel(logging.WARNING if level != "debug" else logging.DEBUG)
    logging.getLogger("aiokafka.conn").setLevel(logging.WARNING)  # it tells of requests whole, the password's included


async def run_worker(app: EmbeddingApp, until: Callable[[], Awaitable[object]] | None = None) -> int:
    """Run until SIGTERM, SIGINT, a fault, or the end of `until`; drain, commit and close; return the exit code.

    A second signal ends the process at once; what is not committed is processed again.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    first_at = 0.0

    def on_signal(number: signal.Signals) -> None:
        nonlocal first_at
        if not stop.is_set():
            log.info("%s: draining and stopping", number.name)
            first_at = loop.time()
            stop.set()
        elif loop.time() - first_at > SAME_SIGNAL_S:
            os._exit(128 + number)

    # Histories live long and hold no cycles: the collector's defaults spend a tenth of the time looking at them.
    gc.set_threshold(*GC_THRESHOLDS)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    app.finalize()
    waits: list[asyncio.Task[Any]] = [asyncio.create_task(stop.wait()), asyncio.create_task(app.failed.wait())]
    if until is not None:
        waits.append(asyncio.create_task(_finish(until, app)))
    starting = asyncio.create_task(app.start())
    try:
        await asyncio.wait([starting, *waits], return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not starting.exception():
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    if starting.done() and (error := starting.exception()):
        app.failure = app.failure or error
    await _stop(app, starting)
    if app.failure is None:
        return 0
    if not isinstance(app.failure, UembError):
        log.critical("stopped by %s", type(app.failure).__name__, exc_info=app.failure)
        return 1
    sys.stderr.write(f"uemb: {app.failure}\n")
    return app.failure.exit_code


async def _finish(until: Callable[[], Awaitable[object]], app: EmbeddingApp) -> None:
    try:
        await until()
    except Exception as exc:  # noqa: BLE001 - reported when the worker has stopped
        app.failure = app.failure or exc


async def _stop(app: EmbeddingApp, starting: "asyncio.Task[None]") -> None:
    """Stop in order, in bounded time: what hangs, as a client of brokers that are away may, is left behind."""

    async def stop() -> None:
        await app.stop()
        await asyncio.gather(starting, return_exceptions=True)

    loop = asyncio.get_running_loop()
    deadline = loop.time() + STOP_TIMEOUT_S
    stopping, failing = asyncio.create_task(stop()), asyncio.create_task(app.failed.wait())
    if app.failure is None:
        await asyncio.wait({stopping, failing}, timeout=STOP_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    if app.failure is not None:
        await asyncio.wait({stopping}, timeout=max(0.0, min(FAULT_STOP_TIMEOUT_S, deadline - loop.time())))
    failing.cancel()
    if not stopping.done():
        msg = "the worker did not stop in time; what was not committed is processed again"
        log.critical(msg)
        app.failure = app.failure or DeliveryError(msg)
    elif error := stopping.exception():
        log.critical("did not stop in order: %s", error, exc_info=None if isinstance(error, UembError) else error)
        app.failure = app.failure or error


def main(app: EmbeddingApp, until: Callable[[], Awaitable[object]] | None = None) -> NoReturn:
    """Run a worker and end the process with its exit code."""
    os.umask(0o077)  # histories are nobody else's to read
    code = asyncio.new_event_loop().run_until_complete(run_worker(app, until))
    logging.shutdown()
    # Nothing is left to save, and a client thread that does not end must not keep a stopped worker alive.
    os._exit(code)
