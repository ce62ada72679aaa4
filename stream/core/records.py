"""Bytes of embedding records: Avro single-object encoding, the seed's JSON shape, and key-value entries.

On the output topic a record may be in the framing of schema registries instead (`stream.core.framing`): only what
precedes its body is another. Which schema the id stands for is not looked up here: a body of another one is no record,
for all of it must fit, up to the length of the vector and its norm.

A key-value entry is epoch and revision (8 bytes each, big-endian), then the Avro record; an empty body is a deletion.
"""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final, NamedTuple

import fastavro
import numpy as np
from fastavro.schema import fingerprint, parse_schema, to_parsing_canonical_form

from stream.core.formulas import Float32, are_unit, is_unit
from stream.core.framing import FRAME_BYTES, MAGIC, frame
from stream.core.frozen import maker_of
from stream.core.varint import varint

AVRO_MARKER: Final = b"\xc3\x01"
PREFIX_BYTES: Final = 16
SCHEMA_FILES: Final = ("user_embedding.v1.avsc",)  # oldest first; the last one is written

_PREFIX = struct.Struct(">QQ")
_DOUBLE = struct.Struct("<d")
_FLOAT32 = np.dtype("<f4")
HEADER_BYTES: Final = 10
_LAST_SHIFT: Final = 56  # of a varint's ninth byte; a tenth could overflow 64 bits


class CorruptRecord(ValueError):
    """Bytes that are no record of a schema this release carries."""


@dataclass(frozen=True, slots=True)
class EmbeddingRecord:
    """One user's vector as it is published; all but epoch and revision follow from the history (law 2).

    It is built by name everywhere but by `_record`, where names cost a reader half a microsecond a record.
    """

    user_id: str
    epoch: int
    revision: int
    status: str
    reason: str
    history_len: int
    unknown_items: int
    as_of: int | None
    user_embedding_version: str
    item_embedding_version: str
    vector: Float32
    norm: float


@cache
def _schemas() -> tuple[dict[bytes, Any], bytes]:
    readable: dict[bytes, Any] = {}
    header = b""
    for name in SCHEMA_FILES:
        raw = json.loads(files("schemas").joinpath(name).read_text())
        # fastavro prints the Rabin fingerprint's bytes in the order that single-object encoding stores them.
        header = AVRO_MARKER + bytes.fromhex(fingerprint(to_parsing_canonical_form(raw), "CRC-64-AVRO"))
        readable[header] = parse_schema(raw)
    return readable, header


def _long(value: int) -> bytes:
    """Avro's zigzag varint of a value that is never negative here."""
    return varint(value << 1)


def _string(text: str) -> bytes:
    data = text.encode()
    return _long(len(data)) + data


class RecordParts(NamedTuple):
    """What is the same in all records of one pair of versions, in Avro.

    Attributes:
        header: marker and fingerprint of the schema.
        versions: both versions and the dimension.
        vector_size: size of the vector's bytes.
    """

    header: bytes
    versions: bytes
    vector_size: bytes


def record_parts(user_embedding_version: str, item_embedding_version: str, dim: int) -> RecordParts:
    """See `RecordParts`."""
    versions = _string(user_embedding_version) + _string(item_embedding_version) + _long(dim)
    return RecordParts(_schemas()[1], versions, _long(4 * dim))


def status_part(status: str, reason: str) -> bytes:
    """Status and reason in Avro."""
    return _string(status) + _string(reason)


def encode(record: EmbeddingRecord) -> bytes:
    """One record in Avro single-object encoding."""
    parts = record_parts(record.user_embedding_version, record.item_embedding_version, len(record.vector))
    return b"".join(
        (
            parts.header,
            _string(record.user_id),
            _long(record.epoch),
            _long(record.revision),
            status_part(record.status, record.reason),
            _long(record.history_len),
            _long(record.unknown_items),
            b"\x00" if record.as_of is None else b"\x02" + _long(record.as_of),
            parts.versions,
            _DOUBLE.pack(record.norm),
            parts.vector_size,
            np.asarray(record.vector, dtype="<f4").tobytes(),
        )
    )


def framed(record: bytes, schema_id: int) -> bytes:
    """A record in the framing of schema registries, from one in single-object encoding."""
    return frame(schema_id) + record[HEADER_BYTES:]


def unframed(record: bytes) -> bytes:
    """A record in single-object encoding, from one in either."""
    return _schemas()[1] + record[FRAME_BYTES:] if record.startswith(MAGIC) else record


def is_newest_schema(text: str) -> bool:
    """Whether an Avro schema says of the bytes what that of records does, whatever its comments say."""
    try:
        return bool(
            to_parsing_canonical_form(json.loads(text)) == to_parsing_canonical_form(json.loads(newest_schema()))
        )
    except Exception:  # noqa: BLE001 - fastavro raises many kinds on what is no schema
        return False


def newest_schema() -> str:
    """The Avro schema that records are written with, as text."""
    return files("schemas").joinpath(SCHEMA_FILES[-1]).read_text()


def schema_name() -> str:
    """The full name of that schema."""
    schema = json.loads(newest_schema())
    return f"{schema['namespace']}.{schema['name']}"


_OK: Final = status_part("ok", "")  # of nearly every record


def _take_long(data: bytes, at: int) -> tuple[int, int]:
    """A long and the place after it; raises `ValueError` or `IndexError` for what fastavro has to judge."""
    byte = data[at]
    at += 1
    value = byte & 0x7F
    shift = 7
    while byte > 0x7F:
        if shift > _LAST_SHIFT:
            raise ValueError
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
    return (value >> 1) ^ -(value & 1), at


def _take_string(data: bytes, at: int) -> tuple[str, int]:
    """A string and the place after it, which may lie behind the end: the caller checks where the record ends."""
    size = data[at]
    at += 1
    if size & 0x81:  # negative, or longer than 63 bytes
        size, at = _take_long(data, at - 1)
        if size < 0:
            raise ValueError
    else:
        size >>= 1
    end = at + size
    return data[at:end].decode(), end


#: For fewer records arrays cost more than they save.
_FEW: Final = 4
#: What `RecordDecoder` raises of what fastavro has to judge.
_NOT_BY_HAND: Final = (ValueError, IndexError, struct.error)

#: A record but for its vector: its fields before the vector; norm and dimension of the vector, and where it begins, at
#: the end of the rest. Plain tuples: named ones cost a reader half a microsecond more.
_Fields = tuple[str, int, int, str, str, int, int, int | None, str, str]
_Head = tuple[_Fields, float, int, int]


_record = maker_of(EmbeddingRecord)


class RecordDecoder:
    """Reads sound records of the newest schema, by hand: a fraction of what fastavro takes.

    What is the same in all records of a pair of versions is decoded once, for the pair that was read last; threads may
    share a decoder.
    """

    def __init__(self) -> None:
        self._header = _schemas()[1]
        # The bytes from the versions to dim, what they say, and the bytes of the vector's size. At first a header,
        # which no sound body has at that place.
        self._pair: tuple[bytes, str, str, int, bytes] = (self._header, "", "", 0, b"")

    def __call__(self, data: bytes) -> EmbeddingRecord:
        """Read one record.

        Raises:
            ValueError: the bytes are damaged, of another schema, or valid in an unusual way; fastavro decides which.
            IndexError: the same.
            struct.error: the same.
        """
        fields, norm, dim, end = self._head(data)
        vector = np.frombuffer(data, _FLOAT32, dim, end).astype(np.float32)
        if not is_unit(vector):
            raise ValueError
        return _record(*fields, vector, norm)

    def many(self, bodies: Sequence[bytes]) -> list[EmbeddingRecord | None]:
        """Read records; None stands for what `__call__` would raise of."""
        if len(bodies) < _FEW:
            return [self._try(data) for data in bodies]
        heads = [self._try_head(data) for data in bodies]
        dims = {head[2] for head in heads if head is not None}
        if len(dims) != 1:  # of none, or of spaces of several dimensions
            return [None if head is None else self._try(data) for head, data in zip(heads, bodies, strict=True)]
        (dim,) = dims
        rows = b"".join([data[head[3] :] for head, data in zip(heads, bodies, strict=True) if head is not None])
        vectors = np.frombuffer(rows, _FLOAT32).reshape(-1, dim).astype(np.float32)
        sound = iter(zip(vectors, are_unit(vectors).tolist(), strict=True))
        records: list[EmbeddingRecord | None] = []
        for head in heads:
            record = None
            if head is not None:
                vector, is_sound = next(sound)
                if is_sound:  # a copy: whoever keeps one vector shall not keep all of them
                    record = _record(*head[0], vector.copy(), head[1])
            records.append(record)
        return records

    def _try(self, data: bytes) -> EmbeddingRecord | None:
        try:
            return self(data)
        except _NOT_BY_HAND:
            return None

    def _try_head(self, data: bytes) -> _Head | None:
        try:
            return self._head(data)
        except _NOT_BY_HAND:
            return None

    def _head(self, data: bytes) -> _Head:
        """All of a record but its vector; raises what `__call__` does."""
        if data.startswith(self._header):
            at = HEADER_BYTES
        elif data.startswith(MAGIC):
            at = FRAME_BYTES
        else:
            raise ValueError
        user_id, at = _take_string(data, at)
        epoch, at = _take_long(data, at)
        revision, at = _take_long(data, at)
        if data.startswith(_OK, at):
            status, reason = "ok", ""
            at += len(_OK)
        else:
            status, at = _take_string(data, at)
            reason, at = _take_string(data, at)
        history_len, at = _take_long(data, at)
        unknown_items, at = _take_long(data, at)
        branch = data[at]
        at += 1
        if branch == 2:  # zigzag of 1: the union's long
            as_of, at = _take_long(data, at)
        elif branch:
            raise ValueError
        else:
            as_of = None
        known, user_version, item_version, dim, size = self._pair
        if data.startswith(known, at):
            at += len(known)
        else:
            start = at
            user_version, at = _take_string(data, at)
            item_version, at = _take_string(data, at)
            dim, at = _take_long(data, at)
            if not dim > 0:
                raise ValueError
            size = _long(4 * dim)
            self._pair = data[start:at], user_version, item_version, dim, size
        (norm,) = _DOUBLE.unpack_from(data, at)
        end = at + 8 + len(size)
        # No step goes back, so with this end nothing before it was cut short.
        if not data.startswith(size, at + 8) or end + 4 * dim != len(data):
            raise ValueError
        if (epoch | revision | history_len | unknown_items) < 0:
            raise ValueError
        fields = (
            user_id, epoch, revision, status, reason, history_len, unknown_items, as_of, user_version, item_version
        )  # fmt: skip
        return fields, norm, dim, end


def _decode_any(data: bytes) -> EmbeddingRecord:
    """Read a record of any schema with fastavro, the judge of all that is unusual."""
    readable, newest = _schemas()
    if data.startswith(MAGIC):
        data = newest + data[FRAME_BYTES:]
    writer = readable.get(bytes(data[:HEADER_BYTES]))
    if writer is None:
        msg = "not an embedding record of a schema this release carries"
        raise CorruptRecord(msg)
    try:
        body_bytes = io.BytesIO(data[HEADER_BYTES:])
        raw: Mapping[str, Any] = fastavro.schemaless_reader(body_bytes, writer, readable[newest])
        body = raw["user_embedding"]
        vector = np.frombuffer(body["vector"], _FLOAT32).astype(np.float32)
        if len(vector) != body["dim"] or not is_unit(vector) or body_bytes.read(1):
            raise ValueError
        if min(raw[name] for name in ("epoch", "revision", "history_len", "unknown_items")) < 0:
            raise ValueError
    except Exception as exc:  # fastavro raises many kinds on damaged bytes
        msg = "damaged embedding record"
        raise CorruptRecord(msg) from exc
    return EmbeddingRecord(
        user_id=raw["user_id"],
        epoch=raw["epoch"],
        revision=raw["revision"],
        status=raw["status"],
        reason=raw["reason"],
        history_len=raw["history_len"],
        unknown_items=raw["unknown_items"],
        as_of=raw["as_of"],
        user_embedding_version=raw["user_embedding_version"],
        item_embedding_version=raw["depends_on"]["item_embedding_version"],
        vector=vector,
        norm=body["norm"],
    )


_decode_sound = RecordDecoder()


def decode(data: bytes) -> EmbeddingRecord:
    """Read one record in Avro single-object encoding, of this or any older schema; its vector is a unit vector.

    One in the framing of schema registries is read as of this schema.

    Raises:
        CorruptRecord: unknown schema, or bytes that don't decode.
    """
    try:
        return _decode_sound(data)
    except _NOT_BY_HAND:
        return _decode_any(data)


def decode_many(bodies: Sequence[bytes]) -> list[EmbeddingRecord | None]:
    """Read records as `decode` does, at once; None stands for a corrupt one."""
    records = _decode_sound.many(bodies)
    for place, record in enumerate(records):
        if record is None:
            with suppress(CorruptRecord):
                records[place] = _decode_any(bodies[place])
    return records


def to_json(record: EmbeddingRecord) -> dict[str, Any]:
    """The seed's output shape plus the record's fields."""
    return {
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
            "vector": [float(x) for x in record.vector],
        },
    }


def kv_prefix(epoch: int, revision: int) -> bytes:
    """First 16 bytes of a key-value entry; entries compare by them."""
    return _PREFIX.pack(epoch, revision)


def kv_order(data: bytes) -> tuple[int, int]:
    """Epoch and revision of a key-value entry that is no shorter than its prefix."""
    epoch, revision = _PREFIX.unpack_from(data)
    return epoch, revision


def kv_entry(data: bytes) -> tuple[int, int, bytes]:
    """Epoch, revision and body of a key-value entry; an empty body is a deletion.

    >>> kv_entry(kv_prefix(3, 17) + b"a record")
    (3, 17, b'a record')
    >>> kv_prefix(3, 17) < kv_prefix(3, 18) < kv_prefix(4, 1)  # bytes compare as (epoch, revision)
    True

    Raises:
        CorruptRecord: shorter than its prefix.
    """
    if len(data) < PREFIX_BYTES:
        msg = "a key-value entry shorter than its 16-byte prefix"
        raise CorruptRecord(msg)
    return *kv_order(data), data[PREFIX_BYTES:]
