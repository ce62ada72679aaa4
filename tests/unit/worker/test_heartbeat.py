"""Heartbeats while a networked store takes its time: partitions may be given up, and batches be written, meanwhile."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from stream.core.batch import StepResult
from stream.core.records import kv_entry
from stream.errors import StoreError, StoreLost
from stream.kafka.delivery import DurableMarks, RecordBatch
from stream.keys import watermark_key
from stream.pipeline.lanes import Destinations, Lane, Lanes, Work
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


def lane(
    partition: int,
    kv: SlowKV,
    progress: Progress | None = None,
    reclaim: Callable[[], Awaitable[None]] = never,
) -> Lane:
    return Lane(
        partition,
        progress or Progress(1),
        Destinations("changelog", "output", "dlq", 1, 1000),
        Producer(),
        kv,  # type: ignore[arg-type]
        marks=DurableMarks(),
        changelog_at=lambda offset: None,
        reclaim=reclaim,
        standing=Standing(Fetches(), [TP("events", partition)], lambda: 0),
        measures=Measures(),
        on_stage=lambda stage, batch, result: None,
    )


@pytest.fixture
async def lanes() -> Lanes:
    async def fail(exc: BaseException) -> None:
        raise exc

    return Lanes(fail)


async def test_partitions_that_are_given_up_meanwhile_get_no_heartbeat(lanes: Lanes) -> None:
    kv = SlowKV(0, 1, 2)
    for partition in (0, 1, 2):
        lanes.start(lane(partition, kv))
    beating = asyncio.create_task(lanes.heartbeat())
    await kv.called.wait()
    await lanes.stop()
    kv.open.clear()
    kv.go.set()
    await beating
    assert [partition for partition, _ in kv.written] == [0], "what was under way"


async def test_partitions_that_are_taken_again_meanwhile_are_left_to_the_next_heartbeat(lanes: Lanes) -> None:
    kv = SlowKV(0, 1)
    for partition in (0, 1):
        lanes.start(lane(partition, kv))
    beating = asyncio.create_task(lanes.heartbeat())
    await kv.called.wait()
    await lanes.stop()
    lanes.start(lane(1, kv))
    kv.go.set()
    await beating
    assert [partition for partition, _ in kv.written] == [0]
    await lanes.heartbeat()
    assert [partition for partition, _ in kv.written] == [0, 1]
    await lanes.stop()


async def test_no_heartbeat_tells_of_offsets_whose_vectors_are_not_stored_yet(lanes: Lanes) -> None:
    kv, progress = SlowKV(0), Progress(1, {"events": 5})
    one = lane(0, kv, progress)
    lanes.start(one)
    batch = RecordBatch("events", 0, [SimpleNamespace(offset=5, timestamp=1)], 0, 0, 5)  # type: ignore[list-item]
    await one.put(Work(batch, (), StepResult(entries={b"user": bytes(16)})))
    await kv.called.wait()
    await lanes.heartbeat()
    assert kv.calls == 1, "a heartbeat overtook the batch"
    kv.go.set()
    await one.empty()
    await lanes.heartbeat()
    await lanes.stop()
    (_, first), (_, second) = kv.written
    assert list(first) == [b"user", watermark_key(0).encode()]
    for entries in (first, second):
        assert json.loads(kv_entry(entries[watermark_key(0).encode()])[2])["offsets"] == {"events": 6}


async def test_a_loss_that_a_heartbeat_and_a_batch_meet_at_once_is_mended_once(lanes: Lanes) -> None:
    kv, reclaimed = SlowKV(0), 0
    kv.lost = True

    async def reclaim() -> None:
        nonlocal reclaimed
        reclaimed += 1
        kv.lost = False

    one = lane(0, kv, reclaim=reclaim)
    lanes.start(one)
    beating = asyncio.create_task(lanes.heartbeat())
    await kv.called.wait()
    batch = RecordBatch("events", 0, [SimpleNamespace(offset=5, timestamp=1)], 0, 0, 5)  # type: ignore[list-item]
    await one.put(Work(batch, (), StepResult(entries={b"user": bytes(16)})))
    for _ in range(20):
        await asyncio.sleep(0)
    kv.go.set()
    await beating
    await one.empty()
    await lanes.stop()
    assert reclaimed == 1
    assert b"user" in kv.written[-1][1]


async def test_no_rebuild_begins_on_a_partition_that_was_given_up_meanwhile(lanes: Lanes) -> None:
    kv = SlowKV(0)
    owned = SimpleNamespace(partition=0)
    processor = SimpleNamespace(owned={0: owned})
    partitions = Partitions.__new__(Partitions)
    started: list[object] = []
    partitions._parts = SimpleNamespace(kv=kv, lanes=lanes, processor=processor)  # type: ignore[assignment]
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
