"""The private parts of aiokafka that we rely on: all of them, in one place.

What the client offers no way to, we reach for here. Each function says what it takes for granted; its tests run the
pinned version, and `read_batches_as` refuses another one.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, Final

import aiokafka
from aiokafka.client import ConnectionGroup
from aiokafka.consumer import fetcher
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError, UnknownMemberIdError
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.protocol.types import Int16, Int32, Schema, String
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition

from stream.errors import ConfigError

TESTED: Final = "0.14.0"
#: The error of a static member whose id another one has taken; the client has no name for it.
FENCED_INSTANCE_ID: Final = 82


# -- consumers --------------------------------------------------------------------------------------------------------


def connection_of(consumer: aiokafka.AIOKafkaConsumer) -> Any:
    """The client under a consumer: its connections and metadata. A producer shows its own as `client`."""
    return consumer._client


def group_fault(consumer: aiokafka.AIOKafkaConsumer) -> Exception | None:
    """Why the group will not have this member, if so: the client raises it only to those who fetch already.

    A consumer that is still looking for its brokers is no member yet.
    """
    coordinator = consumer._coordinator
    fault: Exception | None = None if coordinator is None else coordinator._pending_exception
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


def stop_whatever_fetches(consumer: aiokafka.AIOKafkaConsumer) -> None:
    """Have a stop come to its end also while a fetch that has failed waits to be tried again.

    The client cancels that fetch, awaits it, and takes its end for one of its own: what stops the client is cancelled
    with it, and connections stay open.
    """
    stop = consumer.stop

    async def stop_all() -> None:
        fetcher = consumer._fetcher
        if fetcher is not None and not fetcher._closed:
            close = fetcher.close

            async def close_all() -> None:
                fetches = [fetcher._fetch_task, *fetcher._pending_tasks]
                for task in fetches:
                    task.cancel()
                await asyncio.gather(*fetches, return_exceptions=True)
                fetcher._pending_tasks.clear()
                await close()

            fetcher.close = close_all
        await stop()

    consumer.stop = stop_all


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


class InstanceTaken(KafkaError):
    """Another member has joined the group with the instance id of this one."""


class HeartbeatResponse_v3(Response):
    """What the broker answers to `HeartbeatRequest_v3`."""

    API_KEY = 12
    API_VERSION = 3
    SCHEMA = Schema(("throttle_time_ms", Int32), ("error_code", Int16))


class HeartbeatRequest_v3(RequestStruct):
    """A heartbeat on the wire as KIP-345 has it; the client knows those before that."""

    API_KEY = 12
    API_VERSION = 3
    RESPONSE_TYPE = HeartbeatResponse_v3
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
    )


class StaticHeartbeat(Request[HeartbeatRequest_v3]):
    """A heartbeat that names the member's instance id."""

    API_KEY = 12

    def __init__(self, coordinator: Any) -> None:
        self._fields = (
            coordinator.group_id,
            coordinator.generation,
            coordinator.member_id,
            coordinator._group_instance_id,
        )

    def build(self, request_struct_class: Any) -> Any:
        """The request on the wire."""
        return request_struct_class(*self._fields)


def heed_instance(consumer: aiokafka.AIOKafkaConsumer, on_taken: Callable[[], object]) -> None:
    """Have a static member, which has begun, end its part in the group when another one takes its instance id.

    The client sends heartbeats and commits without the id. Whether the session is over or the id was taken, the broker
    answers them alike, and the client joins anew: which takes the id back, and so on in turns. Heartbeats with the id
    tell the two apart. What the client sends once it was taken raises `InstanceTaken`.
    """
    coordinator = consumer._coordinator
    send = coordinator._send_req
    taken = False

    async def send_as_instance(request: Any) -> Any:
        nonlocal taken
        if taken:
            raise InstanceTaken
        if isinstance(request, HeartbeatRequest) and coordinator.member_id:
            request = StaticHeartbeat(coordinator)
        response = await send(request)
        taken = FENCED_INSTANCE_ID in _codes(response) or (
            isinstance(request, OffsetCommitRequest)
            and UnknownMemberIdError.errno in _codes(response)
            and await is_instance_taken(consumer)
        )
        if taken:
            on_taken()
            raise InstanceTaken
        return response

    coordinator._send_req = send_as_instance


async def is_instance_taken(consumer: aiokafka.AIOKafkaConsumer) -> bool:
    """Ask the broker whether another member has joined with the instance id of this one.

    Raises:
        KafkaError: it does not answer.
    """
    coordinator = consumer._coordinator
    if not coordinator.member_id:  # it is about to join anew, and the broker may know it by the one before
        return False
    asked = await consumer._client.send(
        coordinator.coordinator_id, StaticHeartbeat(coordinator), group=ConnectionGroup.COORDINATION
    )
    return FENCED_INSTANCE_ID in _codes(asked)


def _codes(response: Any) -> set[int]:
    """The errors in an answer of the group's coordinator."""
    if hasattr(response, "error_code"):
        return {response.error_code}
    return {partition[1] for _, partitions in response.topics for partition in partitions}


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


# -- connections ------------------------------------------------------------------------------------------------------


def read_password(client: Any, read: Callable[[], str | None]) -> None:
    """Have a client log in with the password that there is now, wherever it makes a connection.

    It keeps the one that it was made with, and takes it from there whenever it connects.
    """
    connect, bootstrap = client._get_conn, client.bootstrap

    async def connect_with_password(node_id: Any, *, group: Any = ConnectionGroup.DEFAULT, **options: Any) -> Any:
        known = client._conns.get((node_id, group))
        if known is None or not known.connected():
            client._sasl_plain_password = read() or client._sasl_plain_password
        return await connect(node_id, group=group, **options)

    async def bootstrap_with_password() -> None:
        client._sasl_plain_password = read() or client._sasl_plain_password
        await bootstrap()

    client._get_conn = connect_with_password
    client.bootstrap = bootstrap_with_password


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


class _AnyText(bytearray):
    """Bytes whose parts are text, whatever they are."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _AnyText(found) if isinstance(at, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)


class _AnyNamesBatch(_DefaultRecordBatchPy):
    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer: bytearray = _AnyText(self._buffer)


def records_with_any_names(data: memoryview) -> Iterator[Any]:
    r"""Records of a batch, the bytes of a header's name that are not UTF-8 as ``\xff``.

    The client's batch in Python decodes slices of its buffer, once that is unpacked.

    Args:
        data: the batch, whole.
    """
    return iter(_AnyNamesBatch(bytes(data)))
