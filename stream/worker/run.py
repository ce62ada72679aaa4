"""Runs one worker in this process: signals, logging, and an exit code that tells the truth."""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

from stream.errors import DeliveryError, ExitCode, UembError
from stream.logs import print_error
from stream.worker.app import TOO_LATE, EmbeddingApp, guard_secrets

log = logging.getLogger(__name__)

#: How long a stop may take from a fault on, which often is that the brokers don't answer: there is little to save then.
FAULT_STOP_TIMEOUT_S: Final = 15.0
#: So long a start may go on after all that it started was stopped.
STARTING_S: Final = 1.0
#: Supervisors often signal the process and its group: two signals this close are one wish.
SAME_SIGNAL_S: Final = 0.5
GC_THRESHOLDS: Final = (50_000, 20, 100)
#: A thread that makes the metrics, or waits for a store, hands the interpreter back to the event loop after so long;
#: Python's own 5 ms would each be an event's.
SWITCH_S: Final = 0.0005


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
    sys.setswitchinterval(SWITCH_S)
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
        return ExitCode.OK
    if not isinstance(app.failure, UembError):
        log.critical("stopped by %s", type(app.failure).__name__, exc_info=app.failure)
        return ExitCode.FAULT
    print_error(str(app.failure))
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
        await asyncio.wait({starting}, timeout=STARTING_S)
        starting.cancel()  # it waits for a store, or for an answer to a client that was stopped meanwhile
        await asyncio.gather(starting, return_exceptions=True)

    loop = asyncio.get_running_loop()
    timeout_s = app.settings.stop_timeout_s
    deadline = loop.time() + timeout_s
    stopping, failing = asyncio.create_task(stop()), asyncio.create_task(app.failed.wait())
    if app.failure is None:
        await asyncio.wait({stopping, failing}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if app.failure is not None:
        await asyncio.wait({stopping}, timeout=max(0.0, min(FAULT_STOP_TIMEOUT_S, deadline - loop.time())))
    failing.cancel()
    if not stopping.done():
        log.critical(TOO_LATE)
        app.failure = app.failure or app.clients.refusal or DeliveryError(TOO_LATE)
    elif stopping.cancelled():  # the client cancels a task of its own, and what awaits it learns of that
        log.critical("did not stop in order: a client was cut short")
        app.failure = app.failure or app.clients.refusal or DeliveryError(TOO_LATE)
    elif error := stopping.exception():
        log.critical("did not stop in order: %s", error, exc_info=None if isinstance(error, UembError) else error)
        app.failure = app.failure or error


def main(app: EmbeddingApp, until: Callable[[], Awaitable[object]] | None = None) -> NoReturn:
    """Run a worker and end the process with its exit code."""
    guard_secrets(app.settings.kv_group)
    code = asyncio.new_event_loop().run_until_complete(run_worker(app, until))
    logging.shutdown()
    # Nothing is left to save, and a client thread that does not end must not keep a stopped worker alive.
    os._exit(code)
