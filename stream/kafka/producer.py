"""Faust's producer: whole batches to a given partition, in the name of its owner, whom the broker can tell from others.

A producer that begins under a transactional id shuts out all that began under it before: the broker gives it a higher
producer epoch and refuses batches of a lower one. That holds for plain idempotent batches as well, once a partition has
seen the higher epoch. So each partition has a transactional id; its new owner begins under it, ends one empty
transaction on the topics it writes to, whose markers carry the epoch there, and goes on without transactions. An owner
that was paused and comes back can't leave an older state behind, at no cost for a batch.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import aiokafka
from aiokafka.errors import (
    InvalidProducerEpoch,
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
)
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.structs import TopicPartition
from faust.transport.drivers import aiokafka as driver

from stream.errors import DeliveryError, Fenced, OwnershipError, RecordTooLarge
from stream.kafka.client_internals import commit_empty_transaction
from stream.kafka.host import Host

#: Uncompressed bytes of one produced batch; well below the broker's default limit of 1 MiB.
MAX_BATCH_BYTES: Final = 512 * 1024
#: An owner that dies between the beginning and the end of its empty transaction holds up readers for no longer.
FENCE_TIMEOUT_MS: Final = 10_000
NO_BROKER_RETRY_S: Final = 0.2
_STOP_S: Final = 5.0

#: Where Faust's service machinery logs, ours included, so that our own log stays readable.
FAUST_LOG: Final = logging.getLogger("faust.uemb")

OutRecord = tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]


class Producer(driver.Producer):
    """One client for each partition that is owned, and one for dead letters."""

    logger = FAUST_LOG
    app: Host
    _letters: aiokafka.AIOKafkaProducer | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._owned: dict[int, aiokafka.AIOKafkaProducer] = {}
        super().__init__(*args, **kwargs)

    async def create_topic(self, topic: str, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: `stream.kafka.topics` has created and checked every topic."""

    def _settings_default(self) -> Mapping[str, Any]:
        return {
            **super()._settings_default(),
            "acks": "all",
            "enable_idempotence": True,
            "linger_ms": 0,
            "max_batch_size": MAX_BATCH_BYTES,
            "max_request_size": self.app.max_request_bytes,
            # The client's lz4 runs at level 9: 24 us for a history of 100, against 2.6 us of snappy (80 % of the size).
            "compression_type": "snappy",
        }

    def _new_producer(self, transactional_id: str | None = None) -> aiokafka.AIOKafkaProducer:
        client: aiokafka.AIOKafkaProducer = self.app.clients.producer(**self._settings_default())
        return client

    async def on_start(self) -> None:
        """Start Faust's client and that of dead letters."""
        await super().on_start()
        # An idempotent producer is lost after a refusal (its sequence has a hole), and dead letters may be refused.
        self._letters = self.app.clients.producer(**{**self._settings_default(), "enable_idempotence": False})
        await self._letters.start()

    async def on_stop(self) -> None:
        """Stop all clients."""
        await super().on_stop()
        await self.give_up_all()
        if self._letters is not None:
            await self._letters.stop()

    async def take(self, partition: int, topics: Sequence[str]) -> None:
        """Write to a partition of `topics` from here on, and shut every earlier owner out of it.

        Raises:
            DeliveryError: the broker refuses, or none is up for as long as a delivery may take.
        """
        try:
            client = await self._open_client(partition)
            await fence(client, partition, topics)
        except KafkaError as exc:
            msg = f"the broker refuses to fence partition {partition} ({type(exc).__name__}); see the brokers' logs"
            raise DeliveryError(msg) from exc

    async def _open_client(self, partition: int) -> Any:
        deadline = time.monotonic() + self.app.settings.delivery_timeout_s
        while True:
            client = self._owned[partition] = self.app.clients.producer(
                **{**self._settings_default(), "transactional_id": f"{self.app.conf.id}-{partition}"},
                transaction_timeout_ms=FENCE_TIMEOUT_MS,
            )
            try:
                await client.start()
            except AssertionError as exc:  # the metadata lists no broker, which the client takes for a fault of its own
                await _stop(client)
                if time.monotonic() > deadline:
                    msg = "the brokers list none of them as up; see how they are, then restart the worker"
                    raise DeliveryError(msg) from exc
                await asyncio.sleep(NO_BROKER_RETRY_S)
            else:
                return client

    async def give_up_all(self) -> None:
        """Stop the clients of all partitions."""
        clients, self._owned = list(self._owned.values()), {}
        await asyncio.gather(*map(_stop, clients))

    async def send_records(self, topic: str, partition: int, records: Sequence[OutRecord]) -> list[asyncio.Future[Any]]:
        """Queue records for one partition, in order; return a future per batch, done when it is acknowledged.

        Raises:
            Fenced: the partition has a newer owner.
            DeliveryError: there is no room for them, or no such topic, for as long as a delivery may take.
        """
        client = self._owned.get(partition)
        if client is None:
            msg = f"partition {partition} is not taken for writing"
            raise OwnershipError(msg)
        return await self._send(client, topic, partition, records)

    async def send_dead_letters(
        self, topic: str, partition: int, records: Sequence[OutRecord]
    ) -> list[asyncio.Future[Any]]:
        """The same for dead letters, which may be refused for their size without harm to what follows."""
        if self._letters is None:
            msg = "the producer is not started"
            raise OwnershipError(msg)
        return await self._send(self._letters, topic, partition, records)

    async def send_unfenced(self, topic: str, partition: int, key: bytes, value: bytes) -> asyncio.Future[Any]:
        """Queue one record that any worker may write."""
        return (await self.send_dead_letters(topic, partition, [(key, value, [])]))[0]

    async def _send(
        self, client: aiokafka.AIOKafkaProducer, topic: str, partition: int, records: Sequence[OutRecord]
    ) -> list[asyncio.Future[Any]]:
        futures: list[asyncio.Future[Any]] = []
        now_ms = time.time_ns() // 1_000_000  # one look at the clock for all
        builder = client.create_batch()
        for key, value, headers in records:
            if builder.append(key=key, value=value, timestamp=now_ms, headers=headers) is None:
                futures.append(await self._queue(client, builder, topic, partition))
                builder = client.create_batch()
                builder.append(key=key, value=value, timestamp=now_ms, headers=headers)
        if builder.record_count():
            futures.append(await self._queue(client, builder, topic, partition))
        return futures

    async def _queue(
        self, client: aiokafka.AIOKafkaProducer, batch: BatchBuilder, topic: str, partition: int
    ) -> asyncio.Future[Any]:
        """Hand a batch to the client, which by itself would wait 20 minutes for a topic that was deleted."""
        timeout_s = self.app.settings.delivery_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                with _said_our_way(topic):
                    queued: asyncio.Future[Any] = await client.send_batch(batch, topic, partition=partition)
                    return queued
        except TimeoutError as exc:
            if client.client.cluster.partitions_for_topic(topic) is None:
                msg = (
                    f"{topic}: no acknowledgement for {timeout_s:g} s; see whether the brokers are up and have this "
                    "topic, then restart the worker, which makes one anew that was deleted"
                )
                raise DeliveryError(msg) from exc
            raise _unacknowledged(topic, timeout_s) from exc


async def fence(client: aiokafka.AIOKafkaProducer, partition: int, topics: Iterable[str]) -> None:
    """Have the brokers refuse whatever earlier clients of the same transactional id still send to these places.

    One empty transaction takes the client's epoch there; from then on its batches are plain idempotent ones, under that
    epoch.

    Raises:
        KafkaError: the broker refuses.
    """
    await commit_empty_transaction(client, [TopicPartition(topic, partition) for topic in topics])


async def acknowledged(futures: Iterable[asyncio.Future[Any]], timeout_s: float, what: str) -> int:
    """Wait until all are acknowledged; return the last offset, or -1 when there was nothing to wait for.

    Raises:
        Fenced: the partition has a newer owner.
        DeliveryError: the broker refused, or did not answer in time.
    """
    pending = list(futures)
    if not pending:
        return -1
    try:
        async with asyncio.timeout(timeout_s):
            with _said_our_way(what):
                results = [await future for future in pending]
    except TimeoutError as exc:
        raise _unacknowledged(what, timeout_s) from exc
    return int(results[-1].offset)


@contextlib.contextmanager
def _said_our_way(what: str) -> Iterator[None]:
    """Turn the client's errors into ours."""
    try:
        yield
    except MessageSizeTooLargeError as exc:
        msg = f"{what}: a record is larger than the topic admits; raise its max.message.bytes"
        raise RecordTooLarge(msg) from exc
    except (ProducerFenced, InvalidProducerEpoch) as exc:
        msg = f"{what}: a partition has a newer owner; this worker has lost it and stops"
        raise Fenced(msg) from exc
    except InvalidTimestampError as exc:
        msg = (
            f"{what}: this worker's clock is ahead of the brokers' by more than they admit "
            "(message.timestamp.after.max.ms); set the clock, then restart the worker"
        )
        raise DeliveryError(msg) from exc
    except KafkaError as exc:
        msg = f"{what}: the broker refused ({type(exc).__name__})"
        raise DeliveryError(msg) from exc


def _unacknowledged(what: str, timeout_s: float) -> DeliveryError:
    return DeliveryError(
        f"{what}: no acknowledgement for {timeout_s:g} s; see whether the brokers are up, then restart the worker"
    )


async def _stop(client: aiokafka.AIOKafkaProducer) -> None:
    # one that was fenced, or whose broker is away, has nothing left that must arrive
    with contextlib.suppress(TimeoutError, KafkaError):
        await asyncio.wait_for(client.stop(), _STOP_S)
