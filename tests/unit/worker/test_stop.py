"""The end of a worker whose stop goes wrong: it ends all the same, with a fault."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from stream.errors import DeliveryError, UembError
from stream.worker.run import _stop


@pytest.mark.parametrize("earlier", [None, DeliveryError("the brokers are away")])
@pytest.mark.parametrize("fault", [asyncio.CancelledError(), ValueError("a client's")])
async def test_a_stop_that_fails_is_a_fault_unless_there_was_one(
    fault: BaseException, earlier: UembError | None
) -> None:
    """A client that lets a cancellation of its own out would have the process wait for its threads for ever."""

    async def stop() -> None:
        raise fault

    app: Any = SimpleNamespace(
        stop=stop,
        settings=SimpleNamespace(stop_timeout_s=60.0),
        failure=earlier,
        failed=asyncio.Event(),
        clients=SimpleNamespace(refusal=None),
    )
    await _stop(app, asyncio.create_task(asyncio.sleep(0)))
    if earlier is not None:
        assert app.failure is earlier
    elif isinstance(fault, asyncio.CancelledError):
        assert isinstance(app.failure, DeliveryError)
    else:
        assert app.failure is fault
