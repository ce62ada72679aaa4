"""One pair's side of the step: running sums, vectors and records of the users that a batch touched.

A pair is an encoder and an item space; its vectors are published under both versions.
"""

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.core.batch import StepResult
from stream.core.counters import Counter
from stream.core.encoders import REASONS, VectorStatus, VersionedEncoder, finish
from stream.core.entry_writer import EntryWriter, Facts
from stream.core.formulas import Float32
from stream.core.framing import frame
from stream.core.kinds import Columns, Int32, Int64, Kinds
from stream.core.records import HEADER_BYTES, EmbeddingRecord, to_json
from stream.core.space import Space
from stream.core.sums import Moves, RowHistories, RunningSums, Sums
from stream.keys import user_cache_key

#: Cosine to the space's centroid from which on a vector is nearly the same for everybody: popularity has collapsed it.
NEAR_CENTROID: Final = 0.95
#: Of every so many steps, the vectors of so many users are compared with those before: an encoder makes each of these
#: once more, which must cost next to nothing.
_COMPARED_STEPS: Final = 8
_COMPARED_USERS: Final = 16


class Part(NamedTuple):
    """The states of one partition among those to publish: from which on to before which."""

    partition: int
    start: int
    end: int


class Step(NamedTuple):
    """What a batch did to users in memory, and the states of them to publish.

    Attributes:
        users: of each state to publish, one for each of m.
        parts: partitions of these, which lie one behind the other.
        epochs: the claim on its partition [m].
        lengths: of its history [m].
        as_of: when its newest interaction was in ms, -1 without one [m].
        revisions: of the state [m].
        slots: whose history was changed, or is to be shown as it is [n].
        numbers: kind of what was added [n].
        at_ms: its event time [n].
        places: how many interactions are older, -1 if nothing was added [n].
        gone: how many left the old end [n].
        shown: which state to publish that is, or -1 [n].
    """

    users: list[bytes]
    parts: Sequence[Part]
    epochs: Int64
    lengths: Int64
    as_of: Int64
    revisions: Int64
    slots: Int64
    numbers: Int32
    at_ms: Int64
    places: Int64
    gone: Int64
    shown: Int64


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
        kinds: where interactions lie in it, and what their types weigh.
        capacity: slots to begin with.
        json_output: write JSON instead of Avro to the output topic.
        schema_id: write Avro to the output topic in the framing of schema registries, with this id; None: as it is.

    Raises:
        SpaceMismatch: the encoder was made for another item version.
    """

    def __init__(
        self, pair: Pair, kinds: Kinds, *, capacity: int, json_output: bool, schema_id: int | None = None
    ) -> None:
        encoder, space = pair
        encoder.check(space)
        self.versions = pair.versions
        self.space = space
        self._sums = RunningSums.of(space, encoder.encoder, encoder.history_limit, capacity)
        self._encoder = encoder
        self._json_output = json_output
        self._frame = None if schema_id is None else frame(schema_id)
        self._key_prefix = user_cache_key("", space.version, encoder.version).encode()
        self._entries = EntryWriter(encoder.version, space.version, space.dim)
        self._rows = kinds.rows_of(space)
        weighs = any(weight != 1.0 for weight in encoder.encoder.type_weights.values())
        self._weights = kinds.weights_of(encoder.encoder.type_weights) if weighs else None
        self._steps = 0

    def key(self, user: bytes) -> bytes:
        """Key of a user's vector of this pair."""
        return self._key_prefix + user

    def load(self, slots: Int64, columns: Columns, capacity: int) -> None:
        """Set the sums of users whose histories were read from the store; there are so many slots by now."""
        if capacity > self._sums.capacity:
            self._sums.grow(capacity)
        self._sums.load(slots, self._histories(columns))

    def _histories(self, columns: Columns) -> RowHistories:
        weights = None if self._weights is None else self._weights.of(columns.numbers)
        return RowHistories(columns.base, self._rows.of(columns.numbers), weights, columns.times)

    def publish(self, step: Step, result: StepResult) -> None:
        """Follow what was done, and add the records of all states to publish to `result`."""
        is_added = step.places >= 0
        rows, weights = np.full(len(is_added), -1, dtype=np.int32), None
        rows[is_added] = self._rows.of(step.numbers[is_added])
        if self._weights is not None:
            weights = np.ones(len(rows))
            weights[is_added] = self._weights.of(step.numbers[is_added])
        self._steps += 1
        before = self._before(step) if self._steps % _COMPARED_STEPS == 0 else None
        moves = Moves(step.slots, rows, weights, step.at_ms, step.places, step.gone, step.shown)
        computed = self._sums.follow(moves, len(step.users))
        unknown_items = step.lengths - computed.known
        facts = Facts(step.users, step.epochs, step.revisions, step.lengths, unknown_items, step.as_of)
        vectors, status = self._emit(facts, step.parts, computed, result)
        if unknown := int(np.count_nonzero(rows[is_added] < 0)):
            result.unknown_items[self.versions] = result.unknown_items.get(self.versions, 0) + unknown
        if before is not None:
            is_own = status[before.places] == VectorStatus.OK
            now = vectors[before.places[is_own]]
            result.cosines += np.einsum("nd,nd->n", before.vectors[is_own], now).tolist()

    def publish_cold(
        self, partition: int, epoch: int, users: Sequence[bytes], columns: Columns, result: StepResult
    ) -> Coverage:
        """Add the present state of users that need not be in memory, and whose histories are those of the columns.

        Who has no state to show yet is left out. The running sums stay as they are.
        """
        shown = np.flatnonzero(columns.revisions)
        computed = self._sums.sum_all(self._histories(columns)).of(shown)
        lengths = columns.lengths[shown]
        whose = [users[place] for place in shown.tolist()]
        unknown = lengths - computed.known
        epochs = np.full(len(shown), epoch)
        facts = Facts(whose, epochs, columns.revisions[shown], lengths, unknown, columns.as_of[shown])
        _, status = self._emit(facts, [Part(partition, 0, len(shown))], computed, result)
        fallbacks = int(((status != VectorStatus.OK) & (lengths > 0)).sum())
        return Coverage(fallbacks, int(lengths.sum()), int(unknown.sum()))

    def _before(self, step: Step) -> _Before | None:
        """Vectors of a few of those who are about to be given an interaction, and have a vector of their own."""
        _, first = np.unique(step.slots, return_index=True)  # of each user the first that is done
        first = np.sort(first)
        some = first[(step.places[first] >= 0) & (step.shown[first] >= 0)][:_COMPARED_USERS]
        if not len(some):
            return None
        vectors, status = self._vectors(self._sums.read(step.slots[some]))
        is_own = status == VectorStatus.OK
        return _Before(vectors[is_own], step.shown[some][is_own])

    def _vectors(self, computed: Sums) -> tuple[Float32, NDArray[np.int8]]:
        return finish(self._encoder.encoder, *computed, space=self.space)

    def _count(self, vectors: Float32, status: NDArray[np.int8], result: StepResult) -> None:
        """Count what is published: vectors, how many of them say little, and fallbacks."""
        near = (status == VectorStatus.OK) & (vectors @ self.space.fallback > NEAR_CENTROID)
        of_each = np.bincount(status, minlength=len(REASONS)).tolist()
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
        self, facts: Facts, parts: Sequence[Part], computed: Sums, result: StepResult
    ) -> tuple[Float32, NDArray[np.int8]]:
        """Add records of states, in order; return the vectors, and the `VectorStatus` of each."""
        vectors, status = self._vectors(computed)
        is_vector = facts.lengths > 0  # of an empty history there is none
        self._count(vectors[is_vector], status[is_vector], result)
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
        entries, bodies = self._entries.write(facts, status, norms, vectors)
        prefix = self._key_prefix
        keys = [prefix + user for user in facts.users]
        if self._json_output:
            bodies = [
                self._json(facts, place, status, norms, vectors) if body is not None else None
                for place, body in enumerate(bodies)
            ]
        elif (framing := self._frame) is not None:
            bodies = [framing + body[HEADER_BYTES:] if body is not None else None for body in bodies]
        for partition, start, end in parts:
            effects = result.of(partition)
            effects.output += zip(keys[start:end], bodies[start:end], strict=True)
            effects.entries.update(zip(keys[start:end], entries[start:end], strict=True))
        return vectors, status

    def _json(
        self, facts: Facts, place: int, status: NDArray[np.int8], norms: NDArray[np.float64], vectors: Float32
    ) -> bytes:
        said, reason = REASONS[status[place]]
        record = EmbeddingRecord(
            user_id=facts.users[place].decode(),
            epoch=int(facts.epochs[place]),
            revision=int(facts.revisions[place]),
            status=said,
            reason=reason,
            history_len=int(facts.lengths[place]),
            unknown_items=int(facts.unknown[place]),
            as_of=int(facts.as_of[place]),
            user_embedding_version=self._encoder.version,
            item_embedding_version=self.space.version,
            vector=vectors[place],
            norm=float(norms[place]),
        )
        return json.dumps(to_json(record)).encode()


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
