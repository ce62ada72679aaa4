"""Where stored interactions lie in an item space: one look for the type and item of each, instead of decoding it."""

from collections.abc import Mapping, Sequence
from typing import Final
from weakref import WeakValueDictionary

from stream.core.history_codec import HistoryCodec
from stream.core.space import Space

_MEMO_LIMIT: Final = 1 << 18


class StoredRows:
    """Rows and type weights of stored interactions in one item space.

    Args:
        space: the item space.
        codec: what wrote the interactions.
        type_weights: factor per type; others weigh 1.
    """

    def __init__(self, space: Space, codec: HistoryCodec, type_weights: Mapping[str, float]) -> None:
        self._row_of = space.row
        self._codec = codec
        self._type_weights = {name.encode(): weight for name, weight in type_weights.items()}
        self._rows: dict[bytes, int] = {}
        self._weights: dict[bytes, float] = {}

    def rows(self, bodies: Sequence[bytes]) -> list[int]:
        """Row of each interaction's item, -1 where the space lacks it.

        Args:
            bodies: interactions as `HistoryCodec.item_and_type` reads them.
        """
        found = list(map(self._rows.get, bodies))
        if None in found:
            return [self._learn_row(body) if row is None else row for body, row in zip(bodies, found, strict=True)]
        return found  # type: ignore[return-value]  # all are there

    def weights(self, bodies: Sequence[bytes]) -> list[float]:
        """Type weight of each interaction."""
        return [self._weights.get(body) or self._learn_weight(body) for body in bodies]

    def _learn_row(self, body: bytes) -> int:
        item, _, _ = self._codec.item_and_type(body).partition(b"\0")
        if len(self._rows) >= _MEMO_LIMIT:
            self._rows.clear()
        row = self._rows[body] = self._row_of(item, -1)
        return row

    def _learn_weight(self, body: bytes) -> float:
        _, _, type_name = self._codec.item_and_type(body).partition(b"\0")
        if len(self._weights) >= _MEMO_LIMIT:
            self._weights.clear()
        weight = self._weights[body] = self._type_weights.get(type_name, 1.0)
        return weight


class SharedRows:
    """`StoredRows` by item version, so that the partitions of a worker remember each interaction once.

    Args:
        codec: what wrote the interactions.
        type_weights: factor per type; others weigh 1.
    """

    def __init__(self, codec: HistoryCodec, type_weights: Mapping[str, float]) -> None:
        self.codec = codec
        self._type_weights = type_weights
        self._of: WeakValueDictionary[str, StoredRows] = WeakValueDictionary()  # those of a retired version go

    def of(self, space: Space) -> StoredRows:
        """Those of one item space."""
        rows = self._of.get(space.version)
        if rows is None:
            rows = self._of[space.version] = StoredRows(space, self.codec, self._type_weights)
        return rows
