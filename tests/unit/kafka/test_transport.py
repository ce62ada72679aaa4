"""The consumer's promise: what is fetched is delivered in an unbroken chain or read again, never dropped."""

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import aiokafka
import pytest
from aiokafka.errors import CommitFailedError, GroupAuthorizationFailedError, IllegalStateError, OffsetOutOfRangeError
from aiokafka.structs import TopicPartition
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from stream.errors import DeliveryError, OwnershipError
from stream.kafka.client_internals import outlast_empty_metadata
from stream.kafka.delivery import GAP_TRIES, BatchMissing, DeliveryChain, DurableMarks, GivenOut, RecordBatch
from stream.kafka.embedded_broker import DevBroker
from stream.kafka.fetch_pace import FetchPace
from stream.kafka.transport import (
    STEP_RECORDS,
    Consumer,
    ConsumerThread,
    OutOfRange,
    Run,
)

PLACE = TopicPartition("events", 0)


class SeekingThread(ConsumerThread):
    """The real seeks and numbers of the consumer's thread over a client that the test controls; no broker."""

    def __init__(self, flow: "Flow") -> None:
        self._taken, self._pace = {}, FetchPace(12)
        self.flow = flow

    def _ensure_consumer(self) -> Any:
        return self.flow.client

    async def call_thread(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return await call(*args, **kwargs)


class Client:
    """Records of one partition, and the position of a reader."""

    def __init__(self) -> None:
        self._closed = False
        self._fetcher = self
        self._subscriptions = self
        self.position = 0
        self.places = {PLACE}
        self.answer: asyncio.Future[dict[TopicPartition, list[Any]]] = asyncio.get_running_loop().create_future()

    def fetch_context(self) -> Any:
        return contextlib.nullcontext()

    async def fetched_records(self, *_: Any, **__: Any) -> dict[TopicPartition, list[Any]]:
        try:
            return await self.answer
        finally:
            self.answer = asyncio.get_running_loop().create_future()

    def assignment(self) -> set[TopicPartition]:
        return self.places

    def seek(self, place: TopicPartition, offset: int) -> None:
        self.position = offset


class Flow(Consumer):
    """The real deliveries of a consumer: runs, flow, numbers."""

    should_stop = False

    def __init__(self) -> None:
        self._seeks = self._revocations = self.fetches = 0
        self._runs = {}
        self._read_offset, self._committed_offset = {}, {}
        self.client = Client()
        self._thread = SeekingThread(self)
        self._thread.consumer = self
        self.committed_at: int | None = 5
        self.flow_active = False
        self.can_resume_flow, self.suspend_flow = asyncio.Event(), asyncio.Event()
        monitor = SimpleNamespace(track_tp_end_offset=lambda *_: None)
        self.faults: list[BaseException] = []
        self.app = SimpleNamespace(
            consumer_generation_id=1, monitor=monitor, crash=self.crash_app, marks=DurableMarks()
        )

    async def crash_app(self, fault: BaseException) -> None:
        self.faults.append(fault)

    async def wait(self, event: asyncio.Event) -> None:
        await event.wait()

    async def _wait_next_records(self, timeout: float) -> tuple[Any, Any]:
        return await self._thread._fetch_records(self.client, {PLACE}), None

    async def committed(self, tps: Any) -> dict[Any, int | None]:
        await asyncio.sleep(0)
        return dict.fromkeys(tps, self.committed_at)

    async def earliest_offsets(self, *places: Any) -> dict[Any, int]:
        return dict.fromkeys(places, 3)

    async def highwaters(self, *places: Any) -> dict[Any, int]:
        return dict.fromkeys(places, 9)

    def assignment(self) -> set[TopicPartition]:
        return self.client.places

    def _is_changelog_tp(self, tp: TopicPartition) -> bool:
        return False

    def highwater(self, tp: Any) -> int:
        return 9

    def _to_message(self, tp: Any, record: Any) -> Any:
        return SimpleNamespace(key=b"k", value=b"v", offset=record.offset)

    async def resume(self) -> None:
        await self.perform_seek()
        self.resume_flow()

    def answer_next(self, fetched: dict[TopicPartition, list[Any]] | Exception) -> None:
        """Let the next fetch find its answer."""
        if isinstance(fetched, Exception):
            self.client.answer.set_exception(fetched)
        else:
            self.client.answer.set_result(fetched)

    async def next(self, fetched: dict[TopicPartition, list[Any]]) -> list[RecordBatch]:
        self.answer_next(fetched)
        return await collect(self)


def records(*offsets: int) -> dict[TopicPartition, list[Any]]:
    return {PLACE: [SimpleNamespace(offset=offset) for offset in offsets]}


async def collect(flow: Flow) -> list[RecordBatch]:
    return [batch async for _, message in flow.getmany(timeout=1.0) for batch in message.value]


async def test_the_first_fetch_after_a_rebalance_is_delivered() -> None:
    flow = Flow()
    fetching = asyncio.create_task(collect(flow))  # as Faust does: asks while the flow is stopped
    await asyncio.sleep(0)
    await flow.resume()
    flow.answer_next(records(5, 6))
    (batch,) = await fetching
    assert [r.offset for r in batch.records] == [5, 6]
    assert (batch.seeks, batch.number, batch.start, batch.next_offset) == (flow.seeks, 0, 5, 7)


async def test_no_event_flows_before_the_partitions_are_positioned() -> None:
    """Faust resumes in recovery, seeks later, and empties its buffers after that: what came meanwhile was lost."""
    flow = Flow()
    flow.resume_flow()
    assert not flow.flow_active
    await flow.perform_seek()
    flow.resume_flow()
    assert flow.flow_active


async def test_a_recovery_that_was_overtaken_by_a_rebalance_lets_nothing_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    async def revoked(*_: Any) -> None:
        """Faust's own part of it."""

    monkeypatch.setattr(driver.Consumer, "on_partitions_revoked", revoked)
    flow = Flow()
    await flow.resume()
    recovering = asyncio.create_task(flow.perform_seek())
    await asyncio.sleep(0)
    await flow.on_partitions_revoked({PLACE})
    await recovering
    flow.resume_flow()
    assert not flow.flow_active
    assert flow.client.position == 5


async def test_a_fetch_that_a_seek_overtakes_is_read_again() -> None:
    flow = Flow()
    await flow.resume()
    fetching = asyncio.create_task(collect(flow))
    await asyncio.sleep(0)
    flow._seeks += 1  # as a seek begins: it is carried out in the client's thread, after the fetch that runs there
    flow._runs[PLACE] = Run(flow._seeks, 5)
    flow.answer_next(records(5, 6))
    assert await fetching == []
    await flow._thread.seek_all({PLACE: 5}, flow._seeks)
    (batch,) = await flow.next(records(5, 6))
    assert (batch.number, batch.records[0].offset) == (0, 5)


async def test_a_partition_that_was_never_committed_is_read_from_its_beginning() -> None:
    flow = Flow()
    flow.committed_at = None  # the client's own seek leaves the position where it is
    await flow.perform_seek()
    assert flow.client.position == 3
    flow.committed_at = 0
    await flow.perform_seek()
    assert flow.client.position == 0, "a committed offset like any other"


async def test_batches_of_a_partition_are_numbered_between_seeks() -> None:
    flow = Flow()
    await flow.resume()
    numbers = [batch.number for offset in range(3) for batch in await flow.next(records(offset))]
    await flow.perform_seek()
    numbers += [batch.number for batch in await flow.next(records(5))]
    assert numbers == [0, 1, 2, 0]


async def test_a_fetch_that_never_arrives_leaves_a_gap_in_the_numbers() -> None:
    """Its task was ended after the client had given the records out."""
    flow = Flow()
    await flow.resume()
    (first,) = await flow.next(records(5))
    flow.answer_next(records(6))
    await flow._wait_next_records(1.0)
    (third,) = await flow.next(records(7))
    chain = DeliveryChain()
    assert chain.check(first)
    with pytest.raises(BatchMissing) as missing:
        chain.check(third)
    assert missing.value.due == 6
    await flow.read_again(PLACE, missing.value.due, third.seeks)
    assert flow.client.position == 6
    (again,) = await flow.next(records(6, 7))
    assert chain.check(again)


async def test_what_was_positioned_anew_is_not_moved_for_the_sake_of_an_earlier_gap() -> None:
    flow = Flow()
    await flow.resume()
    (batch,) = await flow.next(records(5))
    await flow.perform_seek()
    await flow.read_again(PLACE, 8, batch.seeks)
    assert flow.client.position == 5


async def test_a_gap_that_is_read_again_does_not_keep_the_partitions_from_being_positioned() -> None:
    flow = Flow()
    await flow.resume()
    (batch,) = await flow.next(records(5))
    positioning = asyncio.create_task(flow.perform_seek())
    await asyncio.sleep(0)
    await flow.read_again(PLACE, 6, batch.seeks)
    assert flow.client.position == 6
    await positioning
    assert flow.client.position == 5


async def test_of_two_seeks_the_later_one_counts_in_whatever_order_they_are_carried_out() -> None:
    thread = Flow()._thread
    await thread._seek_all({PLACE: 9}, 2)
    await thread._seek_all({PLACE: 7}, 1)
    assert thread._ensure_consumer().position == 9


async def test_events_that_are_gone_stop_the_worker() -> None:
    flow = Flow()
    await flow.resume()
    flow.answer_next(OffsetOutOfRangeError({PLACE: 8}))
    assert await collect(flow) == []
    (fault,) = flow.faults
    assert "offset 8 of events-0, the next to be read, is gone; the topic has 3 to 9" in str(fault)
    await flow.perform_seek()
    exc = OutOfRange(PLACE, 8, flow.seeks - 1)
    await flow._stop_at_a_loss(exc)
    assert len(flow.faults) == 1, "asked for before the partition was positioned anew"


async def test_a_large_fetch_is_delivered_in_bounded_batches_by_turns() -> None:
    flow, other = Flow(), TopicPartition("events", 1)
    flow.client.places = {PLACE, other}
    flow.committed_at = 0
    await flow.resume()
    batches = await flow.next({**records(*range(2 * STEP_RECORDS + 5)), other: records(*range(STEP_RECORDS))[PLACE]})
    assert [(b.partition, b.number, len(b.records)) for b in batches] == [
        (0, 0, STEP_RECORDS),
        (1, 0, STEP_RECORDS),
        (0, 1, STEP_RECORDS),
        (0, 2, 5),
    ]
    assert [r.offset for b in batches if b.partition == 0 for r in b.records] == list(range(2 * STEP_RECORDS + 5))
    assert batches[-1].next_offset == 2 * STEP_RECORDS + 5


async def test_what_was_fetched_together_comes_together_as_far_as_that_is_bounded() -> None:
    flow, others = Flow(), [TopicPartition("events", n) for n in (1, 2, 3)]
    flow.client.places = {PLACE, *others}
    flow.committed_at = 0
    await flow.resume()
    sizes = (STEP_RECORDS // 2, STEP_RECORDS // 2, 1, STEP_RECORDS)
    flow.answer_next({place: records(*range(n))[PLACE] for place, n in zip([PLACE, *others], sizes, strict=True)})
    steps = [message.value async for _, message in flow.getmany(timeout=1.0)]
    assert [[batch.partition for batch in step] for step in steps] == [[0, 1], [2], [3]]
    assert all(sum(len(batch.records) for batch in step) <= STEP_RECORDS for step in steps)


async def test_commits_follow_the_durable_mark_alone() -> None:
    flow = Flow()
    assert list(flow._filter_tps_with_pending_acks()) == []
    flow.app.marks.mark(*PLACE, 10)
    assert list(flow._filter_tps_with_pending_acks()) == [PLACE]
    assert flow._new_offset(PLACE) == 10


def batch(number: int, seeks: int = 0) -> RecordBatch:
    return RecordBatch("events", 0, [SimpleNamespace(offset=100 + number)], seeks, number, 100)


def test_chain_has_what_is_missing_read_again() -> None:
    chain = DeliveryChain()
    assert chain.check(batch(0))
    assert chain.check(batch(1))
    with pytest.raises(BatchMissing) as missing:
        chain.check(batch(3))
    assert missing.value.due == 102
    assert not chain.check(batch(4)), "it follows the gap"
    assert chain.check(RecordBatch("events", 0, batch(2).records, 1, 0, 102))


def test_chain_stops_when_the_same_batch_is_missing_again_and_again() -> None:
    chain = DeliveryChain()
    assert chain.check(batch(0))
    for seeks in range(GAP_TRIES):
        with pytest.raises(BatchMissing):
            chain.check(RecordBatch("events", 0, batch(2).records, seeks, 2 if seeks == 0 else 1, 101))
    with pytest.raises(OwnershipError, match=rf"offset 101 of events-0 .* and again each of {GAP_TRIES} times"):
        chain.check(RecordBatch("events", 0, batch(2).records, GAP_TRIES, 1, 101))


def test_chain_drops_what_will_be_read_again() -> None:
    chain = DeliveryChain()
    assert chain.check(batch(0, seeks=2))
    assert chain.check(batch(0, seeks=4))
    assert not chain.check(batch(1, seeks=2))
    chain.restart(5)
    assert not chain.check(batch(1, seeks=4)), "fetched before the partitions were given up"
    assert chain.check(batch(0, seeks=6))


def test_chain_demands_the_first_batch_after_a_seek() -> None:
    with pytest.raises(BatchMissing) as missing:
        DeliveryChain().check(batch(1))
    assert missing.value.due == 100


PLACE_0 = ("events", 0)


def lost(chain: DeliveryChain, seeks: int, fetches: int, *, buffered: bool = False) -> list[int]:
    given_out = {PLACE_0: GivenOut(seeks, start=100, end=102)}
    return [gap.due for gap in chain.lost(given_out, fetches, buffered=buffered)]


def test_chain_finds_what_is_on_its_way_no_more() -> None:
    chain = DeliveryChain()
    assert lost(chain, 1, fetches=7) == [], "the fetch that took it is handed on yet"
    assert lost(chain, 1, fetches=8, buffered=True) == [], "it may be in the buffer"
    assert lost(chain, 1, fetches=8) == [100]
    chain.check(batch(0, seeks=1))
    assert lost(chain, 1, fetches=8) == [], "another is missed since now"
    assert lost(chain, 1, fetches=9) == [101]
    chain.check(batch(1, seeks=1))
    assert lost(chain, 1, fetches=10) == []
    chain.check(batch(0, seeks=2))
    assert lost(chain, 1, fetches=11) == [], "that run has ended"


def test_chain_stops_when_the_last_batch_is_lost_again_and_again() -> None:
    chain = DeliveryChain()
    for seeks in range(GAP_TRIES):
        assert lost(chain, seeks, fetches=2 * seeks) == []
        assert lost(chain, seeks, fetches=2 * seeks + 1) == [100]
    assert lost(chain, GAP_TRIES, fetches=50) == []
    with pytest.raises(OwnershipError, match=rf"offset 100 of events-0 .* and again each of {GAP_TRIES} times"):
        lost(chain, GAP_TRIES, fetches=51)


class Commits(Flow):
    """The real commits of a consumer, which a broker takes, refuses or leaves unanswered."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[dict[Any, int]] = []
        self._commits_failed = False
        self._committed_offset = {PLACE: 5}
        self._committed_s: dict[Any, float] = {}
        self.app.settings = SimpleNamespace(delivery_timeout_s=0.05)
        self.app.monitor.on_tp_commit = lambda _: None

    async def _handle_attached(self, offsets: Any) -> None:
        """Faust's attachments are not used."""

    async def _commit(self, offsets: Any) -> bool:
        self.asked.append(dict(offsets))
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return bool(self.answer)

    async def commit_now(self) -> bool:
        return await self._commit_tps([PLACE], start_new_transaction=False)


async def test_only_what_the_broker_took_counts_as_committed() -> None:
    """A refusal, because a rebalance has begun, may be the only answer that a quiet partition ever gets."""
    commits = Commits(answer=False)
    commits.app.marks.mark(*PLACE, 9)
    assert not await commits.commit_now()
    commits.answer = True
    assert await commits.commit_now()
    assert not await commits.commit_now()
    assert commits.asked == [{PLACE: 9}, {PLACE: 9}], "until it is taken, and no longer"
    assert not commits.faults


@pytest.mark.parametrize("answer", [None, DeliveryError("the broker refuses commits")], ids=["none", "refusal"])
async def test_a_commit_without_success_stops_the_worker_once(answer: Any) -> None:
    commits = Commits(answer)
    commits.app.marks.mark(*PLACE, 9)
    assert not await commits.commit_now()
    assert not await commits.commit_now()
    assert len(commits.asked) == len(commits.faults) == 1
    assert isinstance(commits.faults[0], DeliveryError)


class ClientThread(ConsumerThread):
    """The real answers to what the client says of a commit; no thread, no client."""

    def __init__(self, answer: Exception | None) -> None:
        self.answer = answer
        self.tp_last_committed_at = {}
        self.consumer = SimpleNamespace(app=SimpleNamespace(conf=SimpleNamespace(id="films")))

    @property
    def app(self) -> Any:
        return self.consumer.app

    def _ensure_consumer(self) -> Any:
        return self

    async def commit(self, offsets: Any) -> Any:
        assert {place: at.offset for place, at in offsets.items()} == {PLACE: 9}
        if self.answer is not None:
            raise self.answer


@pytest.mark.parametrize(
    ("answer", "taken"), [(None, True), (CommitFailedError("rebalanced"), False), (IllegalStateError("gone"), False)]
)
async def test_a_rebalance_is_no_fault_of_a_commit(answer: Exception | None, taken: bool) -> None:
    assert await ClientThread(answer)._commit({PLACE: 9}) is taken


async def test_a_rebalance_that_begins_while_the_worker_stops_leaves_the_client_alone() -> None:
    """Its connections closed under it, a last commit had neither success nor failure, for a minute."""
    flow = Flow()
    flow._thread._consumer = SimpleNamespace(_client=None, _coordinator=None)  # whatever is touched of them fails
    flow.close()
    assert not hasattr(flow._thread._consumer, "_closed")


async def test_a_forbidden_commit_is_one_line() -> None:
    with pytest.raises(DeliveryError, match=r"refuses commits of group films .*GroupAuthorizationFailedError"):
        await ClientThread(GroupAuthorizationFailedError("films"))._commit({PLACE: 9})


async def test_a_group_outlasts_metadata_without_brokers() -> None:
    with DevBroker() as broker:
        consumer = aiokafka.AIOKafkaConsumer("events", bootstrap_servers=broker.bootstrap, group_id="g")
        outlast_empty_metadata(consumer)
        await consumer.start()
        coordinator = consumer._coordinator
        await coordinator.ensure_coordinator_known()
        coordinator.coordinator_dead()
        consumer._client.cluster._brokers = {}
        await coordinator.ensure_coordinator_known()
        assert coordinator.coordinator_id is not None
        await consumer.stop()


class Drained(Flow):
    """What a fetch brought, as it is handed on."""

    def __init__(self, brought: list[str], stops_at: str) -> None:
        super().__init__()
        self.flow_active = True
        self.app.should_stop = False
        self._brought = brought
        self._stops_at = stops_at
        self.handed_on: list[str] = []

    async def getmany(self, timeout: float) -> Any:
        for one in self._brought:
            yield TP("events", 0), one
        self.should_stop = True

    async def callback(self, message: Any) -> None:
        self.handed_on.append(message)
        self.flow_active = message != self._stops_at

    async def wait_first(self, handing: Any, suspended: Any) -> None:
        suspended.close()
        await handing


async def test_nothing_more_is_handed_on_once_the_flow_has_stopped() -> None:
    flow = Drained(["a", "b", "c", "d"], stops_at="b")
    await flow._drain_messages(SimpleNamespace(should_stop=False))
    assert flow.handed_on == ["a", "b"]
