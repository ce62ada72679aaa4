"""The private parts of aiokafka that we rely on: all of them, in one place.

What the client offers no way to, we reach for here. Each function says what it takes for granted; its tests run the
pinned version, and `read_batches_as` refuses another one.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Final

import aiokafka
from aiokafka.consumer import fetcher
from aiokafka.errors import GroupCoordinatorNotAvailableError
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition

from stream.errors import ConfigError

TESTED: Final = "0.14.0"


# -- consumers --------------------------------------------------------------------------------------------------------


def connection_of(consumer: aiokafka.AIOKafkaConsumer) -> Any:
    """The client under a consumer: its connections and metadata. A producer shows its own as `client`."""
    return consumer._client


def group_fault(consumer: aiokafka.AIOKafkaConsumer) -> Exception | None:
    """Why the group will not have this member, if so: the client raises it only to those who fetch already."""
    fault: Exception | None = consumer._coordinator._pending_exception
    return fault


def partition_state(consumer: aiokafka.AIOKafkaConsumer, place: TopicPartition) -> Any:
    """What the client keeps of a partition: position, high watermark, time of the last answer; None if not assigned."""
    subscription = consumer._subscription.subscription
    assignment = None if subscription is None else subscription.assignment
    return None if assignment is None else assignment.state_value(place)


def hold_fetches(consumer: aiokafka.AIOKafkaConsumer, hold: Callable[[bool], tuple[int, int]]) -> None:
    """Have fetches held at the brokers as `hold` says: for how many ms, or until how many bytes are there.

    It is told whether partitions are left out, for what was fetched of them is not taken in yet.
    """
    fetcher = consumer._fetcher
    requests = fetcher._get_actions_per_node

    def held(assignment: Any) -> Any:
        fetcher._fetch_max_wait_ms, fetcher._fetch_min_bytes = hold(bool(fetcher._records))
        return requests(assignment)

    fetcher._get_actions_per_node = held


def outlast_empty_metadata(consumer: aiokafka.AIOKafkaConsumer) -> None:
    """Have the group's coordinator asked for again while metadata lists no broker, as those that start may say.

    The client takes it for a fault of its own, and its part in the group would be over.
    """
    client = connection_of(consumer)
    lookup = client.coordinator_lookup

    async def ask(*args: Any) -> Any:
        if client.get_random_node() is None:
            await client.bootstrap()
        if client.get_random_node() is None:
            raise GroupCoordinatorNotAvailableError
        return await lookup(*args)

    client.coordinator_lookup = ask


def read_batches_as(reader: type) -> None:
    """Have all consumers of this process read what they fetched with `reader`, in place of the client's own class.

    Raises:
        ConfigError: it is a version of the client that may read elsewhere: batches would be expanded without a bound.
    """
    if fetcher.MemoryRecords is reader:
        return
    if (found := version("aiokafka")) != TESTED or fetcher.MemoryRecords is not MemoryRecords:
        msg = f"aiokafka {found} is installed, and this release is made for {TESTED}: pip install aiokafka=={TESTED}"
        raise ConfigError(msg)
    fetcher.MemoryRecords = reader


# -- metadata ---------------------------------------------------------------------------------------------------------


def known_partitions(cluster: Any, topic: str) -> list[tuple[Any, ...]]:
    """A topic's partitions as metadata had them last, in the shape in which an answer lists them; none: not known."""
    known = cluster._partitions.get(topic) or {}
    return [(p.error, p.partition, p.leader, p.replicas, p.isr) for p in known.values()]


def metadata_wait(client: Any) -> Any:
    """The client's wait for a topic that it does not know yet."""
    return client._wait_on_metadata


def set_metadata_wait(client: Any, wait: Any) -> None:
    """Have the client wait like this instead."""
    client._wait_on_metadata = wait


# -- producers --------------------------------------------------------------------------------------------------------


async def commit_empty_transaction(producer: aiokafka.AIOKafkaProducer, places: Sequence[TopicPartition]) -> None:
    """Take the producer's epoch to `places` with a transaction of nothing; it is a plain idempotent producer after it.

    Raises:
        KafkaError: the broker refuses.
    """
    manager = producer._txn_manager
    manager.begin_transaction()
    for place in places:
        manager.maybe_add_partition_to_txn(place)
    await producer.commit_transaction()
    manager.transactional_id = None


def producer_id_and_epoch(producer: aiokafka.AIOKafkaProducer) -> tuple[int, int]:
    """Under what the brokers know a producer that has begun."""
    manager = producer._txn_manager
    return int(manager.producer_id), int(manager.producer_epoch)
