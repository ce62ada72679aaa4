"""Loading what lies in files beside the loop, in bounded time."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from stream.errors import UembError

_Loaded = TypeVar("_Loaded")
_Asked = TypeVar("_Asked")
#: For versions that could not be loaded, the offset of the control record that asked for it, and why.
Refused = dict[str, tuple[int, str]]


async def in_line(
    asked: Mapping[str, tuple[int, _Asked]],
    wanted: Mapping[str, _Loaded],
    held: Mapping[str, _Loaded],
    refused: Refused,
    load: Callable[[int, _Asked], Awaitable[_Loaded | None]],
) -> dict[str, _Loaded]:
    """Every version that is asked for, beside those that are `wanted` in any case.

    Args:
        asked: the control record of each, with its offset.
        wanted: these, by version.
        held: what is there already.
        refused: what was refused is not looked at again before it is published anew.
        load: loads a version, side by side with others, so that one that hangs holds up none; None refuses it.
    """
    found, missing = dict(wanted), dict[str, tuple[int, _Asked]]()
    for version, (offset, record) in asked.items():
        if (there := found.get(version) or held.get(version)) is not None:
            found[version] = there
        elif refused.get(version, (-1,))[0] != offset:
            missing[version] = offset, record
    loaded = await asyncio.gather(*(load(*each) for each in missing.values()))
    return found | {version: one for version, one in zip(missing, loaded, strict=True) if one is not None}


async def load_beside(
    folder: Path, load: Callable[[Path], _Loaded], timeout_s: float, error: type[UembError]
) -> _Loaded:
    """Load a folder in a thread; one whose file system hangs is left to itself.

    Raises:
        UembError: whatever `load` raises, and `error` if it did not come to an end in time.
    """
    try:
        return await beside(lambda: load(folder), f"load {folder.name}", timeout_s)
    except TimeoutError:
        msg = f"{folder} was not loaded within {timeout_s:g} s; see its file system, or raise UEMB_ITEMS_TIMEOUT_S"
        raise error(msg) from None


async def beside(call: Callable[[], _Loaded], name: str, timeout_s: float) -> _Loaded:
    """Call something in a thread of that name; one that hangs is left to itself, and no exit waits for it.

    Raises:
        TimeoutError: it did not come to an end in time.
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
            loaded.append(call())
        except Exception as exc:  # noqa: BLE001 - it is raised where it is waited for
            failed = exc
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, loaded, failed)

    threading.Thread(target=run, name=name, daemon=True).start()
    async with asyncio.timeout(timeout_s):
        return await done
