"""The batch step of one partition: records and stored states in, new states, vectors and rejects out; no I/O.

A step has three parts, so that its caller can read all missing states with one call: `Engine.decode_events` (or
`decode_deletions`), `Engine.missing`, `Engine.apply`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from stream.core import kernels
from stream.core.batch import Batch, BatchDecoder, Record, StepResult
from stream.core.counters import Counter
from stream.core.events import EventDecoder, EventRules
from stream.core.history_codec import NEVER, HistoryCodec, stored_order
from stream.core.hot_users import Folded, HotUsers
from stream.core.kinds import Kinds
from stream.core.space_engine import Coverage, Pair, Publisher, Step

#: Counters of what came of interactions and erasures.
_COUNTED: Final = {
    kernels.APPLIED: Counter.APPLIED,
    kernels.DUPLICATE: Counter.DUPLICATE,
    kernels.TOO_OLD: Counter.TOO_OLD,
    kernels.ERASED: Counter.ERASED,
    kernels.ERASURE: Counter.ERASURES,
}


class Engine:
    """The step for one partition, with the running sums of its hottest users in memory.

    Args:
        pairs: encoders and item spaces to publish vectors of, at least one; all encoders have one history length.
        rules: which events are admitted.
        partition: number of this partition.
        partitions: how many there are.
        hot_users: how many users are kept in memory between batches.
        publish_latest: publish only a batch's last state of each user instead of one record per applied event.
        json_output: write JSON instead of Avro to the output topic.
        schema_id: write Avro there in the framing of schema registries, with this id; None: as it is.
        decoder: shared with the engines of other partitions, so that its memo is held once.
        kinds: the same.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        rules: EventRules,
        *,
        partition: int,
        partitions: int,
        hot_users: int = 10_000,
        publish_latest: bool = False,
        json_output: bool = False,
        schema_id: int | None = None,
        decoder: EventDecoder | None = None,
        kinds: Kinds | None = None,
    ) -> None:
        self.history_limit = pairs[0].encoder.history_limit
        self.publish_latest = publish_latest
        self.json_output = json_output
        self.schema_id = schema_id
        self._kinds = kinds or Kinds(HistoryCodec(rules.types))
        self._forgotten = self._kinds.forgotten
        self._users = HotUsers(self._kinds, self.history_limit, hot_users)
        self._first_revision = 0
        self._decoder = BatchDecoder(decoder or EventDecoder(rules), partition, partitions, self._users.slots)
        self._publishers: list[Publisher] = []
        self.serve(pairs)

    def serve(self, pairs: Sequence[Pair]) -> None:
        """Publish vectors of these pairs from the next step on; those that stay keep their running sums.

        Raises:
            SpaceMismatch: an encoder was made for another item version than that of its pair.
        """
        kept = {publisher.versions: publisher for publisher in self._publishers}
        if any(pair.versions not in kept for pair in pairs):
            self.forget(list(self._users.slots))  # a new pair has no sums of theirs
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

    def decode_events(self, topic: str, records: Sequence[Record]) -> Batch:
        """Operations and rejects of a fetched batch of one event topic."""
        return self._decoder.events(topic, records)

    def decode_deletions(self, records: Sequence[Record]) -> Batch:
        """Operations and rejects of a fetched batch of the deletion topic."""
        return self._decoder.deletions(records)

    def missing(self, batch: Batch) -> list[bytes]:
        """Users of the batch whose stored state `apply` needs, which must come next."""
        self._kinds.make_room()
        if self._forgotten != self._kinds.forgotten:
            self._forgotten = self._kinds.forgotten
            self.forget(list(self._users.slots))  # their numbers mean nothing any more
        users = self._users.slots
        return list({op.user: None for op in batch.ops if op.user not in users})

    def apply(self, batch: Batch, stored: Mapping[bytes, bytes | None], epoch: int) -> StepResult:
        """Fold the batch into its users' histories and compute every vector that this publishes.

        Args:
            batch: decoded records of this partition.
            stored: stored state, or None, of every user that `missing` named.
            epoch: this worker's claim on the partition.

        Raises:
            StateError: a stored state can't be read.
        """
        result = StepResult(counts=batch.counts)
        self._load(stored)
        if not batch.ops:
            return result
        users = self._users
        folded = users.fold(batch.ops)
        for outcome, n in enumerate(np.bincount(folded.outcomes).tolist()):
            if n and outcome in _COUNTED:
                batch.count(_COUNTED[outcome], n)
        slots = dict(zip(folded.users, folded.slots.tolist(), strict=True))
        batch.count(Counter.HOT_USERS_HITS, len(slots) - len(stored))
        batch.count(Counter.HOT_USERS_MISSES, len(stored))
        step = self._step(folded)
        if step.users:
            for publisher in self._publishers:
                publisher.publish(step, epoch, result)
            result.states = users.states({user: slots[user] for user in step.users}, epoch)
        users.evict()
        return result

    def _step(self, folded: Folded) -> Step:
        """What sums have to follow, and the states to publish.

        These are the ones after each event that changed a history; then once that of who is to be sent again.
        """
        outcomes, slots = folded.outcomes, folded.slots
        is_news = (outcomes == kernels.APPLIED) | (outcomes == kernels.ERASURE)
        at = np.flatnonzero(is_news)
        if len(at):  # of several interactions of one event the last
            at = at[np.append(np.diff(folded.events[at]) > 0, True)]
        if self.publish_latest:
            _, last = np.unique(slots[at][::-1], return_index=True)
            at = at[np.sort(len(at) - 1 - last)]
        is_again = (outcomes == kernels.DUPLICATE) | (outcomes == kernels.KNOWN)
        if is_again.any():
            again = np.flatnonzero(is_again & ~np.isin(slots, slots[is_news]) & self._users.exist(slots))
            _, first = np.unique(slots[again], return_index=True)
            at = np.concatenate([at, again[np.sort(first)]])
        shown = np.full(len(slots), -1)
        shown[at] = np.arange(len(at))
        moved = np.flatnonzero(is_news | (shown >= 0))
        return Step(
            [folded.users[n] for n in at.tolist()], folded.lengths[at], folded.as_of[at], folded.revisions[at],
            slots[moved], folded.numbers[moved], folded.at_ms[moved], folded.places[moved], folded.gone[moved],
            shown[moved],
        )  # fmt: skip

    def embed(
        self, stored: Mapping[bytes, bytes], versions: tuple[str, str], epoch: int
    ) -> tuple[StepResult, Coverage]:
        """Records of users' present states in one pair of versions, and what there is to say of these.

        Changes no state, and leaves memory to the hot users.

        Args:
            stored: the present stored state of each user.
            versions: user and item version of a pair that is served.
            epoch: this worker's claim on the partition.

        Raises:
            StateError: a stored state can't be read.
        """
        self._kinds.make_room()
        result = StepResult()
        publisher = next(p for p in self._publishers if p.versions == versions)
        columns = self._kinds.read(list(stored.values()), self.history_limit)
        return result, publisher.publish_cold(list(stored), columns, epoch, result)

    def end_markers(self, markers: Mapping[bytes, bytes], left_behind: Sequence[bytes] = ()) -> StepResult:
        """What takes the markers of erased users out of every place.

        Whoever comes back begins anew, and stores and readers compare revisions within an epoch: so new histories count
        on from the highest revision that was forgotten in this one.

        Args:
            markers: stored state of each user, which must be a marker.
            left_behind: prefixes of keys that nothing is published under any more, and that were not removed yet.
        """
        revisions = [stored_order(state)[1] for state in markers.values()]
        self._first_revision = max(self._first_revision, *revisions)
        self.forget(markers)
        keys = [publisher.key(user) for user in markers for publisher in self._publishers]  # their tombstones are out
        others = [prefix + user for user in markers for prefix in left_behind]
        return StepResult(output=[(key, None) for key in others], removals=[*keys, *others], forgotten=list(markers))

    def _load(self, stored: Mapping[bytes, bytes | None]) -> None:
        """Take users into memory, and make their running sums."""
        if not stored:
            return
        read = {user: state for user, state in stored.items() if state is not None}
        new = [user for user, state in stored.items() if state is None]
        columns = self._kinds.read(list(read.values()), self.history_limit)
        columns = columns.followed_by(len(new), self._first_revision, NEVER)
        slots = self._users.load([*read, *new], columns)
        for publisher in self._publishers:
            publisher.load(slots, columns, self._users.capacity)

    def forget(self, users: Iterable[bytes]) -> None:
        """Drop users from memory; what is stored has all of them."""
        self._users.forget(users)
