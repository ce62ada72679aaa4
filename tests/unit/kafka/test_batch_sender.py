"""Batches of many partitions in common requests: order, sequences, what is sent again, and what is not."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import (
    InvalidProducerEpoch,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    NotLeaderForPartitionError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.structs import TopicPartition

from stream.errors import DeliveryError
from stream.kafka import batch_sender
from stream.kafka.batch_sender import BatchSender, Writer

DUPLICATE = 46
Batches = list[tuple[str, int, DefaultRecordBatch]]


class Brokers:
    """Keeps each partition's records by the rules of a broker, and answers when it is told to."""

    def __init__(self, leaders: dict[tuple[str, int], int | None]) -> None:
        self.cluster = SimpleNamespace(
            leader_for_partition=lambda place: leaders.get((place.topic, place.partition)),
            partitions_for_topic=lambda topic: {p for t, p in leaders if t == topic} or None,
        )
        self.leaders = leaders
        self.logs: dict[tuple[str, int], list[bytes]] = {}
        self.sequences: dict[tuple[str, int, int], int] = {}
        self.requests: list[tuple[int, Batches]] = []
        self.asked = asyncio.Event()
        self.answering = asyncio.Event()
        self.answering.set()
        self.faults: list[Callable[[Batches], dict[tuple[str, int], int] | Exception] | None] = []
        self.updates = 0
        self.waits: list[Exception] = []

    async def _wait_on_metadata(self, topic: str) -> Any:
        if self.waits:
            raise self.waits.pop(0)
        await asyncio.sleep(0)

    def force_metadata_update(self) -> Any:
        self.updates += 1
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        done.set_result(True)
        return done

    async def send(self, node: int, request: Any) -> Any:
        batches = [(t, p, DefaultRecordBatch(bytes(data))) for t, parts in request._topics for p, data in parts]
        assert len({(t, p) for t, p, _ in batches}) == len(batches), "brokers take one batch of a partition"
        self.requests.append((node, batches))
        self.asked.set()
        await self.answering.wait()
        await asyncio.sleep(0)
        fault = self.faults.pop(0) if self.faults else None
        codes = fault(batches) if fault is not None else {}
        if isinstance(codes, Exception):
            raise codes
        topics: dict[str, list[tuple[int, int, int, int, int]]] = {}
        for topic, partition, batch in batches:
            code, offset = codes.get((topic, partition)), -1
            if code is None:
                code, offset = self._append(topic, partition, batch)
            topics.setdefault(topic, []).append((partition, code, offset, -1, 0))
        return SimpleNamespace(topics=list(topics.items()))

    def take_and_die(self, batches: Batches) -> Exception:
        """A fault: all is taken in, and no answer arrives."""
        for topic, partition, batch in batches:
            self._append(topic, partition, batch)
        return KafkaConnectionError("lost")

    def _append(self, topic: str, partition: int, batch: DefaultRecordBatch) -> tuple[int, int]:
        values = [record.value for record in batch]
        key = (topic, partition, batch.producer_id)
        if batch.producer_id >= 0:
            due = self.sequences.get(key, 0)
            if batch.base_sequence != due:
                return (DUPLICATE if batch.base_sequence < due else 45), -1
            self.sequences[key] = (due + len(values)) % 2**31
        log = self.logs.setdefault((topic, partition), [])
        log += values
        return 0, len(log) - len(values)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sender, "_RETRY_S", 0.001)


def record(value: bytes) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
    return b"user", value, []


PLACES = {("log", 0): 1, ("log", 1): 1, ("out", 0): 1, ("out", 1): 2}


async def test_what_is_ready_together_goes_in_one_request_to_each_broker() -> None:
    brokers = Brokers(dict(PLACES))
    sender = BatchSender(brokers, 5)
    futures = [f for t, p in PLACES for f in sender.send(t, p, [record(b"a"), record(b"b")], Writer(p, 0))]
    assert [await future for future in futures] == [1, 1, 1, 1], "offsets of the last records"
    assert sorted((node, len(batches)) for node, batches in brokers.requests) == [(1, 3), (2, 1)]
    assert brokers.logs == {place: [b"a", b"b"] for place in PLACES}


async def test_what_comes_while_a_request_is_on_its_way_goes_together_in_the_next_in_order() -> None:
    brokers = Brokers(dict(PLACES))
    sender = BatchSender(brokers, 5)
    writers = [Writer(10, 3), Writer(11, 3)]
    brokers.answering.clear()
    futures = sender.send("log", 0, [record(b"0")], writers[0])
    await brokers.asked.wait()
    for value in (b"1", b"2"):
        for partition in (0, 1):
            futures += sender.send("log", partition, [record(value)], writers[partition])
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(brokers.requests) == 1
    brokers.answering.set()
    assert [await future for future in futures] == [0, 1, 0, 2, 1]
    assert brokers.logs == {("log", 0): [b"0", b"1", b"2"], ("log", 1): [b"1", b"2"]}
    assert len(brokers.requests) == 3
    assert {batch.producer_epoch for _, batches in brokers.requests for _, _, batch in batches} == {3}


async def test_many_records_are_cut_into_batches_that_follow_each_other() -> None:
    brokers = Brokers(dict(PLACES))
    sender = BatchSender(brokers, 5)
    values = [b"%d" % i + b"x" * 100_000 for i in range(12)]
    futures = sender.send("log", 0, [record(value) for value in values], Writer(1, 0))
    assert len(futures) == 3
    assert [await future for future in futures] == [4, 9, 11]
    assert brokers.logs["log", 0] == values


@pytest.mark.parametrize(
    "fault",
    [
        lambda _: KafkaConnectionError("lost"),
        lambda batches: {(t, p): NotLeaderForPartitionError.errno for t, p, _ in batches},
    ],
)
async def test_what_a_broker_did_not_take_is_sent_again_in_its_order(fault: Any) -> None:
    brokers = Brokers(dict(PLACES))
    brokers.faults = [fault, fault]
    sender = BatchSender(brokers, 5)
    writer = Writer(1, 0)
    futures = [f for value in (b"a", b"b", b"c") for f in sender.send("log", 0, [record(value)], writer)]
    assert [await future for future in futures] == [0, 1, 2]
    assert brokers.logs["log", 0] == [b"a", b"b", b"c"]
    assert brokers.updates, "the leader may be another by now"


async def test_an_answer_that_was_lost_does_not_repeat_a_record() -> None:
    brokers = Brokers(dict(PLACES))
    brokers.faults = [brokers.take_and_die]
    sender = BatchSender(brokers, 5)
    writer = Writer(1, 0)
    futures = [f for value in (b"a", b"b") for f in sender.send("log", 0, [record(value)], writer)]
    assert [await future for future in futures] == [-1, 1], "the broker has it, and does not say where"
    assert brokers.logs["log", 0] == [b"a", b"b"]


async def test_who_stops_waiting_for_what_was_sent_leaves_no_doubt_about_what_follows() -> None:
    """Else the next record could be taken for the one that was given up, and silently be dropped."""
    brokers = Brokers(dict(PLACES))
    brokers.faults = [brokers.take_and_die]
    brokers.answering.clear()
    sender = BatchSender(brokers, 5)
    writer = Writer(1, 0)
    (given_up,) = sender.send("log", 0, [record(b"a")], writer)
    await brokers.asked.wait()
    given_up.cancel()
    (next_one,) = sender.send("log", 0, [record(b"b")], writer)
    brokers.answering.set()
    assert await next_one == 1
    assert brokers.logs["log", 0] == [b"a", b"b"]


async def test_a_refusal_harms_neither_what_follows_nor_other_partitions() -> None:
    brokers = Brokers(dict(PLACES))
    sender = BatchSender(brokers, 5)
    for writer in (Writer(1, 0), None):
        brokers.logs.clear()
        brokers.sequences.clear()
        brokers.faults = [lambda _: {("log", 0): MessageSizeTooLargeError.errno}]
        refused, other = sender.send("log", 0, [record(b"huge")], writer) + sender.send("log", 1, [record(b"b")], None)
        (follows,) = sender.send("log", 0, [record(b"c")], writer)
        with pytest.raises(MessageSizeTooLargeError):
            await refused
        assert [await other, await follows] == [0, 0]
        assert brokers.logs == {("log", 0): [b"c"], ("log", 1): [b"b"]}


@pytest.mark.parametrize("error", [InvalidProducerEpoch, TopicAuthorizationFailedError])
async def test_a_refusal_for_good_reaches_who_waits(error: type[KafkaError]) -> None:
    brokers = Brokers(dict(PLACES))
    brokers.faults = [lambda _: {("log", 0): error.errno}]
    (future,) = BatchSender(brokers, 5).send("log", 0, [record(b"a")], Writer(1, 0))
    with pytest.raises(error):
        await future


async def test_a_fault_of_the_client_reaches_who_waits() -> None:
    brokers = Brokers(dict(PLACES))
    brokers.faults = [lambda _: RuntimeError("a bug")]
    (future,) = BatchSender(brokers, 5).send("log", 0, [record(b"a")], Writer(1, 0))
    with pytest.raises(RuntimeError, match="a bug"):
        await future


async def test_a_partition_without_a_leader_is_waited_for() -> None:
    brokers = Brokers({("log", 0): -1, ("log", 1): 1})
    sender = BatchSender(brokers, 5)
    (waits,), (goes,) = (sender.send("log", p, [record(b"a")], Writer(p, 0)) for p in (0, 1))
    assert await goes == 0
    assert not waits.done()
    brokers.leaders["log", 0] = 2
    assert await waits == 0


@pytest.mark.parametrize(
    ("leaders", "said"),
    [
        ({}, r"log: no acknowledgement for 0\.02 s; see whether the brokers are up and have this topic, .* made? anew"),
        ({("log", 3): -1}, r"log: no acknowledgement for 0\.02 s; see whether the brokers are up, then restart"),
    ],
)
async def test_nothing_is_waited_for_longer_than_a_delivery(leaders: Any, said: str) -> None:
    brokers = Brokers(leaders)
    brokers.waits = [UnknownTopicOrPartitionError()] if not leaders else []
    (future,) = BatchSender(brokers, 0.02).send("log", 3, [record(b"a")], Writer(1, 0))
    with pytest.raises(DeliveryError, match=said.replace("made?", "makes one")):
        await future


async def test_brokers_that_never_answer_are_not_waited_for_either() -> None:
    brokers = Brokers(dict(PLACES))
    brokers.answering.clear()
    sender = BatchSender(brokers, 0.02)
    (future,) = sender.send("log", 0, [record(b"a")], Writer(1, 0))
    with pytest.raises(DeliveryError, match=r"no acknowledgement for 0\.02 s"):
        await future
    await sender.stop()


async def test_a_topic_that_is_not_for_us_to_see_is_said_at_once() -> None:
    brokers = Brokers({})
    brokers.waits = [TopicAuthorizationFailedError("log")]
    (future,) = BatchSender(brokers, 5).send("log", 3, [record(b"a")], Writer(1, 0))
    with pytest.raises(TopicAuthorizationFailedError):
        await future


async def test_what_was_given_up_is_not_sent_and_not_sent_again() -> None:
    brokers = Brokers(dict(PLACES))
    brokers.answering.clear()
    brokers.faults = [lambda _: KafkaConnectionError("lost")]
    sender = BatchSender(brokers, 5)
    old, new = Writer(1, 0), Writer(1, 1)
    on_its_way, waits = [f for v in (b"a", b"b") for f in sender.send("log", 0, [record(v)], old)]
    await brokers.asked.wait()
    sender.drop([old])
    assert waits.cancelled()
    (future,) = sender.send("log", 0, [record(b"c")], new)
    brokers.answering.set()
    assert await future == 0
    assert brokers.logs["log", 0] == [b"c"]
    with pytest.raises((asyncio.CancelledError, KafkaError)):
        await on_its_way


async def test_a_request_is_bounded_and_all_partitions_get_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sender, "MAX_REQUEST_BYTES", 1)
    brokers = Brokers({("log", p): 1 for p in range(3)})
    sender = BatchSender(brokers, 5)
    writers = [Writer(p, 0) for p in range(3)]
    futures = [f for _ in range(2) for p in range(3) for f in sender.send("log", p, [record(b"a")], writers[p])]
    assert [await future for future in futures] == [0, 0, 0, 1, 1, 1]
    assert [p for _, batches in brokers.requests for _, p, _ in batches] == [0, 1, 2, 0, 1, 2]


async def test_the_number_of_the_next_record_begins_anew_where_brokers_have_it_begin() -> None:
    brokers = Brokers(dict(PLACES))
    place = TopicPartition("log", 0)
    writer = Writer(1, 0, {place: 2**31 - 1})
    brokers.sequences["log", 0, 1] = 2**31 - 1
    sender = BatchSender(brokers, 5)
    futures = [f for v in (b"a", b"b") for f in sender.send("log", 0, [record(v)], writer)]
    assert [await future for future in futures] == [0, 1]
    assert writer.sequences[place] == 1


async def test_stop_lets_nobody_wait() -> None:
    brokers = Brokers(dict(PLACES))
    brokers.answering.clear()
    sender = BatchSender(brokers, 5)
    futures = [f for v in (b"a", b"b") for f in sender.send("log", 0, [record(v)], Writer(1, 0))]
    await brokers.asked.wait()
    await sender.stop()
    assert all(future.done() for future in futures)
