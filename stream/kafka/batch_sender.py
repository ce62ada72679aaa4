"""Batches of many partitions, each in the name of its own producer, in common requests to the brokers.

A producer of the client library is one producer at the brokers, with its own connections: a worker that owns forty
partitions had forty of them, and each event its own request on each. What tells producers apart is in the batches
alone, so one request carries the batches of all partitions that a broker leads. There is one request on its way to each
broker at a time; what comes in meanwhile goes together in the next. So nothing waits where there is little to send, and
where there is much, requests grow instead of their number.
"""

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka.errors import DuplicateSequenceNumber, KafkaError, UnknownTopicOrPartitionError, for_code
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.structs import TopicPartition

from stream.errors import DeliveryError
from stream.kafka.client_internals import metadata_wait

#: Uncompressed bytes of one batch; well below the brokers' default limit of 1 MiB.
MAX_BATCH_BYTES: Final = 512 * 1024
#: Bytes of one request, but for its last batch; brokers take a hundred million.
MAX_REQUEST_BYTES: Final = 8 << 20
# The client's lz4 runs at level 9: 24 us for a history of 100, against 2.6 us of snappy (80 % of the size).
_SNAPPY: Final = 2
_MAGIC: Final = 2
_RETRY_S: Final = 0.1
_ALL_IN_SYNC: Final = -1
_SEQUENCE_END: Final = 1 << 31

OutRecord = tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]


@dataclass(slots=True)
class Writer:
    """A producer as brokers know it; they refuse its batches once its transactional id has a higher epoch.

    Attributes:
        producer_id: given by the brokers.
        epoch: the producer epoch.
        sequences: of each partition, the number of its next record.
        is_dropped: nothing more is sent in its name.
    """

    producer_id: int
    epoch: int
    sequences: dict[TopicPartition, int] = field(default_factory=dict)
    is_dropped: bool = False


@dataclass(slots=True, eq=False)
class _Batch:
    place: TopicPartition
    builder: DefaultRecordBatchBuilder
    count: int
    writer: Writer | None
    future: asyncio.Future[int]
    expiry: asyncio.TimerHandle
    data: bytes | None = None

    @property
    def is_due(self) -> bool:
        """Whether it is to be sent, or sent again.

        What was sent once is, though nobody waits for it any more: until brokers say that they have it, the number of
        the record that follows isn't known.
        """
        if self.writer is not None and self.writer.is_dropped:
            return False
        return not self.future.done() or (self.data is not None and self.writer is not None)

    def encoded(self) -> bytes:
        """The batch as it is sent, and sent again: brokers know by its sequence that they have it already."""
        if self.data is None:
            if (writer := self.writer) is not None:
                sequence = writer.sequences.get(self.place, 0)
                self.builder.set_producer_state(writer.producer_id, writer.epoch, sequence)
            self.data = self.builder.build()
        return self.data

    def succeed(self, offset: int) -> None:
        """The brokers have it, from this offset on."""
        if (writer := self.writer) is not None:
            sequence = writer.sequences.get(self.place, 0)
            writer.sequences[self.place] = (sequence + self.count) % _SEQUENCE_END
        self.expiry.cancel()
        if not self.future.done():
            self.future.set_result(offset + self.count - 1 if offset >= 0 else -1)

    def fail(self, exc: Exception) -> None:
        """Tell who waits; the sequence stays, for the brokers have taken nothing."""
        self.expiry.cancel()
        if not self.future.done():
            self.future.set_exception(exc)
            self.future.exception()  # who waited may be gone


class BatchSender:
    """Sends batches over one client of aiokafka, in the order in which each partition's were given.

    Args:
        client: what knows the brokers; started and stopped by its owner.
        timeout_s: what is not acknowledged for so long has failed.
    """

    def __init__(self, client: Any, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._waiting: dict[TopicPartition, deque[_Batch]] = {}
        self._on_their_way: set[TopicPartition] = set()
        self._busy: set[int] = set()
        self._sought: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_scheduled = False

    def send(
        self, topic: str, partition: int, records: Sequence[OutRecord], writer: Writer | None
    ) -> list[asyncio.Future[int]]:
        """Queue records for one partition; without a writer they may arrive twice, and a refusal harms no other.

        Returns:
            A future for each batch: the offset of its last record (-1 where the broker doesn't say), or the client's
            `KafkaError`, or a `DeliveryError` when the time is up.
        """
        place = TopicPartition(topic, partition)
        now_ms = time.time_ns() // 1_000_000  # one look at the clock for all
        futures: list[asyncio.Future[int]] = []
        builder, count = _builder(), 0
        for key, value, headers in records:
            if builder.append(count, now_ms, key, value, headers) is None:
                futures.append(self._queue(place, builder, count, writer))
                builder, count = _builder(), 0
                builder.append(count, now_ms, key, value, headers)
            count += 1
        if count:
            futures.append(self._queue(place, builder, count, writer))
        return futures

    def drop(self, writers: Sequence[Writer]) -> None:
        """Send nothing more in these names; what is on its way may arrive."""
        for writer in writers:
            writer.is_dropped = True
        for queue in self._waiting.values():
            for batch in queue:
                if not batch.is_due:
                    batch.expiry.cancel()
                    batch.future.cancel()

    async def stop(self) -> None:
        """Send nothing more."""
        for queue in self._waiting.values():
            for batch in queue:
                batch.expiry.cancel()
                batch.future.cancel()
        self._waiting.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what waits -----------------------------------------------------------------------------------------------

    def _queue(
        self, place: TopicPartition, builder: DefaultRecordBatchBuilder, count: int, writer: Writer | None
    ) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        expiry = loop.call_later(self._timeout_s, self._expire, place.topic, future)
        self._waiting.setdefault(place, deque()).append(_Batch(place, builder, count, writer, future, expiry))
        self._schedule()
        return future

    def _expire(self, topic: str, future: asyncio.Future[int]) -> None:
        if not future.done():
            future.set_exception(self._unacknowledged(topic))
            future.exception()

    def _unacknowledged(self, topic: str) -> DeliveryError:
        what = f"{topic}: no acknowledgement for {self._timeout_s:g} s; see whether the brokers are up"
        if self._client.cluster.partitions_for_topic(topic) is None:
            return DeliveryError(
                f"{what} and have this topic, then restart the worker, which makes one anew that was deleted"
            )
        return DeliveryError(f"{what}, then restart the worker")

    def _schedule(self) -> None:
        """Send once all that is ready now is queued: other partitions' steps often end in the same turn of the loop."""
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._send_waiting)

    def _send_waiting(self) -> None:
        self._is_scheduled = False
        by_node: dict[int, list[_Batch]] = {}
        sizes: dict[int, int] = {}
        for place in list(self._waiting):
            if place in self._on_their_way:
                continue
            queue = self._waiting[place]
            while queue and not queue[0].is_due:
                queue.popleft()
            if not queue:
                del self._waiting[place]
                continue
            leader = self._client.cluster.leader_for_partition(place)
            if leader is None or leader < 0:
                self._seek(place.topic)
            elif leader not in self._busy and sizes.get(leader, 0) < MAX_REQUEST_BYTES:
                by_node.setdefault(leader, []).append(queue[0])
                sizes[leader] = sizes.get(leader, 0) + len(queue[0].encoded())
                self._waiting[place] = self._waiting.pop(place)  # to the end: all get their turn
        for node, batches in by_node.items():
            self._busy.add(node)
            self._on_their_way.update(batch.place for batch in batches)
            self._run(self._request(node, batches))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- requests -------------------------------------------------------------------------------------------------

    async def _request(self, node: int, batches: Sequence[_Batch]) -> None:
        try:
            again = await self._ask(node, batches)
        except Exception as exc:  # noqa: BLE001 - a fault of ours or of the client's: whoever waits must learn of it
            again = []
            for batch in batches:
                batch.fail(exc)
        finally:
            self._busy.discard(node)
        self._on_their_way.difference_update(batch.place for batch in batches if batch not in again)
        for batch in batches:
            if batch not in again:
                self._take_out(batch)
        self._schedule()
        if again:
            await asyncio.sleep(_RETRY_S)
            self._on_their_way.difference_update(batch.place for batch in again)
            self._schedule()

    def _take_out(self, batch: _Batch) -> None:
        queue = self._waiting.get(batch.place)
        if queue and queue[0] is batch:
            queue.popleft()
            if not queue:
                del self._waiting[batch.place]

    async def _ask(self, node: int, batches: Sequence[_Batch]) -> list[_Batch]:
        """Send a request; return those of its batches that are to be sent again."""
        topics: dict[str, list[tuple[int, bytes]]] = {}
        for batch in batches:
            topics.setdefault(batch.place.topic, []).append((batch.place.partition, batch.encoded()))
        request = ProduceRequest(None, _ALL_IN_SYNC, int(self._timeout_s * 1000), list(topics.items()))
        try:
            response = await self._client.send(node, request)
        except KafkaError as exc:
            return [batch for batch in batches if self._is_to_be_repeated(batch, exc)]
        answers = {
            TopicPartition(topic, answer[0]): (answer[1], answer[2])
            for topic, partitions in response.topics
            for answer in partitions
        }
        again = []
        for batch in batches:
            code, offset = answers[batch.place]
            error = for_code(code)
            if not code or error is DuplicateSequenceNumber:
                batch.succeed(offset)
            elif self._is_to_be_repeated(batch, error(batch.place.topic)):
                again.append(batch)
        return again

    def _is_to_be_repeated(self, batch: _Batch, exc: KafkaError) -> bool:
        if getattr(exc, "invalid_metadata", False):
            self._client.force_metadata_update()
        if exc.retriable and batch.is_due:
            return True
        batch.fail(exc)
        return False

    def _seek(self, topic: str) -> None:
        """Find the leaders of a topic's partitions."""
        if topic not in self._sought:
            self._sought.add(topic)
            self._run(self._find_leaders(topic))

    async def _find_leaders(self, topic: str) -> None:
        try:
            await metadata_wait(self._client)(topic)
            await self._client.force_metadata_update()
            await asyncio.sleep(_RETRY_S)
        except UnknownTopicOrPartitionError:
            pass  # it is sought until the time of what waits for it is up
        except KafkaError as exc:  # it is not for us to see
            for place, queue in self._waiting.items():
                if place.topic == topic:
                    for batch in queue:
                        batch.fail(exc)
        finally:
            self._sought.discard(topic)
        self._schedule()


def _builder() -> DefaultRecordBatchBuilder:
    return DefaultRecordBatchBuilder(
        _MAGIC,
        _SNAPPY,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=0,
        batch_size=MAX_BATCH_BYTES,
    )
