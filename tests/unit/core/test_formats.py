"""Frozen bytes of everything that is stored: later releases must read them, and this one must write no others.

A format that changes gets a new number and new bytes beside these, which stay.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from stream.core.events import Reason, Reject
from stream.core.history import History, Interaction
from stream.core.history_codec import HistoryCodec, stored_order
from stream.core.records import EmbeddingRecord, decode, encode, kv_entry, kv_prefix
from stream.core.watermark import Watermark, decode_watermark
from stream.errors import StateError
from stream.kafka.dead_letters import Letter, Place, dead_letter
from stream.kafka.delivery import RecordBatch
from stream.kafka.topic_owners import Written, decode_topics, topics_record
from stream.kv.meta import decode_meta, encode_meta
from stream.kv.protocol import Meta, Serving
from stream.kv.redis.losses import Known, Server
from stream.kv.redis.writer import shown_keys
from stream.pipeline.watermark import Progress
from stream.rollout.records import ControlRecord, EncoderRecord, Status
from stream.worker.claims import Claim

HISTORY_1 = bytes.fromhex(
    "01000000000000000700000000000000b800000174876e80000004018bcfe56800040100ee04018bcfe568011202010b0e0c5295cf4d4e9d0a"
    "2c2a2b9b8d11018bcfe56802070102c3a974c3a9018bcfe568030c0200ffffffffffffffffff01"
)
HISTORY_2 = bytes.fromhex(
    "02000000000000000700000000000000b800000174876e8000000480d095ffbc3104ee0401090b0e0c5295cf4d4e9d0a2c2a2b9b8d11010605"
    "c3a974c3a90108ffffffffffffffffff01"
)
ERASED_1 = bytes.fromhex("010000000000000009000000000000000300000174876e80000000")
ERASED_2 = b"\x02" + ERASED_1[1:]
RECORD_1 = bytes.fromhex(
    "c301673e6de4f547a29e0434320ef002046f6b0008020286a0abfef962186d69782d65646438663331311066696c6d735f763104000000000000"
    "f03f109a99193fcdcc4c3f"
)
CLAIM_1 = (
    b'{"app": "app", "encoders": {"mix-edd8f311": "abababababababababababababababababababababababababababababababab"}, '
    b'"epoch": 7, "format": 1, "history_limit": 100, "nonce": "00000000000000000000000000000000", "partitions": 4, '
    b'"types": {"like": 2, "view": 1}}'
)
META_1 = (
    b'{\n "format": 1,\n "app": "app",\n "partitions": 4,\n "current": {\n  "user_version": "mix-edd8f311",\n'
    b'  "item_version": "films_v1",\n  "offset": -1\n },\n "fallbacks": {\n'
    b'  "uemb:fallback:mix-edd8f311:films_v1": "AQI="\n },\n "encoders": {\n'
    b'  "uemb:encoder:mix-edd8f311": "abababababababababababababababababababababababababababababababab"\n }\n}\n'
)
MOVED_CLAIM_1 = CLAIM_1.replace(b'"types"', b'"since": {"user-events": 5}, "types"')
WATERMARK_1 = bytes.fromhex("000000000000000700000000000000b8") + (
    b'{"offsets": {"user-events.\\u00e9t\\u00e9": 5, "user-deletions": 0}, "kafka_time_ms": 1700000000003, '
    b'"lag_ms": 996, "heartbeat_ms": 1700000000999}'
)
FIRST_WATERMARK_1 = bytes.fromhex("00000000000000070000000000000001") + (
    b'{"offsets": {}, "kafka_time_ms": null, "lag_ms": 0, "heartbeat_ms": 1700000000999}'
)
PREPARE_1 = (
    b'{"version": "v1", "uri": "file:///srv/it\\u00e9ms/v1", '
    b'"sha256": "abababababababababababababababababababababababababababababababab", "state": "prepare"}'
)
FORCED_1 = (
    b'{"version": "v1", "uri": "/srv/items/v1", '
    b'"sha256": "abababababababababababababababababababababababababababababababab", "state": "active", "force": true}'
)
RETIRED_USER_VERSION_1 = b'{"user_version": "avg-1", "state": "retired", "epochs": {"0": 5, "1": 7}}'
FORMULA_1 = (
    b'{"user_version": "avg-1", "state": "prepare", "hash": '
    b'"abababababababababababababababababababababababababababababababab", "encoder": "avg", '
    b'"params": {"decay": 0.3}, "type_weights": {"like": 2.0}}'
)
LEARNED_1 = (
    b'{"user_version": "avg-1", "state": "active", "hash": '
    b'"abababababababababababababababababababababababababababababababab", "encoder": "learned", '
    b'"uri": "/srv/encoders/1", "item_version": "v1", "force": true}'
)
COVERING_1 = (
    b'{"user_version": "u", "item_version": "v1", "partition": 3, "epoch": 7, "stage": "covering", "users": 0, '
    b'"done": 0, "fallbacks": 0, "items": 0, "unknown_items": 0, "per_second": 0.0, "error": "", "asked": -1}'
)
REFUSED_1 = (
    b'{"user_version": "u", "item_version": "v1", "partition": 3, "epoch": 7, "stage": "refused", "users": 10, '
    b'"done": 5, "fallbacks": 1, "items": 500, "unknown_items": 20, "per_second": 99.5, '
    b'"error": "no \\u201cvectors.npy\\u201d", "asked": 12}'
)
SENTINEL_1 = b'{"node": "a1", "run": "b2", "history": "c3"}'
CURRENT_1 = b'{"user_version": "mix-edd8f311", "item_version": "films_v1", "offset": -1}'
TOPICS_1 = b'{"output": "\\u00e9-out", "dlq": "user-events.dlq"}'
LETTER_HEADERS_1 = [
    ("trace", b"\x00"),
    ("dlq.reason", b"its own"),
    ("dlq.reason", b"unknown_type"),
    ("dlq.topic", b"user-events.view"),
    ("dlq.partition", b"3"),
    ("dlq.offset", b"17"),
    ("dlq.timestamp", b"1700000000003"),
    ("dlq.detail", b"no such type"),
]
REFERENCE_HEADERS_1 = [
    *LETTER_HEADERS_1,
    ("dlq.value_sha256", b"4834945f7bf91f82efc5cf881d902ec1cfa58f1be01cb35fe602b8ad4620c552"),
    ("dlq.value_size", b"7"),
]
CODEC = HistoryCodec({"view": 1, "like": 2})
HASH = "ab" * 32


@pytest.mark.parametrize("stored", [HISTORY_1, HISTORY_2], ids=["layout 1", "layout 2"])
def test_histories(stored: bytes) -> None:
    history = History.decode(stored, CODEC, 100)
    assert history.interactions() == [
        Interaction(1700000000000, "311", "view"),
        Interaction(1700000000001, "0b0e0c52-95cf-4d4e-9d0a-2c2a2b9b8d11", "like"),
        Interaction(1700000000002, "été", "view"),
        Interaction(1700000000003, "-9223372036854775808", "like"),
    ]
    assert (history.revision, history.erased_at, stored_order(stored)) == (184, 1600000000000, (7, 184))
    assert History(CODEC, 100, history.keys, revision=184, erased_at=1600000000000).encode(7) == HISTORY_2


@pytest.mark.parametrize("stored", [ERASED_1, ERASED_2], ids=["layout 1", "layout 2"])
def test_erased_histories(stored: bytes) -> None:
    history = History.decode(stored, CODEC, 100)
    assert (history.keys, history.revision, history.erased_at) == ([], 3, 1600000000000)
    assert history.encode(9) == ERASED_2


def test_records_and_entries() -> None:
    record = decode(RECORD_1)
    np.testing.assert_array_equal(record.vector, np.array([0.6, 0.8], dtype=np.float32))
    versions = (record.user_embedding_version, record.item_embedding_version)
    assert versions == ("mix-edd8f311", "films_v1")
    fields = (record.user_id, record.epoch, record.revision, record.status, record.reason)
    assert fields == ("42", 7, 184, "ok", "")
    assert (record.history_len, record.unknown_items, record.as_of, record.norm) == (4, 1, 1700000000003, 1.0)
    written = EmbeddingRecord(
        user_id="42",
        epoch=7,
        revision=184,
        status="ok",
        reason="",
        history_len=4,
        unknown_items=1,
        as_of=1700000000003,
        user_embedding_version="mix-edd8f311",
        item_embedding_version="films_v1",
        vector=record.vector,
        norm=1.0,
    )
    assert encode(written) == RECORD_1
    assert kv_entry(bytes.fromhex("000000000000000700000000000000b8") + RECORD_1) == (7, 184, RECORD_1)
    assert kv_prefix(7, 184).hex() == "000000000000000700000000000000b8"


def test_claims() -> None:
    claim = Claim(7, "app", 4, 100, {"view": 1, "like": 2}, {"mix-edd8f311": HASH}, "00" * 16)
    assert Claim.decode(CLAIM_1) == claim
    assert claim.encode() == CLAIM_1
    moved = msgspec.structs.replace(claim, since={"user-events": 5})
    assert Claim.decode(MOVED_CLAIM_1) == moved
    assert moved.encode() == MOVED_CLAIM_1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"{}",
        CLAIM_1.replace(b'"format": 1', b'"format": 2'),
        CLAIM_1.replace(b'"format": 1, ', b""),
        CLAIM_1.replace(b'"epoch": 7, ', b""),
        CLAIM_1.replace(b'"epoch": 7', b'"epoch": "7"'),
        CLAIM_1.replace(b'"epoch": 7', b'"epoch": 7, "colour": "red"'),
    ],
)
def test_a_claim_of_a_format_that_is_not_known_stops_the_worker(data: bytes) -> None:
    with pytest.raises(StateError, match="upgrade the worker"):
        Claim.decode(data)


def test_the_stores_shared_record() -> None:
    meta = Meta(
        "app",
        4,
        Serving("mix-edd8f311", "films_v1", -1),
        {"uemb:fallback:mix-edd8f311:films_v1": b"\x01\x02"},
        {"uemb:encoder:mix-edd8f311": HASH},
    )
    assert decode_meta(META_1, "meta", "repair it") == meta
    assert encode_meta(meta) == META_1


class Standing:
    """What a partition's watermark vouches for."""

    def __init__(self, lag_ms: int) -> None:
        self._lag_ms = lag_ms

    def lag_ms(self, offsets: Mapping[str, int], kafka_time_ms: int | None) -> int:
        return self._lag_ms

    def known_ms(self, offsets: Mapping[str, int]) -> int:
        return 1700000000999


def test_watermarks() -> None:
    offsets = {"user-events.été": 5, "user-deletions": 0}
    progress = Progress(7, offsets, kafka_time_ms=1700000000003, sequence=183)
    assert progress.entry(Standing(996)) == WATERMARK_1  # type: ignore[arg-type]
    assert Progress(7).entry(Standing(0)) == FIRST_WATERMARK_1  # type: ignore[arg-type]
    told = Watermark(offsets=offsets, kafka_time_ms=1700000000003, lag_ms=996, heartbeat_ms=1700000000999)
    assert (told.entry(7, 184), decode_watermark(WATERMARK_1)) == (WATERMARK_1, told)
    assert decode_watermark(FIRST_WATERMARK_1) == Watermark(lag_ms=0, heartbeat_ms=1700000000999)


@pytest.mark.parametrize(
    ("max_bytes", "value", "headers"), [(7, b'{"t":1}', LETTER_HEADERS_1), (6, None, REFERENCE_HEADERS_1)]
)
def test_dead_letters(max_bytes: int, value: bytes | None, headers: list[tuple[str, bytes]]) -> None:
    own = [("trace", b"\x00"), ("dlq.reason", b"its own")]
    record: Any = SimpleNamespace(key=b"42", value=b'{"t":1}', headers=own, offset=17, timestamp=1700000000003)
    batch = RecordBatch("user-events.view", 3, [record], seeks=0, number=0, start=0)
    letter = dead_letter(batch, 0, Reject(Reason.UNKNOWN_TYPE, "no such type"), max_bytes)
    assert letter == (b"42", value, headers)
    read = Letter(0, 9, 1700000000009, *letter)  # type: ignore[arg-type]
    assert (read.reason, read.source) == ("unknown_type", Place("user-events.view", 3, 17))
    assert (read.value_size, read.replay_headers) == (7, [*own, ("dlq.replayed", b"0:9")])


def test_control_records() -> None:
    for record, data in (
        (ControlRecord("v1", "file:///srv/itéms/v1", HASH, "prepare"), PREPARE_1),
        (ControlRecord("v1", "/srv/items/v1", HASH, "active", force=True), FORCED_1),
    ):
        assert record.encode() == (b"v1", data)
        assert ControlRecord.decode(b"v1", data) == record
    for encoder, data in (
        (EncoderRecord("avg-1", "retired", epochs={0: 5, 1: 7}), RETIRED_USER_VERSION_1),
        (EncoderRecord("avg-1", "prepare", HASH, "avg", {"decay": 0.3}, {"like": 2.0}), FORMULA_1),
        (
            EncoderRecord("avg-1", "active", HASH, "learned", uri="/srv/encoders/1", item_version="v1", force=True),
            LEARNED_1,
        ),
    ):
        assert encoder.encode() == (b"user-version:avg-1", data)
        assert EncoderRecord.decode(b"user-version:avg-1", data) == encoder


def test_status_records() -> None:
    for status, data in (
        (Status("u", "v1", 3, 7, "covering"), COVERING_1),
        (Status("u", "v1", 3, 7, "refused", 10, 5, 1, 500, 20, 99.5, "no “vectors.npy”", 12), REFUSED_1),
    ):
        assert status.encode() == (b"u:v1:3", data)
        assert Status.decode(data) == status


def test_the_serving_pair_as_other_clients_read_it() -> None:
    assert shown_keys(Meta("app", 4, Serving("mix-edd8f311", "films_v1", -1))) == {
        "uemb:app": "app",
        "uemb:current": CURRENT_1,
    }


def test_sentinels() -> None:
    assert Server("a1", "b2", "c3", "d4").sentinel() == SENTINEL_1
    assert Known.by([kv_prefix(7, 0) + SENTINEL_1]) == Known({"a1": "b2"}, {"c3"})
    damaged = [b"", b"{", kv_prefix(7, 0), *(kv_prefix(7, 0) + body for body in (b"{", b"[]", b'{"node": "a1"}'))]
    assert Known.by(damaged) == Known()


def test_owners_of_topics() -> None:
    settings: Any = SimpleNamespace(output_topic="é-out", dlq_topic="user-events.dlq")
    assert topics_record(settings) == (b"topics", TOPICS_1)
    assert decode_topics(TOPICS_1) == Written("é-out", "user-events.dlq")
    assert [decode_topics(value) for value in (b"", b"\xff", b"[]", b"{}", b'{"output": 7}')] == [Written()] * 5
