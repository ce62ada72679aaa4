"""Standbys: copies of partitions that other workers own, kept current so that taking over has little to restore."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import Final

from aiokafka.structs import TopicPartition

from stream.config import Settings
from stream.core.history_codec import HistoryCodec
from stream.kafka.clients import Clients
from stream.pipeline.table import HistoryStore
from stream.worker.ownership import apply_changelog

log = logging.getLogger(__name__)

#: Records applied at once; the worker's own partitions wait for no more than this many.
_CHUNK_RECORDS: Final = 500
_POLL_MS: Final = 500


class Standbys:
    """Follows the changelog of partitions that this worker may have to take over.

    Args:
        settings: where the changelog is.
        clients: read it.
        store: the worker's local tables.
        on_error: called with a fault that stops the following.
        max_age_s: local state that is older is not used: the changelog may have forgotten what it still holds.
    """

    def __init__(
        self,
        settings: Settings,
        clients: Clients,
        store: HistoryStore,
        on_error: Callable[[BaseException], Awaitable[None]],
        max_age_s: float = inf,
    ) -> None:
        self._settings = settings
        self._clients = clients
        self._store = store
        self._max_age_s = max_age_s
        self._on_error = on_error
        self._task: asyncio.Task[None] | None = None

    def follow(self, partitions: Sequence[int]) -> None:
        """Keep these partitions current until `stop`."""
        if partitions:
            self._task = asyncio.create_task(self._run(list(partitions)), name="standbys")

    async def stop(self) -> None:
        """Stop following; the tables stay open and hold what was applied."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, partitions: list[int]) -> None:
        try:
            await self._follow(partitions)
        except Exception as exc:  # noqa: BLE001 - a copy that can't be kept is a fault of this worker
            await self._on_error(exc)

    async def _follow(self, partitions: list[int]) -> None:
        settings = self._settings
        codec = HistoryCodec(settings.event_types)
        consumer = self._clients.consumer(isolation_level="read_committed", auto_offset_reset="earliest")
        await consumer.start()
        try:
            tps = [TopicPartition(settings.changelog_topic, partition) for partition in partitions]
            consumer.assign(tps)
            ends = await consumer.end_offsets(tps)
            for tp in tps:
                if self._store.open(tp.partition, self._max_age_s).changelog_offset > ends[tp]:
                    log.warning("%s-%s ends before local state: copied anew", tp.topic, tp.partition)
                    self._store.wipe(tp.partition)
                consumer.seek(tp, self._store.open(tp.partition).changelog_offset)
            log.info("standby for partitions %s", ", ".join(map(str, partitions)))
            current = False
            while True:
                if not current and not [tp for tp in tps if await consumer.position(tp) < ends[tp]]:
                    for tp in tps:
                        self._store.restored(tp.partition)
                    log.info("the copy of partitions %s is current", ", ".join(map(str, partitions)))
                    current = True
                fetched = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_CHUNK_RECORDS)
                for tp, records in fetched.items():
                    apply_changelog(self._store.open(tp.partition), codec, settings.history_limit, records)
                    await asyncio.sleep(0)
        finally:
            await consumer.stop()
