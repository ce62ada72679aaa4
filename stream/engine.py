"""The batch step of one partition: records and stored states in, new states, vectors and rejects out; no I/O.

A step has three parts, so that its caller can read all missing states with one call: `Engine.decode_events` (or
`decode_deletions`), `Engine.missing`, `Engine.apply`.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stream.accumulate import DecayedSums, Newer
from stream.embedding import Float32
from stream.encoders import REASONS, VersionedEncoder, finish
from stream.events import DeletionDecoder, EventDecoder, EventRules, Reason, Reject
from stream.history import TS_BYTES, History, HistoryCodec, Outcome, key_ts_ms
from stream.items import ItemSpace
from stream.keys import partition_of, user_cache_key
from stream.records import EmbeddingRecord, RecordEncoder, kv_prefix, to_json

#: Up to so many events of one user in a batch are added one round at a time, together with other users'; from there on
#: one matrix product for the user alone is cheaper.
MAX_ROUNDS: Final = 8
#: The same holds for an event that is older than so many others of its user.
MAX_NEWER: Final = 64
#: A slot is summed afresh after so many incremental updates, so that rounding can't build up over years.
MAX_AGE: Final = 100_000
_STAYS: Final = 1 << 40


class Record(Protocol):
    """What the step reads of a Kafka record."""

    key: bytes | None
    value: bytes | None
    timestamp: int


class Op(NamedTuple):
    """One thing to do to one user: add an interaction (its sort key), erase up to a time, or only send again (None)."""

    user: bytes
    what: bytes | int | None


@dataclass
class Batch:
    """Decoded records: operations in log order, rejects with the index of their record, counters.

    Attributes:
        placed: how many valid records were on the partition of their key, those that cause nothing included.
    """

    ops: list[Op] = field(default_factory=list)
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    placed: int = 0

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        self.counts[name] = self.counts.get(name, 0) + by


@dataclass
class StepResult:
    """What a batch caused, in the order in which it must become durable.

    Attributes:
        states: new stored state by user, for the local table and the changelog.
        output: key and value of each record for the output topic, in order; a None value is a tombstone.
        entries: last entry of each key for the key-value store, prefix included.
        counts: counters by name.
    """

    states: dict[bytes, bytes] = field(default_factory=dict)
    output: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    entries: dict[bytes, bytes] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


#: A state to publish, right after one operation: history length, as_of (ms), revision, what was added, what left, and
#: how many interactions are newer than what was added. A plain tuple, for one is made for every event.
_Step = tuple[int, int | None, int, bytes | None, Sequence[bytes], int]


class _User:
    """A user in memory: the history, its rows in each active space, and a slot of running sums."""

    __slots__ = ("age", "history", "rows", "slot", "weights")

    def __init__(self, history: History) -> None:
        self.history = history
        self.rows: list[list[int]] = []  # one list a space, aligned with history.keys
        self.weights: list[list[float]] = []  # the same; empty where all types weigh 1
        self.slot = -1
        self.age = 0


class _Touch:
    """What a batch did to one user so far."""

    __slots__ = ("afresh", "again", "plain", "steps", "user")

    def __init__(self, user: _User) -> None:
        self.user = user
        self.steps: list[_Step] = []
        self.plain = True  # all steps are additions that the running sums can follow
        self.again = False  # something arrived that was known already
        self.afresh = False  # the running sums can't follow; sum the interactions again


class _SpaceState:
    """One active item space: its running sums and its record encoder."""

    def __init__(self, space: ItemSpace, encoder: VersionedEncoder, capacity: int) -> None:
        self.space = space
        self.sums = DecayedSums(space.vectors, encoder.encoder.decays, encoder.history_limit, capacity)
        self.records = RecordEncoder(encoder.version, space.version, space.dim)
        self.key_prefix = user_cache_key("", space.version, encoder.version).encode()


class Engine:
    """The step for one partition, with the running sums of its hottest users in memory.

    Args:
        spaces: item spaces to publish vectors in, at least one.
        encoder: the encoder and history length.
        rules: which events are admitted.
        partition: number of this partition.
        partitions: how many there are.
        hot_users: how many users are kept in memory between batches.
        publish_latest: publish only a batch's last state of each user instead of one record per applied event.
        json_output: write JSON instead of Avro to the output topic.
        decoder: shared with the engines of other partitions, so that its memo is held once.
        codec: the same.
    """

    def __init__(
        self,
        spaces: Sequence[ItemSpace],
        encoder: VersionedEncoder,
        rules: EventRules,
        *,
        partition: int,
        partitions: int,
        hot_users: int = 10_000,
        publish_latest: bool = False,
        json_output: bool = False,
        decoder: EventDecoder | None = None,
        codec: HistoryCodec | None = None,
    ) -> None:
        self.encoder = encoder
        self.codec = codec or HistoryCodec(rules.types)
        self.partition = partition
        self.partitions = partitions
        self.hot_users = hot_users
        self.publish_latest = publish_latest
        self.json_output = json_output
        self._decoder = decoder or EventDecoder(rules)
        self._deletions = DeletionDecoder()
        capacity = min(hot_users, 1024)
        self._spaces = [_SpaceState(space, encoder, capacity) for space in spaces]
        self._users: dict[bytes, _User] = {}  # least recently used first
        self._loaded: list[_User] = []  # their sums are to be made before the batch is applied to them
        self._free = list(range(capacity))
        self._capacity = capacity
        weights = {t.encode(): w for t, w in encoder.encoder.type_weights.items() if w != 1.0}
        self._weights = {b"\0" + t: w for t, w in weights.items()}

    # -- decoding -------------------------------------------------------------------------------------------------

    def decode_events(self, topic: str, records: Iterable[Record]) -> Batch:
        """Operations and rejects of a fetched batch of one event topic."""
        decode = self._decoder.decode
        return self._decode(records, lambda r: decode(topic, r.key, r.value, r.timestamp), "ignored")

    def decode_deletions(self, records: Iterable[Record]) -> Batch:
        """Operations and rejects of a fetched batch of the deletion topic."""
        decode = self._deletions.decode
        return self._decode(records, lambda r: decode(r.key, r.value, r.timestamp), "withdrawn")

    def _decode(
        self, records: Iterable[Record], decode: Callable[[Record], bytes | int | Reject | None], none_means: str
    ) -> Batch:
        batch = Batch()
        users, ops = self._users, batch.ops
        placed: set[bytes] = set()
        for index, record in enumerate(records):
            what = decode(record)
            key = record.key
            if type(what) is Reject:
                batch.rejects.append((index, what))
            elif key is not None:
                # A user in memory was placed before; murmur2 in Python is too dear to compute for every event.
                if key not in users and key not in placed:
                    if partition_of(key, self.partitions) != self.partition:
                        detail = "the key's murmur2 partition is another one"
                        batch.rejects.append((index, Reject(Reason.WRONG_PARTITION, detail)))
                        continue
                    placed.add(key)
                if what is None:
                    batch.count(none_means)
                else:
                    ops.append(Op(key, what))  # type: ignore[arg-type]
        batch.placed = len(ops) + batch.counts.get(none_means, 0)
        batch.count("rejected", len(batch.rejects))
        return batch

    def missing(self, batch: Batch) -> list[bytes]:
        """Users of the batch whose stored state `apply` needs."""
        users = self._users
        return list({op.user: None for op in batch.ops if op.user not in users})

    # -- the step -------------------------------------------------------------------------------------------------

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
        touched, states = self._fold(batch, stored)
        self._load_sums()
        touched = {key: touch for key, touch in touched.items() if touch.steps}
        for touch in touched.values():
            user, steps = touch.user, len(touch.steps)
            touch.afresh = not touch.plain or steps > MAX_ROUNDS or user.age >= MAX_AGE
            user.age = 0 if touch.afresh else user.age + steps
        for space in range(len(self._spaces)):
            self._publish(space, touched, states, epoch, result)
        for key, touch in touched.items():
            result.states[key] = touch.user.history.encode(epoch)
        self._evict()
        return result

    def _fold(
        self, batch: Batch, stored: Mapping[bytes, bytes | None]
    ) -> tuple[dict[bytes, _Touch], list[tuple[bytes, _Touch, int]]]:
        """Apply the operations; return the touched users and the states to publish as (user, touch, step index)."""
        touched: dict[bytes, _Touch] = {}
        states: list[tuple[bytes, _Touch, int]] = []
        outcomes = dict.fromkeys(Outcome, 0)
        erasures = 0
        for key, what in batch.ops:
            touch = touched.get(key)
            if touch is None:
                touch = touched[key] = _Touch(self._user(key, stored))
            history = touch.user.history
            if type(what) is bytes:
                outcome, evicted = history.add(what)
                outcomes[outcome] += 1
                if outcome is not Outcome.APPLIED:
                    touch.again |= outcome is Outcome.DUPLICATE
                    continue
                keys = history.keys
                newer = 0
                if keys[-1] is not what:
                    newer = len(keys) - 1 - bisect_left(keys, what)
                    touch.plain &= newer <= MAX_NEWER
                gone: Sequence[bytes] = () if evicted is None else (evicted,)
                step: _Step = (len(keys), key_ts_ms(keys[-1]), history.revision, what, gone, newer)
            elif type(what) is int:
                news, gone = history.erase(what)
                if not news:
                    touch.again = True
                    continue
                erasures += 1
                touch.plain &= not gone
                step = (len(history.keys), history.as_of_ms, history.revision, None, gone, 0)
            else:
                touch.again = True
                continue
            states.append((key, touch, len(touch.steps)))
            touch.steps.append(step)
        for key, touch in touched.items():
            if touch.again and not touch.steps:
                history = touch.user.history
                if history.revision:  # a user that only sent what can't be kept has no state
                    states.append((key, touch, 0))
                    touch.steps.append((len(history.keys), history.as_of_ms, history.revision, None, (), 0))
        if self.publish_latest:
            states = [s for s in states if s[2] == len(s[1].steps) - 1]
        for outcome, n in outcomes.items():
            if n:
                batch.count(outcome.value, n)
        if erasures:
            batch.count("erasures", erasures)
        return touched, states

    def _user(self, key: bytes, stored: Mapping[bytes, bytes | None]) -> _User:
        user = self._users.pop(key, None)
        if user is None:
            data = stored[key]
            limit = self.encoder.history_limit
            user = _User(History(self.codec, limit) if data is None else History.decode(data, self.codec, limit))
            keys = user.history.keys
            user.slot = self._slot()
            user.rows = [[state.space.row(k[TS_BYTES : k.rindex(b"\0")], -1) for k in keys] for state in self._spaces]
            user.weights = [[self._weight(k) for k in keys] for _ in self._spaces if self._weights]
            self._loaded.append(user)
        self._users[key] = user
        return user

    def _load_sums(self) -> None:
        """Sums of the users that were read from the store for this batch, as they were before it."""
        users, self._loaded = self._loaded, []
        if not users:
            return
        slots = np.array([user.slot for user in users])
        for index, state in enumerate(self._spaces):
            rows = [[row for row in reversed(user.rows[index]) if row >= 0] for user in users]
            weights = None
            if self._weights:
                pairs = (zip(reversed(user.rows[index]), reversed(user.weights[index]), strict=True) for user in users)
                weights = [[weight for row, weight in of_one if row >= 0] for of_one in pairs]
            state.sums.load(slots, rows, weights)

    def _slot(self) -> int:
        if not self._free:
            larger = 2 * self._capacity
            for state in self._spaces:
                state.sums.grow(larger)
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

    def _weight(self, key: bytes) -> float:
        return self._weights.get(key[key.rindex(b"\0") :], 1.0) if self._weights else 1.0

    # -- vectors --------------------------------------------------------------------------------------------------

    def _publish(
        self,
        index: int,
        touched: Mapping[bytes, _Touch],
        states: Sequence[tuple[bytes, _Touch, int]],
        epoch: int,
        result: StepResult,
    ) -> None:
        """Sums, vectors and records of all `states` in one item space."""
        state = self._spaces[index]
        places: dict[bytes, list[int]] = {}
        for place, (key, _, _) in enumerate(states):
            places.setdefault(key, []).append(place)
        n, decays = len(states), len(self.encoder.encoder.decays)
        sums = np.zeros((n, decays, state.space.dim))
        totals = np.zeros((n, decays))
        known = np.zeros(n, dtype=np.int64)
        rounds: list[list[tuple[_Touch, int]]] = [[] for _ in range(MAX_ROUNDS)]
        for key, wanted in places.items():
            touch = touched[key]
            if touch.afresh:
                steps = [states[place][2] for place in wanted]
                sums[wanted], totals[wanted], known[wanted] = self._afresh(index, touch, steps)
                continue
            skipped = len(touch.steps) - len(wanted)  # `publish_latest` wants the last step only
            for step in range(len(touch.steps)):
                rounds[step].append((touch, wanted[step - skipped] if step >= skipped else -1))
        for step, members in enumerate(rounds):
            if members:
                slots, at = self._insert_round(index, members, step)
                slots, at = slots[at >= 0], at[at >= 0]
                sums[at], totals[at], known[at] = state.sums.read(slots)
        self._emit(state, states, (sums, totals, known), epoch, result)

    def _insert_round(
        self, index: int, members: Sequence[tuple[_Touch, int]], step: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One step of many users; return their slots and places."""
        state = self._spaces[index]
        row_of = state.space.row
        count = len(members)
        slots = np.fromiter((touch.user.slot for touch, _ in members), dtype=np.int64, count=count)
        places = np.fromiter((place for _, place in members), dtype=np.int64, count=count)
        new_rows, old_rows = np.full(count, -1), np.full(count, -1)
        new_weights, old_weights = np.ones(count), np.ones(count)
        late: list[int] = []
        newer_rows: list[list[int]] = []
        newer_weights: list[list[float]] = []
        for i, (touch, _) in enumerate(members):
            _, _, _, added, gone, newer = touch.steps[step]
            if added is None:  # sent again, or an erasure that took nothing
                continue
            user = touch.user
            rows = user.rows[index]
            if gone:
                old_rows[i] = rows.pop(0)
            row = row_of(added[TS_BYTES : added.rindex(b"\0")], -1)
            new_rows[i] = row
            at = len(rows) - newer
            rows.insert(at, row)
            if self._weights:
                weights = user.weights[index]
                if gone:
                    old_weights[i] = weights.pop(0)
                new_weights[i] = self._weight(added)
                weights.insert(at, float(new_weights[i]))
            if newer and row >= 0:
                known = [n for n in range(len(rows) - 1, at, -1) if rows[n] >= 0]
                if known:
                    late.append(i)
                    newer_rows.append([rows[n] for n in known])
                    if self._weights:
                        newer_weights.append([weights[n] for n in known])
        aside = Newer(np.array(late), newer_rows, newer_weights if self._weights else None) if late else None
        state.sums.insert(slots, new_rows, new_weights, old_rows, old_weights, aside)
        return slots, places

    def _afresh(
        self, index: int, touch: _Touch, wanted: Sequence[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Sums of the wanted steps of one user from the interactions themselves; leaves the user's slot valid."""
        state = self._spaces[index]
        user = touch.user
        arrived: dict[bytes, int] = {}
        left: dict[bytes, int] = {}
        for step, (_, _, _, added, gone, _) in enumerate(touch.steps):
            if added is not None:
                arrived[added] = step
            for key in gone:
                left[key] = step
        keys = user.history.keys
        if left:  # what has left was there before, or came and went in this batch
            keys = sorted({*keys, *left})
        row_of = state.space.row
        rows = np.fromiter((row_of(k[TS_BYTES : k.rindex(b"\0")], -1) for k in keys), dtype=np.int64, count=len(keys))
        weights = np.array([self._weight(k) for k in keys]) if self._weights else None
        arrivals = np.fromiter((arrived.get(k, -1) for k in keys), dtype=np.int64, count=len(keys))
        departures = np.fromiter((left.get(k, _STAYS) for k in keys), dtype=np.int64, count=len(keys))
        steps = np.asarray(wanted, dtype=np.int64)
        sums, totals, known = state.sums.window(rows, weights, arrivals, departures, steps)
        user.rows[index] = rows[departures == _STAYS].tolist()
        if weights is not None:
            user.weights[index] = weights[departures == _STAYS].tolist()
        state.sums.put(user.slot, sums[-1], totals[-1], int(known[-1]))
        return sums, totals, known

    def _emit(
        self,
        state: _SpaceState,
        states: Sequence[tuple[bytes, _Touch, int]],
        computed: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]],
        epoch: int,
        result: StepResult,
    ) -> None:
        """Records of all `states`, in order."""
        sums, totals, known = computed
        space = state.space
        vectors, status = finish(
            self.encoder.encoder, sums, totals, known, max_row_norm=space.max_row_norm, fallback=space.fallback
        )
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)).tolist()
        block = vectors.astype("<f4", copy=False).tobytes()
        size = 4 * space.dim
        prefix, avro = state.key_prefix, state.records.avro
        for place, (user, touch, index) in enumerate(states):
            length, as_of, revision, _, _, _ = touch.steps[index]
            key = prefix + user
            if not length:
                result.output.append((key, None))
                result.entries[key] = kv_prefix(epoch, revision)
                continue
            reason = REASONS[status[place]]
            unknown = length - int(known[place])
            vector = block[place * size : place * size + size]
            body = avro(user, epoch, revision, reason, length, unknown, as_of, norms[place], vector)
            result.entries[key] = kv_prefix(epoch, revision) + body
            if self.json_output:
                record = EmbeddingRecord(
                    user.decode(), epoch, revision, *reason, length, unknown, as_of,
                    self.encoder.version, space.version, vectors[place], norms[place],
                )  # fmt: skip
                result.output.append((key, json.dumps(to_json(record)).encode()))
            else:
                result.output.append((key, body))


def fallback_record(space: ItemSpace, encoder: VersionedEncoder) -> EmbeddingRecord:
    """The record under which readers find a pair's fallback vector."""
    vector: Float32 = space.fallback
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    return EmbeddingRecord(
        "", 0, 0, "fallback", "no_known_items", 0, 0, None, encoder.version, space.version, vector, norm
    )
