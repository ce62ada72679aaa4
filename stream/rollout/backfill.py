"""Work on all users of a partition for one item version, beside its events: writing their vectors, removing them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Final

from stream.core.space_engine import Coverage
from stream.keys import user_cache_key
from stream.pipeline.processor import BatchProcessor, Owned
from stream.rollout.records import Status

log = logging.getLogger(__name__)

#: Users of one step while events flow, which wait for no more than one step; and while none do.
FEW_USERS: Final = 50
MANY_USERS: Final = 200
#: Steps on their way to durability at once while no events flow, so that no round trip is waited for with idle hands.
IN_FLIGHT: Final = 2
#: Pause after each step while events flow, in units of the time until it was durable: events find their lane busy with
#: a step one time in six at most, and the more they load the worker, the longer a step takes, and its pause.
PAUSE: Final = 5.0
#: Events flow if there were some in the last so many seconds.
FLOWING_S: Final = 1.0
REPORT_S: Final = 1.0

Report = Callable[[Status], Awaitable[None]]


class Backfill:
    """Goes over the users of partitions, one step at a time.

    Args:
        processor: queues the steps among the partition's own.
        records: how many records the worker has processed so far; tells whether events flow.
    """

    def __init__(self, processor: BatchProcessor, records: Callable[[], int]) -> None:
        self._processor = processor
        self._records = records

    async def cover(self, owned: Owned, status: Status, report: Report) -> Status:
        """Write the present vector of every user in the status' pair; return the status when all is durable.

        Users that appear, or change, meanwhile are written by their own events.

        Raises:
            NotPublished: the pair is not published, or no more.
        """
        totals = dict.fromkeys(Coverage._fields, 0)

        async def step(users: Sequence[bytes]) -> asyncio.Future[None]:
            coverage, durable = await self._processor.embed(owned, users, status.pair)
            for name, n in coverage._asdict().items():
                totals[name] += n
            return durable

        done = await self._over_all(owned, step, lambda s: report(status.at("covering", **totals, **s)))
        return status.at("covered", **totals, **done)

    async def remove(self, owned: Owned, status: Status, user_versions: Sequence[str], report: Report) -> Status:
        """Remove every user's key of the status' item version; return the status when all is durable."""
        prefixes = [user_cache_key("", status.item_version, version).encode() for version in user_versions]

        async def step(users: Sequence[bytes]) -> asyncio.Future[None]:
            keys = [prefix + user for user in users for prefix in prefixes]
            return await self._processor.remove(owned, keys)

        done = await self._over_all(owned, step, lambda s: report(status.at("removing", **s)))
        return status.at("removed", **done)

    async def _over_all(
        self,
        owned: Owned,
        step: Callable[[Sequence[bytes]], Awaitable[asyncio.Future[None]]],
        report: Callable[[dict[str, float]], Awaitable[None]],
    ) -> dict[str, float]:
        clock = asyncio.get_running_loop().time
        total = owned.db.count_users()
        began = reported_at = clock()
        records, flowed_at = self._records(), -FLOWING_S
        done, reported = 0, 0
        on_their_way: list[asyncio.Future[None]] = []

        def progress() -> dict[str, float]:
            return {"users": max(total, done), "done": done, "per_second": round(done / max(clock() - began, 1e-3), 1)}

        everyone = (user for user, _ in owned.db.users())
        flowing = False
        while users := list(islice(everyone, FEW_USERS if flowing else MANY_USERS)):
            at = clock()
            on_their_way.append(await step(users))
            done += len(users)
            while len(on_their_way) >= (1 if flowing else IN_FLIGHT):
                await on_their_way.pop(0)
            took_s = clock() - at
            if clock() - reported_at >= REPORT_S:
                reported_at, reported = clock(), done
                await report(progress())
            if self._records() != records:
                records, flowed_at = self._records(), clock()
            flowing = clock() - flowed_at < FLOWING_S
            await asyncio.sleep(PAUSE * took_s if flowing else 0)
        for durable in on_their_way:
            await durable
        if done != reported:
            log.info("partition %s: went over %s users (%.1f s)", owned.partition, done, clock() - began)
        return progress()
