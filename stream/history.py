"""The bounded history of one user: a set under a total order.

An interaction is held as one *sort key*: 6 bytes of event time (ms, big-endian), the item's UTF-8 text, a zero byte,
the type's UTF-8 text. No id holds a control character, so comparing these bytes compares ``(ts, item, type)``.
"""

import operator
from bisect import bisect_left, bisect_right
from enum import Enum
from itertools import islice
from typing import NamedTuple

from stream.errors import StateError
from stream.history_codec import (
    COUNT_AT,
    DAMAGED,
    HEADER_BYTES,
    LAYOUT_VERSION,
    NEVER,
    TS_BYTES,
    HistoryCodec,
    check_layout,
    key_ts_ms,
    split_key,
)


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
        history, _ = cls.read(data, codec, limit)
        return history

    @classmethod
    def read(cls, data: bytes, codec: HistoryCodec, limit: int) -> "tuple[History, list[bytes]]":
        """The same, and the stored type and item of each interaction, oldest first (`HistoryCodec.item_and_type`).

        Raises:
            StateError: unknown layout, or bytes that can't be such a state.
        """
        check_layout(data)
        try:
            keys, bodies = codec.keys(data, HEADER_BYTES)
            if len(keys) != int.from_bytes(data[COUNT_AT:HEADER_BYTES], "big") or len(keys) > limit:
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
            raise StateError(DAMAGED) from exc
        history._body = data[HEADER_BYTES:]
        return history, bodies
