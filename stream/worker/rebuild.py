"""Filling a store that lost writes again from the histories (law 10): how it is noticed, and the work itself."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Final

from stream.core.watermark import decode_watermark
from stream.pipeline.processor import BatchProcessor, Owned

log = logging.getLogger(__name__)

#: Users of one step: events of the partition wait for no more than this many.
CHUNK_USERS: Final = 100


def lost_writes(watermark: bytes | None, committed: Mapping[str, int | None]) -> bool:
    """Whether a partition's store lacks what committed records caused.

    Args:
        watermark: the partition's watermark entry as stored, None without one.
        committed: committed offset of each input topic, None where nothing was committed.

    An offset is committed only after the watermark that covers it was written, so a watermark below it, or none, means
    that the store was wiped, or restored from an older copy.
    """
    covered = covered_offsets(watermark)
    return any((offset or 0) > covered.get(topic, 0) for topic, offset in committed.items())


def covered_offsets(watermark: bytes | None) -> Mapping[str, int]:
    """Next offset of each input topic as a watermark entry has it; none where there is no entry, or a damaged one."""
    found = decode_watermark(watermark)
    return {} if found is None else found.offsets


async def rebuild(processor: BatchProcessor, owned: Owned, on_progress: Callable[[int], object] | None = None) -> int:
    """Send the present state of all users of a partition once more; return how many, when all of it is durable.

    Runs beside the partition's events. Users that appear meanwhile are written by their own events.
    """
    started = asyncio.get_running_loop().time()
    users = (user for user, _ in owned.db.users())
    count, durable = 0, None
    while chunk := list(islice(users, CHUNK_USERS)):
        durable = await processor.resend(owned, chunk)
        count += len(chunk)
        if on_progress is not None:
            on_progress(count)
    if durable is not None:
        await durable
    took_s = asyncio.get_running_loop().time() - started
    log.info("partition %s: rebuilt %s users in the store (%.2f s)", owned.partition, count, took_s)
    return count
