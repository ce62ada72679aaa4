"""The step: records and stored states of any partitions in, new states, vectors and rejects out; no I/O.

A step has three parts, so that its caller can read all missing states of a partition with one call:
`Engine.decode_events` (or `decode_deletions`) of each batch, `Engine.missing`, `Engine.apply`. A step of few events
costs about the same whatever their number: so it takes those of all partitions at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from stream.core import kernels
from stream.core.batch import Batch, BatchDecoder, Effects, Record, StepResult
from stream.core.counters import Counter
from stream.core.events import EventDecoder, EventRules
from stream.core.framing import Schemas
from stream.core.history_codec import NEVER, HistoryCodec, stored_order
from stream.core.hot_users import Folded, HotUsers
from stream.core.kinds import Int64, Kinds
from stream.core.space_engine import Coverage, Pair, Part, Publisher, Step

#: Counters of what came of interactions and erasures.
_COUNTED: Final = {
    kernels.APPLIED: Counter.APPLIED,
    kernels.DUPLICATE: Counter.DUPLICATE,
    kernels.TOO_OLD: Counter.TOO_OLD,
    kernels.ERASED: Counter.ERASED,
    kernels.ERASURE: Counter.ERASURES,
}
_OUTCOMES: Final = 1 + max(kernels.KNOWN, *_COUNTED)

#: By partition, the stored state of users, None of those who have none.
Stored = Mapping[int, Mapping[bytes, bytes | None]]


class Engine:
    """The step for partitions that were claimed, with the running sums of their hottest users in memory.

    Args:
        pairs: encoders and item spaces to publish vectors of, at least one; all encoders have one history length.
        rules: which events are admitted.
        partitions: how many there are.
        hot_users: how many users of each are kept in memory between steps.
        publish_latest: publish only a step's last state of each user instead of one record per applied event.
        json_output: write JSON instead of Avro to the output topic.
        schema_id: write Avro there in the framing of schema registries, with this id; None: as it is.
        schemas: of framed events; None without a registry.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        rules: EventRules,
        *,
        partitions: int,
        hot_users: int = 10_000,
        publish_latest: bool = False,
        json_output: bool = False,
        schema_id: int | None = None,
        schemas: Schemas | None = None,
    ) -> None:
        self.history_limit = pairs[0].encoder.history_limit
        self.publish_latest = publish_latest
        self.json_output = json_output
        self.schema_id = schema_id
        self._kinds = Kinds(HistoryCodec(rules.types))
        self._forgotten = self._kinds.forgotten
        self._users = HotUsers(self._kinds, self.history_limit, hot_users)
        self._epochs: dict[int, int] = {}
        self._first_revision = 0
        self._decoder = BatchDecoder(EventDecoder(rules, schemas), partitions)
        self._publishers: list[Publisher] = []
        self.serve(pairs)

    def serve(self, pairs: Sequence[Pair]) -> None:
        """Publish vectors of these pairs from the next step on; those that stay keep their running sums.

        Raises:
            SpaceMismatch: an encoder was made for another item version than that of its pair.
        """
        kept = {publisher.versions: publisher for publisher in self._publishers}
        if any(pair.versions not in kept for pair in pairs):
            self._users.forget_all()  # a new pair has no sums of theirs
        self._publishers = [
            kept.get(pair.versions)
            or Publisher(
                pair,
                self._kinds,
                capacity=self._users.capacity,
                json_output=self.json_output,
                schema_id=self.schema_id,
            )
            for pair in pairs
        ]

    @property
    def versions(self) -> tuple[tuple[str, str], ...]:
        """User and item version of each pair that vectors are published of."""
        return tuple(publisher.versions for publisher in self._publishers)

    def restart(self, hot_users: int) -> None:
        """Own no partition any more, and keep so many users of each that is claimed next."""
        self._users.forget_all()
        self._users.slots.clear()
        self._users.at_most = hot_users
        self._epochs.clear()
        self._first_revision = 0

    def claim(self, partition: int, epoch: int) -> None:
        """Write a partition's states and vectors under this claim from here on; nothing of it is in memory yet."""
        self._epochs[partition] = epoch
        self._users.slots[partition] = {}

    def decode_events(self, topic: str, partition: int, records: Sequence[Record]) -> Batch:
        """Operations and rejects of a fetched batch of one event topic."""
        return self._decoder.events(topic, partition, records, self._users.slots[partition])

    def decode_deletions(self, partition: int, records: Sequence[Record]) -> Batch:
        """Operations and rejects of a fetched batch of the deletion topic."""
        return self._decoder.deletions(partition, records, self._users.slots[partition])

    def missing(self, batches: Iterable[Batch]) -> dict[int, list[bytes]]:
        """Users of the batches whose stored state `apply` needs, which must come next, by partition."""
        self._kinds.make_room()
        if self._forgotten != self._kinds.forgotten:
            self._forgotten = self._kinds.forgotten
            self._users.forget_all()  # their numbers mean nothing any more
        found: dict[int, dict[bytes, None]] = {}
        for batch in batches:
            users = self._users.slots[batch.partition]
            found.setdefault(batch.partition, {}).update({user: None for user, _ in batch.ops if user not in users})
        return {partition: list(users) for partition, users in found.items() if users}

    def apply(self, batches: Iterable[Batch], stored: Stored) -> StepResult:
        """Fold batches into their users' histories and compute every vector that this publishes.

        Args:
            batches: decoded records, those of one partition in the order in which they are to be done; what comes of
                each is counted in it.
            stored: of every user that `missing` named.

        Raises:
            StateError: a stored state can't be read.
        """
        batches = sorted(batches, key=lambda batch: batch.partition)
        result = StepResult({batch.partition: Effects() for batch in batches})
        self._load(stored)
        batches = [batch for batch in batches if batch.ops]
        if not batches:
            return result
        users = self._users
        folded = users.fold(batches)
        self._count(batches, folded)
        used, loaded = len(np.unique(folded.slots)), sum(map(len, stored.values()))
        result.counts = {Counter.HOT_USERS_HITS: used - loaded, Counter.HOT_USERS_MISSES: loaded}
        step, shown = self._step(batches, folded)
        if step.users:
            for publisher in self._publishers:
                publisher.publish(step, result)
            self._store(step, shown, result)
        for partition in result.effects:
            users.evict(partition)
        return result

    def _count(self, batches: Sequence[Batch], folded: Folded) -> None:
        """Tell each batch what came of it."""
        sizes = np.diff(folded.ends, prepend=0)
        places = np.repeat(np.arange(len(batches)) * _OUTCOMES, sizes) + folded.outcomes
        found = np.bincount(places, minlength=len(batches) * _OUTCOMES).reshape(len(batches), _OUTCOMES).tolist()
        for batch, of_each in zip(batches, found, strict=True):
            for outcome, counter in _COUNTED.items():
                if n := of_each[outcome]:
                    batch.count(counter, n)

    def _step(self, batches: Sequence[Batch], folded: Folded) -> tuple[Step, Int64]:
        """What sums have to follow, and the states to publish, with the slots of these.

        These are the ones after each event that changed a history; and once that of who is to be sent again.
        """
        outcomes, slots = folded.outcomes, folded.slots
        is_news = (outcomes == kernels.APPLIED) | (outcomes == kernels.ERASURE)
        at = np.flatnonzero(is_news)
        if len(at):  # of several interactions of one event the last
            at = at[np.append(np.diff(folded.events[at]) > 0, True)]
        if self.publish_latest:
            _, last = np.unique(slots[at][::-1], return_index=True)
            at = np.sort(at[len(at) - 1 - last])
        is_again = (outcomes == kernels.DUPLICATE) | (outcomes == kernels.KNOWN)
        if is_again.any():
            again = np.flatnonzero(is_again & ~np.isin(slots, slots[is_news]) & self._users.exist(slots))
            _, first = np.unique(slots[again], return_index=True)
            at = np.sort(np.concatenate([at, again[first]]))
        parts, epochs = self._parts(batches, np.searchsorted(at, folded.ends).tolist())
        shown = np.full(len(slots), -1)
        shown[at] = np.arange(len(at))
        moved = np.flatnonzero(is_news | (shown >= 0))
        step = Step(
            [folded.users[n] for n in at.tolist()], parts, epochs, folded.lengths[at], folded.as_of[at],
            folded.revisions[at], slots[moved], folded.numbers[moved], folded.at_ms[moved], folded.places[moved],
            folded.gone[moved], shown[moved],
        )  # fmt: skip
        return step, slots[at]

    def _parts(self, batches: Sequence[Batch], ends: Sequence[int]) -> tuple[list[Part], Int64]:
        """Where the states of each partition lie among those to publish, and the epoch of each state."""
        end_of = {batch.partition: end for batch, end in zip(batches, ends, strict=True)}  # that of its last batch
        starts = [0, *end_of.values()]
        parts = [Part(partition, start, end) for (partition, end), start in zip(end_of.items(), starts, strict=False)]
        epochs = np.array([self._epochs[part.partition] for part in parts], dtype=np.int64)
        return parts, np.repeat(epochs, [part.end - part.start for part in parts])

    def _store(self, step: Step, slots: Int64, result: StepResult) -> None:
        """Add the states that users have now to the effects."""
        _, first = np.unique(slots, return_index=True)
        first.sort()
        states = self._users.states(slots[first], step.epochs[first])
        ends = np.searchsorted(first, [part.end for part in step.parts]).tolist()
        start = 0
        for part, end in zip(step.parts, ends, strict=True):
            whose = [step.users[place] for place in first[start:end].tolist()]
            result.of(part.partition).states = dict(zip(whose, states[start:end], strict=True))
            start = end

    def embed(
        self, partition: int, stored: Mapping[bytes, bytes], versions: tuple[str, str]
    ) -> tuple[StepResult, Coverage]:
        """Records of users' present states in one pair of versions, and what there is to say of these.

        Changes no state, and leaves memory to the hot users.

        Args:
            partition: of the users.
            stored: the present stored state of each.
            versions: user and item version of a pair that is served.

        Raises:
            StateError: a stored state can't be read.
        """
        self._kinds.make_room()
        result = StepResult()
        publisher = next(p for p in self._publishers if p.versions == versions)
        columns = self._kinds.read(list(stored.values()), self.history_limit)
        epoch = self._epochs[partition]
        return result, publisher.publish_cold(partition, epoch, list(stored), columns, result)

    def end_markers(self, partition: int, markers: Mapping[bytes, bytes], left_behind: Sequence[bytes] = ()) -> Effects:
        """What takes the markers of erased users out of every place.

        Whoever comes back begins anew, and stores and readers compare revisions within an epoch: so new histories count
        on from the highest revision that was forgotten so far.

        Args:
            partition: of the users.
            markers: stored state of each, which must be a marker.
            left_behind: prefixes of keys that nothing is published under any more, and that were not removed yet.
        """
        revisions = [stored_order(state)[1] for state in markers.values()]
        self._first_revision = max(self._first_revision, *revisions)
        self.forget(partition, markers)
        keys = [publisher.key(user) for user in markers for publisher in self._publishers]  # their tombstones are out
        others = [prefix + user for user in markers for prefix in left_behind]
        return Effects(output=[(key, None) for key in others], removals=[*keys, *others], forgotten=list(markers))

    def _load(self, stored: Stored) -> None:
        """Take users into memory, and make their running sums."""
        if not stored:
            return
        states = [state for users in stored.values() for state in users.values() if state is not None]
        read, new = (
            [(p, [user for user, state in users.items() if (state is None) is is_new]) for p, users in stored.items()]
            for is_new in (False, True)
        )
        columns = self._kinds.read(states, self.history_limit)
        columns = columns.followed_by(sum(len(users) for _, users in new), self._first_revision, NEVER)
        slots = self._users.load([*read, *new], columns)
        for publisher in self._publishers:
            publisher.load(slots, columns, self._users.capacity)

    def forget(self, partition: int, users: Iterable[bytes]) -> None:
        """Drop users from memory; what is stored has all of them."""
        self._users.forget(partition, users)
