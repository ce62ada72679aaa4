"""A store for readers that does as it is told, and the records that go into it."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from stream.core.formulas import Float32
from stream.core.records import EmbeddingRecord, encode, kv_prefix
from stream.errors import StoreError
from stream.keys import encoder_key, fallback_key, partition_of, user_cache_key
from stream.kv.protocol import Meta, Serving
from stream.retrieval.answers import UserEmbedding

DIM = 8
PARTITIONS = 2
USER, ITEMS = "mix-0123abcd", "items_v1"
OLD_ITEMS = "items_v0"


def unit(seed: int, dim: int = DIM) -> Float32:
    vector = np.random.default_rng(seed).normal(size=dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def record(user_id: str, item_version: str = ITEMS, **changes: object) -> EmbeddingRecord:
    plain = EmbeddingRecord(
        user_id=user_id,
        epoch=3,
        revision=17,
        status="ok",
        reason="",
        history_len=100,
        unknown_items=2,
        as_of=1_700_000_000_000,
        user_embedding_version=USER,
        item_embedding_version=item_version,
        vector=unit(sum(user_id.encode())),
        norm=1.0,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def stored(what: EmbeddingRecord) -> bytes:
    return kv_prefix(what.epoch, what.revision) + encode(what)


def key(user_id: str, item_version: str = ITEMS) -> bytes:
    return user_cache_key(user_id, item_version, USER).encode()


FALLBACK = {version: unit(n) for n, version in enumerate((ITEMS, OLD_ITEMS))}
META = Meta(
    "app",
    PARTITIONS,
    Serving(USER, ITEMS, 5),
    {fallback_key(v, USER): encode(record("fallback", v, vector=FALLBACK[v])) for v in FALLBACK},
    {encoder_key(USER): "f" * 64},
)


class FakeStore:
    """A store that does as it is told."""

    def __init__(self, meta: Meta = META) -> None:
        self.shared = meta
        self.entries: dict[bytes, bytes] = {}
        self.calls = 0
        self.delay_s = 0.0
        self.broken: set[int] = set()
        self.before: Callable[[], None] = lambda: None

    def meta(self) -> Meta:
        return self.shared

    def get(self, lookups: Sequence[tuple[bytes, bytes]]) -> list[bytes | None]:
        self.calls += 1
        self.before()
        time.sleep(self.delay_s)
        if any(partition_of(user_id, PARTITIONS) in self.broken for user_id, _ in lookups):
            raise StoreError("told so")
        return [self.entries.get(key) for _, key in lookups]

    def watermark(self, user_id: bytes) -> bytes | None:
        return None

    def close(self) -> None:
        self.broken = set(range(PARTITIONS))


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """Holds whoever comes until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.held = 0

    def __call__(self) -> None:
        self.held += 1
        assert self.open.wait(60), "nobody opened"


def check_fallback(answer: UserEmbedding, reason: str, vector: Float32 = FALLBACK[ITEMS]) -> None:
    assert (answer.status, answer.reason) == ("fallback", reason)
    np.testing.assert_array_equal(answer.vector, vector)
    assert answer.vector.dtype == np.float32
