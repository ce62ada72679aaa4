"""Heartbeats while a networked store takes its time: partitions may be given up, and batches be written, meanwhile."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from stream.core.batch import Effects
from stream.core.records import kv_entry
from stream.errors import StoreError, StoreLost
from stream.kafka.delivery import DurableMarks, RecordBatch
from stream.keys import watermark_key
from stream.pipeline.lane import Destinations, Lane, Outlet, Taken, Work
from stream.pipeline.measures import Measures
from stream.pipeline.watermark import Progress, Standing
from stream.worker.app import EmbeddingApp
from stream.worker.partitions import Partitions


class SlowKV:
    """A store whose calls wait until they are let go on; what is not open is refused, as stores do."""

    def __init__(self, *partitions: int) -> None:
        self.open = set(partitions)
        self.written: list[tuple[int, dict[bytes, bytes]]] = []
        self.calls = 0
        self.lost = False
        self.called, self.go = asyncio.Event(), asyncio.Event()

    async def put(self, partition: int, entries: Mapping[bytes, bytes], *, ordered: bool = False) -> int:
        if partition not in self.open:
            msg = f"partition {partition} is not open for writing"
            raise StoreError(msg)
        lost = self.lost
        await self._wait()
        if lost:
            raise StoreLost("told so")
        self.written.append((partition, dict(entries)))
        return 0

    async def rebuild_request(self, partition: int) -> bytes | None:
        await self._wait()
        return b"request"

    async def _wait(self) -> None:
        self.calls += 1
        self.called.set()
        async with asyncio.timeout(5):
            await self.go.wait()


class Producer:
    def send_records(self, topic: str, partition: int, records: Sequence[Any]) -> list[asyncio.Future[Any]]:
        return []

    send_unfenced = send_records


class Fetches:
    """Logs that are all read to their ends."""

    def due(self, tp: TP) -> int | None:
        return None

    def fetched_ms(self, tp: TP) -> int | None:
        return 0


async def never() -> None:
    raise AssertionError("the store lost nothing")


def lane(kv: SlowKV, *outlets: Outlet) -> Lane:
    async def fail(exc: BaseException) -> None:
        raise exc

    made = Lane(
        Destinations("changelog", "output", "dlq", 1, 1000),
        Producer(),
        kv,  # type: ignore[arg-type]
        marks=DurableMarks(),
        measures=Measures(),
        on_stage=lambda stage, work: None,
        on_error=fail,
    )
    for one in outlets:
        made.open(one)
    return made


def outlet(partition: int, progress: Progress | None = None, reclaim: Callable[[], Awaitable[None]] = never) -> Outlet:
    return Outlet(
        partition,
        progress or Progress(1),
        Standing(Fetches(), [TP("events", partition)], lambda: 0),
        changelog_at=lambda offset: None,
        reclaim=reclaim,
    )


def work(*partitions: int) -> Work:
    """A step with a batch, and an entry, of each partition."""
    record: Any = SimpleNamespace(offset=5, timestamp=1)
    return Work(
        {partition: Effects(entries={b"user": bytes(16)}) for partition in partitions},
        [Taken(RecordBatch("events", partition, [record], 0, 0, 5), ()) for partition in partitions],
    )


async def test_partitions_that_are_given_up_meanwhile_get_no_heartbeat() -> None:
    kv = SlowKV(0, 1, 2)
    one = lane(kv, *map(outlet, (0, 1, 2)))
    beating = asyncio.create_task(one.heartbeat())
    await kv.called.wait()
    await one.stop()
    kv.open.clear()
    kv.go.set()
    await beating
    assert [partition for partition, _ in kv.written] == [0], "what was under way"


async def test_partitions_that_are_taken_again_meanwhile_are_left_to_the_next_heartbeat() -> None:
    kv = SlowKV(0, 1)
    one = lane(kv, outlet(0), outlet(1))
    beating = asyncio.create_task(one.heartbeat())
    await kv.called.wait()
    await one.stop()
    one.open(outlet(1))
    kv.go.set()
    await beating
    assert [partition for partition, _ in kv.written] == [0]
    await one.heartbeat()
    assert [partition for partition, _ in kv.written] == [0, 1]
    await one.stop()


async def test_no_heartbeat_tells_of_offsets_whose_vectors_are_not_stored_yet() -> None:
    kv = SlowKV(0, 1)
    one = lane(kv, *(outlet(partition, Progress(1, {"events": 5})) for partition in (0, 1)))
    await one.put(work(0, 1))
    beating = []
    for _ in range(20):  # whenever they come in
        beating.append(asyncio.create_task(one.heartbeat()))
        await asyncio.sleep(0)
    kv.go.set()
    await asyncio.gather(*beating)
    await one.drain()
    await one.heartbeat()
    await one.stop()
    for partition in (0, 1):
        seen = [entries for where, entries in kv.written if where == partition]
        told = [json.loads(kv_entry(entries[watermark_key(partition).encode()])[2])["offsets"] for entries in seen]
        assert told[-1] == {"events": 6}
        stored_at = next(n for n, entries in enumerate(seen) if b"user" in entries)
        assert all(offsets == {"events": 5} for offsets in told[:stored_at])


async def test_a_loss_that_a_heartbeat_and_a_batch_meet_at_once_is_mended_once() -> None:
    kv, reclaimed = SlowKV(0), 0
    kv.lost = True

    async def reclaim() -> None:
        nonlocal reclaimed
        reclaimed += 1
        kv.lost = False

    one = lane(kv, outlet(0, reclaim=reclaim))
    beating = asyncio.create_task(one.heartbeat())
    await kv.called.wait()
    await one.put(work(0))
    for _ in range(20):
        await asyncio.sleep(0)
    kv.go.set()
    await beating
    await one.drain()
    await one.stop()
    assert reclaimed == 1
    assert b"user" in kv.written[-1][1]


async def test_no_rebuild_begins_on_a_partition_that_was_given_up_meanwhile() -> None:
    kv = SlowKV(0)
    owned = SimpleNamespace(partition=0)
    processor = SimpleNamespace(owned={0: owned})
    partitions = Partitions.__new__(Partitions)
    started: list[object] = []
    partitions._parts = SimpleNamespace(kv=kv, lane=lane(kv), processor=processor)  # type: ignore[assignment]
    partitions._rebuilds = {}
    partitions._start_rebuild = started.append  # type: ignore[method-assign]
    beating = asyncio.create_task(partitions.heartbeat())
    await kv.called.wait()
    processor.owned.clear()
    kv.go.set()
    await beating
    assert started == []
    processor.owned[0] = owned
    await partitions.heartbeat()
    assert started == [owned]


class App:
    """A worker as far as its heartbeat knows it, whose sleep ends when it is stopped."""

    def __init__(self, *, stopped_by: str, failing: bool = False) -> None:
        self.should_stop = False
        self.beats, self.crashes = 0, 0
        self._stopped_by = stopped_by
        self._failing = failing

    async def sleep(self, seconds: float) -> None:
        self.should_stop = self._stopped_by == "sleep"

    async def _look_for_missing(self) -> None:
        """Nothing is missing."""

    async def heartbeat(self) -> None:
        self.beats += 1
        self.should_stop = self._stopped_by == "heartbeat"
        if self._failing:
            msg = "partition 1 is not open for writing"
            raise StoreError(msg)

    async def crash(self, reason: BaseException) -> None:
        self.crashes += 1
        self.should_stop = True


@pytest.mark.parametrize(
    ("app", "beats", "crashes"),
    [
        (App(stopped_by="sleep", failing=True), 0, 0),
        (App(stopped_by="heartbeat", failing=True), 1, 0),
        (App(stopped_by="crash", failing=True), 1, 1),
        (App(stopped_by="heartbeat"), 1, 0),
    ],
)
async def test_a_heartbeat_that_meets_the_end_is_no_crash(app: App, beats: int, crashes: int) -> None:
    await EmbeddingApp._heartbeat(app, app)  # type: ignore[arg-type]
    assert (app.beats, app.crashes) == (beats, crashes)
