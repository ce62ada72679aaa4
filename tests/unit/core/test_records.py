"""Record bytes: Avro single-object encoding by hand against the Avro standard, JSON, key-value entries."""

import ast
import io
import json
import math
import struct
import warnings
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import fastavro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples, ids

import stream
from stream.core import records
from stream.core.encoders import REASONS
from stream.core.entry_writer import EntryWriter, Facts
from stream.core.records import (
    CorruptRecord,
    EmbeddingRecord,
    decode,
    decode_many,
    encode,
    framed,
    is_newest_schema,
    kv_entry,
    kv_prefix,
    newest_schema,
    schema_name,
    to_json,
    unframed,
)

SCHEMA = json.loads(files("schemas").joinpath("user_embedding.v1.avsc").read_text())

RECORD = EmbeddingRecord(
    user_id="é42",
    epoch=3,
    revision=300,
    status="ok",
    reason="",
    history_len=100,
    unknown_items=2,
    as_of=1_700_000_000_000,
    user_embedding_version="user_v7",
    item_embedding_version="items_v42",
    vector=np.array([0.6, -0.8], dtype=np.float32),
    norm=1.0,
)

#: Topics and stores hold these bytes: they must be readable for ever, and must not change unnoticed.
FROZEN = bytes.fromhex(
    "c301 673e6de4f547a29e"  # marker, fingerprint (checked against the algorithm below)
    "08 c3a93432"  # user_id: 4 bytes
    "06"  # epoch 3
    "d804"  # revision 300
    "04 6f6b"  # status ok
    "00"  # no reason
    "c801"  # history_len 100
    "04"  # unknown_items 2
    "02 80a0abfef962"  # as_of: the union's long
    "0e 757365725f7637"  # user_v7
    "12 6974656d735f763432"  # items_v42
    "04"  # dim 2
    "000000000000f03f"  # norm 1.0
    "10 9a99193f cdcc4cbf"  # 8 bytes: 0.6, -0.8
)


def same(one, other):
    names = [name for name in EmbeddingRecord.__dataclass_fields__ if name != "vector"]
    assert {n: getattr(one, n) for n in names} == {n: getattr(other, n) for n in names}
    assert one.vector.dtype == np.float32
    assert one.vector.tobytes() == np.asarray(other.vector, dtype="<f4").tobytes()


longs = st.integers(0, 2**63 - 1) | st.integers(0, 300)
ints = st.integers(0, 2**31 - 1) | st.integers(0, 300)
names = st.from_regex(r"\A[A-Za-z0-9._-]{1,64}\Z")
directions = st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=40).filter(lambda xs: max(map(abs, xs)) > 0.1)
vectors = directions.map(lambda xs: (np.array(xs) / np.linalg.norm(xs)).astype(np.float32))
some_records = st.builds(
    EmbeddingRecord,
    user_id=ids.map(str),
    epoch=longs,
    revision=longs,
    status=st.sampled_from(["ok", "fallback"]),
    reason=st.sampled_from(["", "no_known_items", "too_short_history", "degenerate", "encoder_error"]),
    history_len=ints,
    unknown_items=ints,
    as_of=st.none() | st.integers(0, 2**48 - 1),
    user_embedding_version=names,
    item_embedding_version=names,
    vector=vectors,
    norm=st.floats(allow_nan=False),
)


# -- Avro ---------------------------------------------------------------------------------------------------------


@given(some_records)
def test_the_body_is_what_fastavro_writes(record):
    document = {
        "user_id": record.user_id,
        "epoch": record.epoch,
        "revision": record.revision,
        "status": record.status,
        "reason": record.reason,
        "history_len": record.history_len,
        "unknown_items": record.unknown_items,
        "as_of": record.as_of,
        "user_embedding_version": record.user_embedding_version,
        "depends_on": {"item_embedding_version": record.item_embedding_version},
        "user_embedding": {
            "dim": len(record.vector),
            "norm": record.norm,
            "vector": record.vector.astype("<f4").tobytes(),
        },
    }
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(SCHEMA), document)
    data = encode(record)
    assert data[:2] == b"\xc3\x01"
    assert data[10:] == buffer.getvalue()
    same(decode(data), record)


@pytest.mark.parametrize("damage", [0x7F800001, 0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF])
def test_numbers_that_are_none_are_refused_without_a_warning(damage):
    """A service may turn warnings into errors, and numpy has one for a NaN that signals; readers never fail (law 9)."""
    body = encode(RECORD)[:-4] + damage.to_bytes(4, "little")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CorruptRecord):
            decode(body)


@st.composite
def bodies(draw):
    """A record's bytes, some of them damaged, cut off, or in another framing."""
    data = encode(replace(draw(some_records), **({"vector": RECORD.vector} if draw(st.booleans()) else {})))
    return draw(
        st.sampled_from(
            [data, data, data, framed(data, 7), data[:-1], data + b"x", data[:9], data[:-4] + b"\0\0\x80\x7f"]
        )
        | st.integers(0, len(data) - 1).map(lambda at: data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        | st.binary(max_size=40)
    )


@given(st.lists(bodies(), max_size=12))
def test_many_are_what_each_is(some):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_many(some)
    assert len(found) == len(some)
    for data, record in zip(some, found, strict=True):
        try:
            alone = decode(data)
        except CorruptRecord:
            assert record is None
        else:
            same(record, alone)
            assert record.vector.base is None, "whoever keeps one vector keeps all of them"


@given(some_records)
def test_the_last_bytes_are_the_vector(record):
    data = encode(record)
    size = 4 * len(record.vector)
    assert data[len(data) - size :] == record.vector.astype("<f4").tobytes()


@given(st.lists(some_records, min_size=1, max_size=5), st.integers(1, 2**40), st.data())
def test_a_step_s_entries_are_prefix_and_record_of_each(some, first_epoch, data):
    """Of one pair, as it is in a step; of an empty history there is the prefix only."""
    dim = len(some[0].vector)
    statuses = np.array([data.draw(st.integers(0, len(REASONS) - 1)) for _ in some], dtype=np.int8)
    records = [
        replace(
            record,
            epoch=first_epoch + n,
            revision=record.revision >> 2,
            status=REASONS[status][0],
            reason=REASONS[status][1],
            user_embedding_version="user_v7",
            item_embedding_version="items_v42",
            as_of=record.as_of or 0,
            vector=np.resize(record.vector, dim),
        )
        for n, (record, status) in enumerate(zip(some, statuses, strict=True))
    ]
    facts = Facts(
        [record.user_id.encode() for record in records],
        *(np.array([getattr(record, name) for record in records]) for name in ("epoch", "revision", "history_len")),
        *(np.array([getattr(record, name) for record in records]) for name in ("unknown_items", "as_of")),
    )
    norms, vectors = np.array([record.norm for record in records]), np.stack([record.vector for record in records])
    entries, bodies = EntryWriter("user_v7", "items_v42", dim).write(facts, statuses, norms, vectors)
    want = [encode(record) if record.history_len else None for record in records]
    assert bodies == want
    prefixes = [kv_prefix(record.epoch, record.revision) for record in records]
    assert entries == [prefix + (body or b"") for prefix, body in zip(prefixes, want, strict=True)]
    by_column = np.asfortranarray(vectors)  # an encoder's choice
    assert EntryWriter("user_v7", "items_v42", dim).write(facts, statuses, norms, by_column) == (entries, bodies)


def rabin_fingerprint(data: bytes) -> int:
    """CRC-64-AVRO as the Avro specification prints it ("Schema Fingerprints")."""
    empty = 0xC15D213AA4D7A795
    table = []
    for i in range(256):
        fp = i
        for _ in range(8):
            fp = (fp >> 1) ^ (empty & -(fp & 1))
        table.append(fp)
    fp = empty
    for byte in data:
        fp = (fp >> 8) ^ table[(fp ^ byte) & 0xFF]
    return fp


#: The schema in Parsing Canonical Form, by the specification's rules, by hand.
CANONICAL = (
    '{"name":"uemb.v1.UserEmbedding","type":"record","fields":['
    '{"name":"user_id","type":"string"},'
    '{"name":"epoch","type":"long"},'
    '{"name":"revision","type":"long"},'
    '{"name":"status","type":"string"},'
    '{"name":"reason","type":"string"},'
    '{"name":"history_len","type":"int"},'
    '{"name":"unknown_items","type":"int"},'
    '{"name":"as_of","type":["null","long"]},'
    '{"name":"user_embedding_version","type":"string"},'
    '{"name":"depends_on","type":{"name":"uemb.v1.DependsOn","type":"record","fields":['
    '{"name":"item_embedding_version","type":"string"}]}},'
    '{"name":"user_embedding","type":{"name":"uemb.v1.Vector","type":"record","fields":['
    '{"name":"dim","type":"int"},'
    '{"name":"norm","type":"double"},'
    '{"name":"vector","type":"bytes"}]}}]}'
)


def test_the_fingerprint_is_the_published_algorithms():
    """Little-endian, as single-object encoding demands."""
    assert rabin_fingerprint(b'"null"') == 0x63DD24E7CC258F8A  # the specification's own test data
    assert encode(RECORD)[2:10] == rabin_fingerprint(CANONICAL.encode()).to_bytes(8, "little")


def test_the_record_is_frozen():
    assert encode(RECORD).hex() == FROZEN.hex()
    same(decode(FROZEN), RECORD)


def test_every_schema_that_was_ever_written_is_still_readable():
    assert records.SCHEMA_FILES[0] == "user_embedding.v1.avsc"
    for name in records.SCHEMA_FILES:
        assert files("schemas").joinpath(name).is_file()


# -- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(len(FROZEN)))
def test_bytes_cut_short_are_corrupt(length):
    with pytest.raises(CorruptRecord):
        decode(FROZEN[:length])


def test_bytes_after_the_record_are_corrupt():
    """The last bytes of a record are its vector, so there is none after it."""
    for extra in (b"\0", b"\0" * 8, FROZEN):
        with pytest.raises(CorruptRecord):
            decode(FROZEN + extra)


@pytest.mark.parametrize("data", [b"", b"\xc3", b"{}", b"\xc3\x01" + b"\0" * 60, b"\xc3\x02" + FROZEN[2:], FROZEN[1:]])
def test_bytes_of_another_schema_are_corrupt(data):
    with pytest.raises(CorruptRecord):
        decode(data)


@settings(max_examples=examples(300))
@given(st.lists(st.tuples(st.integers(10, len(FROZEN) - 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_never_raise_anything_else(flips):
    data = bytearray(FROZEN)
    for at, mask in flips:
        data[at] ^= mask
    try:
        record = decode(bytes(data))
    except CorruptRecord:
        return
    assert np.isfinite(record.vector).all()


@given(st.binary(max_size=80))
def test_random_bodies_never_raise_anything_else(body):
    with suppress(CorruptRecord):
        decode(FROZEN[:10] + body)


def outcome(read, data):
    """What a decoder makes of bytes, comparable bit for bit."""
    try:
        record = read(data)
    except CorruptRecord as exc:
        return str(exc)
    fields = [getattr(record, name) for name in EmbeddingRecord.__dataclass_fields__ if name not in ("vector", "norm")]
    exact = [(type(value), value) for value in fields]
    return exact, type(record.norm), struct.pack("<d", record.norm), record.vector.dtype, record.vector.tobytes()


@st.composite
def damaged(draw):
    """Bytes of a record with some flipped, removed, added or moved; sometimes none."""
    data = bytearray(encode(draw(some_records)))
    for how in draw(st.lists(st.sampled_from(["flip", "cut", "insert", "remove", "swap"]), max_size=3)):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if how == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=12) | st.just(b"\x80" * 10))
        elif how == "remove":
            del data[at : at + draw(st.integers(1, 4))]
        else:
            data[at:] = data[at:][::-1]
    return bytes(data)


@settings(max_examples=examples(500))
@given(damaged())
def test_the_hand_written_decoder_judges_as_fastavro_does(data):
    assert outcome(decode, data) == outcome(records._decode_any, data)


@settings(max_examples=examples(300))
@given(st.binary(max_size=80))
def test_it_judges_random_bodies_as_fastavro_does(body):
    assert outcome(decode, FROZEN[:10] + body) == outcome(records._decode_any, FROZEN[:10] + body)


@pytest.mark.parametrize("at", range(10, len(FROZEN)))
def test_it_judges_every_value_of_every_byte_as_fastavro_does(at):
    for byte in range(256):
        data = FROZEN[:at] + bytes([byte]) + FROZEN[at + 1 :]
        assert outcome(decode, data) == outcome(records._decode_any, data), byte


@given(some_records)
def test_sound_records_never_need_fastavro(record):
    """But for numbers of ten bytes; else the hand-written decoder would be slow for nothing."""
    data = encode(record)
    if max(record.epoch, record.revision) < 2**62:
        assert outcome(records.RecordDecoder(), data) == outcome(records._decode_any, data)


@given(st.lists(some_records, min_size=2, max_size=6), st.integers(0, 200))
def test_nothing_of_one_record_is_read_into_the_next(several, cut):
    """A decoder remembers the pair of versions that it read last, also from a record that turned out damaged."""
    decoder = records.RecordDecoder()
    for record in several:
        with suppress(ValueError, IndexError, struct.error):
            decoder(encode(record)[: 10 + cut])
        if max(record.epoch, record.revision) < 2**62:
            same(decoder(encode(record)), record)


@pytest.mark.parametrize(
    ("start", "usual", "unusual"),
    [(14, "06", "8600"), (15, "d804", "d88400"), (17, "046f6b", "84006f6b")],
    ids=["epoch", "revision", "status"],
)
def test_valid_but_unusual_numbers_are_read(start, usual, unusual):
    """A varint may be longer than it need be; Avro does not forbid it."""
    at = start + 1
    assert FROZEN[at:].startswith(bytes.fromhex(usual))
    data = FROZEN[:at] + bytes.fromhex(unusual) + FROZEN[at + len(usual) // 2 :]
    same(decode(data), RECORD)


@pytest.mark.parametrize("dim", [2, 48, 768])
def test_a_length_counts_as_one_as_far_as_law_3_says(dim):
    """In float64: the sum of squares of float32 numbers in float32 is too coarse for this bound."""
    direction = np.random.default_rng(dim).normal(size=dim)
    direction /= np.linalg.norm(direction)
    for length in (1 - 1.003e-5, 1 - 0.997e-5, 1.0, 1 + 0.997e-5, 1 + 1.003e-5):
        vector = (direction * length).astype(np.float32)
        data = encode(replace(RECORD, vector=vector))
        assert (outcome(decode, data) != "damaged embedding record") == (abs(length - 1) < 1e-5), length


@pytest.mark.parametrize("vector", [[np.nan, 1.0], [np.inf, 0.0], [0.6, -np.inf]], ids=["nan", "inf", "-inf"])
def test_vectors_that_are_not_finite_are_corrupt(vector):
    data = FROZEN[:-8] + np.array(vector, dtype="<f4").tobytes()
    with pytest.raises(CorruptRecord):
        decode(data)


@pytest.mark.parametrize("vector", [[3.0, 4.0], [0.0, 0.0], [0.6, 0.79], [1e38, 1e38]])
def test_a_vector_that_is_no_unit_vector_is_corrupt(vector):
    """Law 3: no such record is ever published, so these bytes are damaged and a reader must not serve them."""
    data = FROZEN[:-8] + np.array(vector, dtype="<f4").tobytes()
    with pytest.raises(CorruptRecord):
        decode(data)


def test_a_dimension_that_is_not_the_vectors_is_corrupt():
    at = len(FROZEN) - 8 - 1 - 8 - 1
    assert FROZEN[at] == 4
    for dim in (0, 2, 6, 1):
        with pytest.raises(CorruptRecord):
            decode(FROZEN[:at] + bytes([dim]) + FROZEN[at + 1 :])


def test_a_decoded_vector_is_the_callers_own():
    vector = decode(FROZEN).vector
    vector[0] = 5
    same(decode(FROZEN), RECORD)


# -- JSON ---------------------------------------------------------------------------------------------------------


def test_json_is_the_seeds_shape_and_the_records_fields():
    document = json.loads(json.dumps(to_json(RECORD)))
    assert document == {
        "user_id": "é42",
        "epoch": 3,
        "revision": 300,
        "status": "ok",
        "reason": "",
        "history_len": 100,
        "unknown_items": 2,
        "as_of": 1_700_000_000_000,
        "user_embedding_version": "user_v7",
        "depends_on": {"item_embedding_version": "items_v42"},
        "user_embedding": {"dim": 2, "norm": 1.0, "vector": [float(np.float32(0.6)), float(np.float32(-0.8))]},
    }
    assert list(document)[-1] == "user_embedding"
    assert list(document) == [f["name"] for f in SCHEMA["fields"]]


@given(some_records)
def test_json_loses_no_bit_of_the_vector(record):
    document = json.loads(json.dumps(to_json(record)))
    assert np.array(document["user_embedding"]["vector"], dtype=np.float32).tobytes() == record.vector.tobytes()
    assert document["user_embedding"]["dim"] == len(record.vector)
    assert document["as_of"] == record.as_of
    norm = document["user_embedding"]["norm"]
    assert norm == record.norm or math.isinf(record.norm)


# -- key-value entries --------------------------------------------------------------------------------------------


@given(longs, longs, st.binary(max_size=30))
def test_entries_are_epoch_revision_and_body(epoch, revision, body):
    prefix = kv_prefix(epoch, revision)
    assert prefix == epoch.to_bytes(8, "big") + revision.to_bytes(8, "big")
    assert kv_entry(prefix + body) == (epoch, revision, body)


@given(st.tuples(longs, longs), st.tuples(longs, longs))
def test_prefixes_compare_as_their_numbers(one, other):
    assert (kv_prefix(*one) < kv_prefix(*other)) == (one < other)


@pytest.mark.parametrize("length", range(16))
def test_an_entry_shorter_than_its_prefix_is_corrupt(length):
    with pytest.raises(CorruptRecord):
        kv_entry(b"\1" * length)


def test_a_record_is_built_by_name_but_in_one_place() -> None:
    """Twelve fields, of which most are numbers: two that change places are noticed by nobody."""
    folder = Path(stream.__file__).parent
    calls = [
        (str(file.relative_to(folder)), node)
        for file in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
    ]
    by_name = [call for _, call in calls if getattr(call.func, "id", None) == "EmbeddingRecord"]
    assert len(by_name) > 4
    assert not any(call.args for call in by_name)
    makers = [file for file, call in calls if [getattr(arg, "id", None) for arg in call.args] == ["EmbeddingRecord"]]
    assert makers == ["core/records.py"]


# -- the framing of schema registries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schema_id", [0, 7, 2**32 - 1])
def test_a_framed_record_is_the_same_record(schema_id: int):
    value = framed(FROZEN, schema_id)
    assert value == b"\0" + schema_id.to_bytes(4, "big") + FROZEN[10:]
    assert unframed(value) == unframed(FROZEN) == FROZEN
    assert to_json(decode(value)) == to_json(decode(FROZEN))


@pytest.mark.parametrize("n", range(len(FROZEN) - 5))
def test_a_framed_record_that_is_cut_is_corrupt(n: int):
    with pytest.raises(CorruptRecord):
        decode(framed(FROZEN, 7)[:n])


def test_what_is_of_another_schema_is_no_record_whatever_its_framing_says():
    event = b"\0\0\0\0\7" + b"\x04ab" * 40
    with pytest.raises(CorruptRecord):
        decode(event)


def test_a_schema_is_ours_whatever_its_comments_are():
    assert is_newest_schema(newest_schema())
    assert is_newest_schema(json.dumps({**SCHEMA, "doc": "another"}))
    assert not is_newest_schema(json.dumps({**SCHEMA, "fields": SCHEMA["fields"][1:]}))
    assert not is_newest_schema("{")
    assert schema_name() == "uemb.v1.UserEmbedding"
