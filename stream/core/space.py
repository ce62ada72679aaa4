"""What the step asks of an item space; `stream.items.space.ItemSpace` is the one there is."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Space(Protocol):
    """One version of the item vectors."""

    def __len__(self) -> int:
        """Number of items n."""
        ...

    @property
    def version(self) -> str:
        """Name of the version."""
        ...

    @property
    def sha256(self) -> str:
        """Hash (hex) of all that it holds."""
        ...

    @property
    def dim(self) -> int:
        """Dimension d."""
        ...

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Rows [n, d]."""
        ...

    @property
    def history_vectors(self) -> NDArray[np.float32]:
        """What items count as when they lie in a history [n, d]; the index holds `vectors`, and may differ."""
        ...

    @property
    def max_row_norm(self) -> float:
        """Length of the longest row of `history_vectors`."""
        ...

    @property
    def fallback(self) -> NDArray[np.float32]:
        """Unit vector [d] of users without one of their own."""
        ...

    @property
    def row(self) -> Callable[[bytes, int], int]:
        """Row of an item id in UTF-8, or the second argument where there is none."""
        ...

    @property
    def rows_of(self) -> Callable[[Sequence[bytes]], NDArray[np.int64]]:
        """Row of each item id in UTF-8, -1 where there is none."""
        ...

    def rows(self, item_ids: Sequence[str | int]) -> NDArray[np.int64]:
        """Row of each item id, -1 where there is none."""
        ...
