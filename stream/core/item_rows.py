"""What stored interactions are to an item space or an encoder: one look for each, instead of decoding it."""

from collections.abc import Mapping, Sequence
from typing import Final
from weakref import WeakValueDictionary

from stream.core.history_codec import HistoryCodec
from stream.core.space import Space

_MEMO_LIMIT: Final = 1 << 18


class StoredRows:
    """Rows of stored interactions in one item space.

    Args:
        space: the item space.
        codec: what wrote the interactions.
    """

    def __init__(self, space: Space, codec: HistoryCodec) -> None:
        self._row_of = space.row
        self._codec = codec
        self._rows: dict[bytes, int] = {}

    def rows(self, bodies: Sequence[bytes]) -> list[int]:
        """Row of each interaction's item, -1 where the space lacks it.

        Args:
            bodies: interactions as `HistoryCodec.item_and_type` reads them.
        """
        found = list(map(self._rows.get, bodies))
        if None in found:
            return [self._learn_row(body) if row is None else row for body, row in zip(bodies, found, strict=True)]
        return found  # type: ignore[return-value]  # all are there

    def _learn_row(self, body: bytes) -> int:
        item, _, _ = self._codec.item_and_type(body).partition(b"\0")
        if len(self._rows) >= _MEMO_LIMIT:
            self._rows.clear()
        row = self._rows[body] = self._row_of(item, -1)
        return row


class StoredWeights:
    """Type weights of stored interactions for one encoder.

    Args:
        type_weights: factor per type; others weigh 1.
        codec: what wrote the interactions.
    """

    def __init__(self, type_weights: Mapping[str, float], codec: HistoryCodec) -> None:
        self._codec = codec
        self._type_weights = {name.encode(): weight for name, weight in type_weights.items()}
        self._weights: dict[bytes, float] = {}

    def weights(self, bodies: Sequence[bytes]) -> list[float]:
        """Type weight of each interaction."""
        return [self._weights.get(body) or self._learn(body) for body in bodies]

    def _learn(self, body: bytes) -> float:
        _, _, type_name = self._codec.item_and_type(body).partition(b"\0")
        if len(self._weights) >= _MEMO_LIMIT:
            self._weights.clear()
        weight = self._weights[body] = self._type_weights.get(type_name, 1.0)
        return weight


class SharedRows:
    """Both by what they are of, so that the partitions of a worker remember each interaction once.

    Args:
        codec: what wrote the interactions.
    """

    def __init__(self, codec: HistoryCodec) -> None:
        self.codec = codec
        self._rows: WeakValueDictionary[str, StoredRows] = WeakValueDictionary()  # those of a retired version go
        self._weights: WeakValueDictionary[tuple[tuple[str, float], ...], StoredWeights] = WeakValueDictionary()

    def rows_of(self, space: Space) -> StoredRows:
        """Those of one item space."""
        rows = self._rows.get(space.version)
        if rows is None:
            rows = self._rows[space.version] = StoredRows(space, self.codec)
        return rows

    def weights_of(self, type_weights: Mapping[str, float]) -> StoredWeights:
        """Those of all encoders that weigh types alike."""
        of = tuple(sorted(type_weights.items()))
        weights = self._weights.get(of)
        if weights is None:
            weights = self._weights[of] = StoredWeights(type_weights, self.codec)
        return weights
