"""Frozen bytes of everything that is stored: later releases must read them, and this one must write no others.

A format that changes gets a new number and new bytes beside these, which stay.
"""

import numpy as np

from stream.history import History, Interaction
from stream.history_codec import HistoryCodec, stored_order
from stream.kv.base import Meta, Serving
from stream.kv.meta import decode_meta, encode_meta
from stream.ownership import Claim
from stream.records import EmbeddingRecord, decode, encode, kv_entry, kv_prefix

HISTORY_1 = bytes.fromhex(
    "01000000000000000700000000000000b800000174876e80000004018bcfe56800040100ee04018bcfe568011202010b0e0c5295cf4d4e9d0a"
    "2c2a2b9b8d11018bcfe56802070102c3a974c3a9018bcfe568030c0200ffffffffffffffffff01"
)
ERASED_1 = bytes.fromhex("010000000000000009000000000000000300000174876e80000000")
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
CODEC = HistoryCodec({"view": 1, "like": 2})
HASH = "ab" * 32


def test_histories() -> None:
    history = History.decode(HISTORY_1, CODEC, 100)
    assert history.interactions() == [
        Interaction(1700000000000, "311", "view"),
        Interaction(1700000000001, "0b0e0c52-95cf-4d4e-9d0a-2c2a2b9b8d11", "like"),
        Interaction(1700000000002, "été", "view"),
        Interaction(1700000000003, "-9223372036854775808", "like"),
    ]
    assert (history.revision, history.erased_at, stored_order(HISTORY_1)) == (184, 1600000000000, (7, 184))
    assert History(CODEC, 100, history.keys, revision=184, erased_at=1600000000000).encode(7) == HISTORY_1


def test_erased_histories() -> None:
    history = History.decode(ERASED_1, CODEC, 100)
    assert (history.keys, history.revision, history.erased_at) == ([], 3, 1600000000000)
    assert history.encode(9) == ERASED_1


def test_records_and_entries() -> None:
    record = decode(RECORD_1)
    np.testing.assert_array_equal(record.vector, np.array([0.6, 0.8], dtype=np.float32))
    versions = (record.user_embedding_version, record.item_embedding_version)
    assert versions == ("mix-edd8f311", "films_v1")
    fields = (record.user_id, record.epoch, record.revision, record.status, record.reason)
    assert fields == ("42", 7, 184, "ok", "")
    assert (record.history_len, record.unknown_items, record.as_of, record.norm) == (4, 1, 1700000000003, 1.0)
    assert encode(EmbeddingRecord(*fields, 4, 1, 1700000000003, *versions, record.vector, 1.0)) == RECORD_1
    assert kv_entry(bytes.fromhex("000000000000000700000000000000b8") + RECORD_1) == (7, 184, RECORD_1)
    assert kv_prefix(7, 184).hex() == "000000000000000700000000000000b8"


def test_claims() -> None:
    claim = Claim(7, "app", 4, 100, {"view": 1, "like": 2}, {"mix-edd8f311": HASH}, "00" * 16)
    assert Claim.decode(CLAIM_1) == claim
    assert claim.encode() == CLAIM_1


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
