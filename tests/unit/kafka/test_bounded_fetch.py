"""Fetched batches: as the client reads them, but for those that expand too far."""

import gzip
import random
from collections.abc import Callable

import cramjam
import pytest
from aiokafka.codec import snappy_encode
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given
from hypothesis import strategies as st

from stream.core.events import Unread
from stream.kafka import bounded_fetch as bounded_records
from stream.kafka.bounded_fetch import BoundedRecords, expands_beyond

CODECS = {"gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
COMPRESS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "gzip": (1, gzip.compress),
    "gzip in two members": (1, lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:])),
    "snappy": (2, lambda data: bytes(cramjam.snappy.compress_raw(data))),
    "snappy of Java": (2, lambda data: snappy_encode(data, xerial_blocksize=1_000)),
    "lz4": (3, lambda data: bytes(cramjam.lz4.compress(data))),
    "zstd": (4, lambda data: bytes(cramjam.zstd.compress(data))),
    "zstd in two frames": (4, lambda data: b"".join(bytes(cramjam.zstd.compress(d)) for d in (data[:100], data[100:]))),
}


@pytest.mark.parametrize("how", COMPRESS)
@given(st.binary(max_size=50), st.integers(0, 5_000), st.integers(1, 10_000))
def test_how_far_data_expands_is_told_exactly(how: str, noise: bytes, zeros: int, limit: int) -> None:
    codec, compress = COMPRESS[how]
    data = noise + bytes(zeros)
    assert expands_beyond(codec, memoryview(compress(data)), limit) == (len(data) > limit)


@pytest.mark.parametrize("how", COMPRESS)
def test_data_that_takes_several_pieces_is_measured_as_exactly(how: str) -> None:
    codec, compress = COMPRESS[how]
    data = random.Random(3).randbytes(3 << 20) + bytes(3 << 20)
    packed = memoryview(compress(data))
    assert [expands_beyond(codec, packed, len(data) + more) for more in (-1, 0)] == [True, False]


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_what_can_not_be_expanded_is_too_much(codec: int) -> None:
    assert expands_beyond(codec, memoryview(b"\xff" * 5_000), 10_000)


def test_gzip_that_is_cut_off_ends() -> None:
    assert expands_beyond(1, memoryview(gzip.compress(bytes(5_000))[:-9]), 10_000)


def batch(codec: str, base: int, values: list[bytes]) -> bytes:
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=CODECS.get(codec, 0),
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 30,
    )
    for number, value in enumerate(values):
        builder.append(number, timestamp=1_000 + number, key=b"k", value=value, headers=[("h", b"x")])
    data = bytearray(builder.build())
    data[:8] = base.to_bytes(8, "big")
    return bytes(data)


def all_of(records: object) -> list[tuple[int, bytes | None, bytes | None]]:
    found = []
    while records.has_next():  # type: ignore[attr-defined]
        each = records.next_batch()  # type: ignore[attr-defined]
        assert each.validate_crc()
        found += [(record.offset, record.key, record.value) for record in each]
    return found


def test_batches_are_those_of_the_client() -> None:
    data = b"".join(
        batch(codec, 10 * n, [b"v%d" % n, b"w" * 3_000]) for n, codec in enumerate(["", *CODECS, "", "zstd"])
    )
    for end in (len(data), len(data) - 5):  # a fetch cuts off its last batch
        assert all_of(BoundedRecords(data[:end])) == all_of(MemoryRecords(data[:end]))
        assert BoundedRecords(data[:end]).size_in_bytes() == end
    assert BoundedRecords(b"").next_batch() is None


@pytest.mark.parametrize("codec", CODECS)
def test_one_that_expands_too_far_is_known_by_its_offsets(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_records, "MAX_EXPANDED_BYTES", 100_000)
    good = [batch(codec, 0, [b"a"]), batch(codec, 104, [b"b"])]
    records = BoundedRecords(good[0] + batch(codec, 101, [bytes(60_000)] * 3) + good[1])
    found = all_of(records)
    assert found == [(0, b"k", b"a"), (101, None, b""), (102, None, b""), (103, None, b""), (104, b"k", b"b")]
    assert isinstance(found[1][2], Unread)
    assert "expands beyond 100000" in found[1][2].detail


@pytest.mark.parametrize("codec", ["none", *CODECS])
def test_a_header_s_name_may_be_any_bytes(codec: str) -> None:
    """The client reads no such batch, and the worker would have met it at every start."""
    plain = batch("none", 7, [b"a", b"b", b"c"])
    name = plain.index(b"h", plain.index(b"b", 61))  # of the second record
    damaged = bytearray(plain)
    damaged[name] = 0xFF
    if codec != "none":
        packed = COMPRESS[codec][1](bytes(damaged[61:]))
        head = bytearray(damaged[:61])
        head[8:12] = (49 + len(packed)).to_bytes(4, "big")
        head[21:23] = CODECS[codec].to_bytes(2, "big")
        damaged = head + packed
    fetched = BoundedRecords(bytes(damaged) + batch("none", 10, [b"d"]))
    records = []
    while fetched.has_next():
        records += list(fetched.next_batch())
    assert [(r.offset, r.key, r.value) for r in records] == [(7 + n, b"k", bytes((97 + n,))) for n in range(4)]
    assert [r.headers for r in records] == [[("h", b"x")], [("\\xff", b"x")], [("h", b"x")], [("h", b"x")]]
    assert fetched.next_batch() is None
