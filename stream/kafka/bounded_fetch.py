"""Fetched record batches, of which none ends the worker: by what it expands to, or by a header's name.

A megabyte of zstd may stand for tens of gigabytes, and the client expands a batch whole. A batch that would become too
large is passed on as records without key and value, which are turned away one by one (`stream.core.events.Unread`).
"""

import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

import cramjam
import numpy as np
from aiokafka.record.memory_records import MemoryRecords

from stream.core.events import MAX_EXPANDED_BYTES, Unread
from stream.kafka.client_internals import records_with_any_names

_PIECE: Final = 1 << 20
_GZIP_BITS: Final = zlib.MAX_WBITS | 16

_GZIP, _SNAPPY, _LZ4, _ZSTD = 1, 2, 3, 4
#: How much each codec can make of a byte, at most; for zstd there is no such bound.
_GREATEST_RATIO: Final = {_GZIP: 1_033, _SNAPPY: 24, _LZ4: 256}

# A batch begins: base offset, length of what follows it, leader epoch, magic, checksum, attributes.
_HEAD: Final = struct.Struct(">qiibIh")
_LENGTH_END: Final = 12
#: In all before the records, which alone are compressed (message format 2; the formats before it are long gone).
_OVERHEAD: Final = 61
_MAGIC: Final = 2
_CODEC_MASK: Final = 0x07


class _UnreadRecord(NamedTuple):
    """A record as the client's iterators give it."""

    offset: int
    timestamp: int
    timestamp_type: int
    value: Unread
    key: None = None
    headers: tuple[()] = ()
    checksum: None = None


class _UnreadBatch:
    """A batch that stays as it is; its records are known by their offsets alone."""

    def __init__(self, batch: Any, size: int) -> None:
        self._batch = batch
        self._size = size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[_UnreadRecord]:
        batch = self._batch
        value = Unread(
            f"a compressed batch of {self._size} bytes that expands beyond {MAX_EXPANDED_BYTES} was not read"
        )
        for offset in range(batch.base_offset, batch.next_offset):
            yield _UnreadRecord(offset, batch.max_timestamp, batch.timestamp_type, value)


class _AnyNames:
    """A batch whose headers may have names that are not UTF-8, which brokers take from any producer.

    The client reads no further there, nor would it ever: such a batch is read once more, by its slower twin.
    """

    def __init__(self, batch: Any, data: memoryview) -> None:
        self._batch = batch
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[Any]:
        read = 0
        try:
            for record in self._batch:
                yield record
                read += 1
        except UnicodeDecodeError:
            yield from islice(records_with_any_names(self._data), read, None)


class BoundedRecords:
    """What the client makes of a fetched partition's bytes, batch by batch.

    Args:
        data: consecutive record batches; the last may be cut off.
    """

    def __init__(self, data: bytes) -> None:
        self._records: Any = MemoryRecords(data)
        self._data = memoryview(data)
        self._at = 0

    def size_in_bytes(self) -> int:
        """Length of all."""
        return len(self._data)

    def has_next(self) -> bool:
        """Whether there is another whole batch."""
        return bool(self._records.has_next())

    def next_batch(self) -> Any:
        """The next batch, None after the last."""
        batch, data, start = self._records.next_batch(), self._data, self._at
        if batch is None:
            return None
        _, length, _, magic, _, attributes = _HEAD.unpack_from(data, start)
        self._at = end = start + _LENGTH_END + length
        codec = attributes & _CODEC_MASK
        if magic == _MAGIC and codec and expands_beyond(codec, data[start + _OVERHEAD : end], MAX_EXPANDED_BYTES):
            return _UnreadBatch(batch, end - start)
        return batch if batch.is_control_batch else _AnyNames(batch, data[start:end])


def expands_beyond(codec: int, data: memoryview, limit: int) -> bool:
    """Whether compressed `data` stands for more than `limit` bytes, or for nothing that can be read.

    Args:
        codec: as in a batch's attributes.
        data: the compressed part of a batch.
        limit: bytes; no more memory than this is used.
    """
    ratio = _GREATEST_RATIO.get(codec)
    if ratio is not None and len(data) * ratio <= limit:
        return False
    if codec == _GZIP:
        return _gzip_beyond(data, limit)
    if codec == _SNAPPY:
        return _snappy_beyond(data, limit)
    if codec not in (_LZ4, _ZSTD):
        return False  # the client refuses it
    room = np.empty(limit, np.uint8)  # pages that nothing is written to cost nothing
    try:
        (cramjam.lz4 if codec == _LZ4 else cramjam.zstd).decompress_into(data, room)
    except cramjam.DecompressionError:
        return True
    return False


def _gzip_beyond(data: memoryview, limit: int) -> bool:
    member, at, rest, size = zlib.decompressobj(_GZIP_BITS), 0, b"", 0
    try:
        while at < len(data) or rest or not member.eof:
            if not rest:
                rest, at = bytes(data[at : at + _PIECE]), at + _PIECE
            if rest and member.eof:
                member = zlib.decompressobj(_GZIP_BITS)
            piece = member.decompress(rest, _PIECE)
            size += len(piece)
            if size > limit or not (piece or rest or member.eof):  # too much, or cut off
                return True
            rest = member.unused_data if member.eof else member.unconsumed_tail
    except zlib.error:
        return True
    return False


def _snappy_beyond(data: memoryview, limit: int) -> bool:
    """Blocks say themselves how long they become; Java's have a header, and a length before each of several blocks."""
    blocks = [data]
    if bytes(data[:8]) == b"\x82SNAPPY\0":
        blocks, at = [], 16
        while at + 4 <= len(data):
            (length,) = struct.unpack_from(">i", data, at)
            blocks.append(data[at + 4 : at + 4 + max(length, 0)])
            at += 4 + max(length, 0)
    try:
        return sum(cramjam.snappy.decompress_raw_len(block) for block in blocks) > limit
    except cramjam.DecompressionError:
        return True
