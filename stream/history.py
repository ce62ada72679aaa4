"""The bounded history of one user: a set under a total order, and its binary layout.

An interaction is held as one *sort key*: 6 bytes of event time (ms, big-endian), the item's UTF-8 text, a zero byte,
the type's UTF-8 text. No id holds a control character, so comparing these bytes compares ``(ts, item, type)``.
"""

import operator
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from enum import Enum
from itertools import islice
from typing import Final, NamedTuple
from uuid import UUID

from stream.errors import StateError
from stream.keys import INT64_MAX, INT64_MIN, canonical_id

LAYOUT_VERSION: Final = 1
TS_BYTES: Final = 6
MAX_TS_MS: Final = (1 << (8 * TS_BYTES)) - 1
NEVER: Final = -1  # erased_at of a user who was never erased

_COUNT_AT: Final = 1 + 8 + 8 + 8
_HEADER_BYTES: Final = _COUNT_AT + 2
_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TAG_INTEGER, _TAG_UUID, _TAG_TEXT = 0, 1, 2
_MEMO_LIMIT: Final = 1 << 18


class Interaction(NamedTuple):
    """One user-item event as it is retained."""

    ts_ms: int
    item_id: str
    type: str


class Outcome(Enum):
    """What adding an interaction did to a history."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    TOO_OLD = "too_old"
    ERASED = "erased"


def sort_key(ts_ms: int, item_id: bytes, type_name: bytes) -> bytes:
    """Bytes whose order is the order of ``(ts, item, type)``."""
    return ts_ms.to_bytes(TS_BYTES, "big") + item_id + b"\0" + type_name


def split_key(key: bytes) -> tuple[int, bytes, bytes]:
    """Invert `sort_key`."""
    item, _, type_name = key[TS_BYTES:].partition(b"\0")
    return int.from_bytes(key[:TS_BYTES], "big"), item, type_name


def key_ts_ms(key: bytes) -> int:
    """Event time of a sort key in epoch milliseconds."""
    return int.from_bytes(key[:TS_BYTES], "big")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, pos: int) -> tuple[int, int]:
    shift = result = 0
    while True:
        byte = data[pos]
        pos += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, pos
        shift += 7


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

    def _tail(self, suffix: bytes) -> bytes:
        item, _, type_name = suffix.partition(b"\0")
        body = _varint(self._code_of[type_name])
        if _INTEGER.fullmatch(item) and INT64_MIN <= (number := int(item)) <= INT64_MAX:
            body += bytes([_TAG_INTEGER]) + _varint((number << 1) ^ (number >> 63))
        elif _UUID.fullmatch(item):
            body += bytes([_TAG_UUID]) + UUID(item.decode()).bytes
        else:
            body += bytes([_TAG_TEXT]) + item
        tail = _varint(len(body)) + body
        if len(self._tails) >= _MEMO_LIMIT:
            self._tails.clear()
        self._tails[suffix] = tail
        return tail

    def _suffix(self, body: bytes) -> bytes:
        code, pos = _read_varint(body, 0)
        tag, payload = body[pos], body[pos + 1 :]
        if tag == _TAG_INTEGER:
            raw, _ = _read_varint(payload, 0)
            item = str((raw >> 1) ^ -(raw & 1)).encode()
        elif tag == _TAG_UUID:
            item = str(UUID(bytes=payload)).encode()
        else:
            item = payload
        suffix = canonical_id(item.decode()).encode() + b"\0" + self._type_of[code]
        if self._tail(suffix) != _varint(len(body)) + body:  # not what this codec writes: damaged
            msg = "an entry that no worker writes"
            raise ValueError(msg)
        if len(self._suffixes) >= _MEMO_LIMIT:
            self._suffixes.clear()
        self._suffixes[body] = suffix
        return suffix

    def entry(self, key: bytes) -> bytes:
        """Stored bytes of one interaction."""
        suffix = key[TS_BYTES:]
        return key[:TS_BYTES] + (self._tails.get(suffix) or self._tail(suffix))

    def entries(self, keys: Iterable[bytes]) -> bytes:
        """Stored bytes of many interactions."""
        tails, tail = self._tails, self._tail
        return b"".join([k[:TS_BYTES] + (tails.get(s := k[TS_BYTES:]) or tail(s)) for k in keys])

    def keys(self, data: bytes, pos: int) -> list[bytes]:
        """Sort keys of the entries in `data` from `pos` to its end."""
        out: list[bytes] = []
        suffixes = self._suffixes
        end = len(data)
        while pos < end:
            size, start = data[pos + TS_BYTES], pos + TS_BYTES + 1
            if size > 0x7F:
                size, start = _read_varint(data, pos + TS_BYTES)
            body = data[start : start + size]
            if len(body) != size:
                msg = "truncated entry"
                raise ValueError(msg)
            out.append(data[pos : pos + TS_BYTES] + (suffixes.get(body) or self._suffix(body)))
            pos = start + size
        return out


class History:
    """The `limit` greatest distinct interactions of one user, and what was erased.

    Merging is idempotent, commutative and associative, so duplicates, replays and reordering change nothing (law 1).

    Attributes:
        keys: sort keys, oldest first; read only from outside.
        revision: how often the state changed.
        erased_at: greatest erasure time in ms, or `NEVER`; nothing at or before it is retained.
    """

    __slots__ = ("_body", "codec", "erased_at", "keys", "limit", "revision")

    def __init__(
        self,
        codec: HistoryCodec,
        limit: int,
        keys: list[bytes] | None = None,
        *,
        revision: int = 0,
        erased_at: int = NEVER,
    ) -> None:
        self.codec = codec
        self.limit = limit
        self.keys = keys if keys is not None else []
        self.revision = revision
        self.erased_at = erased_at
        self._body: bytes | None = None

    def add(self, key: bytes) -> tuple[Outcome, bytes | None]:
        """Add one interaction; return what happened and the sort key that fell out, if one did."""
        keys = self.keys
        if self.erased_at >= 0 and key_ts_ms(key) <= self.erased_at:
            return Outcome.ERASED, None
        if not keys or key > keys[-1]:
            keys.append(key)
            body = self._body
            evicted = None
            skip = 0
            if len(keys) > self.limit:
                evicted = keys.pop(0)
                if body is not None:
                    skip = TS_BYTES + 1 + body[TS_BYTES] if body[TS_BYTES] < 0x80 else len(self.codec.entry(evicted))
            if body is not None:
                self._body = body[skip:] + self.codec.entry(key)
        else:
            at = bisect_left(keys, key)
            if keys[at] == key:
                return Outcome.DUPLICATE, None
            if at == 0 and len(keys) >= self.limit:
                return Outcome.TOO_OLD, None
            keys.insert(at, key)
            evicted = keys.pop(0) if len(keys) > self.limit else None
            self._body = None
        self.revision += 1
        return Outcome.APPLIED, evicted

    def erase(self, erased_at: int) -> tuple[bool, list[bytes]]:
        """Forget all at or before `erased_at` (ms), now and later; return whether it was news, and what left."""
        if erased_at <= self.erased_at:
            return False, []
        self.erased_at = erased_at
        cut = bisect_right(self.keys, erased_at.to_bytes(TS_BYTES, "big") + b"\xff")
        gone = self.keys[:cut]
        if gone:
            del self.keys[:cut]
            self._body = None
        self.revision += 1
        return True, gone

    def merge(self, other: "History") -> "History":
        """Join of two states of one user: the union's greatest interactions under the later erasure."""
        erased_at = max(self.erased_at, other.erased_at)
        floor = erased_at.to_bytes(TS_BYTES, "big") + b"\xff" if erased_at >= 0 else b""
        union = [k for k in sorted({*self.keys, *other.keys}) if k > floor][-self.limit :]
        revision = max(self.revision, other.revision)
        if all((s.keys, s.erased_at) != (union, erased_at) for s in (self, other) if s.revision == revision):
            revision += 1
        return History(self.codec, self.limit, union, revision=revision, erased_at=erased_at)

    @property
    def as_of_ms(self) -> int | None:
        """Event time of the newest interaction, or None without one."""
        return key_ts_ms(self.keys[-1]) if self.keys else None

    def interactions(self) -> list[Interaction]:
        """What is retained, oldest first."""
        parts = (split_key(key) for key in self.keys)
        return [Interaction(ts, item.decode(), type_name.decode()) for ts, item, type_name in parts]

    def encode(self, epoch: int) -> bytes:
        """Stored bytes of this state as written under `epoch`."""
        if self._body is None:
            self._body = self.codec.entries(self.keys)
        return (
            bytes([LAYOUT_VERSION])
            + epoch.to_bytes(8, "big")
            + self.revision.to_bytes(8, "big")
            + self.erased_at.to_bytes(8, "big", signed=True)
            + len(self.keys).to_bytes(2, "big")
            + self._body
        )

    @classmethod
    def decode(cls, data: bytes, codec: HistoryCodec, limit: int) -> "History":
        """Read stored bytes.

        Raises:
            StateError: unknown layout, or bytes that can't be such a state.
        """
        if not data or data[0] != LAYOUT_VERSION or len(data) < _HEADER_BYTES:
            msg = f"history layout {data[0] if data else 'empty'} is not readable by this release; upgrade the worker"
            raise StateError(msg)
        try:
            keys = codec.keys(data, _HEADER_BYTES)
            if len(keys) != int.from_bytes(data[_COUNT_AT:_HEADER_BYTES], "big") or len(keys) > limit:
                raise ValueError
            if any(map(operator.ge, keys, islice(keys, 1, None))):
                raise ValueError
            history = cls(
                codec,
                limit,
                keys,
                revision=int.from_bytes(data[9:17], "big"),
                erased_at=int.from_bytes(data[17:25], "big", signed=True),
            )
        except (IndexError, KeyError, ValueError) as exc:
            msg = "a stored history is damaged; wipe the partition's state so that it is restored from the changelog"
            raise StateError(msg) from exc
        history._body = data[_HEADER_BYTES:]
        return history


def stored_order(data: bytes) -> tuple[int, int]:
    """``(epoch, revision)`` of stored bytes, without decoding the rest."""
    return int.from_bytes(data[1:9], "big"), int.from_bytes(data[9:17], "big")


def max_state_bytes(limit: int, max_item_bytes: int = 256) -> int:
    """Largest size that a state with `limit` interactions can have."""
    return _HEADER_BYTES + limit * (TS_BYTES + 2 + 3 + 1 + max_item_bytes)
