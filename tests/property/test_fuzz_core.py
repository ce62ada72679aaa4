"""Whatever bytes a record, a state or an entry has: the documented error in one line, or a right value."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fuzzing import BINARY_TOKENS, JSON_TOKENS, PAYLOAD, check_line, counts, fuzz, with_memory
from hypothesis import given
from hypothesis import strategies as st

from stream.core.events import (
    EARLIEST_TS_MS,
    MAX_LEAD_MS,
    DeletionDecoder,
    EventDecoder,
    EventRules,
    Reason,
    Reject,
    TsUnit,
    json_document,
)
from stream.core.exposure import Exposure
from stream.core.history import History
from stream.core.history_codec import MAX_TS_MS, TS_BYTES, HistoryCodec, key_ts_ms, sort_key, split_key, stored_order
from stream.core.kinds import Columns, Kinds
from stream.core.records import CorruptRecord, EmbeddingRecord, _decode_any, decode, encode, kv_prefix, to_json
from stream.core.watermark import Watermark, decode_watermark
from stream.errors import StateError
from stream.kafka.bounded_fetch import expands_beyond
from stream.kafka.dead_letters import Header, Letter
from stream.kafka.topic_owners import decode_topics
from stream.keys import INT64_MAX, INT64_MIN, MAX_ID_BYTES, canonical_id
from stream.kv.meta import decode_meta, encode_meta
from stream.kv.protocol import Meta
from stream.kv.redis.losses import Known
from stream.retrieval.answers import UserEmbedding, View, answers_for
from stream.retrieval.staleness import Judge
from stream.retrieval.user_matrix import UserMatrix
from stream.rollout.records import BadRecord, Catalogue, ControlRecord, Coverage, EncoderRecord, Status
from stream.worker.claims import Claim

USER = PAYLOAD.encode()
T0 = 1_700_000_000_000
TIMES: dict[TsUnit, Any] = {
    "ms": T0,
    "s": T0 // 1000,
    "us": T0 * 1000,
    "ns": T0 * 10**6,
    "iso8601": "2023-11-14T22:13:20Z",
}
TIME_TOKENS = (
    *(b"1e9999999", b"-1E+9999999", b"1e-9999999", b"1.5", b"sNaN", b"nan123", b"Infinity", b"1_0", b"0x1", b" "),
    *(b"2023-11-14", b"T24:00", b"+99:99", b"-W01-1", b"0001-01-01T00:00:00+23:59", b"9999-12-31T23:59:59-23:59"),
    "٣".encode(),
)
NAMES: dict[str, dict[str, str]] = {
    "our own": {},
    "mapped": {"user_id": "u.id", "ts": "t"},
    "several": {"user_id": "u[0]", "item_id": "items[].id", "ts": "t"},
}


def event(fields: str, ts: Any) -> dict[str, Any]:
    match fields:
        case "our own":
            return {"user_id": PAYLOAD, "item_id": PAYLOAD, "type": "view", "ts": ts}
        case "mapped":
            return {"u": {"id": PAYLOAD}, "item_id": 311, "type": "like", "t": ts}
        case _:
            return {"u": [PAYLOAD, 5], "items": [{"id": 1}, {"id": PAYLOAD}], "type": "view", "t": ts}


def check_interactions(found: Any) -> None:
    """What the decoder says of an event: its interactions, or what is wrong without the payload."""
    if isinstance(found, Reject):
        assert found.reason in Reason
        return check_line(found.detail)
    for key in [] if found is None else found if isinstance(found, tuple) else [found]:
        ts_ms, item, kind = split_key(key)
        assert EARLIEST_TS_MS <= ts_ms <= min(T0 + MAX_LEAD_MS, MAX_TS_MS)
        assert canonical_id(item.decode()).encode() == item
        assert kind in (b"view", b"like")
    return None


@counts
@pytest.mark.parametrize("fields", NAMES)
def test_events(fields: str, count: int) -> None:
    def target(data: bytes) -> None:
        found = decoder.decode("t", USER, data, T0)
        check_interactions(found)
        if fields == "our own" and isinstance(found, bytes):  # the standard library reads the same
            said = json.loads(data)
            assert str(said["user_id"]) == PAYLOAD
            assert split_key(found)[1:] == (str(said["item_id"]).encode(), said["type"].encode())
            assert unit != "ms" or split_key(found)[0] == int(said["ts"])
        exposure.of(data)

    exposure = Exposure("from.what", frozenset({"us"}))
    for unit, ts in TIMES.items():
        decoder = EventDecoder(EventRules({"view": 1, "like": 2}, frozenset({"seen"}), NAMES[fields], unit))
        seeds = [json.dumps(event(fields, at)).encode() for at in (ts, str(ts))]
        fuzz(target, seeds, (*JSON_TOKENS, *TIME_TOKENS), count // len(TIMES))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([T0, T0 / 1000, 10**400, -(10**18), INT64_MIN, 1e300, float("nan"), "1e9999999", PAYLOAD])
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["x" * MAX_ID_BYTES, "x" * 257, "\ud800", "e\u0301", "a\0", "2023-11-14T22:13:20", "view"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "what", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.sampled_from(sorted(NAMES)),
    st.sampled_from(sorted(TIMES)),
    st.dictionaries(st.sampled_from(["user_id", "item_id", "type", "ts", "u", "t", "items", "from"]), anything),
)
def test_events_of_any_values(fields: str, unit: TsUnit, changes: dict[str, Any]) -> None:
    decoder = EventDecoder(EventRules({"view": 1, "like": 2}, frozenset({"seen"}), NAMES[fields], unit))
    value = json.dumps(event(fields, TIMES[unit]) | changes).encode()
    check_interactions(decoder.decode("t", USER, value, T0))


@pytest.mark.parametrize("ts", ["1e9999999", "-1e9999999", "1e+999999999999999999", "1e-999999999999999999"])
def test_a_number_that_no_computer_holds_is_turned_away(ts: str) -> None:
    """It ended the worker, and was there again at its next start."""
    value = json.dumps({"user_id": PAYLOAD, "item_id": 1, "type": "view", "ts": ts}).encode()
    found = EventDecoder(EventRules({"view": 1}, ts_unit="s")).decode("t", USER, value, T0)
    assert isinstance(found, Reject)
    assert found.reason is Reason.IMPLAUSIBLE_TIMESTAMP


def test_the_way_to_a_value_deep_inside_is_cut_short() -> None:
    deep = b'{"a":' * 900 + b"1e999" + b"}" * 900
    found = EventDecoder(EventRules({"view": 1}, fields={"ts": "at"})).decode("t", USER, deep, T0)
    assert isinstance(found, Reject)
    check_line(found.detail)


@counts
def test_erasures(count: int) -> None:
    def target(data: bytes) -> None:
        found = DeletionDecoder().decode(USER, data, T0)
        if isinstance(found, Reject):
            return check_line(found.detail)
        assert found == min(json.loads(data)["ts"] + MAX_LEAD_MS, MAX_TS_MS)
        return None

    fuzz(target, [json.dumps({"user_id": PAYLOAD, "ts": T0}).encode()], (*JSON_TOKENS, *TIME_TOKENS), count)


@pytest.mark.parametrize("what", ["[],", "{},", '[""],', "0,"])
def test_a_value_of_millions_of_values_takes_no_memory(what: str) -> None:
    """Of a megabyte of zstd, 128 MiB may come; as Python objects they would be gigabytes."""
    code = (
        f"value = b'{{\"u\": [' + b'{what}' * ((100 << 20) // {len(what)}) + b'0], \"item_id\": 1}}'\n"
        "rules = EventRules({'view': 1}, fields={'user_id': 'u[0]'})\n"
        "print(EventDecoder(rules).decode('t', b'1', value, 0))"
    )
    imports = "from stream.core.events import EventDecoder, EventRules"
    assert "JSON holds more than 1,048,576 values" in with_memory(400, imports, code)


def test_a_large_document_of_few_values_is_read() -> None:
    document = {"a": "," * (1 << 19), "b": "x" * (1 << 20)}
    assert json_document(json.dumps(document).encode()) == document


# -- histories ----------------------------------------------------------------------------------------------------

CODEC = HistoryCodec({"view": 1, "like": 2})
LIMIT = 100
ITEMS = ["1", "-5", "x", "é", "0b0e0c52-95cf-4d4e-9d0a-2c2a2b9b8d11", "05", str(INT64_MAX), str(INT64_MIN), "z" * 256]
LAYOUT_1 = bytes.fromhex(
    "01000000000000000700000000000000b800000174876e80000004018bcfe56800040100ee04018bcfe568011202010b0e0c5295cf4d4e9d0a"
    "2c2a2b9b8d11018bcfe56802070102c3a974c3a9018bcfe568030c0200ffffffffffffffffff01"
)


def state(ts_ms: int = T0, items: list[str] = ITEMS) -> bytes:
    keys = sorted(sort_key(ts_ms + n % 4, item.encode(), b"view" if n % 2 else b"like") for n, item in enumerate(items))
    return History(CODEC, LIMIT, keys, revision=9, erased_at=5).encode(3)


#: Each of these two readers took for sound what the other one refused.
HISTORY_REGRESSIONS = (
    state(items=["1"])[:9] + b"\xff" * 8 + state(items=["1"])[17:],  # a revision beyond 62 bits
    b"\x02" + b"\xff" * 8 + state(items=["1"])[9:],  # an epoch
    state(items=["1"])[:17] + b"\x80" + b"\0" * 7 + state(items=["1"])[25:],  # erased long before there was time
    state(items=["1"])[:25] + b"\0\1" + b"\x85" + b"\x80" * 8 + b"\x01" + CODEC.body(b"1\0view"),  # 2**63 + 5 ms
    state(items=["1"])[:25] + b"\0\1" + b"\x80" * 9 + b"\x02" + CODEC.body(b"1\0view"),
)


def history_target() -> Callable[[bytes], None]:
    """Reads a state in both ways, which must agree, and writes it again."""
    kinds = Kinds(CODEC)

    def read(how: Callable[[], Any]) -> Any:
        try:
            return how()
        except StateError as exc:
            return check_line(str(exc))

    def target(data: bytes) -> None:
        history: History | None = read(lambda: History.decode(data, CODEC, LIMIT))
        columns: Columns | None = read(lambda: kinds.read([data, data], LIMIT))
        assert (history is None) == (columns is None), "one of the readers takes it"
        if history is None or columns is None:
            return
        assert history.encode(stored_order(data)[0]) == CODEC.as_written_now(data)
        order, at = kinds.order.data, kinds.order.at.tolist()
        keys = [order[at[number] : at[number + 1]].tobytes() for number in columns.numbers.tolist()]
        assert keys == [key[TS_BYTES:] for key in history.keys] * 2
        assert columns.times.tolist() == [key_ts_ms(key) for key in history.keys] * 2
        assert columns.revisions.tolist() == [history.revision] * 2
        assert columns.erased_at.tolist() == [history.erased_at] * 2

    return target


def fuzz_histories(count: int) -> None:
    """Both layouts; a function of its own for another process to call."""
    seeds = [LAYOUT_1, state(), state(0), state(MAX_TS_MS - 3), state(items=[]), LAYOUT_1[:25] + b"\0\0"]
    fuzz(history_target(), seeds, BINARY_TOKENS, count, HISTORY_REGRESSIONS)


@counts
def test_histories(count: int) -> None:
    fuzz_histories(count)


@pytest.mark.slow
def test_histories_where_the_compiled_loops_watch_their_bounds(tmp_path: Path) -> None:
    """Compiled anew, they raise where they would read or write beside an array."""
    checked = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    code = f"import sys; sys.path[:0] = {folders}; import test_fuzz_core; test_fuzz_core.fuzz_histories(20_000)"
    subprocess.run([sys.executable, "-c", code], env=checked, check=True, timeout=500)


@pytest.mark.parametrize("layout", [1, 2])
def test_a_number_of_a_million_bytes_is_refused_at_once(layout: int) -> None:
    """It took minutes, and the square of its length."""
    data = bytes([layout]) + state(items=[])[1:25] + b"\0\1" + b"\x80" * 6 + b"\x80" * 2_000_000 + b"\x01"
    with pytest.raises(StateError):
        History.decode(data, CODEC, LIMIT)
    with pytest.raises(StateError):
        Kinds(CODEC).read([data], LIMIT)


# -- records and entries ------------------------------------------------------------------------------------------

VECTOR = np.array([0.6, 0.8], dtype=np.float32)


def record(user: str = PAYLOAD, status: str = "ok", reason: str = "", as_of: int | None = T0) -> bytes:
    pair = {"user_embedding_version": "mix-1", "item_embedding_version": "v1"}
    numbers = {"epoch": 1 << 40, "revision": 3, "history_len": 4, "unknown_items": 1, "as_of": as_of}
    return encode(
        EmbeddingRecord(user_id=user, status=status, reason=reason, **pair, **numbers, vector=VECTOR, norm=1.0)  # type: ignore[arg-type]
    )


RECORDS = [record(), record("42", "fallback", "no_known_items", None)]


@counts
def test_records(count: int) -> None:
    def target(data: bytes) -> None:
        try:
            found = decode(data)
        except CorruptRecord as exc:
            return check_line(str(exc))
        judge = _decode_any(data)
        for name in EmbeddingRecord.__slots__:
            one, other = getattr(found, name), getattr(judge, name)
            assert np.array_equal(one, other, equal_nan=True) if name in ("vector", "norm") else one == other, name
        assert abs(np.linalg.norm(found.vector.astype(np.float64)) - 1) <= 1e-5
        assert min(found.epoch, found.revision, found.history_len, found.unknown_items) >= 0
        to_json(found)
        return None

    negative = RECORDS[0].replace(b"ok\0\x08", b"ok\0\x07")
    assert negative != RECORDS[0]
    fuzz(target, RECORDS, BINARY_TOKENS, count, [negative])


@counts
def test_answers_of_readers_and_of_the_matrix(count: int) -> None:
    view = View(Meta(), "mix-1", "v1", np.array([1, 0], dtype=np.float32), None)
    users = UserMatrix(2, "v1", "mix-1")
    sound = kv_prefix(1 << 40, 3) + RECORDS[0]

    def answers(*entries: bytes) -> list[UserEmbedding]:
        count = len(entries)
        return answers_for([PAYLOAD] * count, entries, view, [(False, 0.0)] * count)

    (of_sound,) = answers(sound)

    def target(data: bytes) -> None:
        (answer,) = answers(data)
        assert abs(np.linalg.norm(answer.vector.astype(np.float64)) - 1) <= 1e-5
        assert (answer.status, answer.reason) == ("ok", "") or answer.status == "fallback" or answer.reason
        among_others = answers(sound, data, sound, data, sound)
        for one, want in zip(among_others, (of_sound, answer, of_sound, answer, of_sound), strict=True):
            assert (one.status, one.reason, one.revision) == (want.status, want.reason, want.revision)
            assert np.array_equal(one.vector, want.vector)
        try:
            users.apply(b"uemb:mix-1:v1:" + USER, data[16:])
        except CorruptRecord as exc:
            check_line(str(exc))
        assert len(users) <= 1

    fuzz(target, [sound, kv_prefix(3, 3)], BINARY_TOKENS, count)


WATERMARK = Watermark(offsets={"t": 5}, kafka_time_ms=T0, lag_ms=996, heartbeat_ms=T0).entry(7, 184)


@counts
def test_watermarks(count: int) -> None:
    judge = Judge(30.0, lambda: T0 / 1000)
    store: Any = SimpleNamespace(watermark=lambda user: data_of[0])
    data_of = [b""]

    def target(data: bytes) -> None:
        found = decode_watermark(data)
        data_of[0] = data
        ((stale, lag_s),) = judge.freshness(store, ["u"], 4)
        assert (lag_s is None) == (found is None)
        assert found is not None or stale
        assert lag_s is None or abs(lag_s) < 1e17

    fuzz(target, [WATERMARK], (*JSON_TOKENS, *BINARY_TOKENS), count)


# -- small records in JSON ----------------------------------------------------------------------------------------

SHA = "ab" * 32
CLAIM = Claim(7, "app", 4, 100, {"view": 1}, {"mix-1": SHA}, "00" * 16, {"t": 5}).encode()
META = encode_meta(Meta("app", 4, None, {"uemb:fallback:mix-1:v1": b"\x01\x02"}, {"uemb:encoder:mix-1": SHA}))
CONTROL = [ControlRecord("v1", f"file:///srv/{PAYLOAD}", SHA, "active", force=True).encode()[1]]
ENCODERS = [
    EncoderRecord("mix-1", "retired", epochs={0: 5, 1: 7}).encode()[1],
    EncoderRecord("mix-1", "prepare", SHA, "avg", {"decay": 0.3}, {"like": 2.0}).encode()[1],
    EncoderRecord("mix-1", "active", SHA, "learned", uri="/srv/encoder", item_version="v1").encode()[1],
]
STATUS = Status("mix-1", "v1", 3, 7, "refused", 10, 5, 1, 500, 20, 99.5, PAYLOAD, 12).encode()[1]


@counts
def test_claims_and_the_stores_shared_record(count: int) -> None:
    def claim(data: bytes) -> None:
        try:
            found = Claim.decode(data)
        except StateError as exc:
            return check_line(str(exc))
        assert 0 <= found.epoch < 1 << 62
        found.encode()
        return None

    def meta(data: bytes) -> None:
        try:
            found = decode_meta(data, "meta", "repair it")
        except StateError as exc:
            return check_line(str(exc))
        assert (found.partitions or 0) <= 100_000
        encode_meta(found)
        return None

    fuzz(claim, [CLAIM], JSON_TOKENS, count, [CLAIM.replace(b'"epoch": 7', b'"epoch": 4611686018427387904')])
    fuzz(meta, [META], JSON_TOKENS, count, [META.replace(b'"partitions": 4', b'"partitions": 1000000000')])


@counts
def test_control_and_status_records(count: int) -> None:
    """One of them ended every worker of the application: a half of a surrogate pair in a name that nobody asks for."""

    def control(data: bytes) -> None:
        for key in (b"v1", b"user-version:mix-1"):
            try:
                catalogue = Catalogue({}).after(5, key, data)
            except BadRecord as exc:
                check_line(str(exc), payload=True)  # names of versions, which their operator gave
                continue
            for _, found in [*catalogue.records.values(), *catalogue.encoders.values()]:
                found.encode()
                assert b"\0" not in found.path.encode()

    def status(data: bytes) -> None:
        try:
            found = Status.decode(data)
        except BadRecord as exc:
            return check_line(str(exc))
        Coverage().add(found)
        found.encode()
        return None

    control_regressions = [
        CONTROL[0].replace(b'"force"', b'"\\ud800": 1, "force"'),
        CONTROL[0].replace(USER, b"\\ud800"),
        CONTROL[0].replace(USER, b"\\u0000"),
    ]
    fuzz(control, [*CONTROL, *ENCODERS], JSON_TOKENS, count, control_regressions)
    fuzz(status, [STATUS], JSON_TOKENS, count, [STATUS.replace(USER, b"\\ud800")])


@counts
def test_owners_of_topics_sentinels_and_letters(count: int) -> None:
    def letter(data: bytes) -> None:
        values = data.split(b"|")
        headers = [("own", b"x"), *zip([header.value for header in Header], values, strict=False)]
        found = Letter(0, 9, 17, USER, None, headers)  # type: ignore[arg-type]
        assert found.source is None or 0 <= found.source.offset < 10**18
        assert 0 <= found.value_size < 10**18
        assert len(found.replay_headers) <= len(headers) + 1

    seed = b"unknown_type|t|3|17|1700000000003|no such type|" + SHA.encode() + b"|7"
    digits = (b"9" * 5_000, "٣".encode(), "²".encode(), b"-1", b"+1", b"|", b"\xff")
    fuzz(letter, [seed], digits, count, [seed.replace(b"|17|", b"|" + b"9" * 5_000 + b"|")])
    fuzz(decode_topics, [b'{"output": "out", "dlq": "dlq"}'], JSON_TOKENS, count)
    sentinel = kv_prefix(7, 0) + b'{"node": "a", "run": "b", "history": "c"}'
    fuzz(lambda data: Known.by([data]), [sentinel], JSON_TOKENS, count)


@counts
def test_compressed_batches(count: int) -> None:
    import cramjam

    plain = b"some plain text " * 40
    packed = [cramjam.gzip.compress(plain), cramjam.snappy.compress_raw(plain), cramjam.lz4.compress(plain)]
    packed = [bytes(part) for part in [*packed, cramjam.zstd.compress(plain)]]

    def target(data: bytes) -> None:
        for codec in range(1, 5):
            assert expands_beyond(codec, memoryview(data), 1_000) in (True, False)

    fuzz(target, packed, BINARY_TOKENS, count // 4)
