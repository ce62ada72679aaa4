"""What we take for granted of the Kafka client's private parts holds in the version that is pinned."""

import asyncio
import tomllib
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import aiokafka
import pytest
from aiokafka.consumer import fetcher
from aiokafka.structs import TopicPartition
from confluent_kafka import Producer
from kafka_broker import KafkaBroker
from topic_admin import create_topic, delete_topic

from stream.errors import ConfigError
from stream.kafka import client_internals as internals
from stream.kafka.bounded_fetch import BoundedRecords
from stream.kafka.embedded_broker import DevBroker

ROOT = Path(__file__).resolve().parents[3]
PLACE = TopicPartition("events", 0)


def test_the_version_that_is_tested_is_the_one_that_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"aiokafka=={internals.TESTED}" in project["optional-dependencies"]["worker"]
    assert version("aiokafka") == internals.TESTED


async def test_what_the_client_knows_of_a_partition_and_of_its_topic() -> None:
    with DevBroker() as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap})
        producer.produce("events", b"x", partition=0)
        assert producer.flush(60) == 0
        consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=broker.bootstrap, group_id="g", auto_offset_reset="earliest"
        )
        assert internals.group_fault(consumer) is None, "brokers may take their time, and it is asked meanwhile"
        await consumer.start()
        try:
            assert internals.partition_state(consumer, PLACE) is None
            consumer.assign([PLACE])
            assert (await consumer.getone()).value == b"x"
            state = internals.partition_state(consumer, PLACE)
            assert (state.has_valid_position, state.position, state.highwater) == (True, 1, 1)
            assert state.timestamp > 1_700_000_000_000
            assert internals.group_fault(consumer) is None
            client = internals.connection_of(consumer)
            await client._wait_on_metadata("events")
            known = internals.known_partitions(client.cluster, "events")
            assert {entry[1] for entry in known} == client.cluster.partitions_for_topic("events")
            assert internals.known_partitions(client.cluster, "nothing") == []
        finally:
            await consumer.stop()


@pytest.mark.parametrize("is_mended", [False, True])
async def test_a_stop_while_a_fetch_that_has_failed_waits(is_mended: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Without the mend it is cancelled; if it is no more, the client has mended it."""
    with DevBroker() as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap})
        producer.produce("events", b"x", partition=0)
        assert producer.flush(60) == 0
        consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=broker.bootstrap)
        if is_mended:
            internals.stop_whatever_fetches(consumer)
        await consumer.start()
        consumer.assign([PLACE])
        async with asyncio.timeout(60):
            await consumer.position(PLACE)
        consumer._fetcher._retry_backoff = 600.0
    async with asyncio.timeout(60):
        while "Failed fetch messages" not in caplog.text:  # noqa: ASYNC110 - the client has no event for it
            await asyncio.sleep(0.01)
    if is_mended:
        await consumer.stop()
        assert not consumer._client._conns
    else:
        with pytest.raises(asyncio.CancelledError):
            await consumer.stop()
        await consumer._client.close()


async def test_the_wait_for_metadata_that_is_set_is_the_one_that_is_used() -> None:
    with DevBroker() as broker:
        producer = aiokafka.AIOKafkaProducer(bootstrap_servers=broker.bootstrap)
        waited = []
        wait = internals.metadata_wait(producer.client)

        async def ours(topic: str) -> object:
            waited.append(topic)
            return await wait(topic)

        internals.set_metadata_wait(producer.client, ours)
        await producer.start()
        try:
            await producer.send_and_wait("events", b"x", partition=0)
        finally:
            await producer.stop()
        assert waited == ["events"]


class Member:
    """A static member of a group whose coordinator is real."""

    def __init__(self, bootstrap: str, group: str, topic: str) -> None:
        self._topic = topic
        self.consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            group_id=group,
            group_instance_id="the-one",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            heartbeat_interval_ms=200,
            session_timeout_ms=30_000,
        )
        self.taken = asyncio.Event()

    @property
    def part(self) -> tuple[str, int]:
        """Under what the group knows it, and since which generation."""
        return self.consumer._coordinator.member_id, self.consumer._coordinator.generation

    async def join(self) -> None:
        await self.consumer.start()
        internals.heed_instance(self.consumer, self.taken.set)
        self.consumer.subscribe([self._topic])
        async with asyncio.timeout(60):
            while not self.consumer.assignment():
                await self.consumer.getmany(timeout_ms=50)


@pytest.fixture
async def members(kafka: KafkaBroker, unique: str) -> AsyncIterator[list[Member]]:
    """Two with one name, none of which has joined."""
    create_topic(kafka.bootstrap, unique, 1)
    both = [Member(kafka.bootstrap, unique, unique) for _ in range(2)]
    yield both
    for member in both:
        await member.consumer.stop()
    delete_topic(kafka.bootstrap, unique)


async def test_a_member_whose_name_was_taken_is_told_by_its_heartbeat_and_does_not_take_it_back(
    members: list[Member],
) -> None:
    older, newer = members
    await older.join()
    _, generation = older.part
    assert not await internals.is_instance_taken(older.consumer)
    await newer.join()
    assert await internals.is_instance_taken(older.consumer)
    async with asyncio.timeout(60):
        await older.taken.wait()
    member, again = newer.part
    assert again == generation, "the group was made anew"
    with pytest.raises(internals.InstanceTaken):
        await older.consumer.commit({TopicPartition(older._topic, 0): 0})
    assert not newer.taken.is_set()
    await newer.consumer.commit({TopicPartition(newer._topic, 0): 0})
    assert newer.part == (member, generation)


async def test_a_member_whose_name_was_taken_is_told_by_its_commit(members: list[Member]) -> None:
    older, newer = members
    await older.join()
    await older.consumer._coordinator._stop_heartbeat_task()
    await newer.join()
    with pytest.raises(internals.InstanceTaken):
        await older.consumer.commit({TopicPartition(older._topic, 0): 0})
    assert older.taken.is_set()
    assert not newer.taken.is_set()


async def test_a_member_that_comes_back_with_its_name_is_where_it_was(members: list[Member]) -> None:
    before, after = members
    await before.join()
    _, generation = before.part
    await before.consumer.stop()
    assert not before.taken.is_set()
    await after.join()
    assert after.part[1] == generation, "it had left, or the group was made anew"


def test_another_version_of_the_client_is_refused_and_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "MemoryRecords", internals.MemoryRecords)
    monkeypatch.setattr(internals, "version", lambda name: "9.9")
    with pytest.raises(ConfigError, match=r"aiokafka 9\.9 is installed, .* pip install aiokafka==0\.14\.0"):
        internals.read_batches_as(BoundedRecords)
    assert fetcher.MemoryRecords is internals.MemoryRecords


def test_a_client_that_was_changed_by_somebody_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "MemoryRecords", object)
    with pytest.raises(ConfigError, match="aiokafka"):
        internals.read_batches_as(BoundedRecords)


def test_batches_are_read_as_told_and_telling_twice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "MemoryRecords", internals.MemoryRecords)
    for _ in range(2):
        internals.read_batches_as(BoundedRecords)
        assert fetcher.MemoryRecords is BoundedRecords
