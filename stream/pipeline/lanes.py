"""Making a batch's effects durable, one lane per partition: changelog; then KV, output and dead letters; then the mark.

A lane takes finished steps in order and starts none before the last are durable, so a key's records stay in order and a
commit can't pass anything (law 5). Steps that finish meanwhile are made durable together: the busier a partition, the
fewer round trips each of its events costs. What is readable or on the output topic is in the changelog already, so no
crash can take back what somebody has seen.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from stream.core.batch import StepResult
from stream.core.events import Reject
from stream.errors import Fenced, RecordTooLarge, StoreLost
from stream.kafka.batch_sender import OutRecord
from stream.kafka.dead_letters import dead_letter
from stream.kafka.delivery import DurableMarks, RecordBatch
from stream.kafka.producer import acknowledged
from stream.keys import watermark_key
from stream.kv.protocol import KVWriter
from stream.pipeline.activity import Activity
from stream.pipeline.measures import Measures
from stream.pipeline.watermark import Progress, Standing, now_ms

log = logging.getLogger(__name__)

#: Steps that wait in a lane before the agent has to wait; bounds memory and what a crash repeats.
LANE_DEPTH: Final = 4

#: What a lane waits for, as its activity has it. Both may be away for a while, and give up by themselves.
BROKERS: Final = "the brokers"
STORE: Final = "the store"

#: Called with the name of each stage that was just passed; tests stop the process there.
OnStage = Callable[[str, RecordBatch | None, StepResult], None]


class BatchProducer(Protocol):
    """What a lane needs of the producer."""

    def send_records(self, topic: str, partition: int, records: Sequence[OutRecord]) -> list[asyncio.Future[int]]:
        """Queue records for one partition; a future per batch."""
        ...

    def send_unfenced(self, topic: str, partition: int, records: Sequence[OutRecord]) -> list[asyncio.Future[int]]:
        """The same for dead letters, which may be refused."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """A finished step of the engine that waits to become durable.

    Attributes:
        batch: the records that caused it, None for states that are sent again without one.
        rejects: index and reason of each record of the batch that was turned away.
        result: what the step caused.
        durable: done when all of it is durable, where somebody waits for that.
        queued_s: since when it waits (monotonic s).
    """

    batch: RecordBatch | None
    rejects: Sequence[tuple[int, Reject]]
    result: StepResult
    durable: asyncio.Future[None] | None = None
    queued_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Destinations:
    """Names and limits of what lanes write to."""

    changelog: str
    output: str
    dead_letters: str
    dead_letter_partitions: int
    dead_letter_max_bytes: int


class Lane:
    """The ordered path of one partition's effects to durability.

    Args:
        partition: its number.
        progress: the partition's watermark, kept current here.
        to: topics and limits.
        producer: sends batches.
        kv: the partition is open in it.
        marks: told of what is durable.
        changelog_at: called with the changelog offset below which local state is complete.
        reclaim: claims the partition in a store that was wiped, and has it rebuilt.
        standing: how far the partition is behind, for the watermark.
        measures: told of how long it takes.
        on_stage: see `OnStage`.

    Attributes:
        activity: what it is at.
    """

    def __init__(
        self,
        partition: int,
        progress: Progress,
        to: Destinations,
        producer: BatchProducer,
        kv: KVWriter,
        *,
        marks: DurableMarks,
        changelog_at: Callable[[int], None],
        reclaim: Callable[[], Awaitable[None]],
        standing: Standing,
        measures: Measures,
        on_stage: OnStage,
    ) -> None:
        self.partition = partition
        self.progress = progress
        self.standing = standing
        self.activity = Activity()
        self._to = to
        self._producer = producer
        self._kv = kv
        self._marks = marks
        self._changelog_at = changelog_at
        self._reclaim = reclaim
        self._measures = measures
        self._on_stage = on_stage
        self._queue: asyncio.Queue[Work] = asyncio.Queue(LANE_DEPTH)
        self._watermark_key = watermark_key(partition).encode()
        self._storing = asyncio.Lock()

    async def put(self, work: Work) -> None:
        """Queue a step; waits while the lane is full."""
        await self._queue.put(work)

    async def run(self) -> None:
        """Make queued steps durable, in order, until cancelled; any exception means the worker must stop."""
        while True:
            works = [await self._queue.get()]
            while not self._queue.empty():
                works.append(self._queue.get_nowait())
            self.activity.begin()
            await self._make_durable(works)
            self.activity.rest()
            for _ in works:
                self._queue.task_done()

    async def empty(self) -> None:
        """Wait until all queued steps are durable."""
        await self._queue.join()

    def abandon(self) -> None:
        """Drop what is queued, so that nobody waits for room in a lane that has stopped."""
        while not self._queue.empty():
            self._queue.get_nowait()
            self._queue.task_done()

    async def _make_durable(self, works: Sequence[Work]) -> None:
        to, measures = self._to, self._measures
        for work in works:
            measures.passed("queue", work.queued_s)
        begun_s = time.monotonic()
        states: dict[bytes, bytes] = {}
        entries: dict[bytes, bytes] = {}
        for work in works:  # of a user that is in several steps, the last state is what counts
            states.update(work.result.states)
            entries.update(work.result.entries)
        changelog: list[OutRecord] = [(user, state, []) for user, state in states.items()]
        sent = self._producer.send_records(to.changelog, self.partition, changelog)
        self.activity.begin(BROKERS)
        offset = await acknowledged(sent, to.changelog)
        if offset >= 0:
            self.standing.acknowledged()
            self._changelog_at(offset + 1)
        logged_s = measures.passed("changelog", begun_s)
        self._passed("changelog", works)
        output: list[OutRecord] = [(key, value, []) for work in works for key, value in work.result.output]
        sent = self._producer.send_records(to.output, self.partition, output)
        for work in works:
            if work.batch is not None:
                self.progress.took_in(work.batch)
        self.activity.begin(STORE)
        await self._store(entries)
        if removals := [key for work in works for key in work.result.removals]:
            self.activity.begin(STORE)
            await self._kv.remove(self.partition, removals, self.progress.epoch)
        stored_s, stored_ms = measures.passed("kv", logged_s), now_ms()
        for work in works:
            if work.batch is not None:
                measures.readable(work.batch, stored_ms)
        self._passed("kv", works)
        self.activity.begin(BROKERS)
        for work in works:
            await self._dead_letters(work)
        await acknowledged(sent, to.output)
        measures.passed("output", stored_s)
        self._passed("output", works)
        await self._forget([user for work in works for user in work.result.forgotten], works)
        self.activity.begin()
        for work in works:
            if work.batch is not None:
                measures.durable(work.batch)
                self._marks.mark(work.batch.topic, self.partition, work.batch.next_offset)
            if work.durable is not None and not work.durable.cancelled():
                work.durable.set_result(None)

    async def _forget(self, users: Sequence[bytes], works: Sequence[Work]) -> None:
        """Take users out of the changelog, which comes last: as long as they are in it, what a crash left is repeated.

        The offset up to which local state is complete stays where it is, for local state still has them.
        """
        if users:
            to = self._to
            sent = self._producer.send_records(to.changelog, self.partition, [(user, None, []) for user in users])
            await acknowledged(sent, to.changelog)
            self._passed("forgotten", works)

    def _passed(self, stage: str, works: Sequence[Work]) -> None:
        for work in works:
            self._on_stage(stage, work.batch, work.result)

    def _watermark(self) -> dict[bytes, bytes]:
        if not self.progress.whole:
            return {}
        return {self._watermark_key: self.progress.entry(self.standing)}

    async def _store(self, entries: Mapping[bytes, bytes]) -> None:
        """Write entries and the watermark; into a store that has lost what it held, once it is claimed anew."""
        # One at a time: while a networked store takes its time, no heartbeat may tell of offsets whose vectors it does
        # not have yet, and a loss is mended once.
        async with self._storing:
            while True:
                try:
                    await self._kv.put(self.partition, {**entries, **self._watermark()}, ordered=True)
                except StoreLost as exc:
                    log.warning("%s; claiming partition %s in it anew, and rebuilding it", exc, self.partition)
                    await self._reclaim()
                else:
                    return

    async def heartbeat(self) -> None:
        """Write the watermark of an idle partition."""
        if self._queue.empty() and not self._storing.locked() and self.progress.whole:
            await self._store({})

    async def _dead_letters(self, work: Work) -> None:
        batch = work.batch
        if batch is None or not work.rejects:
            return
        to, partition = self._to, self.partition % self._to.dead_letter_partitions
        letters = [dead_letter(batch, i, reject, to.dead_letter_max_bytes) for i, reject in work.rejects]
        try:
            futures = self._producer.send_unfenced(to.dead_letters, partition, letters)
            await acknowledged(futures, to.dead_letters)
        except RecordTooLarge:  # the topic admits less than we do: keep the reason and where the record lies
            references = [dead_letter(batch, i, reject, 0) for i, reject in work.rejects]
            futures = self._producer.send_unfenced(to.dead_letters, partition, references)
            await acknowledged(futures, to.dead_letters)
        self._measures.dead_letters += len(letters)


class LaneState(NamedTuple):
    """What a lane is at, and whether its task has ended."""

    partition: int
    activity: Activity
    has_ended: bool


class Lanes:
    """The running lanes of this worker; a failing lane is reported once, by stopping the worker."""

    def __init__(self, on_error: Callable[[BaseException], Awaitable[None]]) -> None:
        self._lanes: dict[int, Lane] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._on_error = on_error

    def __getitem__(self, partition: int) -> Lane:
        return self._lanes[partition]

    def start(self, lane: Lane) -> None:
        """Run a lane until `stop`."""
        self._lanes[lane.partition] = lane
        self._tasks[lane.partition] = asyncio.create_task(self._run(lane), name=f"lane-{lane.partition}")

    async def _run(self, lane: Lane) -> None:
        try:
            await lane.run()
        except Exception as exc:  # noqa: BLE001 - any fault here means that effects are not durable
            await self._on_error(exc)

    async def stop(self) -> None:
        """Cancel all lanes; what is queued is not durable and will be read again."""
        tasks, lanes = list(self._tasks.values()), list(self._lanes.values())
        self._tasks, self._lanes = {}, {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lane in lanes:
            lane.abandon()

    def states(self) -> list[LaneState]:
        """Of each lane; may be asked from another thread."""
        tasks = dict(self._tasks)
        lanes = dict(self._lanes)
        return [LaneState(p, lane.activity, tasks[p].done()) for p, lane in lanes.items() if p in tasks]

    async def heartbeat(self) -> None:
        """Write the watermarks of idle partitions.

        Raises:
            Fenced: a partition that is held has a newer owner.
        """
        for partition, lane in list(self._lanes.items()):
            if self._lanes.get(partition) is not lane:  # given up while another's was written
                continue
            try:
                await lane.heartbeat()
            except Fenced:
                if self._lanes.get(partition) is lane:
                    raise
                # Given up while the store was away, it has a newer owner, who may be this worker.

    async def drain(self) -> None:
        """Wait until everything queued is durable; returns at once when a lane has failed."""
        waits = [(asyncio.create_task(lane.empty()), self._tasks[p]) for p, lane in self._lanes.items()]
        for wait, running in waits:
            await asyncio.wait({wait, running}, return_when=asyncio.FIRST_COMPLETED)
            wait.cancel()
