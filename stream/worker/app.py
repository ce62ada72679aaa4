"""The Faust application: starts and checks everything, takes and gives up partitions, stops loudly on any fault.

``faust -A stream.app worker`` runs it from ``UEMB_*`` settings, as ``uemb worker`` does.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import faust
from faust.types import TP
from threadpoolctl import threadpool_limits

from stream.config import Settings
from stream.core.counters import Counter
from stream.errors import ConfigError, DeliveryError, Fenced, NotAllowed, StateError, UembError
from stream.kafka.clients import Clients
from stream.kafka.delivery import DurableMarks
from stream.kafka.group import check_group
from stream.kafka.producer import FAUST_LOG, acknowledged
from stream.kafka.schema_registry import open_registry
from stream.kafka.topic_owners import check_owners, topics_record
from stream.kafka.topic_watch import WATCH_S, TopicWatch
from stream.kafka.topics import Prepared, prepare_topics
from stream.kafka.transport import BatchSchema
from stream.kv.protocol import Meta
from stream.kv.retrying import PatientKV
from stream.kv.stores import check_place, open_writer
from stream.logs import log_config, log_what_python_prints, print_error
from stream.pipeline.lane import Destinations, Lane, OnStage
from stream.pipeline.measures import Measures
from stream.pipeline.processor import BatchProcessor
from stream.pipeline.table import TABLE, HistoryTable, TableManager
from stream.rollout.live_spaces import load_space
from stream.rollout.records import Status
from stream.rollout.rollout import Rollout
from stream.security.permissions import close_folder, guard
from stream.worker.health import Health, Pulse
from stream.worker.http import HttpServer
from stream.worker.input_lag import InputLag
from stream.worker.pages import pages
from stream.worker.partitions import Partitions, Parts
from stream.worker.registration import registered

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 1.0
LAG_S: Final = 1.0
TOO_LATE: Final = "the worker did not stop in time; what was not committed is processed again"
REPORT_S: Final = 10.0
#: Steps that wait for the agent: one is ready when it has done the last. More would only have to be done before a stop.
STREAM_BUFFER: Final = 2
REBALANCE_TIMEOUT_S: Final = 60.0
MAX_POLL_RECORDS: Final = 4_000


@dataclass(frozen=True)
class Ready:
    """What a worker has once its start was checked.

    Attributes:
        topics: what they are like.
        kv: the store.
        rollout: item versions.
        lane: what makes all durable.
        partitions: takes them and gives them up.
        watch: looks at the topics from time to time; None where the brokers let nobody.
        enter: enters this worker into the store's shared record.
    """

    topics: Prepared
    kv: PatientKV
    rollout: Rollout
    lane: Lane
    partitions: Partitions
    watch: TopicWatch | None
    enter: Callable[[Meta], Meta]


class EmbeddingApp(faust.App):
    """One worker of the user-embedding stream.

    Args:
        settings: what to run.
        on_stage: called after each stage of a batch's way to durability; tests stop the process there.
        logging_config: for Faust's own command, which sets up the log by itself; None for its way.

    Attributes:
        See `stream.worker.health.Vitals`.
    """

    logger = FAUST_LOG
    input_lag: InputLag

    def __init__(
        self,
        settings: Settings,
        on_stage: OnStage = lambda *_: None,
        logging_config: Mapping[str, object] | None = None,
    ) -> None:
        self.settings = settings
        self.clients = Clients(settings, self._on_refusal)
        self.measures = Measures()
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()
        self.marks = DurableMarks()
        self.registry = open_registry(settings)
        self.processor = BatchProcessor(
            settings.deletion_topic, self.marks, self.measures, on_stage, self._read_again, self.registry
        )
        self.pulse = Pulse()
        self.has_assignment = False
        self._agent: asyncio.Task[Any] | None = None
        self._taking: asyncio.Task[None] | None = None
        self._http: HttpServer | None = None
        self._watching: list[asyncio.Task[None]] = []
        self._on_stage = on_stage
        self._stream: Any = None
        self._ready: Ready | None = None
        self._owned_up = False
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
            # The group's assignments hold it, and a static member may come back to its own on another host.
            canonical_url="http://127.0.0.1",
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
            logging_config=logging_config,
            TableManager=TableManager,
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
        self._serve_http()
        # Our products are small: BLAS threads cost up to 20 times what they save, and a core of the neighbours'.
        threadpool_limits(limits=1, user_api="blas")
        base = None if settings.items is None else await load_space(settings.items, settings.items_timeout_s)
        topics = await asyncio.to_thread(prepare_topics, settings, base.dim if base else 1)
        self.conf.topic_partitions = topics.partitions
        watch = await asyncio.to_thread(self._check_group, topics) if topics.administered else None
        schema_id = None
        if self.registry is not None and settings.output_format == "avro":
            schema_id = await self.registry.output_id()
            log.info("output: schema %s of subject %s", schema_id, self.registry.subject)
        if not topics.administered:
            self.consumer.hold_no_fetch_for_long()
        check_place(settings.kv_url, settings.kv_group)
        store = open_writer(settings.kv_url, lock_patience_s=settings.kv_lock_patience_s)
        kv = PatientKV(store, settings.delivery_timeout_s)
        rollout = Rollout(settings, self.clients, kv, self.processor, self._tell, self._records, self.crash)

        lane = Lane(
            Destinations(
                changelog=settings.changelog_topic,
                output=settings.output_topic,
                dead_letters=settings.dlq_topic,
                dead_letter_partitions=topics.dead_letter_partitions,
                dead_letter_max_bytes=settings.dlq_max_bytes,
            ),
            self.producer,
            kv,
            marks=self.marks,
            measures=self.measures,
            on_stage=self._on_stage,
            on_error=self.crash,
        )

        def enter(meta: Meta) -> Meta:
            return rollout.announce(registered(settings, topics.partitions, meta))

        parts = Parts(
            settings=settings,
            clients=self.clients,
            topics=topics,
            rollout=rollout,
            store=self.history.data,
            kv=kv,
            producer=self.producer,
            consumer=self.consumer,
            lane=lane,
            processor=self.processor,
            measures=self.measures,
            on_error=self.crash,
            enter=enter,
            schemas=None if self.registry is None else self.registry.schemas,
            schema_id=schema_id,
        )
        self._ready = Ready(topics, kv, rollout, lane, Partitions(parts), watch, enter)
        await kv.update_meta(lambda meta: registered(settings, topics.partitions, meta))
        await rollout.start(base, topics.partitions, topics.largest_dim)
        try:
            close_folder(settings.state_dir, lambda name: name == settings.app_id)
            close_folder(settings.state_dir / settings.app_id, lambda _: True)
            await super().on_first_start()
        except OSError as exc:
            msg = f"UEMB_STATE_DIR {settings.state_dir} can't be used ({exc.strerror})"
            raise ConfigError(msg) from exc
        log.info(
            "app %s: %s partitions, user versions %s, item versions %s",
            settings.app_id,
            topics.partitions,
            ", ".join(dict.fromkeys(pair.encoder.version for pair in rollout.pairs)),
            ", ".join(f"{s.version} ({len(s)} items, {s.dim} dims)" for s in rollout.spaces),
        )

    def _serve_http(self) -> None:
        """Tell of metrics and health from here on: a start may take long, too."""
        settings, address = self.settings, self.settings.http_address
        if address is None:
            return
        topics = [*settings.event_topics, settings.deletion_topic]
        self.input_lag = InputLag(self.consumer, self.marks, topics, lambda: dict(self.processor.owned))
        self._http = HttpServer(address, pages(self, Health(self)))
        log.info("metrics and health: http://%s/metrics, /healthz, /readyz", self._http.address)
        self._watching = [
            asyncio.create_task(self.pulse.run(self._keeps_waiting), name="pulse"),
            asyncio.create_task(self._watch_lag(), name="input-lag"),
        ]

    def _check_group(self, topics: Prepared) -> TopicWatch:
        """See that nobody else uses our group and topics; return what looks at the topics while this worker runs."""
        check_group(self.settings)
        check_owners(self.settings)
        watch = TopicWatch(self.settings, topics.partitions)
        watch.check()
        return watch

    async def _tell(self, status: Status) -> None:
        """Write a status record of an item version; returns when it is acknowledged."""
        await self._say_on_status_topic(*status.encode())

    async def _say_on_status_topic(self, key: bytes, value: bytes) -> None:
        topic = self.settings.item_status_topic
        await acknowledged(self.producer.send_unfenced(topic, 0, [(key, value, [])]), topic)

    async def on_stop(self) -> None:
        """Let Faust drain and commit, then close every database."""
        try:
            if self._ready is None:
                await super().on_stop()
                return
            await self._end_taking()
            await self._ready.rollout.stop()
            await super().on_stop()
            await self._ready.partitions.give_up()
            await self._ready.kv.close()
        finally:
            for task in self._watching:
                task.cancel()
            if self._http is not None:
                self._http.stop()
            if self.registry is not None:
                self.registry.close()

    async def on_started_init_extra_tasks(self) -> None:
        """Start background work once the first assignment is taken."""
        await super().on_started_init_extra_tasks()
        self.add_future(self._heartbeat(self.ready.partitions))
        self.add_future(self._report())
        if (watch := self.ready.watch) is not None:
            self.add_future(self._watch_topics(watch))

    @property
    def ready(self) -> Ready:
        """What the start has made.

        Raises:
            StateError: the worker has not started yet.
        """
        if self._ready is None:
            msg = "the worker has not started yet"
            raise StateError(msg)
        return self._ready

    @property
    def kv(self) -> PatientKV | None:
        """See the class."""
        return None if self._ready is None else self._ready.kv

    @property
    def lane(self) -> Lane | None:
        """See the class."""
        return None if self._ready is None else self._ready.lane

    @property
    def rollout(self) -> Rollout | None:
        """See the class."""
        return None if self._ready is None else self._ready.rollout

    @property
    def restoring(self) -> Mapping[int, int | None]:
        """See the class."""
        return {} if self._ready is None else dict(self._ready.partitions.restoring)

    @property
    def agent_has_ended(self) -> bool:
        """See the class."""
        return self._agent is not None and self._agent.done()

    async def crash(self, reason: BaseException) -> None:
        """Stop the worker with a non-zero exit (law 6); Faust's own faults end here too."""
        if isinstance(reason, Fenced):
            reason = await self.consumer.why_fenced(reason)
        self._crash(reason)
        if self.beacon.root is not None:
            self.beacon.root.data._crash(reason)

    def _crash(self, reason: BaseException) -> None:
        reason = self.clients.refusal or reason  # what else failed by now did so for want of that grant
        self.clients.end()
        if self.failure is None:
            self.failure = reason
            log.critical("stopping: %s: %s", type(reason).__name__, reason)
            if self.settings.log_level != "debug":  # what the clients say from here on is of being stopped
                for name in ("aiokafka", "faust", "mode"):
                    logging.getLogger(name).setLevel(logging.CRITICAL)
        # Children are not marked: they are stopped in order, so that what is durable is still committed.
        self._crashed.set()
        self.crash_reason = reason
        self.failed.set()

    def _on_refusal(self, reason: NotAllowed) -> None:
        """Stop the worker; called from any thread."""
        self.loop.call_soon_threadsafe(lambda: self.add_future(self.crash(reason)))

    # -- partitions -----------------------------------------------------------------------------------------------

    async def take_partitions(self, partitions: Sequence[int], standbys: Sequence[int]) -> None:
        """Take what the group assigned, before events flow."""
        self.has_assignment = False
        self.measures.assignments += 1
        self._taking = asyncio.create_task(self._take(partitions, standbys), name="take-partitions")
        try:
            await self._taking
        except asyncio.CancelledError:
            if not self.rebalancing:
                raise
            log.info("the assignment changed while partitions were being restored; starting over")

    async def _take(self, partitions: Sequence[int], standbys: Sequence[int]) -> None:
        ready = self.ready
        if not self._owned_up and ready.topics.administered:
            await self._say_on_status_topic(*topics_record(self.settings))
            self._owned_up = True
        await ready.partitions.take(partitions, standbys)
        self.clients.be_patient()
        ready.kv.be_patient()
        if partitions:
            ready.rollout.saw(await ready.kv.update_meta(ready.enter))
        self.has_assignment = True

    async def _on_revoked(self, app: Any, revoked: set[Any], **_: Any) -> None:
        """Give up what is owned, and what is being taken, however far that is: the next owner may come at once."""
        self.has_assignment = False
        await self._end_taking()
        await self.ready.partitions.give_up()

    async def _end_taking(self) -> None:
        if (taking := self._taking) is not None:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def drain(self) -> None:
        """Wait until what the lane holds is durable; not so long that the group would give this worker up."""
        if self._ready is None:
            return
        try:
            async with asyncio.timeout(min(self.settings.delivery_timeout_s, REBALANCE_TIMEOUT_S / 2)):
                await self._ready.lane.drain()
        except TimeoutError:
            log.warning("gave up waiting for unacknowledged batches; they will be processed again")

    # -- running --------------------------------------------------------------------------------------------------

    async def _embed(self, stream: Any) -> None:
        self._stream, self._agent = stream, asyncio.current_task()
        try:
            async for batches in stream:
                await self.processor.process(batches)
        except Exception as exc:  # noqa: BLE001 - Faust would restart the agent and skip the batch
            await self.crash(exc)
            await asyncio.Event().wait()  # until Faust cancels us

    async def _heartbeat(self, partitions: Partitions) -> None:
        while not self.should_stop:
            await self.sleep(HEARTBEAT_S)
            if self.should_stop:  # which ends a sleep: the partitions are being given up
                return
            try:
                await self._look_for_missing()
                await partitions.heartbeat()
            except Exception as exc:  # noqa: BLE001 - a store that can't be written stops the worker
                if not self.should_stop:  # else the store was closed under the last heartbeat, which nobody needs
                    await self.crash(exc)

    async def _look_for_missing(self) -> None:
        if self._stream is not None:
            consumer = self.consumer
            await self.processor.look_for_missing(consumer.given_out(), consumer.fetches, buffered=self._has_buffered())

    def _has_buffered(self) -> bool:
        return self._stream is not None and not self._stream.channel.queue.empty()

    def _keeps_waiting(self) -> bool:
        return self.processor.activity.since_s is None and self._has_buffered()

    async def _watch_lag(self) -> None:
        while True:
            await asyncio.sleep(LAG_S)
            self.input_lag.note()
            await self.input_lag.ask()

    async def _watch_topics(self, watch: TopicWatch) -> None:
        while not self.should_stop:
            await self.sleep(WATCH_S)
            try:
                await asyncio.to_thread(watch.check)
            except UembError as exc:
                await self.crash(exc)

    async def _report(self) -> None:
        before = self.measures.counts.copy()
        while not self.should_stop:
            await self.sleep(REPORT_S)
            if self.measures.counts != before:
                before = self.measures.counts.copy()
                log.info("processed %s", ", ".join(f"{k} {v}" for k, v in sorted(before.items()) if v))

    async def _read_again(self, topic: str, partition: int, offset: int, seeks: int) -> None:
        self.measures.count(Counter.GAPS, 1)
        log.warning("of %s-%s not all arrived that was fetched; reading on from offset %s", topic, partition, offset)
        await self.consumer.read_again(TP(topic, partition), offset, seeks)

    def _records(self) -> int:
        return self.measures.counts[Counter.RECORDS]


class HostedApp(EmbeddingApp):
    """The worker in a process of Faust's own command, which would let a stop take as long as it likes."""

    def __init__(self, settings: Settings) -> None:
        config = None
        if settings.log_format == "json":
            config = log_config(settings.log_level, "json", app=settings.app_id, instance=settings.group_instance_id)
            log_what_python_prints()
        super().__init__(settings, logging_config=config)

    async def start(self) -> None:
        """Start, or end the process with the reason why not."""
        try:
            await super().start()
        except UembError as exc:
            self.failure = self.failure or exc
            await self.stop()

    async def stop(self) -> None:
        """Stop in order, or end the process; after a fault with its exit code, which Faust would make a 1."""
        asyncio.get_running_loop().call_later(self.settings.stop_timeout_s, self._end_late)
        await super().stop()
        if isinstance(self.failure, UembError):
            self._end(self.failure)

    def _end_late(self) -> None:
        log.critical(TOO_LATE)
        self._end(self.failure if isinstance(self.failure, UembError) else DeliveryError(TOO_LATE))

    def _end(self, reason: UembError) -> None:
        print_error(str(reason))
        logging.shutdown()
        os._exit(reason.exit_code)


def guard_secrets(group: str | None = None) -> None:
    """Keep what this process writes to itself: histories, and the password of the brokers; whoever starts it.

    Args:
        group: whose members may read the embedded store.
    """
    guard(group)
    logging.getLogger("aiokafka.conn").setLevel(logging.WARNING)  # it tells of requests whole, of the login's too
