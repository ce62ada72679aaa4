"""One pair's side of the step: running sums, vectors and records of the users that a batch touched.

A pair is an encoder and an item space; its vectors are published under both versions.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.core.batch import StepResult
from stream.core.counters import Counter
from stream.core.encoders import REASONS, VectorStatus, VersionedEncoder, finish, running_sums
from stream.core.formulas import Float32, Float64
from stream.core.history import History
from stream.core.history_codec import TS_BYTES, key_ts_ms
from stream.core.records import EmbeddingRecord, RecordEncoder, kv_prefix, to_json
from stream.core.space import Space
from stream.core.stored_columns import Columns, SharedColumns
from stream.core.sums import Moved, Newer
from stream.keys import user_cache_key

#: Up to so many events of one user in a batch are added one round at a time, together with other users'; from there on
#: one matrix product for the user alone is cheaper.
MAX_ROUNDS: Final = 8
#: Cosine to the space's centroid from which on a vector is nearly the same for everybody: popularity has collapsed it.
NEAR_CENTROID: Final = 0.95
#: Of every so many steps, the vectors of so many users are compared with those before: an encoder makes each of these
#: once more, which must cost next to nothing.
_COMPARED_STEPS: Final = 8
_COMPARED_USERS: Final = 16
_STAYS: Final = 1 << 40

Int64 = NDArray[np.int64]

#: A state to publish, right after one operation: history length, as_of (ms), revision, what was added, what left, and
#: how many interactions are newer than what was added. A plain tuple, for one is made for every event.
Step = tuple[int, int | None, int, bytes | None, Sequence[bytes], int]


class User:
    """A user in memory: the history, and a slot of running sums in each space."""

    __slots__ = ("age", "history", "slot")

    def __init__(self, history: History, slot: int) -> None:
        self.history = history
        self.slot = slot
        self.age = 0


class Touch:
    """What a batch did to one user so far."""

    __slots__ = ("afresh", "again", "plain", "steps", "user")

    def __init__(self, user: User) -> None:
        self.user = user
        self.steps: list[Step] = []
        self.plain = True  # all steps are additions that the running sums can follow
        self.again = False  # something arrived that was known already
        self.afresh = False  # the running sums can't follow; sum the interactions again


class _Sums(NamedTuple):
    """Sums [n, K, d], totals [n, K], known items [n] and newest rows [n, M], newest first, of n states."""

    sums: Float64
    totals: Float64
    known: Int64
    newest: Int64


class _Before(NamedTuple):
    """Vectors [n, d] of some users before a step, and the places [n] of those that it publishes."""

    vectors: Float32
    places: Int64


class Pair(NamedTuple):
    """What vectors are made with and of."""

    encoder: VersionedEncoder
    space: Space

    @property
    def versions(self) -> tuple[str, str]:
        """User version and item version."""
        return self.encoder.version, self.space.version


class Coverage(NamedTuple):
    """How well a pair of versions serves some users.

    Attributes:
        fallbacks: how many of them, of those who have a history, get the fallback vector.
        items: how many interactions they have.
        unknown_items: how many of those are with items that the version lacks.
    """

    fallbacks: int
    items: int
    unknown_items: int


class Publisher:
    """Vectors and records of one pair, with the running sums of users in memory.

    Args:
        pair: the encoder and the item space.
        shared: where stored interactions lie in it, and what their types weigh.
        capacity: slots to begin with.
        json_output: write JSON instead of Avro to the output topic.

    Raises:
        SpaceMismatch: the encoder was made for another item version.
    """

    def __init__(self, pair: Pair, shared: SharedColumns, *, capacity: int, json_output: bool) -> None:
        encoder, space = pair
        encoder.check(space)
        self.versions = pair.versions
        self.space = space
        self.sums = running_sums(space, encoder.encoder, encoder.history_limit, capacity, shared.kernels)
        self.by_time = encoder.encoder.by_time
        self._encoder = encoder
        self._newest = encoder.encoder.newest
        self._json_output = json_output
        self._key_prefix = user_cache_key("", space.version, encoder.version).encode()
        self._records = RecordEncoder(encoder.version, space.version, space.dim)
        self._row_of = space.row
        self._rows: dict[int, list[int]] = {}  # by slot, aligned with the history's keys
        self._row_weights: dict[int, list[float]] = {}  # the same; empty where all types weigh 1
        self._stored_rows = shared.rows_of(space)
        self._stored_weights = shared.weights_of(encoder.encoder.type_weights)
        self._steps = 0
        self._weights = {b"\0" + t.encode(): w for t, w in encoder.encoder.type_weights.items() if w != 1.0}

    def key(self, user: bytes) -> bytes:
        """Key of a user's vector of this pair."""
        return self._key_prefix + user

    def load(self, slots: Sequence[int], columns: Columns) -> None:
        """Set the sums of users whose histories were read from the store."""
        rows = self._stored_rows.of(columns.numbers)
        weights = self._stored_weights.of(columns.numbers) if self._weights else None
        self.sums.load(np.array(slots), rows, columns.base, weights, columns.times if self.by_time else None)
        all_rows, bounds = rows.tolist(), columns.base.tolist()
        of_each = [slice(*bound) for bound in pairwise(bounds)]
        self._rows.update((slot, all_rows[part]) for slot, part in zip(slots, of_each, strict=True))
        if weights is not None:
            all_weights = weights.tolist()
            self._row_weights.update((slot, all_weights[part]) for slot, part in zip(slots, of_each, strict=True))

    def _rows_of(self, keys: Sequence[bytes]) -> list[int]:
        row_of = self._row_of
        return [row_of(key[TS_BYTES : key.rindex(b"\0")], -1) for key in keys]

    def _weight(self, key: bytes) -> float:
        return self._weights.get(key[key.rindex(b"\0") :], 1.0) if self._weights else 1.0

    def publish(
        self,
        touched: Mapping[bytes, Touch],
        states: Sequence[tuple[bytes, Touch, int]],
        epoch: int,
        result: StepResult,
    ) -> None:
        """Follow the touched users, and add the records of all `states` (user, touch, step) to `result`."""
        sums, totals, known, newest = computed = self._room(len(states))
        unknown = 0
        rounds: list[list[tuple[Touch, int]]] = [[] for _ in range(MAX_ROUNDS)]
        others: dict[bytes, list[int]] = {}
        for place, (key, touch, _) in enumerate(states):
            if len(touch.steps) == 1 and not touch.afresh:  # most
                rounds[0].append((touch, place))
            else:
                others.setdefault(key, []).append(place)
        for key, wanted in others.items():
            touch = touched[key]
            if touch.afresh:
                steps = [states[place][2] for place in wanted]
                (sums[wanted], totals[wanted], known[wanted], newest[wanted]), lacking = self._afresh(touch, steps)
                unknown += lacking
                continue
            if len(wanted) < len(touch.steps):  # not after each element of an event, nor with `publish_latest`
                place_of = {states[place][2]: place for place in wanted}
                wanted = [place_of.get(step, -1) for step in range(len(touch.steps))]
            for step, place in enumerate(wanted):
                rounds[step].append((touch, place))
        self._steps += 1
        before = self._before(rounds[0]) if self._steps % _COMPARED_STEPS == 0 else None
        for step, members in enumerate(rounds):
            if members:
                slots, at, lacking = self._insert_round(members, step)
                unknown += lacking
                slots, at = slots[at >= 0], at[at >= 0]
                sums[at], totals[at], known[at] = self.sums.read(slots)
                if self._newest:
                    newest[at] = [self._newest_of(self._rows[slot]) for slot in slots.tolist()]
        shown = [(key, touch.steps[step]) for key, touch, step in states]
        vectors, status = self._emit(shown, computed, epoch, result)
        if unknown:
            result.unknown_items[self.versions] = result.unknown_items.get(self.versions, 0) + unknown
        if before is not None:
            is_own = status[before.places] == VectorStatus.OK
            now = vectors[before.places[is_own]]
            result.cosines += np.einsum("nd,nd->n", before.vectors[is_own], now).tolist()

    def publish_cold(
        self, users: Sequence[tuple[bytes, History]], columns: Columns, epoch: int, result: StepResult
    ) -> Coverage:
        """Add the present state of users that need not be in memory, and whose histories are those of the columns.

        Who has no state to show yet is left out. The running sums stay as they are.
        """
        rows = self._stored_rows.of(columns.numbers)
        weights = self._stored_weights.of(columns.numbers) if self._weights else None
        sums, totals, known, _ = self.sums.sum_all(rows, columns.base, weights, columns.times if self.by_time else None)
        newest = np.full((len(users), self._newest), -1)
        if self._newest:
            for place, part in enumerate(pairwise(columns.base.tolist())):
                newest[place] = self._newest_of(rows[slice(*part)].tolist())
        is_shown = [place for place, (_, history) in enumerate(users) if history.revision]
        shown: list[tuple[bytes, Step]] = []
        for place in is_shown:
            user, history = users[place]
            shown.append((user, (history.count, history.as_of_ms, history.revision, None, (), 0)))
        computed = _Sums(sums[is_shown], totals[is_shown], known[is_shown], newest[is_shown])
        _, status = self._emit(shown, computed, epoch, result)
        lengths = np.array([step[0] for _, step in shown], dtype=np.int64)
        items = int(lengths.sum())
        fallbacks = int(((status != VectorStatus.OK) & (lengths > 0)).sum())
        return Coverage(fallbacks, items, items - int(computed.known.sum()))

    def _room(self, count: int) -> _Sums:
        decays = len(self._encoder.encoder.decays)
        sums = np.zeros((count, decays, self.space.dim))
        newest = np.full((count, self._newest), -1)
        return _Sums(sums, np.zeros((count, decays)), np.zeros(count, dtype=np.int64), newest)

    def _newest_of(self, rows: Sequence[int]) -> list[int]:
        """The newest of a history's rows (oldest first) that the space has, newest first, -1 where there are fewer."""
        found = list(islice((row for row in reversed(rows) if row >= 0), self._newest))
        return found + [-1] * (self._newest - len(found))

    def _before(self, members: Sequence[tuple[Touch, int]]) -> _Before | None:
        """Vectors of a few of those who are about to be given an interaction, and have a vector of their own."""
        some = [
            (touch.user.slot, place)
            for touch, place in members[:_COMPARED_USERS]
            if place >= 0 and touch.steps[0][3] is not None
        ]
        if not some:
            return None
        slots, places = np.array(some).T
        newest = np.array([self._newest_of(self._rows[slot]) for slot in slots.tolist()]).reshape(len(slots), -1)
        vectors, status = finish(self._encoder.encoder, *self.sums.read(slots), newest, space=self.space)
        is_own = status == VectorStatus.OK
        return _Before(vectors[is_own], places[is_own])

    def _insert_round(self, members: Sequence[tuple[Touch, int]], step: int) -> tuple[Int64, Int64, int]:
        """One step of many users; return their slots, their places, and how many of the items the space lacks."""
        row_of = self._row_of
        count = len(members)
        slots = np.array([touch.user.slot for touch, _ in members])
        places = np.array([place for _, place in members])
        new_rows, old_rows = np.full(count, -1), np.full(count, -1)
        new_weights, old_weights = np.ones(count), np.ones(count)
        new_ms, old_ms = np.zeros((2, count), dtype=np.int64) if self.by_time else (None, None)
        unchanged = 0
        late: list[int] = []
        newer_rows: list[list[int]] = []
        newer_weights: list[list[float]] = []
        for i, (touch, _) in enumerate(members):
            _, _, _, added, gone, newer = touch.steps[step]
            if added is None:  # sent again, or an erasure that took nothing
                unchanged += 1
                continue
            rows = self._rows[touch.user.slot]
            if new_ms is not None and old_ms is not None:
                new_ms[i] = key_ts_ms(added)
                if gone:
                    old_ms[i] = key_ts_ms(gone[0])
            if gone:
                old_rows[i] = rows.pop(0)
            row = row_of(added[TS_BYTES : added.rindex(b"\0")], -1)
            new_rows[i] = row
            at = len(rows) - newer
            rows.insert(at, row)
            if self._weights:
                weights = self._row_weights[touch.user.slot]
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
        self.sums.insert(slots, Moved(new_rows, new_weights, new_ms), Moved(old_rows, old_weights, old_ms), newer=aside)
        return slots, places, count - unchanged - int(np.count_nonzero(new_rows >= 0))

    def _afresh(self, touch: Touch, wanted: Sequence[int]) -> tuple[_Sums, int]:
        """Sums of the wanted steps of one user from the interactions themselves; leaves the user's slot valid.

        Also returns how many items that came in these steps the space lacks.
        """
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
        rows = np.array(self._rows_of(keys), dtype=np.int64)
        weights = np.array([self._weight(k) for k in keys]) if self._weights else None
        times = np.array([*map(key_ts_ms, keys)], dtype=np.int64) if self.by_time else None
        arrivals = np.fromiter((arrived.get(k, -1) for k in keys), dtype=np.int64, count=len(keys))
        departures = np.fromiter((left.get(k, _STAYS) for k in keys), dtype=np.int64, count=len(keys))
        steps = np.asarray(wanted, dtype=np.int64)
        newest = np.full((len(steps), self._newest), -1)
        if self._newest:
            for n, step in enumerate(wanted):
                newest[n] = self._newest_of(rows[(arrivals <= step) & (step < departures)].tolist())
        computed = _Sums(*self.sums.window(rows, weights, arrivals, departures, steps, times), newest)
        stays = departures == _STAYS
        self._rows[user.slot] = rows[stays].tolist()
        if weights is not None:
            self._row_weights[user.slot] = weights[stays].tolist()
        newest_ms = 0 if times is None else int(times[stays & (rows >= 0)].max(initial=0))
        self.sums.put(user.slot, computed.sums[-1], computed.totals[-1], int(computed.known[-1]), newest_ms)
        return computed, int(np.count_nonzero((rows < 0) & (arrivals >= 0)))

    def _count(self, vectors: Float32, status: NDArray[np.int8], shown: Sequence[bool], result: StepResult) -> None:
        """Count what is published: vectors, how many of them say little, and fallbacks; nothing of an empty history."""
        near = (status == VectorStatus.OK) & (vectors @ self.space.fallback > NEAR_CENTROID)
        of_each = np.bincount(status[np.array(shown, dtype=np.bool_)], minlength=len(REASONS)).tolist()
        some = {
            Counter.VECTORS: of_each[VectorStatus.OK],
            Counter.NEAR_CENTROID: int(np.count_nonzero(near)),
            Counter.FALLBACKS: sum(of_each) - of_each[VectorStatus.OK],
            Counter.ENCODER_ERRORS: of_each[VectorStatus.ENCODER_ERROR],
        }
        for counter, n in some.items():
            if n:
                result.counts[counter] = result.counts.get(counter, 0) + n
        for kind, n in enumerate(of_each):
            if n:
                what = (*self.versions, kind)
                result.published[what] = result.published.get(what, 0) + n

    def _emit(
        self, shown: Sequence[tuple[bytes, Step]], computed: _Sums, epoch: int, result: StepResult
    ) -> tuple[Float32, NDArray[np.int8]]:
        """Add records of users after a step each, in order; return the vectors, and the `VectorStatus` of each."""
        vectors, status = finish(self._encoder.encoder, *computed, space=self.space)
        self._count(vectors, status, [bool(step[0]) for _, step in shown], result)
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)).tolist()
        block = vectors.astype("<f4", copy=False).tobytes()
        size = 4 * self.space.dim
        prefix, avro = self._key_prefix, self._records.avro
        for place, (user, (length, as_of, revision, _, _, _)) in enumerate(shown):
            key = prefix + user
            if not length:
                result.output.append((key, None))
                result.entries[key] = kv_prefix(epoch, revision)
                continue
            reason = REASONS[status[place]]
            unknown = length - int(computed.known[place])
            vector = block[place * size : place * size + size]
            body = avro(user, epoch, revision, reason, length, unknown, as_of, norms[place], vector)
            result.entries[key] = kv_prefix(epoch, revision) + body
            if self._json_output:
                record = EmbeddingRecord(
                    user_id=user.decode(),
                    epoch=epoch,
                    revision=revision,
                    status=reason[0],
                    reason=reason[1],
                    history_len=length,
                    unknown_items=unknown,
                    as_of=as_of,
                    user_embedding_version=self._encoder.version,
                    item_embedding_version=self.space.version,
                    vector=vectors[place],
                    norm=norms[place],
                )
                result.output.append((key, json.dumps(to_json(record)).encode()))
            else:
                result.output.append((key, body))
        return vectors, status


def fallback_record(space: Space, encoder: VersionedEncoder) -> EmbeddingRecord:
    """The record under which readers find a pair's fallback vector."""
    vector: Float32 = space.fallback
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    status, reason = REASONS[VectorStatus.NO_KNOWN_ITEMS]
    return EmbeddingRecord(
        user_id="",
        epoch=0,
        revision=0,
        status=status,
        reason=reason,
        history_len=0,
        unknown_items=0,
        as_of=None,
        user_embedding_version=encoder.version,
        item_embedding_version=space.version,
        vector=vector,
        norm=norm,
    )
