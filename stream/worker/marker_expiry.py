"""The end of erasure markers: a marker that was kept for as long as it has to be is removed, a few at a time."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Final

from stream.core.history_codec import marker_erased_at
from stream.pipeline.processor import BatchProcessor, Owned

log = logging.getLogger(__name__)

#: Users of a partition that are looked at at once, in half a millisecond, and the pause after all partitions.
LOOK_USERS: Final = 500
PAUSE_S: Final = 1.0
#: Markers that are removed in one step: the partition's events wait for no more than this many.
STEP_USERS: Final = 100


def stream_time_ms(topics: Iterable[tuple[int | None, bool]], clock_ms: int) -> int | None:
    """The "now" by which a partition's markers end, None while there is none.

    Args:
        topics: of each input topic the Kafka time of the newest record that was taken in, None without one, and whether
            nothing that the brokers hold is still to be taken in.
        clock_ms: the worker's clock.

    A marker is there to drop records, so what counts is how far the records have come. In a backlog that is the time of
    the newest one taken in, however late it is by the clock, for those that follow may still be ones to drop; the topic
    that is furthest behind decides. A topic that is read to its end has none of these ahead, and nothing but the clock
    to tell that time goes by: else the markers of a quiet partition would stay until somebody does something there. A
    producer whose clock is ahead ends no marker early, for the worker's clock is the upper bound; that a worker's own
    is not ahead by more than an hour is seen to by the brokers, which would not have let it claim the partition.
    """
    reached = [clock_ms if is_read else newest_ms for newest_ms, is_read in topics]
    known = [ms for ms in reached if ms is not None]
    return min(clock_ms, *known) if len(known) == len(reached) else None


class MarkerExpiry:
    """Goes round and round the users of this worker's partitions, and has expired markers removed.

    There is no index of markers that could be wrong after a crash: a look at a user is a look at 27 bytes, and a round
    over a million users takes half an hour, of markers that are kept for days.

    Args:
        processor: removes them.
        kept_ms: how long a marker is kept after its erasure.
        now_ms: see `stream_time_ms`.
    """

    def __init__(
        self,
        processor: BatchProcessor,
        kept_ms: int,
        now_ms: Callable[[Owned], int | None],
    ) -> None:
        self._processor = processor
        self._kept_ms = kept_ms
        self._now_ms = now_ms

    async def run(self) -> None:
        """Remove what expires until cancelled; any exception means that the worker must stop."""
        reached: dict[int, bytes] = {}
        while True:
            for partition, owned in list(self._processor.owned.items()):
                reached[partition] = await self.look(owned, reached.get(partition, b""))
            await asyncio.sleep(PAUSE_S)

    async def look(self, owned: Owned, after: bytes) -> bytes:
        """Look at some users behind `after`, and remove expired markers; return how far it got, empty at the end."""
        now_ms = self._now_ms(owned)
        if now_ms is None:
            return after
        before_ms = now_ms - self._kept_ms
        users = owned.db.some_users(after, LOOK_USERS)
        expired = [user for user, state in users if (at := marker_erased_at(state)) is not None and at < before_ms]
        for start in range(0, len(expired), STEP_USERS):
            some = expired[start : start + STEP_USERS]
            await self._processor.end_markers(owned, some, before_ms)
        if expired:
            log.info(
                "partition %s: %s markers of erased users were kept for long enough", owned.partition, len(expired)
            )
        return users[-1][0] if len(users) == LOOK_USERS else b""
