"""Faust transport driver: whole fetched batches in, acknowledged batches out, commits moved by a durable mark only.

One Faust event is what was fetched together, a batch of each partition. What stock Faust decides from acks is decided
here by `stream.kafka.delivery.DurableMarks` alone, so that no exception, decode error or rebalance can move a commit
(law 5).

Nothing that was fetched can vanish on its way to the agent. Each partition is read in runs, from one seek to the next.
The client's thread says of what it fetched to which run it belongs, and numbers it. What belongs to an ended run is
dropped, for the seek has it read again. What is missing between two batches, or after the last, is found at the agent,
and the partition is read again from the first offset that did not arrive. Faust lets events flow in recovery before it
has sought, and empties its buffers after that; here they flow only while there are runs.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import aiokafka
import faust
from aiokafka.errors import (
    CommitFailedError,
    GroupAuthorizationFailedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    TopicAuthorizationFailedError,
)
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata, TopicPartition
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from mode import Service

from stream.errors import ConfigError, DeliveryError, Fenced, OwnershipError, StateError, UembError
from stream.kafka.bounded_fetch import BoundedRecords
from stream.kafka.client_internals import (
    InstanceTaken,
    group_fault,
    heed_instance,
    hold_fetches,
    is_instance_taken,
    outlast_empty_metadata,
    partition_state,
    read_batches_as,
)
from stream.kafka.delivery import GivenOut, RecordBatch
from stream.kafka.fetch_pace import SHORT_MS, FetchPace, Hold
from stream.kafka.host import Host
from stream.kafka.producer import FAUST_LOG, Producer

WATCH_GROUP_S: Final = 1.0
#: How long a worker that stops anyway waits to learn why.
ASK_S: Final = 2.0
#: Records that are handed on together, at most. A fetch of a backlog holds tens of thousands (its limit counts
#: compressed bytes): as one step they would hold up everything else for a second, and their users have many events
#: each, which costs more.
STEP_RECORDS: Final = 2_000


class BatchSchema(faust.Schema):
    """Hands fetched batches to the agent as they are; decoding and its errors are the agent's."""

    def compile(self, app: Any, **_: Any) -> Callable[..., Awaitable[Any]]:
        """Build the function that makes an event of a message."""

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            return app.create_event(None, message.value, None, message)

        return decode


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one fetch took of one partition.

    Attributes:
        seeks: the consumer's count of seeks at the one that the records follow.
        number: how many fetches took something of the partition between that seek and this one.
        records: in offset order.
    """

    seeks: int
    number: int
    records: Sequence[ConsumerRecord]


class Taken(NamedTuple):
    """What the client gave out of a partition: the seek that it follows, fetches since, the offset after the last."""

    seeks: int
    fetches: int
    end: int | None


NOTHING: Final = Taken(0, 0, None)


class OutOfRange(Exception):
    """The broker does not have the offset that is due; `seeks` is as in `Fetched`."""

    def __init__(self, tp: TP, offset: int, seeks: int) -> None:
        super().__init__(tp, offset, seeks)
        self.tp, self.offset, self.seeks = tp, offset, seeks


@dataclass(slots=True)
class Run:
    """A partition's deliveries since it was last positioned.

    Attributes:
        seeks: the consumer's count of seeks at that moment.
        start: offset at which it was positioned.
        fetches: how many fetches were taken in.
        batches: how many batches were made of them, those included that must have been in fetches that are missing.
    """

    seeks: int
    start: int
    fetches: int = 0
    batches: int = 0


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """The consumer's thread, reading committed records only and polling quickly."""

    logger = FAUST_LOG
    app: Host

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._taken: dict[TP, Taken] = {}
        self._instance_taken = False
        super().__init__(*args, **kwargs)
        self._pace = FetchPace(self.app.settings.gather_ms)

    async def on_start(self) -> None:
        """Start the client, and have it hold its fetches as `FetchPace` says."""
        await super().on_start()
        hold_fetches(self._ensure_consumer(), self._hold)
        if self.app.settings.group_instance_id is not None:
            heed_instance(self._ensure_consumer(), self._on_instance_taken)

    def hold_no_fetch_for_long(self) -> None:
        """See `Consumer`."""
        self._pace.idle_ms = SHORT_MS

    def _on_instance_taken(self) -> None:
        self._instance_taken = True

    def _hold(self, is_partial: bool) -> Hold:
        return self._pace.hold(time.monotonic(), is_partial=is_partial)

    def taken(self, tp: TP) -> Taken:
        """What was fetched of a partition since it was last positioned."""
        return self._taken.get(tp, NOTHING)

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        app = self.app
        conf = app.conf
        self._assignor = app.assignor
        read_batches_as(BoundedRecords)
        consumer: aiokafka.AIOKafkaConsumer = app.clients.consumer(
            client_id=conf.broker_client_id,
            group_id=conf.id,
            group_instance_id=app.settings.group_instance_id,
            partition_assignment_strategy=[self._assignor],
            enable_auto_commit=False,
            auto_offset_reset="none",  # events that are gone must not be passed over in silence (law 6)
            max_poll_interval_ms=int(conf.broker_max_poll_interval * 1000),
            max_partition_fetch_bytes=conf.consumer_max_fetch_size,
            request_timeout_ms=int(conf.broker_request_timeout * 1000),
            session_timeout_ms=int(conf.broker_session_timeout * 1000),
            rebalance_timeout_ms=int(conf.broker_rebalance_timeout * 1000),
            heartbeat_interval_ms=int(conf.broker_heartbeat_interval * 1000),
            isolation_level="read_committed",
            check_crcs=True,
        )
        outlast_empty_metadata(consumer)
        return consumer

    async def seek_all(self, offsets: Mapping[TP, int], seeks: int) -> None:
        """Have partitions read from the given offsets; `seeks` orders this among the other calls, the last one counts.

        Partitions that are not assigned any more are passed over.
        """
        await self.call_thread(self._seek_all, offsets, seeks)

    async def _seek_all(self, offsets: Mapping[TP, int], seeks: int) -> None:
        consumer = self._ensure_consumer()
        assigned = consumer.assignment()
        for tp, offset in offsets.items():
            place = TopicPartition(tp.topic, tp.partition)
            if place in assigned and seeks > self.taken(tp).seeks:
                consumer.seek(place, offset)
                self._taken[tp] = Taken(seeks, 0, None)

    async def _fetch_records(self, *args: Any, **kwargs: Any) -> dict[TP, Fetched]:
        """Fetch, and say of each partition's records which seek they follow: none can come between the two."""
        try:
            records = await super()._fetch_records(*args, **kwargs)
        except OffsetOutOfRangeError as exc:
            ((place, offset),) = exc.args[0].items()
            tp = TP(place.topic, place.partition)
            raise OutOfRange(tp, offset, self.taken(tp).seeks) from exc
        if records:
            self._pace.took(sum(map(len, records.values())), time.monotonic())
        fetched = {}
        for place, run in records.items():
            tp = TP(place.topic, place.partition)
            before = self.taken(tp)
            self._taken[tp] = Taken(before.seeks, before.fetches + 1, run[-1].offset + 1)
            fetched[tp] = Fetched(before.seeks, before.fetches, run)
        return fetched

    def group_error(self) -> ConfigError | None:
        """Why the group will not have this worker, if so; the client raises it only to those who fetch already."""
        settings = self.app.settings
        if self._instance_taken:
            return ConfigError(
                f"another worker has joined group {settings.app_id} with UEMB_GROUP_INSTANCE_ID="
                f"{settings.group_instance_id}; give each an id of its own, or leave it out"
            )
        if (error := group_fault(self._ensure_consumer())) is None:
            return None
        return ConfigError(
            f"the broker refuses this worker in group {settings.app_id} ({type(error).__name__}); "
            "check UEMB_APP_ID, UEMB_SESSION_TIMEOUT_S and the broker's group settings"
        )

    async def ask_for_instance(self) -> None:
        """Learn from the broker, if it answers, whether another worker has taken this one's instance id."""

        async def ask() -> None:
            self._instance_taken |= await is_instance_taken(self._ensure_consumer())

        if self.app.settings.group_instance_id is not None:
            with contextlib.suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(ASK_S):
                    await self.call_thread(ask)

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        """Commit; return False when the group has begun to spread its partitions anew.

        Raises:
            DeliveryError: the broker refuses.
        """
        at = {TopicPartition(tp.topic, tp.partition): OffsetAndMetadata(offset, "") for tp, offset in offsets.items()}
        self.tp_last_committed_at.update(dict.fromkeys(offsets, time.monotonic()))
        try:
            await self._ensure_consumer().commit(at)
        except (CommitFailedError, IllegalStateError, InstanceTaken):  # which `_watch_group` tells of
            return False
        except KafkaError as exc:
            msg = f"the broker refuses commits of group {self.app.conf.id} ({type(exc).__name__}); see its access list"
            raise DeliveryError(msg) from exc
        return True

    async def committed(self, tps: Iterable[TP]) -> dict[TP, int | None]:
        """Committed offsets of this group."""

        async def ask() -> dict[TP, int | None]:
            consumer = self._ensure_consumer()
            return {tp: await consumer.committed(TopicPartition(tp.topic, tp.partition)) for tp in tps}

        return dict(await self.call_thread(ask))


class Consumer(driver.Consumer):
    """Delivers record batches; commits only what was marked durable."""

    logger = FAUST_LOG
    app: Host

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runs: dict[TP, Run] = {}
        self._seeks = 0
        self._revocations = 0
        self.fetches = 0
        self._commits_failed = False
        self._committed_s: dict[TP, float] = {}
        super().__init__(*args, **kwargs)

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # -- batches in -----------------------------------------------------------------------------------------------

    async def _drain_messages(self, fetcher: Any) -> None:
        """Hand on what is fetched until the consumer or its fetcher stops.

        A batch whose delivery is cut off is lost here, and read again: the flow stops with the end of its run alone.
        """
        if any(run.fetches for run in self._runs.values()):  # an earlier fetcher ended with records in its hands
            await self.perform_seek()
        try:
            while not (self.should_stop or fetcher.should_stop):
                async for _, message in self.getmany(timeout=1.0):
                    await self._hand_on(message)
                await asyncio.sleep(0)
        except (asyncio.CancelledError, *self.consumer_stopped_errors):
            if not self.app.should_stop:
                raise

    async def _hand_on(self, message: Any) -> None:
        if self.flow_active:
            await self.wait_first(self.callback(message), self.suspend_flow.wait())

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """Fetch from the broker; yield one message for all batches that make a step."""
        if not self.flow_active:
            await self.wait(self.can_resume_flow)
        self.fetches += 1
        try:
            fetched, _ = await self._wait_next_records(timeout)
        except NoOffsetForPartitionError:
            return  # it is to be positioned yet
        except OutOfRange as exc:
            await self._stop_at_a_loss(exc)
            return
        except (GroupAuthorizationFailedError, TopicAuthorizationFailedError):  # of which `Clients` has told by now
            await self.sleep(timeout)
            return
        if not fetched or self.should_stop:
            return
        for batches in _steps(self._take_in(fetched)):
            if not self.flow_active:
                return
            if current := [batch for batch in batches if self._is_current(batch)]:
                yield self._message(current)

    def _is_current(self, batch: RecordBatch) -> bool:
        run = self._runs.get(TP(batch.topic, batch.partition))
        return run is not None and run.seeks == batch.seeks

    def _take_in(self, fetched: Mapping[TP, Fetched]) -> list[RecordBatch]:
        """Cut what was fetched into batches, partitions in turns so that topics of one partition advance together."""
        due: list[tuple[TP, Run, Sequence[ConsumerRecord]]] = []
        for tp, fetch in fetched.items():
            run = self._runs.get(tp)
            if run is None or fetch.seeks != run.seeks:
                continue  # the seek that began the present run, or the one to come, has them read again
            run.batches += fetch.number - run.fetches  # of a fetch that is missing so much is known that it had a batch
            run.fetches = fetch.number + 1
            due.append((tp, run, fetch.records))
        longest = max((len(records) for _, _, records in due), default=0)
        now_s = time.monotonic()
        return [
            self._batch(tp, run, records[start : start + STEP_RECORDS], now_s)
            for start in range(0, longest, STEP_RECORDS)
            for tp, run, records in due
            if start < len(records)
        ]

    def _batch(self, tp: TP, run: Run, records: Sequence[ConsumerRecord], fetched_s: float) -> RecordBatch:
        batch = RecordBatch(tp.topic, tp.partition, records, run.seeks, run.batches, run.start, fetched_s)
        run.batches += 1
        return batch

    def _message(self, batches: Sequence[RecordBatch]) -> tuple[TP, Any]:
        """One message with all of them, in the name of the first; the agent reads all topics through one channel."""
        tp = TP(batches[0].topic, batches[0].partition)
        message = self._to_message(tp, batches[0].records[-1])
        message.key, message.value = None, batches
        return tp, message

    async def _stop_at_a_loss(self, lost: OutOfRange) -> None:
        tp, run = lost.tp, self._runs.get(lost.tp)
        if run is None or run.seeks != lost.seeks:
            return  # asked for before the partition was given up, or positioned anew
        first, end = (await self.earliest_offsets(tp))[tp], (await self.highwaters(tp))[tp]
        msg = (
            f"offset {lost.offset} of {tp.topic}-{tp.partition}, the next to be read, is gone; the topic has {first} "
            f"to {end}: retention or a deletion took events that were not read yet, or the topic was made anew; decide "
            "where to go on with kafka-consumer-groups --reset-offsets, then start again"
        )
        await self.app.crash(StateError(msg))

    async def _position(self, offsets: Mapping[TP, int]) -> None:
        """Begin runs at the given offsets; what was fetched before is void."""
        self._seeks += 1
        self._runs.update({tp: Run(self._seeks, offset) for tp, offset in offsets.items()})
        await self._thread.seek_all(offsets, self._seeks)

    async def perform_seek(self) -> None:
        """Read on from the committed offsets, and from the beginning where there are none."""
        tps = [tp for tp in self.assignment() if not self._is_changelog_tp(tp)]
        revocations = self._revocations
        committed = await self.committed(tps)
        never = [tp for tp, offset in committed.items() if offset is None]
        first = await self.earliest_offsets(*never) if never else {}
        if revocations != self._revocations:
            return  # revoked meanwhile: what follows that seeks again
        self._committed_offset.update(committed)
        await self._position({tp: first[tp] if offset is None else offset for tp, offset in committed.items()})

    async def read_again(self, tp: TP, offset: int, seeks: int) -> None:
        """Read a partition again from `offset`, unless it was positioned or given up since its run `seeks` began."""
        run = self._runs.get(tp)
        if run is not None and run.seeks == seeks:
            await self._position({tp: offset})

    def resume_flow(self) -> None:
        """Let events flow, but not before all partitions are positioned: they would come twice, or be lost."""
        if self._runs:
            super().resume_flow()

    @Service.task  # type: ignore[untyped-decorator]
    async def _watch_group(self) -> None:
        while not self.should_stop:
            await self.sleep(WATCH_GROUP_S)
            if error := self._thread.group_error():
                await self.app.crash(error)

    async def why_fenced(self, fenced: Fenced) -> UembError:
        """What lies behind the loss of a partition, if it is more: another worker under this one's instance id."""
        await self._thread.ask_for_instance()
        return self._thread.group_error() or fenced

    def given_out(self) -> dict[TP, GivenOut]:
        """What the client gave out of each partition since it was last positioned."""
        taken = ((tp, run, self._thread.taken(tp)) for tp, run in self._runs.items())
        return {
            tp: GivenOut(run.seeks, run.start, at.end)
            for tp, run, at in taken
            if at.seeks == run.seeks and at.end is not None
        }

    @property
    def seeks(self) -> int:
        """How often the consumer was positioned anew."""
        return self._seeks

    def highwater(self, tp: TP) -> int | None:
        """End of a partition's log as of the last fetch; None when it is not assigned or not known yet."""
        state = self._state(tp)
        return None if state is None else state.highwater

    def due(self, tp: TP) -> int | None:
        """Offset below which all must be durable for nothing to be left to do; None when not known yet.

        That is the end of the log, but for what comes after the last record that counts: markers of transactions, and
        what was aborted, of which no batch ever tells.
        """
        state = self._state(tp)
        if state is None or state.highwater is None:
            return None
        read_to_the_end = state.has_valid_position and state.position >= state.highwater
        if not read_to_the_end:
            return int(state.highwater)
        taken = self._thread.taken(tp)
        return taken.end or 0 if (run := self._runs.get(tp)) and run.seeks == taken.seeks else 0

    def hold_no_fetch_for_long(self) -> None:
        """Before it starts, of a broker that answers a fetch not when a record comes but when the time is up."""
        self._thread.hold_no_fetch_for_long()

    def started_at(self, tp: TP) -> int | None:
        """Offset at which a partition was positioned last; None before that."""
        run = self._runs.get(tp)
        return None if run is None else run.start

    def committed_offset(self, tp: TP) -> int | None:
        """Offset that was committed last, None without one."""
        offset: int | None = self._committed_offset.get(tp)
        return offset

    def committed_s(self, tp: TP) -> float | None:
        """When this worker last committed an offset of a partition (monotonic s); None if it never did."""
        return self._committed_s.get(tp)

    def fetched_ms(self, tp: TP) -> int | None:
        """When the last fetch of a partition was answered, in epoch ms; None when not assigned, or not known yet."""
        state = self._state(tp)
        return None if state is None else state.timestamp

    def _state(self, tp: TP) -> Any:
        """What the client keeps of a partition, in its own thread; None when it is not assigned."""
        return partition_state(self._thread._ensure_consumer(), TopicPartition(tp.topic, tp.partition))

    # -- commits --------------------------------------------------------------------------------------------------

    def ack(self, message: Any) -> bool:
        """Faust's own acks free memory and mean nothing for commits."""
        message.acked = True
        self._unacked_messages.discard(message)
        return False

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Gaps are normal (transactions, compaction); the durable mark knows no gaps."""

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        due = [TP(*place) for place in self.app.marks.due()]
        return (tp for tp in due if topics is None or tp in topics or tp.topic in topics)

    def _new_offset(self, tp: TP) -> int | None:
        return self.app.marks.due().get(tp)

    async def _commit_offsets(self, offsets: Mapping[TP, int], start_new_transaction: bool = True) -> bool:
        """Commit within the time of a delivery, and count as committed only what the broker took.

        The client by itself tries for ever, in silence, and Faust counts as committed what was refused, too.
        """
        assigned = self.assignment()
        due = {tp: offset for tp, offset in offsets.items() if tp in assigned}
        if not due or self._commits_failed:
            return False
        timeout_s = self.app.settings.delivery_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                if not await self._commit(due):
                    return False
        except TimeoutError:
            msg = f"no commit of offsets for {timeout_s:g} s; see whether the brokers are up, then restart the worker"
            await self._stop_committing(DeliveryError(msg))
            return False
        except DeliveryError as exc:
            await self._stop_committing(exc)
            return False
        still = self.assignment()
        self._committed_offset.update({tp: offset for tp, offset in due.items() if tp in still})
        self._committed_s.update(dict.fromkeys(due, time.monotonic()))
        self.app.monitor.on_tp_commit(due)
        return True

    async def _stop_committing(self, reason: DeliveryError) -> None:
        self._commits_failed = True  # the stop would try again, and only take as long again
        await self.app.crash(reason)

    def close(self) -> None:
        """Do nothing when a rebalance begins while the worker stops: the client is stopped in its own thread, in turn.

        Faust would close parts of it from the loop of the application, after which no commit can succeed or fail.
        """

    async def wait_empty(self) -> None:
        """Wait for what is under way to become durable (bounded), then commit it."""
        await self.app.drain()
        await self.commit()

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """End all runs, and forget the marks of revoked partitions after the base class has drained and committed."""
        self._runs.clear()
        self._seeks += 1
        self._revocations += 1
        self.stop_flow()
        await super().on_partitions_revoked(revoked)
        self.app.marks.forget(revoked)

    # -- recovery: the history table restores itself in bulk (`stream.worker.ownership`), Faust has nothing to read ----

    async def highwaters(self, *partitions: TP) -> Mapping[TP, int]:
        """Ends of logs; changelogs are shown as empty."""
        return await self._without_changelogs(super().highwaters, partitions)

    async def earliest_offsets(self, *partitions: TP) -> Mapping[TP, int]:
        """Beginnings of logs; changelogs are shown as empty."""
        return await self._without_changelogs(super().earliest_offsets, partitions)

    async def seek_wait(self, partitions: Mapping[TP, int]) -> None:
        """Seek; changelogs are never read by this consumer and are paused at the client instead."""
        changelogs = [tp for tp in partitions if self._is_changelog_tp(tp)]
        if changelogs:
            await self._thread.call_thread(self._pause_at_client, changelogs)
        await super().seek_wait({tp: at for tp, at in partitions.items() if not self._is_changelog_tp(tp)})

    async def _pause_at_client(self, tps: Sequence[TP]) -> None:
        consumer = self._thread._ensure_consumer()
        for place in [TopicPartition(tp.topic, tp.partition) for tp in tps]:
            consumer.seek(place, 0)  # else the client would ask where to begin, and hold up its neighbours meanwhile
            consumer.pause(place)

    async def _without_changelogs(
        self, ask: Callable[..., Awaitable[Mapping[TP, int]]], partitions: Sequence[TP]
    ) -> Mapping[TP, int]:
        others = [tp for tp in partitions if not self._is_changelog_tp(tp)]
        found = dict(await ask(*others)) if others else {}
        return {tp: found.get(tp, 0) for tp in partitions}

    async def committed(self, tps: Iterable[TP]) -> dict[TP, int | None]:
        """Committed offsets of this group."""
        return dict(await self._thread.committed(tps))

    def check_assignment(self, topics: Sequence[str], partitions: Sequence[int]) -> None:
        """Every assigned partition number must be ours in all topics, or one user would have two owners.

        Raises:
            OwnershipError: the group spread a partition number over several workers.
        """
        assigned = {(tp.topic, tp.partition) for tp in self.assignment() if tp.topic in topics}
        due = {(topic, partition) for topic in topics for partition in partitions}
        if wrong := sorted(assigned ^ due):
            topic, partition = wrong[0]
            msg = (
                f"the group gave {topic}-{partition} to another worker than its sibling topics: all workers must read "
                "the same topics; stop all of them and start them with equal UEMB_EVENT_TOPICS"
            )
            raise OwnershipError(msg)


def _steps(batches: Iterable[RecordBatch]) -> Iterator[list[RecordBatch]]:
    """Batches, in their order, as many together as have no more than `STEP_RECORDS`."""
    together: list[RecordBatch] = []
    count = 0
    for batch in batches:
        if count + len(batch.records) > STEP_RECORDS and together:
            yield together
            together, count = [], 0
        together.append(batch)
        count += len(batch.records)
    if together:
        yield together


class Transport(driver.Transport):
    """Registered as ``uemb://`` under ``faust.transports``."""

    Consumer = Consumer
    Producer = Producer
