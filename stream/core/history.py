"""The bounded history of one user: a set under a total order.

An interaction is one *sort key*: 6 bytes of event time (ms, big-endian), the item's UTF-8 text, a zero byte, the type's
UTF-8 text. No id holds a control character, so comparing these bytes compares ``(ts, item, type)``.

As long as interactions arrive in their order, a history is nothing but its stored bytes: one is added at their end and
one leaves their beginning. Only who needs the others has them decoded.
"""

from bisect import bisect_left, bisect_right
from enum import Enum
from typing import NamedTuple

from stream.core.history_codec import (
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
        count: how many interactions there are.
        newest: sort key of the newest, empty without one.
        revision: how often the state changed.
        erased_at: greatest erasure time in ms, or `NEVER`; nothing at or before it is retained.
    """

    __slots__ = ("_body", "_keys", "codec", "count", "erased_at", "limit", "newest", "revision")

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
        self.count = len(keys) if keys else 0
        self.newest = keys[-1] if keys else b""
        self.revision = revision
        self.erased_at = erased_at
        # the entries as they are stored, the sort keys, or both: what is None follows from the other
        self._body: bytes | None = None if keys else b""
        self._keys: list[bytes] | None = keys or None

    @property
    def keys(self) -> list[bytes]:
        """Sort keys, oldest first; read only.

        Raises:
            StateError: this was read from bytes that can't be such a state.
        """
        if self._keys is None:
            self._keys = self.codec.keys(self._entries)
        return self._keys

    @property
    def _entries(self) -> bytes:
        if self._body is None:
            self._body = self.codec.entries(self.keys)
        return self._body

    def add(self, key: bytes) -> tuple[Outcome, bytes | None]:
        """Add one interaction; return what happened and the sort key that fell out, if one did.

        Raises:
            StateError: this was read from bytes that can't be such a state.
        """
        if self.erased_at >= 0 and key_ts_ms(key) <= self.erased_at:
            return Outcome.ERASED, None
        newest = self.newest
        if key > newest:
            evicted = self._append(key)
        elif key == newest:
            return Outcome.DUPLICATE, None
        else:
            keys = self.keys
            at = bisect_left(keys, key)
            if keys[at] == key:
                return Outcome.DUPLICATE, None
            if at == 0 and self.count >= self.limit:
                return Outcome.TOO_OLD, None
            keys.insert(at, key)
            evicted = keys.pop(0) if self.count == self.limit else None
            self._body = None
        self.count += evicted is None
        self.revision += 1
        return Outcome.APPLIED, evicted

    def _append(self, key: bytes) -> bytes | None:
        """Add what is newer than all others; return the sort key that fell out, if one did."""
        codec, body, keys = self.codec, self._body, self._keys
        evicted, skip = None, 0
        if self.count == self.limit:
            evicted, skip = (keys[0], 0) if body is None and keys else codec.first(self._entries)
        if body is not None:
            self._body = body[skip:] + codec.entry(key)
        if keys is not None:
            keys.append(key)
            if evicted is not None:
                del keys[0]
        self.newest = key
        return evicted

    def erase(self, erased_at: int) -> tuple[bool, list[bytes]]:
        """Forget all at or before `erased_at` (ms), now and later; return whether it was news, and what left."""
        if erased_at <= self.erased_at:
            return False, []
        self.erased_at = erased_at
        keys = self.keys
        cut = bisect_right(keys, erased_at.to_bytes(TS_BYTES, "big") + b"\xff")
        gone = keys[:cut]
        if gone:
            del keys[:cut]
            self.count -= cut
            self.newest = keys[-1] if keys else b""
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
        return key_ts_ms(self.newest) if self.count else None

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
            + self._entries
        )

    @classmethod
    def decode(cls, data: bytes, codec: HistoryCodec, limit: int) -> "History":
        """Read stored bytes, whole.

        Raises:
            StateError: unknown layout, or bytes that can't be such a state.
        """
        history, _ = cls.read(data, codec, limit)
        history._keys = codec.keys(history._entries)
        return history

    @classmethod
    def read(cls, data: bytes, codec: HistoryCodec, limit: int) -> "tuple[History, list[bytes]]":
        """Read stored bytes without making sense of each interaction.

        Returns:
            The history, and the stored type and item of each interaction, oldest first: `HistoryCodec.item_and_type`
            tells of each whether a worker writes such bytes.

        Raises:
            StateError: unknown layout, or bytes that can't be such a state.
        """
        check_layout(data)
        bodies, newest = codec.bodies(data[HEADER_BYTES:])
        if len(bodies) != int.from_bytes(data[COUNT_AT:HEADER_BYTES], "big") or len(bodies) > limit:
            raise StateError(DAMAGED)
        return cls.of_bytes(data, codec, limit, len(bodies), newest), bodies

    @classmethod
    def of_bytes(cls, data: bytes, codec: HistoryCodec, limit: int, count: int, newest: bytes) -> "History":
        """A history of stored bytes that were checked, given how many interactions they hold and the newest's key."""
        history = cls(
            codec,
            limit,
            revision=int.from_bytes(data[9:17], "big"),
            erased_at=int.from_bytes(data[17:25], "big", signed=True),
        )
        history._body, history.count, history.newest = data[HEADER_BYTES:], count, newest
        return history
