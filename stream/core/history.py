"""The bounded history of one user: a set under a total order.

An interaction is one *sort key*: 6 bytes of event time (ms, big-endian), the item's UTF-8 text, a zero byte, the type's
UTF-8 text. No id holds a control character, so comparing these bytes compares ``(ts, item, type)``.

This is the readable form, one user at a time; the batch step does the same to arrays (`stream.core.hot_users`).
"""

from bisect import bisect_left, bisect_right
from enum import Enum
from typing import NamedTuple

from stream.core.history_codec import (
    COUNT_AT,
    DAMAGED,
    LAYOUT_VERSION,
    MAX_ORDER,
    MAX_TS_MS,
    NEVER,
    TS_BYTES,
    HistoryCodec,
    key_ts_ms,
    split_key,
    stored_order,
)
from stream.errors import StateError


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

    >>> from stream.core.history_codec import HistoryCodec, sort_key
    >>> history = History(HistoryCodec({"view": 1}), limit=2)
    >>> for ts_ms, item in [(20, b"b"), (10, b"a"), (10, b"a"), (30, b"c"), (5, b"d")]:
    ...     outcome, evicted = history.add(sort_key(ts_ms, item, b"view"))
    ...     print(item, outcome.value, [one.item_id for one in history.interactions()])
    b'b' applied ['b']
    b'a' applied ['a', 'b']
    b'a' duplicate ['a', 'b']
    b'c' applied ['b', 'c']
    b'd' too_old ['b', 'c']

    Attributes:
        keys: sort keys, oldest first; read only.
        revision: how often the state changed.
        erased_at: greatest erasure time in ms, or `NEVER`; nothing at or before it is retained.
    """

    __slots__ = ("codec", "erased_at", "keys", "limit", "revision")

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
        self.keys = keys or []
        self.revision = revision
        self.erased_at = erased_at

    @property
    def count(self) -> int:
        """How many interactions there are."""
        return len(self.keys)

    def add(self, key: bytes) -> tuple[Outcome, bytes | None]:
        """Add one interaction; return what happened and the sort key that fell out, if one did."""
        if key_ts_ms(key) <= self.erased_at:
            return Outcome.ERASED, None
        keys = self.keys
        at = bisect_left(keys, key)
        if at < len(keys) and keys[at] == key:
            return Outcome.DUPLICATE, None
        is_full = len(keys) == self.limit
        if at == 0 and is_full:
            return Outcome.TOO_OLD, None
        keys.insert(at, key)
        self.revision += 1
        return Outcome.APPLIED, keys.pop(0) if is_full else None

    def erase(self, erased_at: int) -> tuple[bool, list[bytes]]:
        """Forget all at or before `erased_at` (ms), now and later; return whether it was news, and what left."""
        if erased_at <= self.erased_at:
            return False, []
        self.erased_at = erased_at
        cut = bisect_right(self.keys, erased_at.to_bytes(TS_BYTES, "big") + b"\xff")
        gone = self.keys[:cut]
        del self.keys[:cut]
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
        return (
            bytes([LAYOUT_VERSION])
            + epoch.to_bytes(8, "big")
            + self.revision.to_bytes(8, "big")
            + self.erased_at.to_bytes(8, "big", signed=True)
            + self.count.to_bytes(2, "big")
            + self.codec.entries(self.keys)
        )

    @classmethod
    def decode(cls, data: bytes, codec: HistoryCodec, limit: int) -> "History":
        """Read stored bytes, whole.

        Raises:
            StateError: unknown layout, or bytes that can't be such a state.
        """
        keys = codec.keys(data)
        epoch, revision = stored_order(data)
        erased_at = int.from_bytes(data[17:COUNT_AT], "big", signed=True)
        if len(keys) > limit or max(epoch, revision) > MAX_ORDER or not NEVER <= erased_at <= MAX_TS_MS:
            raise StateError(DAMAGED)
        return cls(codec, limit, keys, revision=revision, erased_at=erased_at)


def joined(held: bytes | None, value: bytes, codec: HistoryCodec, limit: int) -> bytes:
    """State of a user after one more changelog record: the newer one, joined with an older that came later."""
    if held is None or stored_order(value) >= stored_order(held):
        return value
    merged = History.decode(held, codec, limit).merge(History.decode(value, codec, limit))
    return merged.encode(stored_order(held)[0])
