"""Runs checks side by side, each in bounded time and as soon as what it needs is known; tells them in their order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from stream.errors import UembError
from stream.findings import Finding, Status, failed, of_error, skipped
from stream.rollout.loading import beside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        name: what the lines of it begin with.
        look: looks, in a thread of its own.
        timeout_s: how long that may take.
        todo: what to do when it fails and its error does not say.
        needs: checks without which there is nothing to look at: each must have found something in order.
        after: checks whose findings it makes use of, if there are any.
    """

    name: str
    look: Callable[[], Sequence[Finding]]
    timeout_s: float
    todo: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


async def run_checks(checks: Sequence[Check]) -> AsyncIterator[tuple[str, Finding]]:
    """Yield name and finding, in the order of `checks`, where each comes after all that it waits for."""
    tasks: dict[str, asyncio.Task[Sequence[Finding]]] = {}
    for check in checks:
        tasks[check.name] = asyncio.create_task(_run(check, tasks))
    for name, task in tasks.items():
        for finding in await task:
            yield name, finding


async def _run(check: Check, tasks: Mapping[str, asyncio.Task[Sequence[Finding]]]) -> Sequence[Finding]:
    for name in check.after:
        await tasks[name]
    for name in check.needs:
        if not any(finding.status in (Status.OK, Status.WARNING) for finding in await tasks[name]):
            return [skipped(f"{name} must be in order first")]
    try:
        return await beside(check.look, f"check {check.name}", check.timeout_s)
    except TimeoutError:
        return [failed(f"no answer within {check.timeout_s:g} s", check.todo)]
    except UembError as exc:
        return [of_error(exc, check.todo)]
    except OSError as exc:
        return [failed(f"{exc.strerror or type(exc).__name__} {exc.filename or ''}".strip(), check.todo)]
    except Exception as exc:
        log.debug("check %s", check.name, exc_info=exc)
        return [failed(f"it could not be looked at ({type(exc).__name__})", check.todo)]
