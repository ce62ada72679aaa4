"""The Faust application: starts and checks everything, takes and gives up partitions, stops loudly on any fault.

``faust -A stream.app worker`` runs it from ``UEMB_*`` settings, as ``uemb worker`` does.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import faust
from faust.types import TP
from threadpoolctl import threadpool_limits

from stream.agents import BatchProcessor, Owned
from stream.config import Settings, load_settings
from stream.engine import Engine, fallback_record
from stream.errors import ConfigError, StateError
from stream.items import ItemSpace
from stream.keys import encoder_key, fallback_key
from stream.kv.base import KVWriter, Meta, Serving
from stream.kv.urls import open_writer
from stream.ownership import Restorer, restore_and_claim
from stream.publish import Destinations, Lane, Lanes, Progress, Stage
from stream.records import encode
from stream.table import TABLE, HistoryStore, HistoryTable
from stream.topics import Prepared, prepare_topics
from stream.transport import FAUST_LOG, BatchSchema, RecordBatch, acknowledged

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 1.0
REPORT_S: Final = 10.0
#: Batches that wait for the agent; each is a whole fetch of a partition.
STREAM_BUFFER: Final = 16
MAX_POLL_RECORDS: Final = 4_000
_KEEP_OFFSET: Final = -1  # control offset of a serving pair that came from UEMB_ITEMS


class EmbeddingApp(faust.App):
    """One worker of the user-embedding stream.

    Args:
        settings: what to run.
        on_stage: called after each stage of a batch's way to durability; tests stop the process there.
    """

    logger = FAUST_LOG

    def __init__(self, settings: Settings, on_stage: Stage = lambda *_: None) -> None:
        self.settings = settings
        self.kafka_client = settings.kafka_client
        self.max_request_bytes = settings.dlq_max_bytes + (1 << 20)
        self.counts: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()
        self._on_stage = on_stage
        self._kv: KVWriter | None = None
        self._space: ItemSpace | None = None
        self._topics = Prepared(settings.partitions, settings.partitions, administered=True)
        self._taking: asyncio.Future[Any] | None = None
        self.lanes = Lanes(self.crash)
        self.processor = BatchProcessor(settings.deletion_topic, self.lanes, self._add, self._stage, self._mark_durable)
        super().__init__(
            settings.app_id,
            broker=f"uemb://{settings.bootstrap_servers.split(',')[0]}",
            store="uemb://",
            datadir=str(settings.state_dir / settings.app_id),
            version=1,
            topic_partitions=settings.partitions,
            topic_disable_leader=True,
            web_enabled=False,
            web_bind="127.0.0.1",  # `faust worker` starts it all the same
            stream_buffer_maxsize=STREAM_BUFFER,
            stream_wait_empty=True,
            stream_recovery_delay=0.0,
            broker_max_poll_records=MAX_POLL_RECORDS,
            broker_session_timeout=settings.session_timeout_s,
            broker_heartbeat_interval=min(3.0, settings.session_timeout_s / 5),
            broker_request_timeout=max(settings.session_timeout_s + 10, 40.0),
            broker_rebalance_timeout=max(settings.session_timeout_s, 60.0),
            broker_commit_interval=1.0,
            worker_redirect_stdouts=False,
        )
        topics = [*settings.event_topics, settings.deletion_topic]
        self.history = HistoryTable(
            self,
            name=TABLE,
            key_type=bytes,
            value_type=bytes,
            beacon=self.tables.beacon,
            help="bounded history of each user",
        )
        self.tables.add(self.history)
        self.agent(self.topic(*topics, schema=BatchSchema()), name="embed")(self._embed)
        self.on_partitions_revoked.connect(self._on_revoked)

    # -- start and stop -------------------------------------------------------------------------------------------

    async def on_first_start(self) -> None:
        """Check items, topics and the store before the group is joined."""
        settings = self.settings
        # Our products are small: BLAS threads cost up to 20 times what they save, and a core of the neighbours'.
        threadpool_limits(limits=1, user_api="blas")
        if settings.items is None:
            msg = "UEMB_ITEMS is not set; point it to an item space folder (make one with `uemb items build`)"
            raise ConfigError(msg)
        self._space = await asyncio.to_thread(ItemSpace.load, settings.items)
        self._topics = await asyncio.to_thread(prepare_topics, settings, self._space.dim)
        self.conf.topic_partitions = self._topics.partitions
        self._kv = open_writer(settings.kv_url, lock_patience_s=settings.kv_lock_patience_s)
        await self._kv.update_meta(self._register)
        try:
            settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            await super().on_first_start()
        except OSError as exc:
            msg = f"UEMB_STATE_DIR {settings.state_dir} can't be used ({exc.strerror})"
            raise ConfigError(msg) from exc
        log.info(
            "app %s: %s partitions, user version %s, item version %s (%s items, %s dims)",
            settings.app_id,
            self._topics.partitions,
            settings.versioned_encoder.version,
            self._space.version,
            len(self._space),
            self._space.dim,
        )

    def _register(self, meta: Meta) -> Meta:
        """Enter this application into the store's shared record, or refuse a store that belongs to another."""
        settings = self.settings
        encoder = settings.versioned_encoder
        if meta.app not in (None, settings.app_id):
            msg = f"the key-value store belongs to application {meta.app!r}; choose another UEMB_KV_URL"
            raise StateError(msg)
        if meta.partitions not in (None, self._topics.partitions):
            msg = f"the key-value store has {meta.partitions} partitions, the topics have {self._topics.partitions}"
            raise StateError(msg)
        name = encoder_key(encoder.version)
        if meta.encoders.get(name, encoder.hash) != encoder.hash:
            msg = f"user version {encoder.version!r} names other parameters in the store; set a new UEMB_USER_VERSION"
            raise StateError(msg)
        return replace(meta, app=settings.app_id, partitions=self._topics.partitions)

    def _announce(self, meta: Meta) -> Meta:
        """Let readers follow this worker's versions, once it owns partitions whose state was made for them."""
        space, encoder = self._required_space, self.settings.versioned_encoder
        current = meta.current
        if current is None or current.offset <= _KEEP_OFFSET:
            current = Serving(encoder.version, space.version, _KEEP_OFFSET)
        fallback = encode(fallback_record(space, encoder))
        return replace(
            meta,
            current=current,
            encoders={**meta.encoders, encoder_key(encoder.version): encoder.hash},
            fallbacks={**meta.fallbacks, fallback_key(space.version, encoder.version): fallback},
        )

    async def on_stop(self) -> None:
        """Let Faust drain and commit, then close every database."""
        await super().on_stop()
        await self._give_up()
        if self._kv is not None:
            await self._kv.close()

    async def on_started_init_extra_tasks(self) -> None:
        """Start background work once the first assignment is taken."""
        await super().on_started_init_extra_tasks()
        self.add_future(self._heartbeat())
        self.add_future(self._report())

    async def crash(self, reason: BaseException) -> None:
        """Stop the worker with a non-zero exit (law 6); Faust's own faults end here too."""
        self._crash(reason)
        if self.beacon.root is not None:
            self.beacon.root.data._crash(reason)

    def _crash(self, reason: BaseException) -> None:
        if self.failure is None:
            self.failure = reason
            log.critical("stopping: %s: %s", type(reason).__name__, reason)
        # Children are not marked: they are stopped in order, so that what is durable is still committed.
        self._crashed.set()
        self.crash_reason = reason
        self.failed.set()

    # -- partitions -----------------------------------------------------------------------------------------------

    async def take_partitions(self, partitions: Sequence[int]) -> None:
        """Restore and claim the assigned partitions and apply their pending erasures, before events flow."""
        await self._give_up()
        self.consumer.check_assignment([*self.settings.event_topics, self.settings.deletion_topic], partitions)
        share = max(64, self.settings.hot_users // max(1, len(partitions)))
        self._taking = asyncio.gather(*(self._take(partition, share) for partition in partitions))
        try:
            await self._taking
            if partitions:
                await self._required_kv.update_meta(self._announce)
        except asyncio.CancelledError:
            if not self.rebalancing:
                raise
            log.info("the assignment changed while partitions were being restored; starting over")

    async def _take(self, partition: int, hot_users: int) -> None:
        settings = self.settings
        store: HistoryStore = self.history.data
        db, epoch, had_claim = await restore_and_claim(
            partition,
            settings=settings,
            partitions=self._topics.partitions,
            store=store,
            kv=self._required_kv,
            send=self._send_one,
        )
        engine = Engine(
            [self._required_space],
            settings.versioned_encoder,
            settings.rules,
            partition=partition,
            partitions=self._topics.partitions,
            hot_users=hot_users,
            publish_latest=settings.publish == "latest",
            json_output=settings.output_format == "json",
        )
        tps = [TP(topic, partition) for topic in (*settings.event_topics, settings.deletion_topic)]
        committed = await self.consumer.committed(tps)
        progress = Progress(epoch, {tp.topic: offset for tp, offset in committed.items() if offset is not None})
        self.processor.owned[partition] = Owned(partition, epoch, db, engine, progress, db.changelog_offset)
        self.lanes.start(self._lane(self.processor.owned[partition]))
        start = (committed[tps[-1]] or 0) if had_claim else 0
        await self._apply_erasures(partition, start)

    async def _apply_erasures(self, partition: int, start: int) -> None:
        """Apply erasures that are not committed yet, so that no replayed event publishes an erased user."""

        async def handle(records: list[Any]) -> None:
            await self.processor.step(RecordBatch(self.settings.deletion_topic, partition, records, -1, 0))

        await Restorer(self.kafka_client).read(self.settings.deletion_topic, partition, start, handle)
        await self.lanes[partition].empty()

    def _lane(self, owned: Owned) -> Lane:
        settings, partition = self.settings, owned.partition
        return Lane(
            partition,
            owned.progress,
            Destinations(
                changelog=settings.changelog_topic,
                output=settings.output_topic,
                dead_letters=settings.dlq_topic,
                dead_letter_partitions=self._topics.dead_letter_partitions,
                dead_letter_max_bytes=settings.dlq_max_bytes,
                timeout_s=settings.delivery_timeout_s,
            ),
            self.producer,
            self._required_kv,
            mark_durable=lambda topic, offset: self.processor.probation.durable(topic, partition, offset),
            changelog_at=owned.changelog_at,
            lag_ms=lambda progress: self._lag_ms(partition, progress),
            now_ms=_now_ms,
            on_stage=self._stage,
        )

    async def _on_revoked(self, app: Any, revoked: set[Any], **_: Any) -> None:
        await self._give_up()

    async def _give_up(self) -> None:
        """Stop taking and publishing, and close the databases of all partitions."""
        taking, self._taking = self._taking, None
        if taking is not None and not taking.done():
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
        owned = self.processor.give_up(0 if self._consumer is None else self._consumer.seeks + 1)
        await self.lanes.stop()
        for partition in owned:
            partition.db.put({}, partition.changelog_offset)
        store: HistoryStore = self.history.data
        for number in store.open_partitions:  # also those that were being taken
            store.close(number)
            await self._required_kv.close_partition(number)

    async def drain(self) -> None:
        """Wait until what the lanes hold is durable, at most the delivery timeout."""
        try:
            async with asyncio.timeout(self.settings.delivery_timeout_s):
                await self.lanes.drain()
        except TimeoutError:
            log.warning("gave up waiting for unacknowledged batches; they will be processed again")

    # -- running --------------------------------------------------------------------------------------------------

    async def _embed(self, stream: Any) -> None:
        try:
            async for batch in stream:
                await self.processor.process(batch)
        except Exception as exc:  # noqa: BLE001 - Faust would restart the agent and skip the batch
            await self.crash(exc)
            await asyncio.Event().wait()  # until Faust cancels us

    async def _heartbeat(self) -> None:
        while not self.should_stop:
            await self.sleep(HEARTBEAT_S)
            try:
                await self.lanes.heartbeat()
            except Exception as exc:  # noqa: BLE001 - a store that can't be written stops the worker
                await self.crash(exc)

    async def _report(self) -> None:
        before = Counter[str]()
        while not self.should_stop:
            await self.sleep(REPORT_S)
            if self.counts != before:
                log.info("processed %s", ", ".join(f"{k} {v}" for k, v in sorted(self.counts.items()) if v))
                before = self.counts.copy()

    def _lag_ms(self, partition: int, progress: Progress) -> int:
        """0 when all that the brokers hold is durable, else the age of the newest durable record."""
        topics = (*self.settings.event_topics, self.settings.deletion_topic)
        ends = {topic: self.consumer.highwater(TP(topic, partition)) for topic in topics}
        if all(end is None or progress.offsets.get(topic, 0) >= end for topic, end in ends.items()):
            return 0
        return max(0, _now_ms() - (progress.kafka_time_ms or 0)) if progress.kafka_time_ms else 0

    async def _send_one(self, topic: str, partition: int, key: bytes, value: bytes) -> int:
        futures = await self.producer.send_records(topic, partition, [(key, value, [])])
        return await acknowledged(futures, self.settings.delivery_timeout_s, topic)

    def _mark_durable(self, topic: str, partition: int, next_offset: int) -> None:
        self.consumer.mark_durable(TP(topic, partition), next_offset)

    def _add(self, name: str, by: int) -> None:
        self.counts[name] += by

    def _stage(self, name: str, batch: RecordBatch, result: Any) -> None:
        self._on_stage(name, batch, result)

    @property
    def _required_kv(self) -> KVWriter:
        if self._kv is None:
            msg = "the key-value store is opened when the worker starts"
            raise StateError(msg)
        return self._kv

    @property
    def _required_space(self) -> ItemSpace:
        if self._space is None:
            msg = "the item space is loaded when the worker starts"
            raise StateError(msg)
        return self._space


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def __getattr__(name: str) -> Any:
    """Make the application when ``faust -A stream.app`` asks for it, not on import."""
    if name == "app":
        globals()["app"] = EmbeddingApp(load_settings())
        return globals()["app"]
    raise AttributeError(name)
