"""The batch step of one partition: records and stored states in, new states, vectors and rejects out; no I/O.

A step has three parts, so that its caller can read all missing states with one call: `Engine.decode_events` (or
`decode_deletions`), `Engine.missing`, `Engine.apply`.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Final

from stream.core.batch import Batch, BatchDecoder, Record, StepResult
from stream.core.counters import Counter
from stream.core.events import EventDecoder, EventRules
from stream.core.history import History, Outcome
from stream.core.history_codec import NEVER, HistoryCodec, key_ts_ms, stored_order
from stream.core.space_engine import MAX_ROUNDS, Coverage, Pair, Publisher, Touch, User
from stream.core.stored_columns import SharedColumns

#: An event that is older than so many others of its user is not added to running sums: summing afresh is cheaper.
MAX_NEWER: Final = 64
#: A slot is summed afresh after so many incremental updates, so that rounding can't build up over years.
MAX_AGE: Final = 100_000
_FIRST_SLOTS: Final = 1024


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
        decoder: shared with the engines of other partitions, so that its memo is held once.
        columns: the same; it reads stored states.
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
        decoder: EventDecoder | None = None,
        columns: SharedColumns | None = None,
    ) -> None:
        self.history_limit = pairs[0].encoder.history_limit
        self._columns = columns or SharedColumns(HistoryCodec(rules.types))
        self.codec = self._columns.codec
        self.hot_users = hot_users
        self.publish_latest = publish_latest
        self.json_output = json_output
        self._users: dict[bytes, User] = {}  # least recently used first
        self._first_revision = 0
        self._decoder = BatchDecoder(decoder or EventDecoder(rules), partition, partitions, self._users)
        self._capacity = min(hot_users, _FIRST_SLOTS)
        self._free = list(range(self._capacity))
        self._publishers: list[Publisher] = []
        self._by_time = False
        self.serve(pairs)

    def serve(self, pairs: Sequence[Pair]) -> None:
        """Publish vectors of these pairs from the next step on; those that stay keep their running sums.

        Raises:
            SpaceMismatch: an encoder was made for another item version than that of its pair.
        """
        kept = {publisher.versions: publisher for publisher in self._publishers}
        if any(pair.versions not in kept for pair in pairs):
            self.forget(list(self._users))  # a new pair has no sums of theirs
        self._publishers = [
            kept.get(pair.versions)
            or Publisher(pair, self._columns, capacity=self._capacity, json_output=self.json_output)
            for pair in pairs
        ]
        self._by_time = any(publisher.by_time for publisher in self._publishers)

    @property
    def versions(self) -> tuple[tuple[str, str], ...]:
        """User and item version of each pair that vectors are published of."""
        return tuple(publisher.versions for publisher in self._publishers)

    def decode_events(self, topic: str, records: Iterable[Record]) -> Batch:
        """Operations and rejects of a fetched batch of one event topic."""
        return self._decoder.events(topic, records)

    def decode_deletions(self, records: Iterable[Record]) -> Batch:
        """Operations and rejects of a fetched batch of the deletion topic."""
        return self._decoder.deletions(records)

    def missing(self, batch: Batch) -> list[bytes]:
        """Users of the batch whose stored state `apply` needs."""
        users = self._users
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
        touched, states = self._fold(batch)
        if touched:
            batch.count(Counter.HOT_USERS_HITS, len(touched) - len(stored))
            batch.count(Counter.HOT_USERS_MISSES, len(stored))
        touched = {key: touch for key, touch in touched.items() if touch.steps}
        for touch in touched.values():
            user, steps = touch.user, len(touch.steps)
            touch.afresh = not touch.plain or steps > MAX_ROUNDS or user.age >= MAX_AGE
            user.age = 0 if touch.afresh else user.age + steps
        for publisher in self._publishers:
            publisher.publish(touched, states, epoch, result)
        for key, touch in touched.items():
            result.states[key] = touch.user.history.encode(epoch)
        self._evict()
        return result

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
        result = StepResult()
        publisher = next(p for p in self._publishers if p.versions == versions)
        histories, columns = self._columns.reader.read(
            list(stored.values()), self.history_limit, times=publisher.by_time
        )
        users = list(zip(stored, histories, strict=True))
        return result, publisher.publish_cold(users, columns, epoch, result)

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

    def _fold(self, batch: Batch) -> tuple[dict[bytes, Touch], list[tuple[bytes, Touch, int]]]:
        """Apply the operations; return the touched users and the states to publish as (user, touch, step index)."""
        touched: dict[bytes, Touch] = {}
        states: list[tuple[bytes, Touch, int]] = []
        outcomes = dict.fromkeys(Outcome, 0)
        erasures = 0
        for key, what in batch.ops:
            touch = touched.get(key)
            if touch is None:
                touch = touched[key] = Touch(self._user(key))
            if type(what) is bytes:
                if not _add(touch, what, outcomes):
                    continue
            elif type(what) is tuple:  # one event: one state is published, that after all of it
                if not sum([_add(touch, one, outcomes) for one in what]):
                    continue
            elif type(what) is int:
                history = touch.user.history
                news, gone = history.erase(what)
                if not news:
                    touch.again = True
                    continue
                erasures += 1
                touch.plain &= not gone
                touch.steps.append((history.count, history.as_of_ms, history.revision, None, gone, 0))
            else:
                touch.again = True
                continue
            states.append((key, touch, len(touch.steps) - 1))
        for key, touch in touched.items():
            if touch.again and not touch.steps:
                history = touch.user.history
                if history.count or history.erased_at != NEVER:  # else there is no such user
                    states.append((key, touch, 0))
                    touch.steps.append((history.count, history.as_of_ms, history.revision, None, (), 0))
        if self.publish_latest:
            states = [s for s in states if s[2] == len(s[1].steps) - 1]
        for outcome, n in outcomes.items():
            if n:
                batch.count(Counter[outcome.name], n)
        if erasures:
            batch.count(Counter.ERASURES, erasures)
        return touched, states

    def _user(self, key: bytes) -> User:
        user = self._users[key] = self._users.pop(key)  # the most recently used
        return user

    def _load(self, stored: Mapping[bytes, bytes | None]) -> None:
        """Take users into memory, and make their running sums."""
        if not stored:
            return
        read = {key: state for key, state in stored.items() if state is not None}
        histories, columns = self._columns.reader.read(list(read.values()), self.history_limit, times=self._by_time)
        users = dict(zip(read, histories, strict=True))
        for key, state in stored.items():
            if state is None:
                users[key] = History(self.codec, self.history_limit, revision=self._first_revision)
        slots = [self._slot() for _ in users]
        self._users.update((key, User(users[key], slot)) for key, slot in zip(users, slots, strict=True))
        columns = columns.followed_by(len(users) - len(read))
        for publisher in self._publishers:
            publisher.load(slots, columns)

    def _slot(self) -> int:
        if not self._free:
            larger = 2 * self._capacity
            for publisher in self._publishers:
                publisher.sums.grow(larger)
            self._free = list(range(self._capacity, larger))
            self._capacity = larger
        return self._free.pop()

    def forget(self, users: Iterable[bytes]) -> None:
        """Drop users from memory; what is stored has all of them."""
        for key in users:
            user = self._users.pop(key, None)
            if user is not None:
                self._free.append(user.slot)

    def _evict(self) -> None:
        excess = len(self._users) - self.hot_users
        if excess > 0:
            self.forget(list(islice(self._users, excess)))


def _add(touch: Touch, what: bytes, outcomes: dict[Outcome, int]) -> bool:
    """Add an interaction to a touched user's history; return whether that is a step."""
    history = touch.user.history
    outcome, evicted = history.add(what)
    outcomes[outcome] += 1
    if outcome is not Outcome.APPLIED:
        touch.again |= outcome is Outcome.DUPLICATE
        return False
    newer = 0
    if history.newest is not what:
        newer = history.count - 1 - bisect_left(history.keys, what)
        touch.plain &= newer <= MAX_NEWER
    gone: Sequence[bytes] = () if evicted is None else (evicted,)
    touch.steps.append((history.count, key_ts_ms(history.newest), history.revision, what, gone, newer))
    return True
