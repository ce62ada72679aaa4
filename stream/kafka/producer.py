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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import aiokafka
from aiokafka.errors import (
    InvalidProducerEpoch,
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
)
from aiokafka.structs import TopicPartition
from faust.transport.drivers import aiokafka as driver

from stream.errors import DeliveryError, Fenced, OwnershipError, RecordTooLarge
from stream.kafka.batch_sender import BatchSender, OutRecord, Writer
from stream.kafka.client_internals import commit_empty_transaction, producer_id_and_epoch
from stream.kafka.host import Host

#: An owner that dies between the beginning and the end of its empty transaction holds up readers for no longer.
FENCE_TIMEOUT_MS: Final = 10_000
NO_BROKER_RETRY_S: Final = 0.2
_STOP_S: Final = 5.0

#: Where Faust's service machinery logs, ours included, so that our own log stays readable.
FAUST_LOG: Final = logging.getLogger("faust.uemb")


class Producer(driver.Producer):
    """One client for all that is written, and one for a moment for each partition that is taken."""

    logger = FAUST_LOG
    app: Host

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writers: dict[int, Writer] = {}
        self._sender: BatchSender | None = None
        super().__init__(*args, **kwargs)

    async def create_topic(self, topic: str, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: `stream.kafka.topics` has created and checked every topic."""

    def _new_producer(self, transactional_id: str | None = None) -> aiokafka.AIOKafkaProducer:
        client: aiokafka.AIOKafkaProducer = self.app.clients.producer(**self._settings_default())
        return client

    async def on_start(self) -> None:
        """Start Faust's client, over whose connections all is sent."""
        await super().on_start()
        self._sender = BatchSender(self._ensure_producer().client, self.app.settings.delivery_timeout_s)

    async def on_stop(self) -> None:
        """Stop all that sends."""
        await self.give_up_all()
        sender, self._sender = self._sender, None
        if sender is not None:
            await sender.stop()
        await super().on_stop()

    async def take(self, partition: int, topics: Sequence[str]) -> None:
        """Write to a partition of `topics` from here on, and shut every earlier owner out of it.

        Raises:
            DeliveryError: the broker refuses, or none is up for as long as a delivery may take.
        """
        try:
            client = await self._open_client(partition)
            try:
                await fence(client, partition, topics)
                self._writers[partition] = Writer(*producer_id_and_epoch(client))
            finally:
                await _stop(client)
        except KafkaError as exc:
            msg = f"the broker refuses to fence partition {partition} ({type(exc).__name__}); see the brokers' logs"
            raise DeliveryError(msg) from exc

    async def _open_client(self, partition: int) -> Any:
        deadline = time.monotonic() + self.app.settings.delivery_timeout_s
        while True:
            client = self.app.clients.producer(
                **{
                    **self._settings_default(),
                    "acks": "all",
                    "enable_idempotence": True,
                    "transactional_id": f"{self.app.conf.id}-{partition}",
                },
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
            except BaseException:
                await _stop(client)
                raise
            else:
                return client

    async def give_up_all(self) -> None:
        """Write to no partition any more."""
        writers, self._writers = list(self._writers.values()), {}
        if self._sender is not None:
            self._sender.drop(writers)

    def send_records(self, topic: str, partition: int, records: Sequence[OutRecord]) -> list[asyncio.Future[int]]:
        """Queue records for a partition that was taken, in order; return a future per batch for `acknowledged`.

        Raises:
            OwnershipError: it was not taken, or was given up.
        """
        writer = self._writers.get(partition)
        if writer is None:
            msg = f"partition {partition} is not taken for writing"
            raise OwnershipError(msg)
        return self._running_sender().send(topic, partition, records, writer)

    def send_unfenced(self, topic: str, partition: int, records: Sequence[OutRecord]) -> list[asyncio.Future[int]]:
        """The same for what any worker may write, and what may be refused without harm to what follows."""
        return self._running_sender().send(topic, partition, records, None)

    def _running_sender(self) -> BatchSender:
        if self._sender is None:
            msg = "the producer is not started"
            raise OwnershipError(msg)
        return self._sender


async def fence(client: aiokafka.AIOKafkaProducer, partition: int, topics: Iterable[str]) -> None:
    """Have the brokers refuse whatever earlier clients of the same transactional id still send to these places.

    One empty transaction takes the client's epoch there; from then on its batches are plain idempotent ones, under that
    epoch.

    Raises:
        KafkaError: the broker refuses.
    """
    await commit_empty_transaction(client, [TopicPartition(topic, partition) for topic in topics])


async def acknowledged(futures: Iterable[asyncio.Future[int]], what: str) -> int:
    """Wait until all are acknowledged; return the last offset, or -1 when there was nothing to wait for.

    Raises:
        Fenced: the partition has a newer owner.
        DeliveryError: the broker refused, or did not answer in time.
    """
    offset = -1
    with _said_our_way(what):
        for future in list(futures):
            offset = await future
    return offset


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


async def _stop(client: aiokafka.AIOKafkaProducer) -> None:
    # one that was fenced, or whose broker is away, has nothing left that must arrive
    with contextlib.suppress(TimeoutError, KafkaError):
        await asyncio.wait_for(client.stop(), _STOP_S)
