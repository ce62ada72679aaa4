"""Loading what lies in files beside the loop, in bounded time."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from stream.errors import UembError

_Loaded = TypeVar("_Loaded")


async def load_beside(
    folder: Path, load: Callable[[Path], _Loaded], timeout_s: float, error: type[UembError]
) -> _Loaded:
    """Load a folder in a thread; one whose file system hangs is left to itself, and no exit waits for it.

    Raises:
        UembError: whatever `load` raises, and `error` if it did not come to an end in time.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_Loaded] = loop.create_future()

    def tell(loaded: list[_Loaded], failed: Exception | None) -> None:
        if done.done():  # given up
            return
        if failed is not None:
            done.set_exception(failed)
        else:
            done.set_result(loaded[0])

    def run() -> None:
        loaded: list[_Loaded] = []
        failed = None
        try:
            loaded.append(load(folder))
        except Exception as exc:  # noqa: BLE001 - it is raised where it is waited for
            failed = exc
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, loaded, failed)

    threading.Thread(target=run, name=f"load {folder.name}", daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            return await done
    except TimeoutError:
        msg = f"{folder} was not loaded within {timeout_s:g} s; see its file system, or raise UEMB_ITEMS_TIMEOUT_S"
        raise error(msg) from None
