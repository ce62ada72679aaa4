"""How histories are stored: sort keys of interactions, and the binary layout with permanent type codes."""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Final
from uuid import UUID

from stream.core.varint import read_varint, varint
from stream.errors import StateError, StateMismatch
from stream.keys import INT64_MAX, INT64_MIN, canonical_id

#: The layout that is written, and the one before it, which is read.
LAYOUT_VERSION: Final = 2
_LAYOUT_1: Final = 1
TS_BYTES: Final = 6
MAX_TS_MS: Final = (1 << (8 * TS_BYTES)) - 1
#: Greatest epoch and revision: in the record, Avro doubles it, and 64 bits hold that.
MAX_ORDER: Final = (1 << 62) - 1
NEVER: Final = -1  # erased_at of a user who was never erased

COUNT_AT: Final = 1 + 8 + 8 + 8
HEADER_BYTES: Final = COUNT_AT + 2
_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TAG_INTEGER, _TAG_UUID, _TAG_TEXT = 0, 1, 2
_TAG_BITS, _TAG_MASK = 2, 3
_UUID_BYTES: Final = 16
_MEMO_LIMIT: Final = 1 << 18
DAMAGED: Final = "a stored history is damaged; wipe the partition's state so that it is restored from the changelog"


def sort_key(ts_ms: int, item_id: bytes, type_name: bytes) -> bytes:
    """Bytes whose order is the order of ``(ts, item, type)``.

    >>> sort_key(9, b"z", b"view") < sort_key(10, b"a", b"like") < sort_key(10, b"a", b"view")
    True
    """
    return ts_ms.to_bytes(TS_BYTES, "big") + item_id + b"\0" + type_name


def split_key(key: bytes) -> tuple[int, bytes, bytes]:
    """Invert `sort_key`."""
    item, _, type_name = key[TS_BYTES:].partition(b"\0")
    return int.from_bytes(key[:TS_BYTES], "big"), item, type_name


def key_ts_ms(key: bytes) -> int:
    """Event time of a sort key in epoch milliseconds."""
    return int.from_bytes(key[:TS_BYTES], "big")


class HistoryCodec:
    """Turns sort keys into the stored layout and back, for one table of permanent type codes.

    Layout 2: version byte, epoch, revision, erased_at (8 bytes each, big-endian; erased_at -1 for never), number of
    interactions (2 bytes), then one entry each, oldest first: a varint of the milliseconds since the one before (since
    1970 for the first), and its body. That is a varint of four times the type code plus how the item follows: 0 an
    integer as zigzag varint, 1 a UUID as 16 bytes, 2 text behind a varint of its length.

    In layout 1 an entry was the event time (6 bytes, big-endian), a varint length, and that many bytes of type code
    (varint), 0, 1 or 2, and the item: integers and UUIDs as now, text without a length. 1,128 bytes for 100
    interactions with integers, where this one takes some 700.
    """

    def __init__(self, type_codes: Mapping[str, int]) -> None:
        self.type_codes = dict(type_codes)
        self._code_of = {name.encode(): code for name, code in type_codes.items()}
        self._type_of = {code: name for name, code in self._code_of.items()}
        self._bodies: dict[bytes, bytes] = {}
        self._suffixes: dict[bytes, bytes] = {}

    def body(self, suffix: bytes) -> bytes:
        """Stored type and item of an interaction, given as the end of its sort key."""
        item, _, type_name = suffix.partition(b"\0")
        tag, payload = _stored_item(item)
        head = varint(self._code_of[type_name] << _TAG_BITS | tag)
        return head + varint(len(payload)) + payload if tag == _TAG_TEXT else head + payload

    def entries(self, keys: Iterable[bytes]) -> bytes:
        """Stored bytes of many interactions, oldest first."""
        parts: list[bytes] = []
        before = 0
        for key in keys:
            ts_ms, suffix = key_ts_ms(key), key[TS_BYTES:]
            body = self._bodies.get(suffix)
            if body is None:
                body = _remembered(self._bodies, suffix, self.body(suffix))
            parts += (varint(ts_ms - before), body)
            before = ts_ms
        return b"".join(parts)

    def item_and_type(self, body: bytes) -> bytes:
        """Item and type of one interaction, with a zero byte in between.

        Raises:
            StateError: no worker writes such bytes.
        """
        try:
            return self._suffix(body)
        except (IndexError, KeyError, ValueError) as exc:
            raise StateError(DAMAGED) from exc

    def _suffix(self, body: bytes) -> bytes:
        suffix = self._suffixes.get(body)
        if suffix is None:
            head, pos = read_varint(body, 0)
            tag = head & _TAG_MASK
            if tag == _TAG_TEXT:
                _, pos = read_varint(body, pos)
            suffix = _read_item(tag, body[pos:]) + b"\0" + self._type_of[head >> _TAG_BITS]
            if self.body(suffix) != body:
                raise ValueError(DAMAGED)
            _remembered(self._suffixes, body, suffix)
        return suffix

    def keys(self, data: bytes) -> list[bytes]:
        """Sort keys of a stored state of any layout, oldest first.

        Raises:
            StateError: no worker writes such a state.
        """
        check_layout(data)
        keys, pos, end, ts_ms = [], HEADER_BYTES, len(data), 0
        try:
            while pos < end:
                if data[0] == _LAYOUT_1:
                    key, pos = self._key_1(data, pos)
                else:
                    start, (since, pos) = pos, read_varint(data, pos)
                    if varint(since) != data[start:pos] or (ts_ms := ts_ms + since) > MAX_TS_MS:
                        raise ValueError(DAMAGED)
                    start, pos = pos, _body_end(data, pos)
                    key = ts_ms.to_bytes(TS_BYTES, "big") + self._suffix(data[start:pos])
                keys.append(key)
            if pos != end or any(later <= earlier for earlier, later in pairwise(keys)):
                raise ValueError(DAMAGED)
        except (IndexError, KeyError, ValueError) as exc:
            raise StateError(DAMAGED) from exc
        if len(keys) != int.from_bytes(data[COUNT_AT:HEADER_BYTES], "big"):
            raise StateError(DAMAGED)
        return keys

    def _key_1(self, data: bytes, pos: int) -> tuple[bytes, int]:
        """Sort key of the entry of layout 1 at `pos`, and where the next one begins."""
        stamp, pos = data[pos : pos + TS_BYTES], pos + TS_BYTES
        size, start = read_varint(data, pos)
        code, at = read_varint(data, start)
        tag, end = data[at], start + size
        item = _read_item(tag, data[at + 1 : end])
        written = varint(code) + bytes([tag]) + _stored_item(item)[1]
        if tag != _stored_item(item)[0] or data[pos:end] != varint(size) + written:
            raise ValueError(DAMAGED)
        return stamp + item + b"\0" + self._type_of[code], end

    def as_written_now(self, data: bytes) -> bytes:
        """A stored state in the layout that is written.

        Raises:
            StateError: its layout is an earlier one, and no worker wrote such a state.
            StateMismatch: its layout isn't known.
        """
        check_layout(data)
        if data[0] == LAYOUT_VERSION:
            return data
        return bytes([LAYOUT_VERSION]) + data[1:HEADER_BYTES] + self.entries(self.keys(data))


def _stored_item(item: bytes) -> tuple[int, bytes]:
    """How an item is stored."""
    if _INTEGER.fullmatch(item) and INT64_MIN <= (number := int(item)) <= INT64_MAX:
        return _TAG_INTEGER, varint((number << 1) ^ (number >> 63))
    if _UUID.fullmatch(item):
        return _TAG_UUID, UUID(item.decode()).bytes
    return _TAG_TEXT, item


def _read_item(tag: int, payload: bytes) -> bytes:
    """Invert `_stored_item`; raises `ValueError` or `IndexError` for most of what is no such thing."""
    if tag == _TAG_INTEGER:
        raw, _ = read_varint(payload, 0)
        return str((raw >> 1) ^ -(raw & 1)).encode()
    if tag == _TAG_UUID:
        return str(UUID(bytes=payload)).encode()
    return canonical_id(payload.decode()).encode()


def _body_end(data: bytes, pos: int) -> int:
    """Where the body that begins at `pos` ends; raises `IndexError` or `ValueError` where there is none."""
    head, pos = read_varint(data, pos)
    tag = head & _TAG_MASK
    if tag == _TAG_INTEGER:
        _, pos = read_varint(data, pos)
        return pos
    size = _UUID_BYTES
    if tag == _TAG_TEXT:
        size, pos = read_varint(data, pos)
    if tag > _TAG_TEXT or pos + size > len(data):
        raise ValueError(DAMAGED)
    return pos + size


def _remembered(memo: dict[bytes, bytes], key: bytes, value: bytes) -> bytes:
    """Keep a value in a memo that is emptied when it is full."""
    if len(memo) >= _MEMO_LIMIT:
        memo.clear()
    memo[key] = value
    return value


def check_layout(data: bytes) -> None:
    """Raise `StateMismatch` unless the bytes begin like a stored state of a known layout."""
    if not data or data[0] not in (_LAYOUT_1, LAYOUT_VERSION) or len(data) < HEADER_BYTES:
        msg = f"history layout {data[0] if data else 'empty'} is not readable by this release; upgrade the worker"
        raise StateMismatch(msg)


def stored_order(data: bytes) -> tuple[int, int]:
    """``(epoch, revision)`` of stored bytes, without decoding the rest."""
    return int.from_bytes(data[1:9], "big"), int.from_bytes(data[9:17], "big")


def marker_erased_at(data: bytes) -> int | None:
    """``erased_at`` (ms) of stored bytes that are the marker of an erased user, silent since; None for all others."""
    if int.from_bytes(data[COUNT_AT:HEADER_BYTES], "big"):
        return None
    erased_at = int.from_bytes(data[17:COUNT_AT], "big", signed=True)
    return None if erased_at == NEVER else erased_at


def max_state_bytes(limit: int, max_item_bytes: int = 256) -> int:
    """Largest size that a state with `limit` interactions can have."""
    return HEADER_BYTES + limit * (TS_BYTES + 1 + 3 + 2 + max_item_bytes)
