"""Decayed sums of item rows for many users at once: the incremental twin of `embedding.decayed_mean`.

By rank: for decay λ the sum of a history is ``Σ exp(-λ·r) · w · x`` over its known items, r counting known items from
the newest (0). An item that arrives multiplies what is older by ``exp(-λ)``; one that leaves the old end is subtracted
at its rank. By time: ``Σ exp(-λ·(T-t)) · w · x``, T the time of the newest known item.

What isn't the arrival of the newest interaction (a late one, an erasure) has the history summed afresh.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.core import kernels
from stream.core.encoders import Encoder
from stream.core.formulas import Float32, Float64
from stream.core.space import Space

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

#: Sums are made afresh after so many additions, so that rounding can't build up over years.
MAX_AGE: Final = 100_000


class Sums(NamedTuple):
    """Of n states.

    Attributes:
        sums: weighted sums of known rows [n, K, d].
        totals: sums of the weights [n, K].
        known: number of known items [n].
        newest: rows of the newest known items [n, M], newest first, -1 where there are fewer.
    """

    sums: Float64
    totals: Float64
    known: Int64
    newest: Int64

    def of(self, places: Any) -> "Sums":
        """Those of some of the states."""
        return Sums(*(part[places] for part in self))


class RowHistories(NamedTuple):
    """Rows of histories that lie one behind the other, each oldest first.

    Attributes:
        base: where each history begins and the last ends [m + 1].
        rows: of each interaction [n], -1 for items that the space lacks.
        weights: type weight of each [n]; None is all ones.
        times: event time of each in ms [n]; None where sums don't go by time.
    """

    base: Int64
    rows: Int32
    weights: Float64 | None = None
    times: Int64 | None = None


class Moves(NamedTuple):
    """What was done to histories, one after the other.

    Attributes:
        slots: whose [n].
        rows: row of the interaction that was added [n], -1 where the space lacks its item.
        weights: its type weight [n]; None is all ones.
        times: its event time in ms [n].
        places: how many interactions are older, -1 if none was added [n].
        gone: how many left the old end before [n].
        shown: number of the state after it among those that are wanted, else -1 [n].
    """

    slots: Int64
    rows: Int32
    weights: Float64 | None
    times: Int64
    places: Int64
    gone: Int64
    shown: Int64


class RunningSums:
    """Sums in float64 for numbered slots, one slot a user, in one item space, with the rows that they are made of.

    Args:
        vectors: rows of the space [n, d].
        decays: λ of each sum, K of them, per millisecond where they go by time.
        history_limit: L, how many interactions a history has at most.
        capacity: slots S to begin with.
        by_time: whether they go by time.
        weighted: whether types weigh differently.
        newest: M, how many of the newest rows are told.
    """

    def __init__(
        self,
        vectors: Float32,
        decays: tuple[float, ...],
        history_limit: int,
        capacity: int = 0,
        *,
        by_time: bool = False,
        weighted: bool = False,
        newest: int = 0,
    ) -> None:
        self._vectors = vectors
        self._decays: Float64 = np.asarray(decays, dtype=np.float64)
        # powers[k, r] = exp(-decay_k · r), for every rank a history can have
        self._powers = np.exp(-np.outer(self._decays, np.arange(0 if by_time else history_limit + 2)))
        self._newest = newest
        self._by_time = by_time
        self._weighted = weighted
        self._rows = np.zeros((capacity, history_limit), dtype=np.int32)
        self._weights = np.zeros((capacity, history_limit if weighted else 0))
        self._times = np.zeros((capacity, history_limit if by_time else 0), dtype=np.int64)
        self._sums: Float64 = np.zeros((capacity, len(decays), vectors.shape[1]))
        self._totals: Float64 = np.zeros((capacity, len(decays)))
        self._counts, self._known, self._newest_ms, self._ages = (np.zeros(capacity, dtype=np.int64) for _ in range(4))

    @classmethod
    def of(cls, space: Space, encoder: Encoder, history_limit: int, capacity: int = 0) -> "RunningSums":
        """The sums that an encoder combines."""
        return cls(
            space.history_vectors,
            encoder.decays,
            history_limit,
            capacity,
            by_time=encoder.by_time,
            weighted=any(weight != 1.0 for weight in encoder.type_weights.values()),
            newest=encoder.newest,
        )

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return len(self._counts)

    def grow(self, capacity: int) -> None:
        """Make room for so many slots."""
        for name in ("rows", "weights", "times", "sums", "totals", "counts", "known", "newest_ms", "ages"):
            setattr(self, f"_{name}", grown(getattr(self, f"_{name}"), capacity))

    def load(self, slots: Int64, of: RowHistories) -> None:
        """Set distinct slots [m] to histories."""
        weights, times = self._aside(of)
        kernels.place_rows(
            slots, of.base, of.rows, weights, times, self._rows, self._weights, self._times, self._counts
        )
        found, newest_ms = self._sum(of)
        self._sums[slots], self._totals[slots], self._known[slots] = found.sums, found.totals, found.known
        self._newest_ms[slots], self._ages[slots] = newest_ms, 0

    def follow(self, moves: Moves, count: int) -> Sums:
        """Have the slots follow what was done; return the `count` states that were wanted."""
        out = self._room(count)
        kernels.follow(
            moves.slots, moves.rows, _NO_WEIGHTS if moves.weights is None else moves.weights, moves.times,
            moves.places, moves.gone, moves.shown, MAX_AGE,
            self._rows, self._weights, self._times, self._counts, self._sums, self._totals, self._known,
            self._newest_ms, self._ages, self._decays, self._powers, self._vectors, *out,
        )  # fmt: skip
        return out

    def read(self, slots: Int64) -> Sums:
        """The present state of some slots, copied."""
        count = len(slots)
        nothing, none = np.zeros(count, dtype=np.int64), np.full(count, -1)
        moves = Moves(
            slots, none.astype(np.int32), np.zeros(count) if self._weighted else None, nothing, none, nothing,
            np.arange(count),
        )  # fmt: skip
        return self.follow(moves, count)

    def sum_all(self, of: RowHistories) -> Sums:
        """Sums of whole histories that need no slots."""
        found, _ = self._sum(of)
        for place in range(len(found.newest) if self._newest else 0):
            rows = of.rows[of.base[place] : of.base[place + 1]]
            newest = rows[rows >= 0][: -self._newest - 1 : -1]
            found.newest[place, : len(newest)] = newest
        return found

    def _sum(self, of: RowHistories) -> tuple[Sums, Int64]:
        out, newest_ms = self._room(len(of.base) - 1), np.zeros(len(of.base) - 1, dtype=np.int64)
        weights, times = self._aside(of)
        kernels.sum_histories(
            of.rows[None], of.base, weights[None], times[None], self._decays, self._powers, self._vectors, out.sums,
            out.totals, out.known, newest_ms,
        )  # fmt: skip
        return out, newest_ms

    def _aside(self, of: RowHistories) -> tuple[Float64, Int64]:
        if self._by_time and of.times is None:
            msg = "sums that go by time need the times"
            raise ValueError(msg)
        weights = _NO_WEIGHTS
        if self._weighted:
            weights = np.ones(len(of.rows)) if of.weights is None else of.weights
        return weights, of.times if self._by_time and of.times is not None else _NO_TIMES

    def _room(self, count: int) -> Sums:
        decays = len(self._decays)
        return Sums(
            np.zeros((count, decays, self._vectors.shape[1])),
            np.zeros((count, decays)),
            np.zeros(count, dtype=np.int64),
            np.full((count, self._newest), -1),
        )


_NO_WEIGHTS: Final[Float64] = np.zeros(0)
_NO_TIMES: Final[Int64] = np.zeros(0, dtype=np.int64)


def grown(array: NDArray[Any], capacity: int) -> NDArray[Any]:
    """The same with room for so many in its first dimension, the rest of it zeros."""
    larger = np.zeros((capacity, *array.shape[1:]), dtype=array.dtype)
    larger[: len(array)] = array
    return larger
