"""What goes into the core in tests: ids, interactions, streams in every disorder, small item spaces, and a driver."""

import json
import random
import unicodedata
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from stream.core.batch import Batch, Effects, Record, StepResult
from stream.core.counters import Counter
from stream.core.encoders import VersionedEncoder
from stream.core.engine import Engine
from stream.core.events import EventRules
from stream.core.history_codec import stored_order
from stream.core.records import decode, kv_entry, unframed
from stream.core.space_engine import Pair
from stream.items.ids import ItemIds
from stream.items.space import ItemSpace
from stream.keys import INT64_MAX, INT64_MIN

T0 = 1_700_000_000_000
MINUTE = 60_000
LATE_ENOUGH = T0 + 10 * 24 * 60 * MINUTE  # Kafka timestamp of records whose own is of no interest
TYPES = {"view": 1, "like": 2}
DELETIONS = "user-deletions"


def examples(number: int) -> int:
    """So many for a law where all are asked for; else the part of them that the others are tried on (conftest)."""
    return number * settings.default.max_examples // settings.get_profile("all").max_examples


class Event(NamedTuple):
    """One interaction."""

    user: int | str
    item: int | str
    type: str
    ts: int


class Erase(NamedTuple):
    """One erasure; `ts` is that of the deletion record."""

    user: int | str
    ts: int


Operation = Event | Erase


class Message(NamedTuple):
    """A Kafka record as the core reads it."""

    key: bytes | None
    value: bytes | None
    timestamp: int = LATE_ENOUGH


def topic_of(operation: Operation) -> str:
    """A topic per type, and one for erasures."""
    return DELETIONS if isinstance(operation, Erase) else f"user-events.{operation.type}"


def message(operation: Operation) -> Message:
    """The record a producer writes."""
    if isinstance(operation, Erase):
        document: dict[str, object] = {"user_id": operation.user, "ts": operation.ts}
    else:
        user, item, kind, ts = operation
        document = {"user_id": user, "item_id": item, "type": kind, "ts": ts}
    return Message(str(operation.user).encode(), json.dumps(document).encode())


# -- ids ----------------------------------------------------------------------------------------------------------

integer_ids = st.integers(INT64_MIN, INT64_MAX) | st.integers(-300, 300)
uuid_ids = st.uuids().map(str) | st.uuids().map(lambda u: str(u).upper())
text_ids = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=64)  # at most 256 bytes
number_like_ids = st.sampled_from(["0", "00", "-0", "+1", "05", "5", "-5", "1.0", "1e3", "9223372036854775808", " 7"])
ids = st.one_of(integer_ids, uuid_ids, text_ids, number_like_ids)

# -- streams ------------------------------------------------------------------------------------------------------

#: Few times, a minute apart: ties are the rule, and the five minutes of an erasure's reach matter.
times = st.integers(0, 20).map(lambda n: T0 + n * MINUTE)
interactions = st.builds(lambda ts, item, kind: (ts, str(item), kind), times, ids, st.sampled_from(sorted(TYPES)))


@st.composite
def streams(
    draw: st.DrawFn,
    users: Sequence[int | str] = ("u", 7),
    items: Sequence[int | str] = ("a", "b", 3, "é", "unknown", str(uuid.UUID(int=5))),
    max_size: int = 30,
) -> list[Operation]:
    """Distinct and repeated interactions of a few users on two topics, erasures among them."""
    events = st.builds(Event, st.sampled_from(users), st.sampled_from(items), st.sampled_from(sorted(TYPES)), times)
    erasures = st.builds(Erase, st.sampled_from(users), times)
    return draw(st.lists(st.one_of(events, events, events, events, erasures), max_size=max_size))


class Chunk(NamedTuple):
    """A fetched batch: records of one topic."""

    topic: str
    operations: tuple[Operation, ...]


def chunks(operations: Sequence[Operation], cuts: Iterable[int]) -> list[Chunk]:
    """Cut at the given places, then by topic, as Kafka delivers: each topic in its own order."""
    out = []
    edges = [0, *sorted(cuts), len(operations)]
    for start, end in pairwise(edges):
        by_topic: dict[str, list[Operation]] = {}
        for operation in operations[start:end]:
            by_topic.setdefault(topic_of(operation), []).append(operation)
        out += [Chunk(topic, tuple(members)) for topic, members in by_topic.items()]
    return out


@st.composite
def arrivals(draw: st.DrawFn, operations: Sequence[Operation]) -> list[Chunk]:
    """The operations shuffled, some of them several times, in random batches."""
    n = len(operations)
    if not n:
        return []
    again = draw(st.lists(st.integers(0, n - 1), max_size=8))
    order = draw(st.permutations([*range(n), *again]))
    cuts = draw(st.lists(st.integers(0, len(order)), max_size=8))
    return chunks([operations[i] for i in order], cuts)


def random_stream(
    rng: random.Random, n: int, *, users: int = 2, items: int = 40, late: float = 0.1, erasures: float = 0.0
) -> list[Operation]:
    """A longer stream, too long to draw: mostly in order, repeats, some late, some times shared; seeded."""
    out: list[Operation] = []
    for i in range(n):
        user = rng.randrange(users)
        if rng.random() < erasures:
            out.append(Erase(user, T0 + (i - rng.randrange(40)) * MINUTE))
            continue
        ts = T0 + (i - (rng.randrange(60) if rng.random() < late else 0)) * MINUTE
        if out and rng.random() < 0.05:
            out.append(out[rng.randrange(len(out))])
            continue
        out.append(Event(user, rng.randrange(items), rng.choice(("view", "view", "like")), ts))
    return out


def random_chunks(rng: random.Random, operations: Sequence[Operation], mean: int) -> list[Chunk]:
    """Batches of random sizes around `mean`."""
    cuts = [i for i in range(1, len(operations)) if rng.random() < 1 / mean]
    return chunks(operations, cuts)


# -- item spaces --------------------------------------------------------------------------------------------------


def longest_row(rows: np.ndarray) -> float:
    return float(np.linalg.norm(rows.astype(np.float64), axis=1).max())


def make_space(
    version: str,
    item_ids: Sequence[int | str],
    vectors: np.ndarray,
    *,
    metric: str = "cosine",
    history: np.ndarray | None = None,
) -> ItemSpace:
    """An item space in memory, made without the code that makes folders; `history` is its history side's rows."""

    def stored(vectors: np.ndarray) -> np.ndarray:
        matrix = np.asarray(vectors, dtype=np.float64)
        if metric == "cosine":
            matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        return matrix.astype(np.float32)

    rows = stored(vectors)
    history_rows = None if history is None else stored(history)
    exact = rows.astype(np.float64)
    longest = longest_row(rows)
    centroid = exact.mean(axis=0)
    if np.linalg.norm(centroid) <= 1e-6 * longest:
        centroid = np.ones(exact.shape[1])
    return ItemSpace(
        version,
        ItemIds.of([str(i).encode() for i in item_ids]),
        rows,
        metric=metric,  # type: ignore[arg-type]
        fallback=(centroid / np.linalg.norm(centroid)).astype(np.float32),
        max_row_norm=longest
        if history_rows is None
        else float(np.linalg.norm(history_rows.astype(np.float64), axis=1).max()),
        history_vectors=history_rows,
        sha256="0" * 64,
    )


def random_space(
    version: str, dim: int, *, known: Iterable[int | str] = range(30), seed: int = 0, metric: str = "cosine"
) -> ItemSpace:
    """A seeded space, with a history side if its metric is dot; a stream's items beyond `known` are unknown to it."""
    item_ids = list(known)
    sides = np.random.default_rng(seed).normal(size=(2, len(item_ids), dim))
    sides[np.abs(sides).max(axis=2) < 1e-3] = 1.0
    return make_space(version, item_ids, sides[0], metric=metric, history=sides[1] if metric == "dot" else None)


@st.composite
def small_spaces(
    draw: st.DrawFn, version: str = "items_v1", items: Sequence[int | str] = ("a", "b", 3, "é", str(uuid.UUID(int=5)))
) -> ItemSpace:
    """A few of the items in one to three dimensions, cosine or dot, with or without a history side."""
    dim = draw(st.integers(1, 3))
    item_ids = draw(st.lists(st.sampled_from(items), min_size=1, unique=True))
    number = st.sampled_from([-2.0, -1.0, -0.5, 0.25, 1.0, 1.5, 3.0])
    row = st.lists(number, min_size=dim, max_size=dim)
    matrix = st.lists(row, min_size=len(item_ids), max_size=len(item_ids)).map(np.array)
    metric, history = draw(st.sampled_from(["cosine", "dot"])), draw(st.none() | matrix)
    return make_space(version, item_ids, draw(matrix), metric=metric, history=history)


# -- the engine, driven -------------------------------------------------------------------------------------------


@dataclass
class Fed(StepResult, Effects):
    """What came of a step in the driver's partition, with what its batches counted."""

    @classmethod
    def of_step(cls, result: StepResult, batches: Sequence[Batch], partition: int) -> "Fed":
        """The same in one piece."""
        counts = dict(result.counts)
        for batch in batches:
            for name, n in batch.counts.items():
                counts[name] = counts.get(name, 0) + n
        assert result.effects.keys() <= {partition}
        return cls(**{**vars(result.of(partition)), **vars(result), "counts": counts})


@dataclass
class Driver:
    """An engine with a store of its own: feeds it batches, keeps what it wrote, checks that the writes agree."""

    spaces: Sequence[ItemSpace]
    encoder: VersionedEncoder = field(default_factory=VersionedEncoder)
    rules: EventRules = field(default_factory=lambda: EventRules(TYPES))
    hot_users: int = 10_000
    publish_latest: bool = False
    json_output: bool = False
    schema_id: int | None = None
    partition: int = 0
    partitions: int = 1
    epoch: int = 0

    def __post_init__(self) -> None:
        self.states: dict[bytes, bytes] = {}
        self.kv: dict[bytes, bytes] = {}
        self.topic: dict[bytes, bytes | None] = {}
        self.counts: dict[str, int] = {}
        self.restart()

    def restart(self) -> None:
        """A new worker with a higher claim and nothing but the stored bytes."""
        self.epoch += 1
        self.engine = Engine(
            self._pairs(),
            self.rules,
            partitions=self.partitions,
            hot_users=self.hot_users,
            publish_latest=self.publish_latest,
            json_output=self.json_output,
            schema_id=self.schema_id,
        )
        self.engine.claim(self.partition, self.epoch)

    def _pairs(self) -> list[Pair]:
        return [Pair(self.encoder, space) for space in self.spaces]

    def serve(self, spaces: Sequence[ItemSpace]) -> None:
        """Publish in other spaces from here on."""
        self.spaces = spaces
        self.engine.serve(self._pairs())

    def decode(self, topic: str, records: Sequence[Record]) -> Batch:
        """What is in one fetched batch."""
        if topic == DELETIONS:
            return self.engine.decode_deletions(self.partition, records)
        return self.engine.decode_events(topic, self.partition, records)

    def step(self, *batches: Batch) -> Fed:
        """One step; changes nothing that is stored."""
        missing = self.engine.missing(batches)
        stored = {partition: {user: self.states.get(user) for user in users} for partition, users in missing.items()}
        return Fed.of_step(self.engine.apply(batches, stored), batches, self.partition)

    def embed(self, versions: tuple[str, str]) -> Effects:
        """The present vectors of all who are stored, in one pair."""
        result, _ = self.engine.embed(self.partition, self.states, versions)
        return result.of(self.partition)

    def feed(self, topic: str, records: Sequence[Record]) -> Fed:
        """One fetched batch."""
        result = self.step(self.decode(topic, records))
        self._check(result)
        self.states |= result.states
        self.kv |= result.entries
        self.topic |= dict(result.output)
        for name, n in result.counts.items():
            self.counts[name] = self.counts.get(name, 0) + n
        return result

    def run(self, batches: Iterable[Chunk]) -> None:
        """Many batches."""
        for topic, operations in batches:
            self.feed(topic, [message(operation) for operation in operations])

    def apply(self, *operations: Operation) -> Fed:
        """One batch of operations of one topic."""
        (topic,) = {topic_of(operation) for operation in operations}
        return self.feed(topic, [message(operation) for operation in operations])

    def record(self, user: int | str, space: int = 0) -> object | None:
        """The user's decoded record in the store, None where it is deleted or never was."""
        body = self.kv.get(self.key(user, space), b"\0" * 16)[16:]
        return decode(body) if body else None

    def key(self, user: int | str, space: int = 0) -> bytes:
        """The user's key."""
        return f"uemb:{self.encoder.version}:{self.spaces[space].version}:{user}".encode()

    def _check(self, result: Fed) -> None:
        last = dict(result.output)
        assert last.keys() == result.entries.keys()
        for key, entry in result.entries.items():
            epoch, revision, body = kv_entry(entry)
            user = key.split(b":", 3)[3]
            assert (epoch, revision) == stored_order(result.states[user]) == (self.epoch, revision)
            assert bool(body) == (last[key] is not None)
            if body:
                record = decode(body)
                assert (record.epoch, record.revision, record.user_id.encode()) == (epoch, revision, user)
                if not self.json_output:
                    assert body == unframed(last[key])


def records_by_user(output: Iterable[tuple[bytes, bytes | None]]) -> Mapping[bytes, list[bytes | None]]:
    """What a batch published, by key, in order."""
    out: dict[bytes, list[bytes | None]] = {}
    for key, value in output:
        out.setdefault(key, []).append(value)
    return out


def acts(text: str) -> bool:
    """Whether something in it, line ends apart, does more than be seen."""
    return any(unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"} for c in text if c != "\n")


def of_events(counts: Mapping[str, int]) -> dict[str, int]:
    """What was counted of events, without what was counted of their users and vectors."""
    of_vectors = {Counter.VECTORS, Counter.NEAR_CENTROID, Counter.FALLBACKS, Counter.ENCODER_ERRORS}
    of_vectors |= {Counter.HOT_USERS_HITS, Counter.HOT_USERS_MISSES}
    return {name: n for name, n in counts.items() if name not in of_vectors}
