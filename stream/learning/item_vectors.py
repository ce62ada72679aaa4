"""What a method learns of items."""

from collections.abc import Callable
from typing import Final, NamedTuple

from stream.core.formulas import Float64
from stream.items.manifest import Metric

DIM: Final = 48

Note = Callable[[str], None]


class ItemVectors(NamedTuple):
    """What was learned of n items.

    Attributes:
        ids: their ids, row order.
        vectors: what the index holds, float64 [n, d].
        popularity: how often each was interacted with, float64 [n].
        metric: the similarity that the vectors are made for.
        history_vectors: what they count as in a history, float64 [n, d]; None for `vectors`.
    """

    ids: list[str]
    vectors: Float64
    popularity: Float64
    metric: Metric = "cosine"
    history_vectors: Float64 | None = None
