"""The Faust application: starts and checks everything, takes and gives up partitions, stops loudly on any fault.

``faust -A stream.app worker`` runs it from ``UEMB_*`` settings, as ``uemb worker`` does.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import faust
from faust.types import TP
from threadpoolctl import threadpool_limits

from stream.agents import BatchProcessor
from stream.config import Settings, load_settings
from stream.errors import ConfigError, StateError, UembError
from stream.fetched import RecordBatch
from stream.group import check_group
from stream.item_versions import Status
from stream.items import ItemSpace
from stream.keys import encoder_key
from stream.kv.base import KVWriter, Meta
from stream.kv.patient import PatientKV
from stream.kv.stores import open_writer
from stream.partitions import Partitions, Parts
from stream.producer import FAUST_LOG, acknowledged
from stream.publish import Lanes, Stage
from stream.rollout import Rollout
from stream.table import TABLE, HistoryTable
from stream.topic_watch import WATCH_S, TopicWatch
from stream.topics import Prepared, prepare_topics
from stream.transport import BatchSchema

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 1.0
REPORT_S: Final = 10.0
#: Batches that wait for the agent; each is a whole fetch of a partition.
STREAM_BUFFER: Final = 16
REBALANCE_TIMEOUT_S: Final = 60.0
MAX_POLL_RECORDS: Final = 4_000


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
        self._rollout: Rollout | None = None
        self._topics = Prepared(settings.partitions, settings.partitions, administered=True, largest_dim=0)
        self._watch: TopicWatch | None = None
        self._stream: Any = None
        self._partitions: Partitions | None = None
        self.lanes = Lanes(self.crash)
        self.processor = BatchProcessor(
            settings.deletion_topic, self.lanes, self._add, self._stage, self._mark_durable, self._read_again
        )
        super().__init__(
            settings.app_id,
            broker=f"uemb://{settings.bootstrap_servers.split(',')[0]}",
            store="uemb://",
            datadir=str(settings.state_dir / settings.app_id),
            version=1,
            topic_partitions=settings.partitions,
            topic_disable_leader=True,
            table_standby_replicas=settings.standbys,
            web_enabled=False,
            web_bind="127.0.0.1",  # `faust worker` starts it all the same
            stream_buffer_maxsize=STREAM_BUFFER,
            stream_wait_empty=True,
            stream_recovery_delay=0.0,
            broker_max_poll_records=MAX_POLL_RECORDS,
            broker_session_timeout=settings.session_timeout_s,
            broker_heartbeat_interval=min(3.0, settings.session_timeout_s / 5),
            broker_request_timeout=max(settings.session_timeout_s + 10, 40.0),
            broker_rebalance_timeout=max(settings.session_timeout_s, REBALANCE_TIMEOUT_S),
            # A worker that waits for a broker or the store fetches nothing and must stay in the group.
            broker_max_poll_interval=max(1000.0, 2 * settings.delivery_timeout_s),
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
        base = None if settings.items is None else await asyncio.to_thread(ItemSpace.load, settings.items)
        self._topics = await asyncio.to_thread(prepare_topics, settings, base.dim if base else 1)
        self.conf.topic_partitions = self._topics.partitions
        if self._topics.administered:
            await asyncio.to_thread(check_group, settings)
            self._watch = TopicWatch(settings, self._topics.partitions)
            await asyncio.to_thread(self._watch.check)
        store = open_writer(settings.kv_url, lock_patience_s=settings.kv_lock_patience_s)
        self._kv = PatientKV(store, settings.delivery_timeout_s)
        await self._kv.update_meta(self._register)
        self._rollout = Rollout(
            settings, self._kv, self.processor, self._tell, lambda: self.counts["records"], self.crash
        )
        await self._rollout.start(base, self._topics.partitions, self._topics.largest_dim)
        try:
            own = settings.state_dir / settings.app_id
            own.mkdir(parents=True, exist_ok=True, mode=0o700)
            own.chmod(0o700)  # it may have been there, open to all
            await super().on_first_start()
        except OSError as exc:
            msg = f"UEMB_STATE_DIR {settings.state_dir} can't be used ({exc.strerror})"
            raise ConfigError(msg) from exc
        log.info(
            "app %s: %s partitions, user version %s, item versions %s",
            settings.app_id,
            self._topics.partitions,
            settings.versioned_encoder.version,
            ", ".join(f"{s.version} ({len(s)} items, {s.dim} dims)" for s in self._rollout.spaces),
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

    async def _tell(self, status: Status) -> None:
        """Write a status record of an item version; returns when it is acknowledged."""
        topic, timeout_s = self.settings.item_status_topic, self.settings.delivery_timeout_s
        await acknowledged([await self.producer.send_unfenced(topic, 0, *status.encode())], timeout_s, topic)

    async def on_stop(self) -> None:
        """Let Faust drain and commit, then close every database."""
        if self._rollout is not None:
            await self._rollout.stop()
        await super().on_stop()
        await self._give_up()
        if self._kv is not None:
            await self._kv.close()

    async def on_started_init_extra_tasks(self) -> None:
        """Start background work once the first assignment is taken."""
        await super().on_started_init_extra_tasks()
        self.add_future(self._heartbeat())
        self.add_future(self._report())
        if self._watch is not None:
            self.add_future(self._watch_topics(self._watch))

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

    async def take_partitions(self, partitions: Sequence[int], standbys: Sequence[int]) -> None:
        """Take what the group assigned, before events flow."""
        try:
            await self._required_partitions.take(partitions, standbys)
            if partitions:
                await self._required_kv.update_meta(lambda meta: self._required_rollout.announce(self._register(meta)))
        except asyncio.CancelledError:
            if not self.rebalancing:
                raise
            log.info("the assignment changed while partitions were being restored; starting over")

    async def _on_revoked(self, app: Any, revoked: set[Any], **_: Any) -> None:
        await self._give_up()

    async def _give_up(self) -> None:
        if self._partitions is not None:
            await self._partitions.give_up()

    async def drain(self) -> None:
        """Wait until what the lanes hold is durable; not so long that the group would give this worker up."""
        try:
            async with asyncio.timeout(min(self.settings.delivery_timeout_s, REBALANCE_TIMEOUT_S / 2)):
                await self.lanes.drain()
        except TimeoutError:
            log.warning("gave up waiting for unacknowledged batches; they will be processed again")

    # -- running --------------------------------------------------------------------------------------------------

    async def _embed(self, stream: Any) -> None:
        self._stream = stream
        try:
            async for batch in stream:
                await self.processor.process(batch)
        except Exception as exc:  # noqa: BLE001 - Faust would restart the agent and skip the batch
            await self.crash(exc)
            await asyncio.Event().wait()  # until Faust cancels us

    async def _heartbeat(self) -> None:
        while not self.should_stop:
            await self.sleep(HEARTBEAT_S)
            if self.should_stop:  # which ends a sleep: the partitions are being given up
                return
            try:
                await self._look_for_missing()
                await self._required_partitions.heartbeat()
            except Exception as exc:  # noqa: BLE001 - a store that can't be written stops the worker
                if not self.should_stop:  # else the store was closed under the last heartbeat, which nobody needs
                    await self.crash(exc)

    async def _look_for_missing(self) -> None:
        if self._stream is not None:
            consumer, buffered = self.consumer, not self._stream.channel.queue.empty()
            await self.processor.look_for_missing(consumer.given_out(), consumer.fetches, buffered=buffered)

    async def _watch_topics(self, watch: TopicWatch) -> None:
        while not self.should_stop:
            await self.sleep(WATCH_S)
            try:
                await asyncio.to_thread(watch.check)
            except UembError as exc:
                await self.crash(exc)

    async def _report(self) -> None:
        before = Counter[str]()
        while not self.should_stop:
            await self.sleep(REPORT_S)
            if self.counts != before:
                log.info("processed %s", ", ".join(f"{k} {v}" for k, v in sorted(self.counts.items()) if v))
                before = self.counts.copy()

    def _mark_durable(self, topic: str, partition: int, next_offset: int) -> None:
        self.consumer.mark_durable(TP(topic, partition), next_offset)

    async def _read_again(self, topic: str, partition: int, offset: int, seeks: int) -> None:
        self._add("gaps", 1)
        log.warning("of %s-%s not all arrived that was fetched; reading on from offset %s", topic, partition, offset)
        await self.consumer.read_again(TP(topic, partition), offset, seeks)

    def _add(self, name: str, by: int) -> None:
        self.counts[name] += by

    def _stage(self, name: str, batch: RecordBatch | None, result: Any) -> None:
        self._on_stage(name, batch, result)

    @property
    def _required_partitions(self) -> Partitions:
        if self._partitions is None:  # made when the group first assigns some: consumer and producer run by then
            self._partitions = Partitions(
                Parts(
                    settings=self.settings,
                    topics=self._topics,
                    rollout=self._required_rollout,
                    store=self.history.data,
                    kv=self._required_kv,
                    producer=self.producer,
                    consumer=self.consumer,
                    lanes=self.lanes,
                    processor=self.processor,
                    on_stage=self._stage,
                    on_error=self.crash,
                    enter=lambda meta: self._required_rollout.announce(self._register(meta)),
                )
            )
        return self._partitions

    @property
    def _required_kv(self) -> KVWriter:
        if self._kv is None:
            msg = "the key-value store is opened when the worker starts"
            raise StateError(msg)
        return self._kv

    @property
    def _required_rollout(self) -> Rollout:
        if self._rollout is None:
            msg = "item versions are loaded when the worker starts"
            raise StateError(msg)
        return self._rollout


def __getattr__(name: str) -> Any:
    """Make the application when ``faust -A stream.app`` asks for it, not on import."""
    if name == "app":
        globals()["app"] = EmbeddingApp(load_settings())
        return globals()["app"]
    raise AttributeError(name)
