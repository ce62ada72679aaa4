"""Decayed sums of item rows for many users at once: the incremental twin of `embedding.decayed_mean`.

For decay λ the sum of a history is ``Σ exp(-λ·r) · w · x`` over its known items, r counting known items from the newest
(0). An item that arrives multiplies what is older by ``exp(-λ)``; what is newer (nothing, mostly) keeps its rank. An
item that leaves the old end is subtracted at its rank. Both run over all users of a batch in a few array operations.
Anything else (an erasure, a very late or a very busy user) is summed afresh for all states of the user in the batch by
one matrix product.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.core.formulas import Float32, Float64

Int64 = NDArray[np.int64]

#: States of one user summed by one product at most.
MAX_WINDOW: Final = 256


class Newer(NamedTuple):
    """Known items newer than those that arrive late, for l of m slots.

    Attributes:
        at: which of the m slots [l], each once.
        rows: for each of them the rows of the newer items, newest first, at least one.
        weights: their type weights; None is all ones.
    """

    at: Int64
    rows: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]] | None


class DecayedSums:
    """Sums in float64 for numbered slots, one slot a user, in one item space.

    Attributes:
        sums: weighted sums [capacity, K, d].
        totals: sums of weights [capacity, K].
        known: number of known items [capacity].
    """

    def __init__(self, vectors: Float32, decays: tuple[float, ...], history_limit: int, capacity: int) -> None:
        self.vectors = vectors
        dim = int(vectors.shape[1])
        self.sums: Float64 = np.zeros((capacity, len(decays), dim))
        self.totals: Float64 = np.zeros((capacity, len(decays)))
        self.known: Int64 = np.zeros(capacity, dtype=np.int64)
        # powers[k, r] = exp(-decay_k · r), for every rank a history can have
        self._powers: Float64 = np.exp(-np.outer(np.asarray(decays), np.arange(history_limit + 2, dtype=np.float64)))

    def grow(self, capacity: int) -> None:
        """Make room for at least `capacity` slots."""
        old = self.sums.shape[0]
        if capacity <= old:
            return
        capacity = max(capacity, 2 * old)
        for name in ("sums", "totals", "known"):
            array = getattr(self, name)
            larger = np.zeros((capacity, *array.shape[1:]), dtype=array.dtype)
            larger[:old] = array
            setattr(self, name, larger)

    def read(self, slots: Int64) -> tuple[Float64, Float64, Int64]:
        """Sums [m, K, d], totals [m, K] and known [m] of some slots, copied."""
        return self.sums[slots], self.totals[slots], self.known[slots]

    def load(self, slots: Int64, rows: Sequence[Int64], weights: Sequence[Float64] | None) -> None:
        """Set slots to the sums of whole histories.

        Args:
            slots: distinct slots [m].
            rows: for each the rows of its known items, newest first.
            weights: their type weights; None is all ones.
        """
        self.sums[slots], self.totals[slots] = self._ragged(rows, weights)
        self.known[slots] = [len(of_one) for of_one in rows]

    def _ragged(
        self, rows: Sequence[Sequence[int] | Int64], weights: Sequence[Sequence[float] | Float64] | None
    ) -> tuple[Float64, Float64]:
        """Sums [m, K, d] and totals [m, K] of m sequences of rows, newest first."""
        count, decays, dim = len(rows), self._powers.shape[0], self.vectors.shape[1]
        sums, totals = np.zeros((count, decays, dim)), np.zeros((count, decays))
        for i, of_one in enumerate(rows):
            if len(of_one):
                sums[i], totals[i] = self.sum_of(of_one, None if weights is None else weights[i])
        return sums, totals

    def sum_of(self, rows: Sequence[int] | Int64, weights: Sequence[float] | Float64 | None) -> tuple[Float64, Float64]:
        """Sums [K, d] and totals [K] of one sequence of rows, newest first; weights None is all ones."""
        factors = self._powers[:, : len(rows)]
        if weights is not None:
            factors = factors * weights
        return factors @ self.vectors.take(rows, axis=0), factors.sum(axis=1)  # take: indexing costs twice as much

    def insert(
        self,
        slots: Int64,
        new_rows: Int64,
        new_weights: Float64,
        old_rows: Int64,
        old_weights: Float64,
        newer: Newer | None = None,
    ) -> None:
        """One interaction that arrives for each of m distinct slots, and at most one that leaves the old end.

        Args:
            slots: distinct slots [m].
            new_rows: row of the new item [m], -1 where this space lacks it.
            new_weights: its type weight [m].
            old_rows: row of the item that left [m], -1 where none did or this space lacks it.
            old_weights: its type weight [m].
            newer: what is newer than the items that are not the newest; they are known items.
        """
        is_new = new_rows >= 0
        is_old = old_rows >= 0
        known = self.known[slots]
        keep = np.where(is_new[:, None], self._powers[:, 1][None, :], 1.0)  # [m, K]
        gain = np.where(is_new, new_weights, 0.0)[:, None]  # [m, 1]
        loss = self._powers.T[np.maximum(known + is_new - 1, 0)] * np.where(is_old, old_weights, 0.0)[:, None]  # [m, K]
        sums, totals = self.sums[slots], self.totals[slots]
        if newer is not None:  # set aside what keeps its rank
            sums_aside, totals_aside = self._ragged(newer.rows, newer.weights)
            sums[newer.at] -= sums_aside
            totals[newer.at] -= totals_aside
            gain = np.repeat(gain, keep.shape[1], axis=1)  # [m, K]
            gain[newer.at] *= self._powers.T[[len(rows) for rows in newer.rows]]
        sums *= keep[:, :, None]
        sums += self.vectors[np.maximum(new_rows, 0)][:, None, :] * gain[:, :, None]
        totals = totals * keep + gain - loss
        if newer is not None:
            sums[newer.at] += sums_aside
            totals[newer.at] += totals_aside
        if is_old.any():
            sums -= loss[:, :, None] * self.vectors[np.maximum(old_rows, 0)][:, None, :]
        known = known + is_new - is_old
        if (empty := known == 0).any():  # nothing left: no rounding residue either
            sums[empty] = 0.0
            totals[empty] = 0.0
        self.sums[slots] = sums
        self.totals[slots] = totals
        self.known[slots] = known

    def window(
        self, rows: Int64, weights: Float64 | None, arrived: Int64, left: Int64, steps: Int64
    ) -> tuple[Float64, Float64, Int64]:
        """Sums of several states of one user from scratch.

        Args:
            rows: row of every interaction that is in any of the states [M], oldest first, -1 for unknown items.
            weights: type weight of each [M]; None is all ones.
            arrived: first step at which each is present [M].
            left: first step at which it no longer is [M].
            steps: the states asked for [n].

        Returns:
            sums [n, K, d], totals [n, K], known [n].
        """
        if len(steps) > MAX_WINDOW:  # the product grows with the square of the steps; pieces see few entries each
            parts = [
                self.window(rows[seen], None if weights is None else weights[seen], arrived[seen], left[seen], piece)
                for piece in np.array_split(steps, -(-len(steps) // MAX_WINDOW))
                for seen in [(arrived <= piece[-1]) & (left > piece[0])]
            ]
            return (
                np.concatenate([part[0] for part in parts]),
                np.concatenate([part[1] for part in parts]),
                np.concatenate([part[2] for part in parts]),
            )
        is_known = rows >= 0
        rows, arrived, left = rows[is_known], arrived[is_known], left[is_known]
        present = (arrived[None, :] <= steps[:, None]) & (left[None, :] > steps[:, None])  # [n, M]
        ranks = present[:, ::-1].cumsum(axis=1)[:, ::-1] - 1
        known = ranks[:, 0] + 1 if rows.size else np.zeros(len(steps), dtype=np.int64)
        share = present.astype(np.float64) if weights is None else present * weights[is_known][None, :]
        factors = self._powers[:, np.maximum(ranks, 0)] * share[None]  # [K, n, M]
        matrix = self.vectors[rows].astype(np.float64)  # [M, d]
        sums = np.ascontiguousarray((factors @ matrix).transpose(1, 0, 2))
        return sums, np.ascontiguousarray(factors.sum(axis=2).T), known.astype(np.int64)

    def put(self, slot: int, sums: Float64, totals: Float64, known: int) -> None:
        """Set a slot to a state's sums [K, d] and totals [K]."""
        self.sums[slot] = sums
        self.totals[slot] = totals
        self.known[slot] = known
