"""Lanes while partitions come and go."""

import asyncio

import pytest

from stream.errors import Fenced
from stream.pipeline.lanes import Lanes


class FencedLane:
    """A lane whose heartbeat waits for a store that is away, and is refused by a newer claim once it is back."""

    partition = 0

    def __init__(self) -> None:
        self.beats = asyncio.Event()
        self.store_is_back = asyncio.Event()

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def heartbeat(self) -> None:
        self.beats.set()
        await self.store_is_back.wait()
        raise Fenced

    def abandon(self) -> None:
        pass


async def crash(reason: BaseException) -> None:
    raise AssertionError(reason)


@pytest.mark.parametrize("is_held", [True, False])
async def test_only_a_partition_that_is_still_held_is_lost_to_a_newer_owner(is_held: bool) -> None:
    lanes, lane = Lanes(crash), FencedLane()
    lanes.start(lane)  # type: ignore[arg-type]
    beat = asyncio.create_task(lanes.heartbeat())
    await lane.beats.wait()
    if not is_held:
        await lanes.stop()
        lanes.start(FencedLane())  # type: ignore[arg-type]
    lane.store_is_back.set()
    if is_held:
        with pytest.raises(Fenced):
            await beat
    else:
        await beat
    await lanes.stop()
