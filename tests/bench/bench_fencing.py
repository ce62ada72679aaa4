"""What it costs to keep a worker that was paused from writing after its successor: three ways, side by side.

    python tests/bench/bench_fencing.py [--seconds 10] [--json]

One owner writes batches to one partition of two compacted topics, as a lane does: states to the changelog, then vectors
to the output. Compared, with the first as 1:

- fence: the product's own way, one empty transaction and a claim when a partition is taken, then plain idempotent
  batches (`stream.kafka.producer.fence`);
- transactions: all batches of 100 ms in one transaction, both topics at once;
- detection: a plain idempotent producer, and a reader of its own output that looks for the records of others.

Throughput is without anybody else; latency at 50 events/s is from an event to its vector at a reader of committed
records. At the end a successor takes the partition, and the first owner sends once more.
"""

import argparse
import asyncio
import itertools
import json
import logging
import random
import time
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import aiokafka
from aiokafka.errors import InvalidProducerEpoch, KafkaError, ProducerFenced
from confluent_kafka.admin import AdminClient, NewTopic
from harness import broker

from stream.kafka.batch_sender import MAX_BATCH_BYTES
from stream.kafka.producer import FENCE_TIMEOUT_MS, fence

#: Users of a step, and bytes of their states (100 interactions) and vectors (64 dimensions).
USERS, STATE_BYTES, VECTOR_BYTES = 100, 1_000, 400
RATE = 50.0
TRANSACTION_S = 0.1
STAMP_BYTES = 8


class Owner:
    """One who writes to partition 0 of both topics.

    Args:
        bootstrap: the broker.
        topics: changelog and output.
        epoch: of its claim, the first bytes of what it writes.
    """

    name: ClassVar[str]

    def __init__(self, bootstrap: str, topics: Sequence[str], epoch: int) -> None:
        self.topics = topics
        self.epoch = epoch.to_bytes(STAMP_BYTES, "big")
        self._bootstrap = bootstrap
        common = {"acks": "all", "enable_idempotence": True, "linger_ms": 0, "compression_type": "snappy"}
        self.client = aiokafka.AIOKafkaProducer(
            bootstrap_servers=bootstrap, max_batch_size=MAX_BATCH_BYTES, **common, **self._own_settings()
        )

    def _own_settings(self) -> dict[str, Any]:
        return {"transactional_id": self.topics[0], "transaction_timeout_ms": FENCE_TIMEOUT_MS}

    async def start(self) -> None:
        """Take the partition."""
        await self.client.start()

    @abstractmethod
    async def step(self, states: Sequence[bytes], vectors: Sequence[bytes]) -> None:
        """Write a step; returns when the next may be written."""

    async def settle(self) -> None:
        """Make all that was written durable."""

    async def stop(self) -> None:
        """Let go."""
        await self.client.stop()

    async def send(self, topic: str, values: Sequence[bytes]) -> asyncio.Future[Any]:
        """Queue a batch; the future is done when it is acknowledged."""
        batch = self.client.create_batch()
        now_ms = time.time_ns() // 1_000_000
        for user, value in enumerate(values):
            batch.append(key=b"%d" % user, value=self.epoch + value, timestamp=now_ms)
        queued: asyncio.Future[Any] = await self.client.send_batch(batch, topic, partition=0)
        return queued

    async def in_order(self, states: Sequence[bytes], vectors: Sequence[bytes]) -> None:
        """Changelog, then output."""
        for topic, values in zip(self.topics, (states, vectors), strict=True):
            await (await self.send(topic, values))


class Fence(Owner):
    """The product's own way."""

    name = "fence"

    async def start(self) -> None:
        """See `Owner`."""
        await super().start()
        await fence(self.client, 0, self.topics)
        await (await self.send(self.topics[0], [b"claim"]))

    step = Owner.in_order


class Transactions(Owner):
    """Batches of 100 ms in one transaction."""

    name = "transactions"
    _began_s = 0.0
    _open = False
    _timer: asyncio.Task[None] | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._turn = asyncio.Lock()

    async def step(self, states: Sequence[bytes], vectors: Sequence[bytes]) -> None:
        """See `Owner`."""
        async with self._turn:
            if not self._open:
                await self.client.begin_transaction()
                self._open, self._began_s = True, time.monotonic()
                self._timer = asyncio.create_task(self._after_a_while())
            sent = [await self.send(topic, v) for topic, v in zip(self.topics, (states, vectors), strict=True)]
            await asyncio.gather(*sent)
        if time.monotonic() - self._began_s >= TRANSACTION_S:
            await self.settle()

    async def settle(self) -> None:
        """See `Owner`."""
        async with self._turn:
            if self._open:
                await self.client.commit_transaction()
                self._open = False

    async def stop(self) -> None:
        """See `Owner`."""
        if self._timer is not None:
            self._timer.cancel()
        await super().stop()

    async def _after_a_while(self) -> None:
        await asyncio.sleep(TRANSACTION_S)
        await self.settle()


class Detection(Owner):
    """Reads back all that is written."""

    name = "detection"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.foreign = 0
        self._reader = aiokafka.AIOKafkaConsumer(*self.topics, bootstrap_servers=self._bootstrap)

    def _own_settings(self) -> dict[str, Any]:
        return {}

    async def start(self) -> None:
        """See `Owner`."""
        await super().start()
        await self._reader.start()
        await self._reader.seek_to_end()
        self._reading = asyncio.create_task(self._read())

    step = Owner.in_order

    async def settle(self) -> None:
        """See `Owner`."""
        for place in self._reader.assignment():
            end = (await self._reader.end_offsets([place]))[place]
            while await self._reader.position(place) < end:  # noqa: ASYNC110 - the client tells nobody
                await asyncio.sleep(0.001)

    async def stop(self) -> None:
        """See `Owner`."""
        self._reading.cancel()
        await self._reader.stop()
        await super().stop()

    async def _read(self) -> None:
        while True:
            for records in (await self._reader.getmany(timeout_ms=100)).values():
                self.foreign += sum(not record.value.startswith(self.epoch) for record in records)


async def throughput(owner: Owner, seconds: float) -> dict[str, float]:
    """Steps one after another."""
    states, vectors = ([random.randbytes(size) for _ in range(USERS)] for size in (STATE_BYTES, VECTOR_BYTES))
    for _ in range(20):
        await owner.step(states, vectors)
    await owner.settle()
    at, cpu, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - at < seconds:
        await owner.step(states, vectors)
        steps += 1
    await owner.settle()
    users = steps * USERS
    took_s, cpu_s = time.perf_counter() - at, time.process_time() - cpu
    return {"users_per_s": round(users / took_s), "cpu_us_per_user": round(1e6 * cpu_s / users, 2)}


async def latency(bootstrap: str, owner: Owner, seconds: float) -> dict[str, float]:
    """One user at a time, at a fixed rate."""
    reader = aiokafka.AIOKafkaConsumer(
        owner.topics[1], bootstrap_servers=bootstrap, isolation_level="read_committed", fetch_max_wait_ms=10
    )
    await reader.start()
    await reader.seek_to_end()
    await reader.position(next(iter(reader.assignment())))
    took: list[float] = []

    async def follow(count: int) -> None:
        async for record in reader:
            took.append(time.perf_counter() - int.from_bytes(record.value[STAMP_BYTES : 2 * STAMP_BYTES], "big") / 1e9)
            if len(took) == count:
                return

    count = int(seconds * RATE)
    following, steps = asyncio.create_task(follow(count)), []
    began = time.perf_counter()
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
        stamp = time.perf_counter_ns().to_bytes(STAMP_BYTES, "big")
        steps.append(asyncio.create_task(owner.step([bytes(STATE_BYTES)], [stamp + bytes(VECTOR_BYTES)])))
    await asyncio.gather(*steps)
    async with asyncio.timeout(20):
        await following
    await reader.stop()
    took.sort()
    return {f"p{q}_ms": round(1e3 * took[len(took) * q // 100], 1) for q in (50, 99)}


async def zombie(kind: type[Owner], bootstrap: str, first: Owner, epoch: int) -> str:
    """What becomes of a write of the first owner after a second has taken the partition."""
    second = kind(bootstrap, first.topics, epoch)
    await second.start()
    try:
        await first.step([b"old"], [b"old"])
        await first.settle()
    except (ProducerFenced, InvalidProducerEpoch):
        return "refused"
    except KafkaError as exc:
        return f"refused ({type(exc).__name__})"
    else:
        if isinstance(second, Detection):
            await second.settle()
            return f"written, {second.foreign} records found afterwards"
        return "written"
    finally:
        await second.stop()


async def measure(bootstrap: str, kind: type[Owner], seconds: float) -> dict[str, Any]:
    """One way, on topics of its own."""
    topics = [f"{kind.name}-{what}-{uuid.uuid4().hex[:8]}" for what in ("changelog", "output")]
    client = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})
    made = client.create_topics([NewTopic(topic, 1, 1, config={"cleanup.policy": "compact"}) for topic in topics])
    for future in made.values():
        future.result()
    epochs = itertools.count(1)
    owner = kind(bootstrap, topics, next(epochs))
    at = time.perf_counter()
    await owner.start()
    found = {"start_ms": round(1e3 * (time.perf_counter() - at), 1)}
    found |= await throughput(owner, seconds)
    found |= await latency(bootstrap, owner, seconds)
    after = await zombie(kind, bootstrap, owner, next(epochs))
    await owner.stop()
    return {**found, "write_after_succession": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in ("asyncio", "aiokafka"):  # what befalls the first owner is what is asked for, and is printed
        logging.getLogger(name).setLevel(logging.CRITICAL)
    found: dict[str, dict[str, Any]] = {}
    with broker() as bootstrap:
        asyncio.run(measure(bootstrap, Fence, 1.0))  # the broker is cold
        for kind in (Fence, Transactions, Detection):
            found[kind.name] = asyncio.run(measure(bootstrap, kind, args.seconds))
    ours = found[Fence.name]
    for row in found.values():
        row["throughput_ratio"] = round(row["users_per_s"] / ours["users_per_s"], 2)
        row["cpu_ratio"] = round(row["cpu_us_per_user"] / ours["cpu_us_per_user"], 2)
    print(json.dumps(found, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
