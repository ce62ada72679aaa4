"""The lane while partitions come and go, and when it fails."""

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from stream.core.batch import Effects
from stream.errors import DeliveryError, Fenced
from stream.kafka.delivery import DurableMarks, RecordBatch
from stream.pipeline.lane import LANE_DEPTH, Destinations, Lane, Outlet, Taken, Work
from stream.pipeline.measures import Measures
from stream.pipeline.watermark import Progress, Standing


class Place:
    """Brokers, logs and a store that note in which order they are told of what."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, object]] = []
        self.fault: Exception | None = None
        self.is_back = asyncio.Event()
        self.is_back.set()
        self.beats = asyncio.Event()
        self.refuses = False

    def send_records(self, topic: str, partition: int, records: Sequence[Any]) -> list[asyncio.Future[int]]:
        self.told.append((topic, partition, [key for key, _, _ in records]))
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self.fault is None:
            future.set_result(7)
        else:
            future.set_exception(self.fault)
        return [future]

    send_unfenced = send_records

    async def put(self, partition: int, entries: Mapping[bytes, bytes], *, ordered: bool = False) -> int:
        self.beats.set()
        await self.is_back.wait()
        if self.refuses:
            raise Fenced
        self.told.append(("store", partition, [key for key in entries if b"watermark" not in key]))
        return 0

    async def remove(self, partition: int, keys: Sequence[bytes], epoch: int) -> None:
        self.told.append(("removed", partition, list(keys)))

    def due(self, tp: TP) -> int | None:
        return None

    def fetched_ms(self, tp: TP) -> int | None:
        return 0


def lane(place: Place, faults: list[BaseException] | None = None) -> Lane:
    async def fail(exc: BaseException) -> None:
        if faults is None:
            raise exc
        faults.append(exc)

    return Lane(
        Destinations("changelog", "output", "dlq", 1, 1000),
        place,
        place,  # type: ignore[arg-type]
        marks=MARKS,
        measures=Measures(),
        on_stage=lambda stage, work: None,
        on_error=fail,
    )


MARKS = DurableMarks()


async def never() -> None:
    raise AssertionError("the store lost nothing")


def outlet(place: Place, partition: int, offsets: list[int] | None = None) -> Outlet:
    return Outlet(
        partition,
        Progress(1),
        Standing(place, [TP("events", partition)], lambda: 0),
        changelog_at=([] if offsets is None else offsets).append,
        reclaim=never,
    )


def work(n: int, *partitions: int, durable: asyncio.Future[None] | None = None) -> Work:
    record: Any = SimpleNamespace(offset=n, timestamp=1)
    user, key = b"%d" % n, b"uemb:%d" % n
    effects = {p: Effects({user: b"state"}, [(key, b"vector")], {key: bytes(16)}, [], []) for p in partitions}
    return Work(effects, [Taken(RecordBatch("events", p, [record], 0, 0, n), ()) for p in partitions], durable)


@pytest.mark.parametrize("is_held", [True, False])
async def test_only_a_partition_that_is_still_held_is_lost_to_a_newer_owner(is_held: bool) -> None:
    place = Place()
    place.is_back.clear()
    one = lane(place)
    one.open(outlet(place, 0))
    beat = asyncio.create_task(one.heartbeat())
    await place.beats.wait()
    if not is_held:
        await one.stop()
        one.open(outlet(place, 0))
    place.refuses = True
    place.is_back.set()
    if is_held:
        with pytest.raises(Fenced):
            await beat
    else:
        await beat
    await one.stop()


async def test_each_partition_s_effects_become_durable_in_order_and_steps_that_wait_together() -> None:
    place, offsets = Place(), []
    one = lane(place)
    for partition in (0, 1):
        one.open(outlet(place, partition, offsets))
    for n, partitions in ((1, (0, 1)), (2, (1,)), (3, (0,))):
        await one.put(work(n, *partitions))
    await one.drain()
    of_each = {partition: [(to, what) for to, p, what in place.told if p == partition] for partition in (0, 1)}
    assert of_each[0] == [
        ("changelog", [b"1", b"3"]), ("output", [b"uemb:1", b"uemb:3"]), ("store", [b"uemb:1", b"uemb:3"])
    ]  # fmt: skip
    assert of_each[1] == [
        ("changelog", [b"1", b"2"]), ("output", [b"uemb:1", b"uemb:2"]), ("store", [b"uemb:1", b"uemb:2"])
    ]  # fmt: skip
    assert offsets == [8, 8]
    due = MARKS.due()
    assert (due["events", 0], due["events", 1]) == (4, 3)
    await one.stop()


async def test_what_is_removed_and_forgotten_comes_after_all_else() -> None:
    place = Place()
    one = lane(place)
    one.open(outlet(place, 0))
    durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    effects = Effects(output=[(b"uemb:gone", None)], removals=[b"uemb:gone"], forgotten=[b"gone"])
    await one.put(Work({0: effects}, durable=durable))
    await durable
    assert place.told == [
        ("output", 0, [b"uemb:gone"]), ("store", 0, []), ("removed", 0, [b"uemb:gone"]), ("changelog", 0, [b"gone"])
    ]  # fmt: skip
    await one.stop()


async def test_a_lane_that_fails_says_so_once_and_keeps_nobody_waiting() -> None:
    place, faults = Place(), []
    place.fault = DeliveryError("refused")
    one = lane(place, faults)
    one.open(outlet(place, 0))
    await one.put(work(1, 0))
    await one.drain()
    assert faults == [place.fault]
    assert one.has_ended
    assert [to for to, _, _ in place.told] == ["changelog"], "what is not in the changelog is nowhere"
    await one.stop()
    assert not one.has_ended


async def test_what_waits_for_room_when_the_lane_is_stopped_is_never_made_durable() -> None:
    place = Place()
    place.is_back.clear()
    one = lane(place)
    one.open(outlet(place, 0))
    waiting = [asyncio.create_task(one.put(work(n, 0))) for n in range(LANE_DEPTH + 5)]
    await place.beats.wait()
    await one.stop()
    await asyncio.gather(*waiting)
    place.is_back.set()
    one.open(outlet(place, 0))
    before = len(place.told)
    await one.put(work(100, 0))
    await one.drain()
    assert [what for _, _, what in place.told[before:]] == [[b"100"], [b"uemb:100"], [b"uemb:100"]]
    await one.stop()
