"""The agent's work on one fetched batch: decode, fold, store locally, queue for durability. Order, nothing else."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from stream.core.batch import Batch, Op, StepResult
from stream.core.counters import Counter
from stream.core.engine import Engine
from stream.core.events import Reason
from stream.core.history_codec import marker_erased_at
from stream.core.space_engine import Coverage
from stream.errors import OwnershipError
from stream.kafka.delivery import BatchMissing, DeliveryChain, DurableMarks, GivenOut, RecordBatch
from stream.kafka.schema_registry import REGISTRY, SchemaRegistry
from stream.pipeline.activity import Activity
from stream.pipeline.lanes import Lanes, OnStage, Work
from stream.pipeline.measures import Measures
from stream.pipeline.table import PartitionDB
from stream.pipeline.watermark import Progress


@dataclass
class Owned:
    """A partition this worker owns: its claim, its state and its engine.

    `left_behind` gives the prefixes of the keys under which the partition has vectors that nobody keeps current.
    `turn` is held from a step's computation until it is queued, so that steps are queued in the order of their states.
    """

    partition: int
    epoch: int
    db: PartitionDB
    engine: Engine
    progress: Progress
    changelog_offset: int
    left_behind: Callable[[], list[bytes]] = list
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def changelog_at(self, offset: int) -> None:
        """Local state contains all changelog records below `offset`."""
        self.changelog_offset = max(self.changelog_offset, offset)


class NotPublished(Exception):
    """Vectors of a pair of versions were asked for that is not published, or no more."""


class BatchProcessor:
    """Turns fetched batches into queued work.

    Args:
        deletion_topic: the topic whose records are erasures.
        lanes: where finished steps go.
        marks: told of records on wrong partitions.
        measures: told of what is done.
        on_stage: see `stream.pipeline.lanes.OnStage`.
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
        lanes: Lanes,
        marks: DurableMarks,
        measures: Measures,
        on_stage: OnStage,
        read_again: Callable[[str, int, int, int], Awaitable[None]],
        registry: SchemaRegistry | None = None,
    ) -> None:
        self.owned: dict[int, Owned] = {}
        self.activity = Activity()
        self._deletion_topic = deletion_topic
        self._lanes = lanes
        self._marks = marks
        self._measures = measures
        self._on_stage = on_stage
        self._read_again = read_again
        self._registry = registry
        self._chain = DeliveryChain()

    def give_up(self, seeks: int) -> list[Owned]:
        """Own nothing any more; batches fetched before the consumer has sought `seeks` times are dropped."""
        owned = list(self.owned.values())
        self.owned.clear()
        self._chain.restart(seeks)
        return owned

    async def process(self, batch: RecordBatch) -> None:
        """Process a batch that Faust delivered; returns when it is queued, not when it is durable."""
        self.activity.begin()
        try:
            if self._chain.check(batch):
                await self.step(batch)
        except BatchMissing as missing:
            await self._read_again(batch.topic, batch.partition, missing.due, batch.seeks)
        finally:
            self.activity.rest()

    async def look_for_missing(
        self, given_out: Mapping[tuple[str, int], GivenOut], fetches: int, *, buffered: bool
    ) -> None:
        """Have read again what is lost; arguments and errors are those of `DeliveryChain.lost`."""
        for lost in self._chain.lost(given_out, fetches, buffered=buffered):
            await self._read_again(*lost)

    async def step(self, batch: RecordBatch) -> None:
        """Decode, fold and store a batch, and queue what it caused.

        Raises:
            OwnershipError: the partition is not ours.
            TopicMismatch: the topic's producer partitions wrongly.
            StateError: a stored history can't be read.
            RegistryError: the schema registry is away for too long.
        """
        owned = self.owned.get(batch.partition)
        if owned is None:
            msg = f"a batch of {batch.topic}-{batch.partition} arrived, but this worker does not own the partition"
            raise OwnershipError(msg)
        if self._registry is not None and (ids := self._registry.missing(record.value for record in batch.records)):
            self.activity.begin(REGISTRY)
            await self._registry.fetch(ids)
            if self.owned.get(batch.partition) is not owned:  # given up meanwhile: its next owner reads it again
                return
        engine, measures, is_erasures = owned.engine, self._measures, batch.topic == self._deletion_topic
        self.activity.begin("its turn")
        async with owned.turn:
            self.activity.begin()
            began_s = time.monotonic()
            if is_erasures:
                decoded = engine.decode_deletions(batch.records)
            else:
                decoded = engine.decode_events(batch.topic, batch.records)
            decoded_s = measures.passed("decode", began_s)
            wrong = sum(reject.reason is Reason.WRONG_PARTITION for _, reject in decoded.rejects)
            self._marks.saw(batch.topic, decoded.placed, wrong)
            result = self._apply(owned, decoded, engine.missing(decoded))
            if is_erasures:
                _erase_left_behind(owned, decoded, result)
            self._on_stage("local", batch, result)
            measures.passed("apply", decoded_s)
            measures.took(batch, decoded, is_erasures=is_erasures)
            measures.caused(result)
            self.activity.begin("room in the lane")
            await self._lanes[batch.partition].put(Work(batch, decoded.rejects, result))

    async def resend(self, owned: Owned, users: Sequence[bytes]) -> asyncio.Future[None]:
        """Queue the present states of `users` once more; the future is done when they are durable."""
        async with owned.turn:
            again = Batch([Op(user, None) for user in users])
            missing = owned.engine.missing(again)
            result = self._apply(owned, again, missing)
            owned.engine.forget(missing)  # they were not in use, and shall not push out those that are
            self._on_stage("local", None, result)
            self._measures.count(Counter.SENT_AGAIN, len(users))
            return await self._queue(owned, result)

    async def embed(
        self, owned: Owned, users: Sequence[bytes], versions: tuple[str, str]
    ) -> tuple[Coverage, asyncio.Future[None]]:
        """Queue the present vectors of `users` in one pair of versions; the future is done when they are durable.

        Raises:
            NotPublished: the pair is not among those that the partition publishes.
        """
        async with owned.turn:
            if versions not in owned.engine.versions:
                raise NotPublished
            found = zip(users, owned.db.get(users), strict=True)
            stored = {user: state for user, state in found if state}
            result, coverage = owned.engine.embed(stored, versions, owned.epoch)
            return coverage, await self._queue(owned, result)

    async def remove(self, owned: Owned, keys: Sequence[bytes]) -> asyncio.Future[None]:
        """Queue tombstones for keys that nothing is published under any more, and their removal from the store."""
        result = StepResult(output=[(key, None) for key in keys], removals=list(keys))
        async with owned.turn:
            return await self._queue(owned, result)

    async def end_markers(self, owned: Owned, users: Sequence[bytes], erased_before_ms: int) -> int:
        """Take the markers of those of `users` that were erased before a time out of every place; return how many.

        What they left under keys that nobody keeps current goes as well. Events of the partition wait until that is
        durable. Local state comes last: a crash before leaves a marker there, or in the changelog that it is restored
        from, and the next owner repeats what is left to be done.
        """
        async with owned.turn:
            found = zip(users, owned.db.get(users), strict=True)
            stored = {user: state for user, state in found if state is not None}
            markers = {
                user: state
                for user, state in stored.items()
                if (erased_at := marker_erased_at(state)) is not None and erased_at < erased_before_ms
            }
            if markers:
                await (await self._queue(owned, owned.engine.end_markers(markers, owned.left_behind())))
                owned.db.put(dict.fromkeys(markers), owned.changelog_offset)
                self._measures.count(Counter.MARKERS_ENDED, len(markers))
        return len(markers)

    async def _queue(self, owned: Owned, result: StepResult) -> asyncio.Future[None]:
        self._measures.caused(result)
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._lanes[owned.partition].put(Work(None, (), result, durable))
        return durable

    def _apply(self, owned: Owned, batch: Batch, missing: Sequence[bytes]) -> StepResult:
        stored = dict(zip(missing, owned.db.get(missing), strict=True))
        result = owned.engine.apply(batch, stored, owned.epoch)
        owned.db.put(result.states, owned.changelog_offset)
        return result


def _erase_left_behind(owned: Owned, erasures: Batch, result: StepResult) -> None:
    """Take the erased users' vectors of earlier encoders with them, which readers may be pinned to.

    Whatever became of an erasure in the histories: one that is seen again may have been cut short here by a crash.
    """
    users = dict.fromkeys(op.user for op in erasures.ops)
    keys = [prefix + user for prefix in owned.left_behind() for user in users]
    result.output += [(key, None) for key in keys]
    result.removals += keys
