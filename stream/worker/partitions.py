"""The partitions of a worker: taken with their state, rebuilt where the store lost writes, copied, given up."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faust.types import TP

from stream.config import Settings
from stream.core.engine import Engine
from stream.core.framing import Schemas
from stream.core.records import kv_prefix
from stream.errors import StateError, UembError
from stream.kafka.clients import Clients
from stream.kafka.delivery import RecordBatch
from stream.kafka.producer import Producer, acknowledged
from stream.kafka.topics import Prepared
from stream.kafka.transport import Consumer
from stream.keys import epoch_key, watermark_key
from stream.kv.protocol import KVWriter, Meta
from stream.pipeline.lane import Lane, Outlet
from stream.pipeline.measures import Measures
from stream.pipeline.processor import BatchProcessor, Owned
from stream.pipeline.table import HistoryStore
from stream.pipeline.watermark import Progress, Standing, now_ms
from stream.rollout.rollout import Rollout
from stream.worker.marker_expiry import MarkerExpiry, stream_time_ms
from stream.worker.ownership import Restorer, restore_and_claim
from stream.worker.rebuild import covered_offsets, lost_writes, rebuild
from stream.worker.standby import Standbys

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a worker is made of, as far as its partitions need it."""

    settings: Settings
    clients: Clients
    topics: Prepared
    rollout: Rollout
    store: HistoryStore
    kv: KVWriter
    producer: Producer
    consumer: Consumer
    lane: Lane
    processor: BatchProcessor
    measures: Measures
    on_error: Callable[[BaseException], Awaitable[None]]
    enter: Callable[[Meta], Meta]  # this worker in the store's shared record
    schemas: Schemas | None = None  # of framed events
    schema_id: int | None = None  # of the output, in the schema registry


class Partitions:
    """Takes and gives up partitions as the group assigns them.

    Attributes:
        restoring: of each partition that is being taken, records of the changelog to be read; None: not known yet.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.restoring: dict[int, int | None] = {}
        max_age_s = parts.topics.removed_kept_s
        self._standbys = Standbys(parts.settings, parts.clients, parts.store, parts.on_error, max_age_s)
        self._taking: asyncio.Future[Any] | None = None
        self._rebuilds: dict[int, asyncio.Task[None]] = {}
        self._expiry: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._input_topics = (*parts.settings.event_topics, parts.settings.deletion_topic)

    async def take(self, partitions: Sequence[int], standbys: Sequence[int]) -> None:
        """Restore and claim `partitions` and apply their pending erasures; follow `standbys` from here on.

        Raises:
            asyncio.CancelledError: `give_up` was called meanwhile.
        """
        await self.give_up()
        parts = self._parts
        parts.consumer.check_assignment(self._input_topics, partitions)
        await parts.rollout.prepare()
        self.restoring = dict.fromkeys(partitions)
        if partitions:
            engine = self._engine_for(len(partitions))
            parts.processor.begin(engine, parts.lane)
            self._taking = asyncio.gather(*(self._take(partition, engine) for partition in partitions))
            await self._taking
        parts.rollout.begin()
        if (kept_ms := parts.settings.erasure_marker_retention_ms) is not None:
            expiry = MarkerExpiry(parts.processor, kept_ms, self._stream_time_ms)
            self._expiry = asyncio.create_task(self._expire(expiry), name="marker-expiry")
        self._standbys.follow(standbys)

    async def give_up(self) -> None:
        """Stop taking, publishing and copying, and close the databases of all partitions."""
        parts = self._parts
        await parts.rollout.give_up()
        tasks = [*self._rebuilds.values(), *(task for task in (self._taking, self._expiry) if task is not None)]
        self._taking, self._rebuilds, self._expiry = None, {}, None
        self.restoring = {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._standbys.stop()
        owned = parts.processor.give_up(parts.consumer.seeks + 1)
        await parts.lane.stop()
        for partition in owned:
            try:
                partition.db.put({}, partition.changelog_offset)
            except UembError as exc:  # what is not noted is read from the changelog once more
                log.warning("partition %s: %s", partition.partition, exc)
        await parts.producer.give_up_all()
        for number in parts.store.open_partitions:  # also those that were being taken
            await parts.kv.close_partition(number)  # first: should this be cut short, the number is still to be found
            parts.store.close(number)

    async def heartbeat(self) -> None:
        """Write the watermarks of idle partitions, and see whether somebody asks for a rebuild."""
        parts = self._parts
        await parts.lane.heartbeat()
        for partition, owned in list(parts.processor.owned.items()):
            if partition in self._rebuilds or await parts.kv.rebuild_request(partition) is None:
                continue
            if parts.processor.owned.get(partition) is owned:  # not given up while the store answered
                self._start_rebuild(owned)

    def _engine_for(self, partitions: int) -> Engine:
        """The engine, for so many partitions to be claimed."""
        parts, settings = self._parts, self._parts.settings
        hot_users = max(64, settings.hot_users // partitions)
        if self._engine is None:
            self._engine = Engine(
                parts.rollout.pairs,
                settings.rules,
                partitions=parts.topics.partitions,
                hot_users=hot_users,
                publish_latest=settings.publish == "latest",
                json_output=settings.output_format == "json",
                schema_id=parts.schema_id,
                schemas=parts.schemas,
            )
        else:
            self._engine.restart(hot_users)
            self._engine.serve(parts.rollout.pairs)
        return self._engine

    async def _take(self, partition: int, engine: Engine) -> None:
        parts, settings = self._parts, self._parts.settings
        restoring = self.restoring
        await parts.producer.take(partition, [settings.changelog_topic, settings.output_topic])
        db, epoch, earlier_epoch = await restore_and_claim(
            partition,
            settings=settings,
            clients=parts.clients,
            partitions=parts.topics.partitions,
            store=parts.store,
            kv=parts.kv,
            send=self._send_one,
            on_progress=lambda left: restoring.update({partition: left}),
            max_age_s=parts.topics.removed_kept_s,
        )
        parts.measures.claims += 1
        engine.claim(partition, epoch)
        watermark = (await parts.kv.get(partition, [watermark_key(partition).encode()]))[0]
        committed = await self._committed(partition, covered_offsets(watermark))
        progress = Progress(epoch, {topic: offset for topic, offset in committed.items() if offset is not None})
        owned = Owned(partition, epoch, db, progress, db.changelog_offset)
        owned.left_behind = lambda: parts.rollout.left_behind(owned)
        if lost_writes(watermark, committed):
            log.warning("partition %s: the key-value store lacks committed writes; rebuilding it", partition)
            progress.whole = False
        await parts.rollout.take(owned, earlier_epoch)
        parts.processor.owned[partition] = owned
        parts.lane.open(self._outlet(owned))
        start = (committed[settings.deletion_topic] or 0) if earlier_epoch else 0
        await self._apply_erasures(partition, start)
        restoring.pop(partition, None)
        if not progress.whole:
            self._start_rebuild(owned)

    async def _committed(self, partition: int, covered: Mapping[str, int]) -> dict[str, int | None]:
        """Committed offset of each input topic, None where nothing was committed.

        The broker forgets a topic's offsets with the topic; `covered`, those of the watermark, still tell then.

        Raises:
            StateError: an offset is outside of what its topic holds: events would be skipped, or read again as others.
        """
        consumer = self._parts.consumer
        tps = [TP(topic, partition) for topic in self._input_topics]
        committed = await consumer.committed(tps)
        first, end = await consumer.earliest_offsets(*tps), await consumer.highwaters(*tps)
        for tp, at in committed.items():
            offset = covered.get(tp.topic, 0) if at is None else at
            if offset > end[tp] or (at is not None and at < first[tp]):
                msg = (
                    f"offset {offset}, from where {tp.topic}-{partition} is to be read, is outside of the topic, which "
                    f"has {first[tp]} to {end[tp]}: it was made anew, or retention took events that were not read yet; "
                    "decide where to go on with kafka-consumer-groups --reset-offsets, then start again"
                )
                raise StateError(msg)
        return {tp.topic: offset for tp, offset in committed.items()}

    async def _apply_erasures(self, partition: int, start: int) -> None:
        """Apply erasures that are not committed yet, so that no replayed event publishes an erased user."""
        parts, topic = self._parts, self._parts.settings.deletion_topic

        async def handle(records: list[Any]) -> None:
            await parts.processor.step([RecordBatch(topic, partition, records, -1, 0, records[0].offset)])

        await Restorer(parts.clients).read(topic, partition, start, handle)
        await parts.lane.drain()

    async def _reclaim(self, owned: Owned) -> None:
        """Claim a partition in a store that has lost it, under the same epoch, and fill it beside the events."""
        kv, partition = self._parts.kv, owned.partition
        owned.progress.whole = False
        if (running := self._rebuilds.pop(partition, None)) is not None:
            running.cancel()
        await kv.update_meta(self._parts.enter)
        await kv.put(partition, {epoch_key(partition).encode(): kv_prefix(owned.epoch, 0)})
        self._start_rebuild(owned)

    def _start_rebuild(self, owned: Owned) -> None:
        task = asyncio.create_task(self._rebuild(owned), name=f"rebuild-{owned.partition}")
        self._rebuilds[owned.partition] = task

    async def _rebuild(self, owned: Owned) -> None:
        """Fill the partition's store in the background; events go on meanwhile."""
        parts = self._parts
        try:
            request = await parts.kv.rebuild_request(owned.partition)
            await rebuild(parts.processor, owned)
            owned.progress.whole = True
            if request is not None:
                await parts.kv.rebuild_done(owned.partition, request)
        except Exception as exc:  # noqa: BLE001 - a store that can't be filled stops the worker
            await parts.on_error(exc)
        del self._rebuilds[owned.partition]

    async def _expire(self, expiry: MarkerExpiry) -> None:
        try:
            await expiry.run()
        except Exception as exc:  # noqa: BLE001 - a marker that is removed in part is a fault of this worker
            await self._parts.on_error(exc)

    def _stream_time_ms(self, owned: Owned) -> int | None:
        progress, topics = owned.progress, []
        for topic in self._input_topics:
            due = self._parts.consumer.due(TP(topic, owned.partition))
            is_read = due is not None and progress.offsets.get(topic, 0) >= due
            topics.append((progress.newest_ms.get(topic), is_read))
        return stream_time_ms(topics, now_ms())

    def _outlet(self, owned: Owned) -> Outlet:
        return Outlet(
            owned.partition,
            owned.progress,
            Standing(self._parts.consumer, [TP(topic, owned.partition) for topic in self._input_topics]),
            changelog_at=owned.changelog_at,
            reclaim=lambda: self._reclaim(owned),
        )

    async def _send_one(self, topic: str, partition: int, key: bytes, value: bytes) -> int:
        return await acknowledged(self._parts.producer.send_records(topic, partition, [(key, value, [])]), topic)
