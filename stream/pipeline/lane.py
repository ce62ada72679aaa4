"""Making a step's effects durable: changelog; then KV, output and dead letters; then the mark.

The lane takes finished steps in order and starts none before the last are durable, so a key's records stay in order and
a commit can't pass anything (law 5). Steps that finish meanwhile are made durable together: the busier the worker, the
fewer round trips each of its events costs. What is readable or on the output topic is in the changelog already, so no
crash can take back what somebody has seen.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from stream.core.batch import Effects
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

#: Steps that wait in the lane before the agent has to wait; bounds memory and what a crash repeats.
LANE_DEPTH: Final = 16

#: What the lane waits for, as its activity has it. Both may be away for a while, and give up by themselves.
BROKERS: Final = "the brokers"
STORE: Final = "the store"


class BatchProducer(Protocol):
    """What the lane needs of the producer."""

    def send_records(self, topic: str, partition: int, records: Sequence[OutRecord]) -> list[asyncio.Future[int]]:
        """Queue records for one partition; a future per batch."""
        ...

    def send_unfenced(self, topic: str, partition: int, records: Sequence[OutRecord]) -> list[asyncio.Future[int]]:
        """The same for dead letters, which may be refused."""
        ...


class Taken(NamedTuple):
    """A fetched batch that a step took in, and the index and reason of each of its records that was turned away."""

    batch: RecordBatch
    rejects: Sequence[tuple[int, Reject]]


@dataclass(frozen=True, slots=True)
class Work:
    """A finished step that waits to become durable.

    Attributes:
        effects: what the step caused, by partition.
        taken: the batches that caused it, none for states that are sent again without one.
        durable: done when all of it is durable, where somebody waits for that.
        queued_s: since when it waits (monotonic s).
    """

    effects: Mapping[int, Effects]
    taken: Sequence[Taken] = ()
    durable: asyncio.Future[None] | None = None
    queued_s: float = field(default_factory=time.monotonic)


#: Called with the name of each stage that a step has just passed; tests stop the process there.
OnStage = Callable[[str, Work], None]


@dataclass(frozen=True)
class Destinations:
    """Names and limits of what the lane writes to."""

    changelog: str
    output: str
    dead_letters: str
    dead_letter_partitions: int
    dead_letter_max_bytes: int


class Outlet:
    """One partition's end of the lane.

    Args:
        partition: its number.
        progress: its watermark, kept current here.
        standing: how far it is behind, for the watermark.
        changelog_at: called with the changelog offset below which local state is complete.
        reclaim: claims the partition in a store that was wiped, and has it rebuilt.
    """

    def __init__(
        self,
        partition: int,
        progress: Progress,
        standing: Standing,
        *,
        changelog_at: Callable[[int], None],
        reclaim: Callable[[], Awaitable[None]],
    ) -> None:
        self.partition = partition
        self.progress = progress
        self.standing = standing
        self.changelog_at = changelog_at
        self._reclaim = reclaim
        self._watermark_key = watermark_key(partition).encode()
        self._storing = asyncio.Lock()

    async def store(self, kv: KVWriter, entries: Mapping[bytes, bytes], batches: Iterable[RecordBatch] = ()) -> None:
        """Write what batches caused, and the watermark; into a store that has lost what it held, once it is claimed."""
        # One at a time: while a networked store takes its time, no heartbeat may tell of offsets whose vectors it does
        # not have yet, and a loss is mended once.
        async with self._storing:
            for batch in batches:
                self.progress.took_in(batch)
            while True:
                try:
                    await kv.put(self.partition, {**entries, **self._watermark()}, ordered=True)
                except StoreLost as exc:
                    log.warning("%s; claiming partition %s in it anew, and rebuilding it", exc, self.partition)
                    await self._reclaim()
                else:
                    return

    @property
    def is_due(self) -> bool:
        """Whether a heartbeat has something to say that nobody is saying already."""
        return not self._storing.locked() and self.progress.whole

    def _watermark(self) -> dict[bytes, bytes]:
        if not self.progress.whole:
            return {}
        return {self._watermark_key: self.progress.entry(self.standing)}


class Lane:
    """The ordered path of all effects to durability; when it fails that is reported once, by stopping the worker.

    Args:
        to: topics and limits.
        producer: sends batches.
        kv: the partitions of all outlets are open in it.
        marks: told of what is durable.
        measures: told of how long it takes.
        on_stage: see `OnStage`.
        on_error: called with what ends the lane.

    Attributes:
        activity: what it is at.
    """

    def __init__(
        self,
        to: Destinations,
        producer: BatchProducer,
        kv: KVWriter,
        *,
        marks: DurableMarks,
        measures: Measures,
        on_stage: OnStage,
        on_error: Callable[[BaseException], Awaitable[None]],
    ) -> None:
        self.activity = Activity()
        self._to = to
        self._producer = producer
        self._kv = kv
        self._marks = marks
        self._measures = measures
        self._on_stage = on_stage
        self._on_error = on_error
        self._outlets: dict[int, Outlet] = {}
        self._queue: asyncio.Queue[Work] = asyncio.Queue(LANE_DEPTH)
        self._task: asyncio.Task[None] | None = None

    # -- what owners do -------------------------------------------------------------------------------------------

    def open(self, outlet: Outlet) -> None:
        """Let a partition's effects out, until `stop`."""
        self._outlets[outlet.partition] = outlet
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="lane")

    async def put(self, work: Work) -> None:
        """Queue a step; waits while the lane is full."""
        await self._queue.put(work)

    async def stop(self) -> None:
        """End all; what is queued is not durable and will be read again."""
        task, self._task = self._task, None
        self._outlets.clear()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        abandoned, self._queue = self._queue, asyncio.Queue(LANE_DEPTH)
        while not abandoned.empty():  # so that nobody waits for room in it; what comes into it yet is read again, too
            abandoned.get_nowait()
            await asyncio.sleep(0)
        self.activity.rest()

    async def drain(self) -> None:
        """Wait until everything queued is durable; returns at once when the lane has failed."""
        if self._task is not None:
            empty = asyncio.create_task(self._queue.join())
            await asyncio.wait({empty, self._task}, return_when=asyncio.FIRST_COMPLETED)
            empty.cancel()

    @property
    def has_ended(self) -> bool:
        """Whether it runs no more, though there are partitions; from any thread."""
        return (task := self._task) is not None and task.done()

    async def heartbeat(self) -> None:
        """Write the watermarks of idle partitions.

        Raises:
            Fenced: a partition that is held has a newer owner.
        """
        for partition, outlet in list(self._outlets.items()):
            if self._outlets.get(partition) is not outlet:  # given up while another's was written
                continue
            try:
                if self._queue.empty() and outlet.is_due:
                    await outlet.store(self._kv, {})
            except Fenced:
                if self._outlets.get(partition) is outlet:
                    raise
                # Given up while the store was away, it has a newer owner, who may be this worker.

    # -- the way --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                works = [await self._queue.get()]
                while not self._queue.empty():
                    works.append(self._queue.get_nowait())
                self.activity.begin()
                await self._make_durable(works)
                self.activity.rest()
                for _ in works:
                    self._queue.task_done()
        except Exception as exc:  # noqa: BLE001 - any fault here means that effects are not durable
            await self._on_error(exc)

    async def _make_durable(self, works: Sequence[Work]) -> None:
        measures = self._measures
        for work in works:
            measures.passed("queue", work.queued_s)
        begun_s = time.monotonic()
        effects = _together(works)
        await self._log(effects)
        logged_s = measures.passed("changelog", begun_s)
        self._passed("changelog", works)
        to, sent = self._to, []
        for partition, part in effects.items():
            records: list[OutRecord] = [(key, value, []) for key, value in part.output]
            sent += self._producer.send_records(to.output, partition, records)
        taken = [one for work in works for one in work.taken]
        await self._store(effects, taken)
        stored_s, stored_ms = measures.passed("kv", logged_s), now_ms()
        for batch, _ in taken:
            measures.readable(batch, stored_ms)
        self._passed("kv", works)
        self.activity.begin(BROKERS)
        for one in taken:
            if one.rejects:
                await self._reject(one)
        await acknowledged(sent, to.output)
        measures.passed("output", stored_s)
        self._passed("output", works)
        if forgotten := {partition: part.forgotten for partition, part in effects.items() if part.forgotten}:
            await self._forget(forgotten)
            self._passed("forgotten", works)
        self.activity.begin()
        for batch, _ in taken:
            measures.durable(batch)
            self._marks.mark(batch.topic, batch.partition, batch.next_offset)
        for work in works:
            if work.durable is not None and not work.durable.cancelled():
                work.durable.set_result(None)

    async def _log(self, effects: Mapping[int, Effects]) -> None:
        """Write states into the changelog."""
        to, send = self._to, self._producer.send_records
        sent = [
            (self._outlets[partition], send(to.changelog, partition, [(*state, []) for state in part.states.items()]))
            for partition, part in effects.items()
            if part.states
        ]
        self.activity.begin(BROKERS)
        for outlet, futures in sent:
            offset = await acknowledged(futures, to.changelog)
            if offset >= 0:
                outlet.standing.acknowledged()
                outlet.changelog_at(offset + 1)

    async def _store(self, effects: Mapping[int, Effects], taken: Sequence[Taken]) -> None:
        """Write vectors, and take out what is to be removed."""
        self.activity.begin(STORE)
        kv = self._kv
        batches: dict[int, list[RecordBatch]] = {}
        for batch, _ in taken:
            batches.setdefault(batch.partition, []).append(batch)
        await _all(
            self._outlets[partition].store(kv, part.entries, batches.get(partition, ()))
            for partition, part in effects.items()
        )
        removals = [
            kv.remove(partition, part.removals, self._outlets[partition].progress.epoch)
            for partition, part in effects.items()
            if part.removals
        ]
        if removals:
            self.activity.begin(STORE)
            await _all(removals)

    async def _forget(self, users: Mapping[int, Sequence[bytes]]) -> None:
        """Take users out of the changelog, which comes last: as long as they are in it, what a crash left is repeated.

        The offset up to which local state is complete stays where it is, for local state still has them.
        """
        changelog, sent = self._to.changelog, []
        for partition, some in users.items():
            sent += self._producer.send_records(changelog, partition, [(user, None, []) for user in some])
        await acknowledged(sent, changelog)

    def _passed(self, stage: str, works: Sequence[Work]) -> None:
        for work in works:
            self._on_stage(stage, work)

    async def _reject(self, taken: Taken) -> None:
        batch, to = taken.batch, self._to
        partition = batch.partition % to.dead_letter_partitions
        letters = [dead_letter(batch, i, reject, to.dead_letter_max_bytes) for i, reject in taken.rejects]
        try:
            futures = self._producer.send_unfenced(to.dead_letters, partition, letters)
            await acknowledged(futures, to.dead_letters)
        except RecordTooLarge:  # the topic admits less than we do: keep the reason and where the record lies
            references = [dead_letter(batch, i, reject, 0) for i, reject in taken.rejects]
            futures = self._producer.send_unfenced(to.dead_letters, partition, references)
            await acknowledged(futures, to.dead_letters)
        self._measures.dead_letters += len(letters)


def _together(works: Sequence[Work]) -> Mapping[int, Effects]:
    """What steps caused, in their order."""
    if len(works) == 1:
        return works[0].effects
    effects: dict[int, Effects] = {}
    for work in works:
        for partition, part in work.effects.items():
            effects.setdefault(partition, Effects()).follow(part)
    return effects


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    """Await all at once; one by itself costs no task."""
    calls = list(calls)
    if len(calls) == 1:
        await calls[0]
    else:
        await asyncio.gather(*calls)
