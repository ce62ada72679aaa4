"""Retrieval: every reason reached for real, nothing raised after `open`, nothing mixed."""

import asyncio
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kv_entries import eventually
from reader_store import (
    DIM,
    FALLBACK,
    ITEMS,
    META,
    OLD_ITEMS,
    PARTITIONS,
    USER,
    Clock,
    FakeStore,
    Gate,
    check_fallback,
    key,
    record,
    stored,
    unit,
)

from stream.core.encoders import AvgEncoder, MixEncoder, VersionedEncoder
from stream.core.formulas import Float32, fallback_user_embedding
from stream.core.records import encode, kv_prefix
from stream.errors import ConfigError, StoreError
from stream.items.space import ItemSpace
from stream.keys import encoder_key, fallback_key, partition_of, user_cache_key, watermark_key
from stream.kv import lookups, outages
from stream.kv.lookups import TIMEOUT
from stream.kv.outages import Outages
from stream.kv.protocol import Meta, Serving
from stream.kv.rocksdb.writer import RocksKV
from stream.retrieval.reader import EmbeddingReader, get_or_build_user_embedding

ROOT = Path(__file__).resolve().parents[3]
READER_REASONS = {"missing", "erased", "corrupt", "store_down", "timeout", "version_missing"}


class Store:
    """A real store and its one worker, driven from plain tests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"rocksdb://{path}"
        self.kv = RocksKV(path)
        self.meta(lambda _: META)
        for partition in range(PARTITIONS):
            asyncio.run(self.kv.open_partition(partition))

    def meta(self, change: Callable[[Meta], Meta]) -> None:
        asyncio.run(self.kv.update_meta(change))

    def put(self, user_id: str, entry: bytes, item_version: str = ITEMS) -> None:
        partition = partition_of(user_id.encode(), PARTITIONS)
        asyncio.run(self.kv.put(partition, {key(user_id, item_version): entry}))

    def progress(self, partition: int, body: object, sequence: int = 1) -> None:
        entry = kv_prefix(1, sequence) + json.dumps(body).encode()
        asyncio.run(self.kv.put(partition, {watermark_key(partition).encode(): entry}))

    def close(self) -> None:
        asyncio.run(self.kv.close())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "kv")
    yield store
    store.close()


@pytest.fixture
def reader(store: Store) -> Iterator[EmbeddingReader]:
    with EmbeddingReader.open(store.url, timeout_s=5) as reader:
        yield reader


# -- what is stored


def test_a_stored_vector_comes_with_all_its_record_says(store: Store, reader: EmbeddingReader) -> None:
    store.put("42", stored(record("42")))
    eventually(lambda: reader.get(42).status == "ok")
    for asked in (42, "42", np.int64(42)):
        answer = reader.get(asked)  # type: ignore[arg-type]
        np.testing.assert_array_equal(answer.vector, record("42").vector)
        assert answer.vector.dtype == np.float32
        assert (answer.user_id, answer.status, answer.reason) == ("42", "ok", "")
        assert (answer.epoch, answer.revision, answer.as_of) == (3, 17, 1_700_000_000_000)
        assert (answer.history_len, answer.unknown_items) == (100, 2)
        assert (answer.user_embedding_version, answer.item_embedding_version) == (USER, ITEMS)


def test_a_stored_fallback_keeps_its_own_reason(store: Store, reader: EmbeddingReader) -> None:
    for reason in ("no_known_items", "too_short_history", "degenerate", "encoder_error"):
        what = record(reason, status="fallback", reason=reason, vector=FALLBACK[ITEMS], as_of=None)
        store.put(reason, stored(what))
        eventually(lambda reason=reason: reader.get(reason).reason == reason)  # type: ignore[misc]
        answer = reader.get(reason)
        check_fallback(answer, reason)
        assert (answer.revision, answer.as_of, answer.history_len) == (17, None, 100)


def test_a_user_who_is_not_stored_is_missing(reader: EmbeddingReader) -> None:
    check_fallback(reader.get("nobody"), "missing")


@pytest.mark.parametrize("asked", ["", "a\nb", "x" * 257, 1 << 70, -(1 << 70), True, None, 1.5, b"42", [1], "\ud800"])
def test_what_is_no_id_is_missing(reader: EmbeddingReader, asked: object) -> None:
    answer = reader.get(asked)  # type: ignore[arg-type]
    check_fallback(answer, "missing")
    assert answer.user_id == ""
    vectors, answers = reader.get_many([asked, 7])  # type: ignore[list-item]
    assert vectors.shape == (2, DIM)
    assert [a.user_id for a in answers] == ["", "7"]


def test_an_erased_user_is_erased(store: Store, reader: EmbeddingReader) -> None:
    store.put("7", kv_prefix(4, 18))
    eventually(lambda: reader.get(7).reason != "missing")
    answer = reader.get(7)
    check_fallback(answer, "erased")
    assert (answer.epoch, answer.revision) == (4, 18)


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.parametrize(
    "entry",
    [
        kv_prefix(9, 9) + b"garbage",
        kv_prefix(9, 9) + encode(record("7"))[:-1],
        kv_prefix(3, 17) + _flip(encode(record("7")), 3),
        stored(record("8")),
        stored(record("7", OLD_ITEMS)),
        stored(record("7", user_embedding_version="other")),
        stored(record("7", vector=unit(1, DIM + 1))),
        stored(record("7", vector=unit(1, DIM - 1))),
        stored(record("7", vector=2 * unit(1))),
        stored(record("7", vector=np.full(DIM, np.nan, dtype=np.float32))),
        stored(record("7", vector=np.zeros(DIM, dtype=np.float32))),
        stored(record("7", status="perhaps")),
        kv_prefix(3, 18) + encode(record("7")),
        kv_prefix(4, 17) + encode(record("7")),
    ],
    ids=lambda entry: str(len(entry)),
)
def test_what_is_not_the_record_asked_for_is_corrupt(store: Store, reader: EmbeddingReader, entry: bytes) -> None:
    store.put("7", entry)
    eventually(lambda: reader.get("7").reason != "missing")
    check_fallback(reader.get("7"), "corrupt")


def test_an_entry_without_a_whole_prefix_is_corrupt() -> None:
    fake = FakeStore()
    fake.entries[key("7")] = b"short"
    with EmbeddingReader(lambda: fake) as reader:
        check_fallback(reader.get("7"), "corrupt")


# -- versions


def test_without_pins_the_serving_pair_is_followed(store: Store, reader: EmbeddingReader) -> None:
    store.put("7", stored(record("7")))
    store.put("7", stored(record("7", OLD_ITEMS, vector=unit(77))), OLD_ITEMS)
    eventually(lambda: reader.get(7).item_embedding_version == ITEMS and reader.get(7).status == "ok")
    store.meta(lambda meta: replace(meta, current=Serving(USER, OLD_ITEMS, 6)))
    eventually(lambda: reader.get(7).item_embedding_version == OLD_ITEMS)
    np.testing.assert_array_equal(reader.get(7).vector, unit(77))
    check_fallback(reader.get(8), "missing", FALLBACK[OLD_ITEMS])


@pytest.mark.parametrize("pins", [{"item_version": OLD_ITEMS}, {"item_version": OLD_ITEMS, "user_version": USER}])
def test_a_pinned_reader_stays_with_its_pair(store: Store, pins: dict[str, str]) -> None:
    store.put("7", stored(record("7", OLD_ITEMS)), OLD_ITEMS)
    store.put("8", stored(record("8")))
    with EmbeddingReader.open(store.url, timeout_s=5, **pins) as reader:  # type: ignore[arg-type]
        assert (reader.get(7).status, reader.get(7).item_embedding_version) == ("ok", OLD_ITEMS)
        check_fallback(reader.get(8), "missing", FALLBACK[OLD_ITEMS])


def test_a_user_version_alone_follows_the_served_items(store: Store) -> None:
    store.put("7", stored(record("7")))
    with EmbeddingReader.open(store.url, timeout_s=5, user_version=USER) as reader:
        assert reader.get(7).status == "ok"
        store.meta(lambda meta: replace(meta, current=Serving("other", OLD_ITEMS, 6)))
        eventually(lambda: reader.get(7).item_embedding_version == OLD_ITEMS)
        assert reader.get(7).user_embedding_version == USER


def test_a_version_that_the_store_lacks(store: Store) -> None:
    with EmbeddingReader.open(store.url, item_version="items_v9", timeout_s=5) as reader:
        answer = reader.get(7)
        check_fallback(answer, "version_missing", fallback_user_embedding(DIM))
        assert (answer.user_embedding_version, answer.item_embedding_version) == (USER, "items_v9")
        assert not set(FALLBACK[ITEMS]) & set(answer.vector), "another space's vector"
    with EmbeddingReader.open(store.url, item_version="items_v9", fallback=unit(5), timeout_s=5) as reader:
        check_fallback(reader.get(7), "version_missing", unit(5))


def test_a_pinned_version_that_is_retired_goes_missing_and_comes_back(store: Store) -> None:
    store.put("7", stored(record("7", OLD_ITEMS)), OLD_ITEMS)
    with EmbeddingReader.open(store.url, item_version=OLD_ITEMS, timeout_s=5) as reader:
        assert reader.get(7).status == "ok"
        keep = {fallback_key(ITEMS, USER): META.fallbacks[fallback_key(ITEMS, USER)]}
        store.meta(lambda meta: replace(meta, fallbacks=keep))
        eventually(lambda: reader.get(7).reason == "version_missing")
        store.meta(lambda _: META)
        eventually(lambda: reader.get(7).status == "ok")


def test_one_call_never_mixes_pairs() -> None:
    fake = FakeStore()
    for version in (ITEMS, OLD_ITEMS):
        for user in range(50):
            fake.entries[key(str(user), version)] = stored(record(str(user), version))
    pairs = [replace(META, current=Serving(USER, version, n)) for n, version in enumerate((ITEMS, OLD_ITEMS))]

    def switch() -> None:
        fake.shared = pairs[fake.calls % 2]

    fake.before = switch
    seen = set()
    with EmbeddingReader(lambda: fake, timeout_s=5) as reader:
        for _ in range(20):
            _, answers = reader.get_many(range(50))
            versions = {answer.item_embedding_version for answer in answers}
            assert len(versions) == 1
            assert {answer.status for answer in answers} == {"ok"}
            seen |= versions
    assert seen == {ITEMS, OLD_ITEMS}


# -- a store that fails


def test_a_slow_store_times_out_once_and_is_asked_again_after_a_second() -> None:
    fake, gate, clock = FakeStore(), Gate(), Clock()
    fake.entries[key("7")] = stored(record("7"))
    with EmbeddingReader(lambda: fake, timeout_s=0.02) as reader:
        eventually(lambda: reader.get(7).status == "ok")
        reader._state.bounded._outages = Outages(clock)
        fake.before = gate
        began = time.monotonic()
        check_fallback(reader.get(7), "timeout")  # though the store has no answer yet
        assert time.monotonic() - began >= 0.02
        calls = fake.calls
        for _ in range(20):
            check_fallback(reader.get(7), "store_down")
        vectors, answers = reader.get_many([7, 8])
        assert {answer.reason for answer in answers} == {"store_down"}
        assert vectors.shape == (2, DIM)
        assert fake.calls == calls, "answered at once"
        time.sleep(0.3)  # longer than what counts as soon after
        gate.open.set()
        clock.now += 0.99
        check_fallback(reader.get(7), "store_down")
        assert fake.calls == calls, "for the whole second"

        def asked_after_a_second() -> bool:
            clock.now += 1.01
            return reader.get(7).status == "ok"

        eventually(asked_after_a_second)


def test_a_store_whose_answer_came_soon_after_is_asked_again_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "_OUTAGE", 1e6)  # however slow this machine is, it came soon
    monkeypatch.setattr(outages, "DOWN_S", 3600.0)  # so that it is not the second's end that helps
    fake = FakeStore()
    with EmbeddingReader(lambda: fake, timeout_s=0.05) as reader:
        fake.delay_s = 0.1
        check_fallback(reader.get(7), "timeout")
        check_fallback(reader.get(7), "store_down")
        assert fake.calls == 1, "answered at once"
        fake.delay_s = 0.0
        eventually(lambda: reader.get(7).reason == "missing")


def test_a_store_that_hangs_for_ever_holds_nobody() -> None:
    fake, gate = FakeStore(), Gate()
    with EmbeddingReader(lambda: fake, timeout_s=0.01) as reader:
        reader._state.bounded._outages.failed = lambda *_: None  # type: ignore[method-assign]
        fake.before = gate
        for _ in range(12):  # more than there are threads for it
            check_fallback(reader.get(7), "timeout")
        gate.open.set()
        fake.before = lambda: None
        eventually(lambda: reader.get(7).reason == "missing")


def test_a_process_that_was_held_up_does_not_blame_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "_OUTAGE", 1e6)  # however slow this machine is, it came soon
    monkeypatch.setattr(outages, "DOWN_S", 3600.0)
    fake = FakeStore()
    with EmbeddingReader(lambda: fake, timeout_s=0.4) as reader:  # a slow machine is no slow store
        late = time.monotonic() - 1  # the whole wait went by before this thread ran again
        for _ in range(100):  # begun or not when it is given up
            assert reader._state.bounded._read(fake, [(b"7", key("7"))], late) in ([None], TIMEOUT)
        eventually(lambda: reader.get(7).reason == "missing")


def test_a_partition_that_fails_costs_the_others_nothing(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeStore()
    users = [str(user) for user in range(20)]
    for user in users:
        fake.entries[key(user)] = stored(record(user))
    bad = {user for user in users if partition_of(user.encode(), PARTITIONS) == 1}
    assert 0 < len(bad) < 20
    with EmbeddingReader(lambda: fake, timeout_s=5) as reader:
        fake.broken = {1}
        for _ in range(2):
            answers = reader.get_many(users)[1]
            assert {a.user_id: a.reason for a in answers} == {u: "store_down" if u in bad else "" for u in users}
        calls = fake.calls
        check_fallback(reader.get(min(bad)), "store_down")
        assert fake.calls == calls, "answered at once"
        fake.broken = set()
        eventually(lambda: all(a.status == "ok" for a in reader.get_many(users)[1]))
    assert "unexpected" not in caplog.text


def test_a_store_that_breaks_in_unheard_of_ways_is_down() -> None:
    fake = FakeStore()

    def explode() -> None:
        raise RuntimeError("unheard of")

    with EmbeddingReader(lambda: fake, timeout_s=5) as reader:
        fake.before = explode
        check_fallback(reader.get(7), "store_down")


def test_a_store_that_is_removed_is_down_and_its_return_is_seen(store: Store) -> None:
    store.put("7", stored(record("7")))
    with EmbeddingReader.open(store.url, timeout_s=5) as reader:
        assert reader.get(7).status == "ok"
        store.close()
        shutil.rmtree(store.path)
        eventually(lambda: reader.get(7).reason == "store_down")
        check_fallback(reader.get(7), "store_down")
        again = Store(store.path)
        again.put("7", stored(record("7", revision=99)))
        eventually(lambda: reader.get(7).revision == 99)
        again.close()


def test_without_a_store_open_needs_a_fallback(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="start a worker first"):
        EmbeddingReader.open(f"rocksdb://{tmp_path}/kv")
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "meta.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        EmbeddingReader.open(f"rocksdb://{tmp_path}/kv")


def test_with_a_fallback_open_waits_for_the_store(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    with EmbeddingReader.open(f"rocksdb://{path}", fallback=unit(5), item_version=ITEMS, timeout_s=5) as reader:
        answer = reader.get(7)
        check_fallback(answer, "store_down", unit(5))
        assert (answer.stale, answer.lag_s) == (True, None)
        assert (answer.user_embedding_version, answer.item_embedding_version) == (None, ITEMS)
        assert reader.get_many([1, 2])[0].shape == (2, DIM)
        store = Store(path)
        store.put("7", stored(record("7")))
        eventually(lambda: reader.get(7).status == "ok")
        store.close()


def test_a_store_that_serves_nothing_yet(tmp_path: Path) -> None:
    kv = RocksKV(tmp_path)
    asyncio.run(kv.update_meta(lambda _: Meta("app", 2)))
    with pytest.raises(StoreError, match="no fallback vector yet"):
        EmbeddingReader.open(f"rocksdb://{tmp_path}")
    with EmbeddingReader.open(f"rocksdb://{tmp_path}", fallback=unit(5)) as reader:
        check_fallback(reader.get(7), "version_missing", unit(5))


def test_a_closed_reader_is_a_store_that_is_down(store: Store) -> None:
    reader = EmbeddingReader.open(store.url, timeout_s=5)
    reader.close()
    reader.close()
    check_fallback(reader.get(7), "store_down")


# -- opening


@pytest.mark.parametrize(
    "arguments",
    [
        {"item_version": "a b"},
        {"user_version": "current"},
        {"fallback": np.zeros(DIM)},
        {"fallback": np.ones((2, DIM))},
        {"fallback": [1.0, float("nan")]},
        {"fallback": "vector"},
        {"fallback": unit(1, DIM + 1)},
    ],
)
def test_arguments_that_can_not_be_right_are_refused_at_open(store: Store, arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$"):
        EmbeddingReader.open(store.url, **arguments)  # type: ignore[arg-type]


def test_a_fallback_is_made_unit_and_can_not_be_changed(tmp_path: Path) -> None:
    with EmbeddingReader.open(f"rocksdb://{tmp_path}/kv", fallback=[3.0, 4.0]) as reader:
        vector = reader.get(1).vector
        np.testing.assert_allclose(vector, [0.6, 0.8], rtol=1e-6)
        with pytest.raises(ValueError, match="read-only"):
            vector[0] = 1


def test_an_item_space_is_a_fallback_of_its_own_version(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "items", ITEMS, ["a", "b", "c"], np.random.default_rng(3).normal(size=(3, DIM)))
    url = f"rocksdb://{tmp_path}/kv"
    with EmbeddingReader.open(url, fallback=space, item_version=ITEMS) as reader:
        np.testing.assert_array_equal(reader.get(1).vector, space.fallback)
    with pytest.raises(ConfigError, match="items_v1"):
        EmbeddingReader.open(url, fallback=space, item_version=OLD_ITEMS)


# -- freshness


NOW_S = 1_700_000_000.0


@pytest.mark.parametrize(
    ("lag_ms", "silent_s", "max_lag_s", "stale", "lag_s"),
    [
        (0, 0.0, None, False, 0.0),
        (250, 1.4, None, False, 0.25),
        (250, 3.5, None, False, 2.25),
        (0, 4.9, None, False, 3.4),
        (0, 5.1, None, True, 3.6),
        (60_000, 0.0, None, False, 60.0),
        (900, 0.0, 1.0, False, 0.9),
        (1100, 0.0, 1.0, True, 1.1),
        (900, 2.0, 1.0, True, 1.4),
        (0, 0.0, 0.0, False, 0.0),
        (1, 0.0, 0.0, True, 0.001),
        (0, -3.0, None, False, 0.0),
    ],
)
def test_lag_and_heartbeat_decide_what_is_stale(
    store: Store, lag_ms: int, silent_s: float, max_lag_s: float | None, stale: bool, lag_s: float
) -> None:
    store.put("7", stored(record("7")))
    heartbeat_ms = round((NOW_S - silent_s) * 1000)
    body = {"offsets": {"t": 3}, "kafka_time_ms": None, "lag_ms": lag_ms, "heartbeat_ms": heartbeat_ms}
    store.progress(partition_of(b"7", PARTITIONS), body)
    with EmbeddingReader.open(store.url, max_lag_s=max_lag_s, clock=lambda: NOW_S, timeout_s=5) as reader:
        answer = reader.get(7)
        assert (answer.status, answer.stale, answer.lag_s) == ("ok", stale, pytest.approx(lag_s))
        other = next(str(u) for u in range(99) if partition_of(b"%d" % u, PARTITIONS) != partition_of(b"7", PARTITIONS))
        assert (reader.get(other).stale, reader.get(other).lag_s) == (True, None), "each partition has its own"
        answers = reader.get_many(["7", other, ""])[1]
        assert [a.stale for a in answers] == [stale, True, True]


DAMAGED = [
    None,
    7,
    {},
    {"lag_ms": "x", "heartbeat_ms": 1},
    {"lag_ms": 1},
    {"lag_ms": 10**400, "heartbeat_ms": 1},
    {"lag_ms": 0, "heartbeat_ms": float("nan")},
    {"lag_ms": float("inf"), "heartbeat_ms": 1},
]


@pytest.mark.parametrize("body", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_watermark_vouches_for_nothing(store: Store, reader: EmbeddingReader, body: object) -> None:
    fresh = {"lag_ms": 0, "heartbeat_ms": time.time_ns() // 1_000_000}
    store.progress(partition_of(b"7", PARTITIONS), fresh, 1)
    eventually(lambda: not reader.get(7).stale)
    store.progress(partition_of(b"7", PARTITIONS), body, 2)
    eventually(lambda: reader.get(7).stale)
    assert reader.get(7).lag_s is None


# -- counting


def test_fallbacks_are_counted_and_logged_once_a_minute_without_ids(
    store: Store, reader: EmbeddingReader, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("secret7", stored(record("secret7")))
    eventually(lambda: reader.get("secret7").status == "ok")
    store.put("secret8", kv_prefix(1, 1))
    eventually(lambda: reader.get("secret8").reason == "erased")
    before = dict(reader.fallbacks)
    with caplog.at_level(logging.DEBUG, logger="stream"):
        for _ in range(10):
            reader.get_many(["secret7", "secret8", "secret9", ""])
    assert reader.fallbacks["erased"] == before.get("erased", 0) + 10
    assert reader.fallbacks["missing"] == before.get("missing", 0) + 20
    assert set(reader.fallbacks) == {"erased", "missing"}
    assert len(caplog.records) <= 1
    assert "secret" not in caplog.text


def test_the_line_of_a_minute_tells_how_many_of_what(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddingReader(FakeStore, timeout_s=5) as reader:
        reader.get(1)
        reader.get_many([1, 2, 3])
        reader._state.counted._report_at = 0.0
        reader.get(1)
    assert [line.split(": ")[1] for line in caplog.messages] == ["1 missing", "4 missing"]


# -- building


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> ItemSpace:
    rows = np.random.default_rng(11).normal(size=(30, DIM))
    return ItemSpace.save(tmp_path_factory.mktemp("space") / "items", ITEMS, list(range(30)), rows)


ENCODER = VersionedEncoder(MixEncoder(), 5)


@pytest.fixture
def buildable() -> Iterator[tuple[FakeStore, EmbeddingReader]]:
    """A store that serves what `ENCODER` makes."""
    pair = (ENCODER.version, ITEMS)
    own = record("fallback", vector=FALLBACK[ITEMS], user_embedding_version=ENCODER.version)
    fake = FakeStore(
        Meta(
            "app",
            PARTITIONS,
            Serving(*pair, 0),
            {fallback_key(ITEMS, ENCODER.version): encode(own)},
            {encoder_key(ENCODER.version): ENCODER.hash},
        )
    )
    with EmbeddingReader(lambda: fake, timeout_s=5) as reader:
        yield fake, reader


Buildable = tuple[FakeStore, EmbeddingReader]


def test_a_stored_vector_wins_over_a_history(buildable: Buildable, space: ItemSpace) -> None:
    fake, reader = buildable
    what = record("7", user_embedding_version=ENCODER.version)
    fake.entries[user_cache_key(7, ITEMS, ENCODER.version).encode()] = stored(what)
    answer = get_or_build_user_embedding(
        7, ITEMS, ENCODER.version, reader=reader, history=[1, 2, 3], items=space, encoder=ENCODER
    )
    assert (answer.status, answer.revision) == ("ok", 17)
    np.testing.assert_array_equal(answer.vector, what.vector)


@pytest.mark.parametrize(
    ("history", "status", "reason", "history_len", "unknown"),
    [
        ([1, 2, 3], "ok", "", 3, 0),
        (["1", 2, "gone", 3], "ok", "", 4, 1),
        (list(range(20)), "ok", "", 5, 0),
        (np.arange(4), "ok", "", 4, 0),
        ((1,), "fallback", "too_short_history", 1, 0),
        (["gone", "lost"], "fallback", "no_known_items", 2, 2),
        ([], "fallback", "no_known_items", 0, 0),
    ],
)
def test_without_one_it_is_built_from_the_history(
    buildable: Buildable,
    space: ItemSpace,
    history: Sequence[int | str],
    status: str,
    reason: str,
    history_len: int,
    unknown: int,
) -> None:
    fake, reader = buildable
    answer = get_or_build_user_embedding(
        7, ITEMS, ENCODER.version, reader=reader, history=history, items=space, encoder=ENCODER
    )
    assert (answer.status, answer.reason, answer.history_len) == (status, reason, history_len)
    assert (answer.epoch, answer.revision, answer.as_of, answer.unknown_items) == (0, 0, None, unknown)
    assert (answer.user_embedding_version, answer.item_embedding_version) == (ENCODER.version, ITEMS)
    np.testing.assert_array_equal(answer.vector, ENCODER.embed(space, list(history))[0])
    assert fake.entries == {}, "only the stream writes"
    assert reader.fallbacks == ({} if status == "ok" else {reason: 1}), "counted as given out"


def test_a_stored_fallback_gives_way_to_a_history(buildable: Buildable, space: ItemSpace) -> None:
    fake, reader = buildable
    what = record("7", user_embedding_version=ENCODER.version, status="fallback", reason="too_short_history")
    fake.entries[user_cache_key(7, ITEMS, ENCODER.version).encode()] = stored(what)
    answer = get_or_build_user_embedding(
        7, ITEMS, ENCODER.version, reader=reader, history=[1, 2], items=space, encoder=ENCODER
    )
    assert (answer.status, answer.history_len) == ("ok", 2)
    without = get_or_build_user_embedding(7, ITEMS, ENCODER.version, reader=reader)
    assert (without.reason, without.revision) == ("too_short_history", 17)


@pytest.mark.parametrize(
    "parts",
    [
        {"history": None},
        {"items": None},
        {"encoder": None},
        {"encoder": VersionedEncoder(AvgEncoder(), 5)},
        {"encoder": VersionedEncoder(MixEncoder(), 6)},
        {"encoder": VersionedEncoder(AvgEncoder(), 5, alias=ENCODER.version)},
        {"history": 7},
    ],
)
def test_a_missing_part_or_another_version_gives_the_fallback(
    buildable: Buildable, space: ItemSpace, parts: dict[str, object]
) -> None:
    _, reader = buildable
    given = {"history": [1, 2, 3], "items": space, "encoder": ENCODER, **parts}
    answer = get_or_build_user_embedding(7, ITEMS, ENCODER.version, reader=reader, **given)  # type: ignore[arg-type]
    check_fallback(answer, "missing")
    assert reader.fallbacks == {"missing": 1}


def test_a_space_of_another_version_is_never_built_from(buildable: Buildable, space: ItemSpace) -> None:
    _, reader = buildable
    answer = get_or_build_user_embedding(
        7, OLD_ITEMS, ENCODER.version, reader=reader, history=[1, 2], items=space, encoder=ENCODER
    )
    assert (answer.status, answer.reason, answer.item_embedding_version) == ("fallback", "version_missing", OLD_ITEMS)


def test_it_builds_while_the_store_is_down(buildable: Buildable, space: ItemSpace) -> None:
    fake, reader = buildable
    fake.broken = set(range(PARTITIONS))
    answer = get_or_build_user_embedding(
        7, ITEMS, ENCODER.version, reader=reader, history=[1, 2], items=space, encoder=ENCODER
    )
    assert answer.status == "ok"


def test_an_encoder_that_fails_is_a_reason(buildable: Buildable, space: ItemSpace) -> None:
    class Failing(VersionedEncoder):
        def embed(self, *_: object) -> tuple[Float32, object, int]:  # type: ignore[override]
            raise ZeroDivisionError

    _, reader = buildable
    answer = get_or_build_user_embedding(
        7, ITEMS, ENCODER.version, reader=reader, history=[1, 2], items=space, encoder=Failing(MixEncoder(), 5)
    )
    check_fallback(answer, "encoder_error", space.fallback)


def test_every_reason_of_the_reader_is_reached_above() -> None:
    text = Path(__file__).read_text()
    assert all(text.count(f'"{reason}"') > 1 for reason in READER_REASONS)


# -- imports


@pytest.mark.parametrize(
    "modules", ["stream.retrieval, stream.kv.rocksdb.reader", "stream.cli.root, stream.kv.rocksdb.reader"]
)
def test_reading_needs_neither_faust_nor_a_kafka_client(modules: str) -> None:
    """Nor does the command line load them for a command that only reads."""
    code = f"import sys, {modules}; print(*{{m.split('.')[0] for m in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert "rocksdict" in loaded.split()
    assert not {"faust", "mode", "aiokafka", "confluent_kafka"} & set(loaded.split())
