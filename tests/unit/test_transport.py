"""The consumer's promise: what is fetched is delivered in an unbroken chain or read again, never dropped."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import CommitFailedError, GroupAuthorizationFailedError, IllegalStateError
from aiokafka.structs import TopicPartition

from stream.errors import DeliveryError, OwnershipError, RecordTooLarge
from stream.fetched import DeliveryChain, RecordBatch
from stream.producer import acknowledged
from stream.transport import BATCH_RECORDS, Consumer, ConsumerThread

PLACE = TopicPartition("events", 0)


class Flow(Consumer):
    """The real `getmany` and `perform_seek` over a fetch that the test controls; no threads, no broker."""

    should_stop = False

    def __init__(self) -> None:
        self._seeks = 0
        self._numbers = {}
        self._delivered = {}
        self._durable = {}
        self._read_offset, self._committed_offset = {}, {}
        self._thread = SimpleNamespace(seek_to_beginning=self.seek_to_beginning)
        self.committed_at: int | None = 5
        self.begun: list[TopicPartition] = []
        self.flow_active = False
        self.can_resume_flow = asyncio.Event()
        self.fetch: asyncio.Future[dict[TopicPartition, list[Any]]] = asyncio.get_running_loop().create_future()
        monitor = SimpleNamespace(track_tp_end_offset=lambda *_: None)
        self.app = SimpleNamespace(consumer_generation_id=1, monitor=monitor)
        self.sought = 0

    async def wait(self, event: asyncio.Event) -> None:
        await event.wait()

    async def _wait_next_records(self, timeout: float) -> tuple[Any, Any]:
        await self.can_resume_flow.wait()
        return await self.fetch, None

    async def seek_to_committed(self) -> dict[Any, int]:
        self.sought += 1
        await asyncio.sleep(0)
        return {PLACE: self.committed_at}

    async def seek_to_beginning(self, *places: TopicPartition) -> None:
        self.begun += places

    def assignment(self) -> set[TopicPartition]:
        return {PLACE}

    def _is_changelog_tp(self, tp: TopicPartition) -> bool:
        return False

    def highwater(self, tp: Any) -> int:
        return 9

    def _to_message(self, tp: Any, record: Any) -> Any:
        return SimpleNamespace(key=b"k", value=b"v", offset=record.offset)

    def resume(self) -> None:
        self.flow_active = True
        self.can_resume_flow.set()


def records(*offsets: int) -> dict[TopicPartition, list[Any]]:
    return {PLACE: [SimpleNamespace(offset=offset) for offset in offsets]}


async def collect(flow: Flow) -> list[RecordBatch]:
    return [message.value async for _, message in flow.getmany(timeout=1.0)]


async def test_the_first_fetch_after_a_rebalance_is_delivered() -> None:
    flow = Flow()
    fetching = asyncio.create_task(collect(flow))  # as Faust does: asks while the flow is stopped
    await asyncio.sleep(0)
    await flow.perform_seek()
    flow.resume()
    flow.fetch.set_result(records(5, 6))
    (batch,) = await fetching
    assert [r.offset for r in batch.records] == [5, 6]
    assert (batch.seeks, batch.number, batch.next_offset) == (flow.seeks, 0, 7)


async def test_a_fetch_that_spans_a_seek_is_read_again() -> None:
    flow = Flow()
    flow.resume()
    fetching = asyncio.create_task(collect(flow))
    await asyncio.sleep(0)
    await flow.perform_seek()
    flow.fetch.set_result(records(5, 6))
    assert await fetching == []
    assert flow.sought == 2, "nobody will read these records"


async def test_a_partition_that_was_never_committed_is_read_from_its_beginning() -> None:
    flow = Flow()
    await flow.perform_seek()
    assert flow.begun == []
    flow.committed_at = None  # the client's own seek leaves the position where it is
    await flow.perform_seek()
    assert flow.begun == [PLACE]


async def test_batches_of_a_partition_are_numbered_between_seeks() -> None:
    flow = Flow()
    flow.resume()
    numbers = []
    for offset in range(3):
        flow.fetch = asyncio.get_running_loop().create_future()
        flow.fetch.set_result(records(offset))
        numbers += [batch.number for batch in await collect(flow)]
    await flow.perform_seek()
    numbers += [batch.number for batch in await collect(flow)]
    assert numbers == [0, 1, 2, 0]


async def test_a_large_fetch_is_delivered_in_bounded_batches_by_turns() -> None:
    flow = Flow()
    flow.resume()
    other = TopicPartition("events", 1)
    flow.fetch.set_result({**records(*range(2 * BATCH_RECORDS + 5)), other: records(*range(BATCH_RECORDS))[PLACE]})
    batches = await collect(flow)
    assert [(b.partition, b.number, len(b.records)) for b in batches] == [
        (0, 0, BATCH_RECORDS),
        (1, 0, BATCH_RECORDS),
        (0, 1, BATCH_RECORDS),
        (0, 2, 5),
    ]
    assert [r.offset for b in batches if b.partition == 0 for r in b.records] == list(range(2 * BATCH_RECORDS + 5))
    assert batches[-1].next_offset == 2 * BATCH_RECORDS + 5


async def test_commits_follow_the_durable_mark_alone() -> None:
    flow = Flow()
    assert list(flow._filter_tps_with_pending_acks()) == []
    flow.mark_durable(PLACE, 10)
    flow.mark_durable(PLACE, 7)  # never backward
    assert list(flow._filter_tps_with_pending_acks()) == [PLACE]
    assert flow._new_offset(PLACE) == 10


def batch(number: int, seeks: int = 0) -> RecordBatch:
    return RecordBatch("events", 0, [SimpleNamespace(offset=number)], seeks, number)


def test_chain_stops_at_a_missing_batch() -> None:
    chain = DeliveryChain()
    assert chain.check(batch(0))
    assert chain.check(batch(1))
    with pytest.raises(OwnershipError, match="arrived where 2 was due"):
        chain.check(batch(3))


def test_chain_drops_what_will_be_read_again() -> None:
    chain = DeliveryChain()
    assert chain.check(batch(0, seeks=2))
    assert chain.check(batch(0, seeks=4))
    assert not chain.check(batch(1, seeks=2))
    chain.restart(5)
    assert not chain.check(batch(1, seeks=4)), "fetched before the partitions were given up"
    assert chain.check(batch(0, seeks=6))


def test_chain_demands_the_first_batch_after_a_seek() -> None:
    with pytest.raises(OwnershipError):
        DeliveryChain().check(batch(1))


async def test_acknowledgements_are_awaited_with_a_bound() -> None:
    never = asyncio.get_running_loop().create_future()
    with pytest.raises(DeliveryError, match=r"out: no acknowledgement for 0\.01 s"):
        await acknowledged([never], 0.01, "out")
    assert await acknowledged([], 1.0, "out") == -1


async def test_a_record_beyond_the_topics_limit_says_so() -> None:
    from aiokafka.errors import MessageSizeTooLargeError

    refused = asyncio.get_running_loop().create_future()
    refused.set_exception(MessageSizeTooLargeError())
    with pytest.raises(RecordTooLarge, match=r"max\.message\.bytes"):
        await acknowledged([refused], 1.0, "dlq")


class Commits(Flow):
    """The real commits of a consumer, which a broker takes, refuses or leaves unanswered."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[dict[Any, int]] = []
        self.faults: list[BaseException] = []
        self._commits_failed = False
        self._committed_offset = {PLACE: 5}
        self.app.settings = SimpleNamespace(delivery_timeout_s=0.05)
        self.app.monitor.on_tp_commit = lambda _: None
        self.app.crash = self.crash_app

    async def crash_app(self, fault: BaseException) -> None:
        self.faults.append(fault)

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
    commits.mark_durable(PLACE, 9)
    assert not await commits.commit_now()
    commits.answer = True
    assert await commits.commit_now()
    assert not await commits.commit_now()
    assert commits.asked == [{PLACE: 9}, {PLACE: 9}], "until it is taken, and no longer"
    assert not commits.faults


@pytest.mark.parametrize("answer", [None, DeliveryError("the broker refuses commits")], ids=["none", "refusal"])
async def test_a_commit_without_success_stops_the_worker_once(answer: Any) -> None:
    commits = Commits(answer)
    commits.mark_durable(PLACE, 9)
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


async def test_a_forbidden_commit_is_one_line() -> None:
    with pytest.raises(DeliveryError, match=r"refuses commits of group films .*GroupAuthorizationFailedError"):
        await ClientThread(GroupAuthorizationFailedError("films"))._commit({PLACE: 9})
