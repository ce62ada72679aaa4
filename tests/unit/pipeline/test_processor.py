"""The agent's work on batches while partitions come and go, and while batches are missing."""

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from strategies import TYPES, Event, message, random_space

from stream.core.encoders import MixEncoder, VersionedEncoder
from stream.core.engine import Engine
from stream.core.events import EventRules
from stream.core.space_engine import Pair
from stream.errors import OwnershipError
from stream.kafka.delivery import DurableMarks, RecordBatch
from stream.keys import partition_of
from stream.pipeline.lane import Work
from stream.pipeline.measures import Measures
from stream.pipeline.processor import BatchProcessor, Owned
from stream.pipeline.watermark import Progress

TOPIC = "user-events.view"
PARTITIONS = 2


class Table:
    """A partition's local states."""

    def __init__(self) -> None:
        self.states: dict[bytes, bytes | None] = {}

    def get(self, users: Sequence[bytes]) -> list[bytes | None]:
        return [self.states.get(user) for user in users]

    def put(self, entries: Mapping[bytes, bytes | None], changelog_offset: int) -> None:
        self.states.update(entries)


class Worker:
    """A processor, what it has queued, and what it wants to be read again."""

    def __init__(self) -> None:
        self.queued: list[Work] = []
        self.again: list[tuple[str, int, int, int]] = []
        self.processor = BatchProcessor("deletions", DurableMarks(), Measures(), lambda stage, work: None, self._again)
        pairs = [Pair(VersionedEncoder(MixEncoder(), 5), random_space("items_v1", 3))]
        self.engine = Engine(pairs, EventRules(TYPES), partitions=PARTITIONS)
        self.processor.begin(self.engine, SimpleNamespace(put=self._put))  # type: ignore[arg-type]
        for partition in range(PARTITIONS):
            self.own(partition)

    def own(self, partition: int) -> None:
        self.engine.claim(partition, 1)
        table: Any = Table()
        self.processor.owned[partition] = Owned(partition, 1, table, Progress(1), 0)

    async def _put(self, work: Work) -> None:
        self.queued.append(work)

    async def _again(self, *gap: Any) -> None:
        self.again.append(gap)

    @property
    def users(self) -> list[set[bytes]]:
        """Whose states each step wrote."""
        return [{user for part in work.effects.values() for user in part.states} for work in self.queued]


USERS = {p: next(n for n in range(100) if partition_of(b"%d" % n, PARTITIONS) == p) for p in range(PARTITIONS)}


def batch(partition: int, number: int = 0, seeks: int = 1) -> RecordBatch:
    sent = message(Event(USERS[partition], 1, "view", 1_700_000_000_000))
    record: Any = SimpleNamespace(offset=number, key=sent.key, value=sent.value, timestamp=sent.timestamp)
    return RecordBatch(TOPIC, partition, [record], seeks, number, 0)


@pytest.fixture
def worker() -> Worker:
    return Worker()


async def test_what_was_fetched_together_is_one_step(worker: Worker) -> None:
    await worker.processor.process([batch(0), batch(1)])
    assert worker.users == [{b"%d" % user for user in USERS.values()}]
    assert [taken.batch.partition for taken in worker.queued[0].taken] == [0, 1]


async def test_what_waits_for_its_turn_while_its_partition_is_given_up_is_dropped(worker: Worker) -> None:
    async with worker.processor._turn:
        waiting = asyncio.create_task(worker.processor.step([batch(0), batch(1)]))
        await asyncio.sleep(0)
        worker.processor.give_up(2)
        worker.engine.restart(10)
        worker.own(1)  # taken again, which is another owner
    await waiting
    assert worker.queued == []


async def test_of_what_waits_for_its_turn_the_rest_goes_on(worker: Worker) -> None:
    async with worker.processor._turn:
        waiting = asyncio.create_task(worker.processor.step([batch(0), batch(1)]))
        await asyncio.sleep(0)
        del worker.processor.owned[0]
    await waiting
    assert worker.users == [{b"%d" % USERS[1]}]


async def test_a_batch_that_is_missing_holds_up_no_other_partition(worker: Worker) -> None:
    await worker.processor.process([batch(0, 1), batch(1)])
    assert worker.users == [{b"%d" % USERS[1]}]
    assert worker.again == [(TOPIC, 0, 0, 1)]


async def test_a_batch_of_a_partition_that_was_never_ours_stops_the_worker(worker: Worker) -> None:
    del worker.processor.owned[0]
    with pytest.raises(OwnershipError, match=r"user-events\.view-0 arrived"):
        await worker.processor.process([batch(0), batch(1)])
    assert worker.queued == []
