"""How histories are stored: sort keys of interactions, and the binary layout with permanent type codes."""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Final
from uuid import UUID

from stream.core.varint import read_varint, varint
from stream.errors import StateError, StateMismatch
from stream.keys import INT64_MAX, INT64_MIN, canonical_id

LAYOUT_VERSION: Final = 1
TS_BYTES: Final = 6
MAX_TS_MS: Final = (1 << (8 * TS_BYTES)) - 1
NEVER: Final = -1  # erased_at of a user who was never erased

COUNT_AT: Final = 1 + 8 + 8 + 8
HEADER_BYTES: Final = COUNT_AT + 2
_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TAG_INTEGER, _TAG_UUID, _TAG_TEXT = 0, 1, 2
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

    Layout: version byte, epoch, revision, erased_at (8 bytes each, big-endian; erased_at -1 for never), number of
    interactions (2 bytes), then one entry each, oldest first: event time (6 bytes, big-endian), a varint length, and
    that many bytes of type code (varint) and tagged item (0 integer as zigzag varint, 1 UUID as 16 bytes, 2 text).
    """

    def __init__(self, type_codes: Mapping[str, int]) -> None:
        self.type_codes = dict(type_codes)
        self._code_of = {name.encode(): code for name, code in type_codes.items()}
        self._type_of = {code: name for name, code in self._code_of.items()}
        self._tails: dict[bytes, bytes] = {}
        self._suffixes: dict[bytes, bytes] = {}

    def body(self, suffix: bytes) -> bytes:
        """Stored type and item of an interaction, given as the end of its sort key."""
        item, _, type_name = suffix.partition(b"\0")
        body = varint(self._code_of[type_name])
        if _INTEGER.fullmatch(item) and INT64_MIN <= (number := int(item)) <= INT64_MAX:
            return body + bytes([_TAG_INTEGER]) + varint((number << 1) ^ (number >> 63))
        if _UUID.fullmatch(item):
            return body + bytes([_TAG_UUID]) + UUID(item.decode()).bytes
        return body + bytes([_TAG_TEXT]) + item

    def _tail(self, suffix: bytes) -> bytes:
        body = self.body(suffix)
        tail = varint(len(body)) + body
        if len(self._tails) >= _MEMO_LIMIT:
            self._tails.clear()
        self._tails[suffix] = tail
        return tail

    def _suffix(self, body: bytes) -> bytes:
        """Item and type of an entry as the end of its sort key."""
        return self._suffixes.get(body) or self._learn(body)

    def _learn(self, body: bytes) -> bytes:
        code, pos = read_varint(body, 0)
        tag, payload = body[pos], body[pos + 1 :]
        if tag == _TAG_INTEGER:
            raw, _ = read_varint(payload, 0)
            item = str((raw >> 1) ^ -(raw & 1)).encode()
        elif tag == _TAG_UUID:
            item = str(UUID(bytes=payload)).encode()
        else:
            item = payload
        suffix = canonical_id(item.decode()).encode() + b"\0" + self._type_of[code]
        if self._tail(suffix) != varint(len(body)) + body:  # not what this codec writes: damaged
            msg = "an entry that no worker writes"
            raise ValueError(msg)
        if len(self._suffixes) >= _MEMO_LIMIT:
            self._suffixes.clear()
        self._suffixes[body] = suffix
        return suffix

    def entries(self, keys: Iterable[bytes]) -> bytes:
        """Stored bytes of many interactions."""
        tails, tail = self._tails, self._tail
        return b"".join([k[:TS_BYTES] + (tails.get(s := k[TS_BYTES:]) or tail(s)) for k in keys])

    def item_and_type(self, body: bytes) -> bytes:
        """Item and type of one interaction, with a zero byte in between.

        Raises:
            StateError: no worker writes such bytes.
        """
        try:
            return self._suffix(body)
        except (IndexError, KeyError, ValueError) as exc:
            raise StateError(DAMAGED) from exc

    def keys(self, entries: bytes) -> list[bytes]:
        """Sort keys of entries, oldest first.

        Raises:
            StateError: no worker writes such entries, or not in this order.
        """
        keys, pos, end = [], 0, len(entries)
        try:
            while pos < end:
                key, pos = self._key(entries, pos)
                keys.append(key)
            if pos != end or any(later <= earlier for earlier, later in pairwise(keys)):
                raise ValueError
        except (IndexError, KeyError, ValueError) as exc:
            raise StateError(DAMAGED) from exc
        return keys

    def _key(self, entries: bytes, pos: int) -> tuple[bytes, int]:
        """Sort key of the entry at `pos`, and where the next one begins."""
        start = pos + TS_BYTES + 1
        size = entries[start - 1]
        if size > 0x7F:
            size, start = read_varint(entries, start - 1)
        body = entries[start : start + size]
        return entries[pos : pos + TS_BYTES] + self._suffix(body), start + size


def check_layout(data: bytes) -> None:
    """Raise `StateMismatch` unless the bytes begin like a stored state of a known layout."""
    if not data or data[0] != LAYOUT_VERSION or len(data) < HEADER_BYTES:
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
    return HEADER_BYTES + limit * (TS_BYTES + 2 + 3 + 1 + max_item_bytes)
