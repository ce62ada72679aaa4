"""The agent's work on what was fetched: decode, fold, store locally, queue for durability. Order, nothing else."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stream.core.batch import Batch, Effects, Op, StepResult
from stream.core.counters import Counter
from stream.core.engine import Engine
from stream.core.events import Reason
from stream.core.history_codec import marker_erased_at
from stream.core.space_engine import Coverage, Pair
from stream.errors import OwnershipError
from stream.kafka.delivery import BatchMissing, DeliveryChain, DurableMarks, GivenOut, RecordBatch
from stream.kafka.schema_registry import REGISTRY, SchemaRegistry
from stream.pipeline.activity import Activity
from stream.pipeline.lane import Lane, OnStage, Taken, Work
from stream.pipeline.measures import Measures
from stream.pipeline.table import PartitionDB
from stream.pipeline.watermark import Progress


@dataclass
class Owned:
    """A partition this worker owns: its claim, its state, and how far that is durable.

    `left_behind` gives the prefixes of the keys under which the partition has vectors that nobody keeps current.
    """

    partition: int
    epoch: int
    db: PartitionDB
    progress: Progress
    changelog_offset: int
    left_behind: Callable[[], list[bytes]] = list

    def changelog_at(self, offset: int) -> None:
        """Local state contains all changelog records below `offset`."""
        self.changelog_offset = max(self.changelog_offset, offset)


class NotPublished(Exception):
    """Vectors of a pair of versions were asked for that is not published, or no more."""


class BatchProcessor:
    """Turns fetched batches into queued work.

    Args:
        deletion_topic: the topic whose records are erasures.
        marks: told of records on wrong partitions.
        measures: told of what is done.
        on_stage: see `stream.pipeline.lane.OnStage`.
        read_again: called with topic, partition, offset and the run's count of seeks, to have the partition read again
            from the offset.
        registry: asked for the schemas of framed values; None without one.

    Attributes:
        owned: the partitions of this worker.
        activity: what the agent is at.
    """

    def __init__(
        self,
        deletion_topic: str,
        marks: DurableMarks,
        measures: Measures,
        on_stage: OnStage,
        read_again: Callable[[str, int, int, int], Awaitable[None]],
        registry: SchemaRegistry | None = None,
    ) -> None:
        self.owned: dict[int, Owned] = {}
        self.activity = Activity()
        self._deletion_topic = deletion_topic
        self._marks = marks
        self._measures = measures
        self._on_stage = on_stage
        self._read_again = read_again
        self._registry = registry
        self._chain = DeliveryChain()
        # Held from a step's computation until it is queued, so that steps are queued in the order of their states.
        self._turn = asyncio.Lock()
        self._path: _Path | None = None

    # -- what is owned --------------------------------------------------------------------------------------------

    def begin(self, engine: Engine, lane: Lane) -> None:
        """Take steps with this engine from here on, and queue them in this lane."""
        self._path = _Path(engine, lane)

    def give_up(self, seeks: int) -> list[Owned]:
        """Own nothing any more; batches fetched before the consumer has sought `seeks` times are dropped."""
        owned = list(self.owned.values())
        self.owned.clear()
        self._chain.restart(seeks)
        return owned

    @property
    def versions(self) -> tuple[tuple[str, str], ...]:
        """User and item version of each pair that vectors are published of."""
        return () if self._path is None else self._path.engine.versions

    async def serve(self, pairs: Sequence[Pair]) -> None:
        """Publish vectors of these pairs from the next step on."""
        async with self._turn:
            if self._path is not None:
                self._path.engine.serve(pairs)

    # -- events ---------------------------------------------------------------------------------------------------

    async def process(self, batches: Sequence[RecordBatch]) -> None:
        """Process batches that Faust delivered together; returns when they are queued, not when they are durable."""
        self.activity.begin()
        try:
            due, missing = [], []
            for batch in batches:
                try:
                    if self._chain.check(batch):
                        due.append(batch)
                except BatchMissing as exc:
                    missing.append((batch.topic, batch.partition, exc.due, batch.seeks))
            if due:
                await self.step(due)
            for gap in missing:
                await self._read_again(*gap)
        finally:
            self.activity.rest()

    async def look_for_missing(
        self, given_out: Mapping[tuple[str, int], GivenOut], fetches: int, *, buffered: bool
    ) -> None:
        """Have read again what is lost; arguments and errors are those of `DeliveryChain.lost`."""
        for lost in self._chain.lost(given_out, fetches, buffered=buffered):
            await self._read_again(*lost)

    async def step(self, batches: Sequence[RecordBatch]) -> None:
        """Decode, fold and store batches, and queue what they caused.

        Raises:
            OwnershipError: a partition is not ours.
            TopicMismatch: a topic's producer partitions wrongly.
            StateError: a stored history can't be read.
            RegistryError: the schema registry is away for too long.
        """
        owned = [self._owner(batch) for batch in batches]
        await self._fetch_schemas(batches)
        self.activity.begin("its turn")
        async with self._turn:
            # What was given up meanwhile is read again by its next owner.
            batches = [b for b, one in zip(batches, owned, strict=True) if self.owned.get(b.partition) is one]
            if not batches:
                return
            self.activity.begin()
            work = self._work(batches)
            self._on_stage("local", work)
            self.activity.begin("room in the lane")
            await self._begun.lane.put(work)

    def _owner(self, batch: RecordBatch) -> Owned:
        owned = self.owned.get(batch.partition)
        if owned is None:
            msg = f"a batch of {batch.topic}-{batch.partition} arrived, but this worker does not own the partition"
            raise OwnershipError(msg)
        return owned

    async def _fetch_schemas(self, batches: Sequence[RecordBatch]) -> None:
        if self._registry is not None:
            ids = self._registry.missing(record.value for batch in batches for record in batch.records)
            if ids:
                self.activity.begin(REGISTRY)
                await self._registry.fetch(ids)

    def _work(self, batches: Sequence[RecordBatch]) -> Work:
        measures, began_s = self._measures, time.monotonic()
        decoded = [self._decode(batch) for batch in batches]
        decoded_s = measures.passed("decode", began_s)
        result = self._apply(decoded)
        for batch, one in zip(batches, decoded, strict=True):
            if batch.topic == self._deletion_topic:
                self._erase_left_behind(one, result.of(one.partition))
        measures.passed("apply", decoded_s)
        for batch, one in zip(batches, decoded, strict=True):
            measures.took(batch, one, is_erasures=batch.topic == self._deletion_topic)
        measures.step_records.observe(sum(len(batch.records) for batch in batches))
        measures.caused(result)
        return Work(result.effects, [Taken(b, one.rejects) for b, one in zip(batches, decoded, strict=True)])

    def _decode(self, batch: RecordBatch) -> Batch:
        engine = self._begun.engine
        if batch.topic == self._deletion_topic:
            decoded = engine.decode_deletions(batch.partition, batch.records)
        else:
            decoded = engine.decode_events(batch.topic, batch.partition, batch.records)
        wrong = sum(reject.reason is Reason.WRONG_PARTITION for _, reject in decoded.rejects)
        self._marks.saw(batch.topic, decoded.placed, wrong)
        return decoded

    def _erase_left_behind(self, erasures: Batch, effects: Effects) -> None:
        """Take the erased users' vectors of earlier encoders with them, which readers may be pinned to.

        Whatever became of an erasure in the histories: one that is seen again may have been cut short here by a crash.
        """
        users = dict.fromkeys(op.user for op in erasures.ops)
        keys = [prefix + user for prefix in self.owned[erasures.partition].left_behind() for user in users]
        effects.output += [(key, None) for key in keys]
        effects.removals += keys

    # -- all users of a partition, beside its events ------------------------------------------------------------------

    async def resend(self, owned: Owned, users: Sequence[bytes]) -> asyncio.Future[None]:
        """Queue the present states of `users` once more; the future is done when they are durable."""
        async with self._turn:
            again, engine = Batch(owned.partition, [Op(user, None) for user in users]), self._begun.engine
            missing = engine.missing([again])
            result = self._apply([again])
            for partition, some in missing.items():  # they were not in use, and shall not push out those that are
                engine.forget(partition, some)
            self._on_stage("local", Work(result.effects))
            self._measures.count(Counter.SENT_AGAIN, len(users))
            return await self._queue(result)

    async def embed(
        self, owned: Owned, users: Sequence[bytes], versions: tuple[str, str]
    ) -> tuple[Coverage, asyncio.Future[None]]:
        """Queue the present vectors of `users` in one pair of versions; the future is done when they are durable.

        Raises:
            NotPublished: the pair is not among those that are published.
        """
        async with self._turn:
            if versions not in self.versions:
                raise NotPublished
            found = zip(users, owned.db.get(users), strict=True)
            stored = {user: state for user, state in found if state}
            result, coverage = self._begun.engine.embed(owned.partition, stored, versions)
            return coverage, await self._queue(result)

    async def remove(self, owned: Owned, keys: Sequence[bytes]) -> asyncio.Future[None]:
        """Queue tombstones for keys that nothing is published under any more, and their removal from the store."""
        effects = Effects(output=[(key, None) for key in keys], removals=list(keys))
        async with self._turn:
            return await self._queue(StepResult({owned.partition: effects}))

    async def end_markers(self, owned: Owned, users: Sequence[bytes], erased_before_ms: int) -> int:
        """Take the markers of those of `users` that were erased before a time out of every place; return how many.

        What they left under keys that nobody keeps current goes as well. Events wait until that is durable. Local state
        comes last: a crash before leaves a marker there, or in the changelog that it is restored from, and the next
        owner repeats what is left to be done.
        """
        async with self._turn:
            found = zip(users, owned.db.get(users), strict=True)
            stored = {user: state for user, state in found if state is not None}
            markers = {
                user: state
                for user, state in stored.items()
                if (erased_at := marker_erased_at(state)) is not None and erased_at < erased_before_ms
            }
            if markers:
                effects = self._begun.engine.end_markers(owned.partition, markers, owned.left_behind())
                await (await self._queue(StepResult({owned.partition: effects})))
                owned.db.put(dict.fromkeys(markers), owned.changelog_offset)
                self._measures.count(Counter.MARKERS_ENDED, len(markers))
        return len(markers)

    async def _queue(self, result: StepResult) -> asyncio.Future[None]:
        self._measures.caused(result)
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._begun.lane.put(Work(result.effects, durable=durable))
        return durable

    # -- a step ---------------------------------------------------------------------------------------------------

    @property
    def _begun(self) -> "_Path":
        if self._path is None:
            msg = "no partition was taken yet"
            raise OwnershipError(msg)
        return self._path

    def _apply(self, batches: Sequence[Batch]) -> StepResult:
        engine = self._begun.engine
        stored = {
            partition: dict(zip(users, self.owned[partition].db.get(users), strict=True))
            for partition, users in engine.missing(batches).items()
        }
        result = engine.apply(batches, stored)
        for partition, effects in result.effects.items():
            owned = self.owned[partition]
            owned.db.put(effects.states, owned.changelog_offset)
        return result


class _Path(NamedTuple):
    """What makes steps, and what makes them durable."""

    engine: Engine
    lane: Lane
