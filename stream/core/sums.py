"""Decayed sums of item rows for many users at once: the incremental twin of `embedding.decayed_mean`.

`DecayedSums`: for decay λ the sum of a history is ``Σ exp(-λ·r) · w · x`` over its known items, r counting known items
from the newest (0). An item that arrives multiplies what is older by ``exp(-λ)``; what is newer (nothing, mostly) keeps
its rank. An item that leaves the old end is subtracted at its rank.

`FadingSums`: ``Σ exp(-λ·(T-t)) · w · x``, T the time of the newest known item. Only one that is newer than all changes
what others weigh, so the order of arrival is nothing to it.

Both run over all users of a batch in a few array operations. Anything else (an erasure, a very late or a very busy
user) is summed afresh for all states of the user in the batch by one matrix product.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.core.formulas import Float32, Float64

Int64 = NDArray[np.int64]

#: States of one user summed by one product at most.
MAX_WINDOW: Final = 256
_NO_TIMES: Final = np.zeros(0, dtype=np.int64)


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


class Moved(NamedTuple):
    """One interaction for each of m slots, which arrives, or leaves the old end.

    Attributes:
        rows: row of its item [m], -1 where there is none or this space lacks it.
        weights: its type weight [m].
        times: its event time in ms [m]; None where sums don't go by time.
    """

    rows: Int64
    weights: Float64
    times: Int64 | None = None


class RunningSums(ABC):
    """Sums in float64 for numbered slots, one slot a user, in one item space.

    Sequences of rows go newest first here, times and weights with them; weights None is all ones.

    Attributes:
        sums: weighted sums [capacity, K, d].
        totals: sums of weights [capacity, K].
        known: number of known items [capacity].
    """

    _slotted: tuple[str, ...] = ("sums", "totals", "known")

    def __init__(self, vectors: Float32, decays: tuple[float, ...], capacity: int, kernels: ModuleType | None) -> None:
        self._kernels = kernels
        self._powers: Float64 = np.zeros((len(decays), 0))
        self.vectors = vectors
        self.decays: Float64 = np.asarray(decays, dtype=np.float64)
        dim = int(vectors.shape[1])
        self.sums: Float64 = np.zeros((capacity, len(decays), dim))
        self.totals: Float64 = np.zeros((capacity, len(decays)))
        self.known: Int64 = np.zeros(capacity, dtype=np.int64)

    def grow(self, capacity: int) -> None:
        """Make room for at least `capacity` slots."""
        old = self.sums.shape[0]
        if capacity <= old:
            return
        capacity = max(capacity, 2 * old)
        for name in self._slotted:
            array = getattr(self, name)
            larger = np.zeros((capacity, *array.shape[1:]), dtype=array.dtype)
            larger[:old] = array
            setattr(self, name, larger)

    def read(self, slots: Int64) -> tuple[Float64, Float64, Int64]:
        """Sums [m, K, d], totals [m, K] and known [m] of some slots, copied."""
        return self.sums[slots], self.totals[slots], self.known[slots]

    def load(
        self, slots: Int64, rows: NDArray[np.integer[Any]], base: Int64, weights: Float64 | None, times: Int64 | None
    ) -> None:
        """Set distinct slots [m] to the sums of whole histories; the other arguments are those of `sum_all`."""
        self.sums[slots], self.totals[slots], self.known[slots], _ = self.sum_all(rows, base, weights, times)

    def sum_all(
        self, rows: NDArray[np.integer[Any]], base: Int64, weights: Float64 | None, times: Int64 | None
    ) -> tuple[Float64, Float64, Int64, Int64]:
        """Sums of whole histories that lie one behind the other, oldest first.

        Args:
            rows: row of every interaction [n], -1 for unknown items.
            base: where each history begins and the last ends [m + 1].
            weights: type weight of each [n]; None is all ones.
            times: event time of each in ms [n], where sums go by time.

        Returns:
            sums [m, K, d], totals [m, K], known [m], time of the newest known item [m] (0 where nobody asks).
        """
        count, decays = len(base) - 1, len(self.decays)
        sums, totals = np.zeros((count, decays, self.vectors.shape[1])), np.zeros((count, decays))
        known, newest_ms = np.zeros((2, count), dtype=np.int64)
        if self._kernels is not None:
            none = np.zeros(0)
            self._kernels.sum_states(
                rows.astype(np.int32, copy=False),
                base,
                none if weights is None else weights,
                _NO_TIMES if times is None else times,
                self.decays,
                self._powers,
                self.vectors,
                sums,
                totals,
                known,
                newest_ms,
            )
            return sums, totals, known, newest_ms
        for state in range(count):
            part = np.arange(base[state + 1] - 1, base[state] - 1, -1)
            part = part[rows[part] >= 0]
            if known_items := len(part):
                at = None if times is None else times[part]
                of_one = None if weights is None else weights[part]
                sums[state], totals[state] = self.sum_of(rows[part].astype(np.int64), of_one, at)
                known[state] = known_items
                newest_ms[state] = 0 if at is None else at[0]
        return sums, totals, known, newest_ms

    def put(self, slot: int, sums: Float64, totals: Float64, known: int, newest_ms: int) -> None:
        """Set a slot to a state's sums [K, d] and totals [K]; `newest_ms` is the time of its newest known item."""
        self.sums[slot] = sums
        self.totals[slot] = totals
        self.known[slot] = known

    def _keep(self, slots: Int64, sums: Float64, totals: Float64, known: Int64) -> None:
        """Set slots after an insertion."""
        if (empty := known == 0).any():  # nothing left: no rounding residue either
            sums[empty] = 0.0
            totals[empty] = 0.0
        self.sums[slots] = sums
        self.totals[slots] = totals
        self.known[slots] = known

    @abstractmethod
    def sum_of(
        self, rows: Sequence[int] | Int64, weights: Sequence[float] | Float64 | None, times: Int64 | None = None
    ) -> tuple[Float64, Float64]:
        """Sums [K, d] and totals [K] of one sequence of at least one row."""

    @abstractmethod
    def insert(self, slots: Int64, new: Moved, old: Moved, newer: Newer | None = None) -> None:
        """One interaction that arrives for each of m distinct slots, and at most one that leaves the old end.

        Args:
            slots: distinct slots [m].
            new: what arrives.
            old: what leaves.
            newer: what is newer than the items that are not the newest; they are known items.
        """

    def window(
        self,
        rows: Int64,
        weights: Float64 | None,
        arrived: Int64,
        left: Int64,
        steps: Int64,
        times: Int64 | None = None,
    ) -> tuple[Float64, Float64, Int64]:
        """Sums of several states of one user from scratch.

        Args:
            rows: row of every interaction that is in any of the states [M], oldest first, -1 for unknown items.
            weights: type weight of each [M].
            arrived: first step at which each is present [M].
            left: first step at which it no longer is [M].
            steps: the states asked for [n].
            times: event time of each in ms [M], where sums go by time.

        Returns:
            sums [n, K, d], totals [n, K], known [n].
        """
        if len(steps) > MAX_WINDOW:  # the product grows with the square of the steps; pieces see few entries each
            parts = [
                self.window(
                    rows[seen],
                    None if weights is None else weights[seen],
                    arrived[seen],
                    left[seen],
                    piece,
                    None if times is None else times[seen],
                )
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
        known = present.sum(axis=1, dtype=np.int64)
        share = present.astype(np.float64) if weights is None else present * weights[is_known][None, :]
        factors = self._factors(present, None if times is None else times[is_known]) * share[None]  # [K, n, M]
        matrix = self.vectors[rows].astype(np.float64)  # [M, d]
        sums = np.ascontiguousarray((factors @ matrix).transpose(1, 0, 2))
        return sums, np.ascontiguousarray(factors.sum(axis=2).T), known

    @abstractmethod
    def _factors(self, present: NDArray[np.bool_], times: Int64 | None) -> Float64:
        """What each of M rows (oldest first) weighs in each of n states [K, n, M]; nothing is asked of absent ones."""


class DecayedSums(RunningSums):
    """Sums that go by rank.

    Args:
        vectors: rows of the space [n, d].
        decays: λ of each sum, K of them.
        history_limit: how many interactions a history has at most.
        capacity: slots to begin with.
        kernels: `stream.core.kernels` for whole histories; None for the plain way.
    """

    def __init__(
        self,
        vectors: Float32,
        decays: tuple[float, ...],
        history_limit: int,
        capacity: int,
        kernels: ModuleType | None = None,
    ) -> None:
        super().__init__(vectors, decays, capacity, kernels)
        # powers[k, r] = exp(-decay_k · r), for every rank a history can have
        self._powers = np.exp(-np.outer(self.decays, np.arange(history_limit + 2, dtype=np.float64)))

    def sum_of(
        self, rows: Sequence[int] | Int64, weights: Sequence[float] | Float64 | None, times: Int64 | None = None
    ) -> tuple[Float64, Float64]:
        """Sums [K, d] and totals [K] of one sequence of rows; `times` don't matter."""
        factors = self._powers[:, : len(rows)]
        if weights is not None:
            factors = factors * weights
        return factors @ self.vectors.take(rows, axis=0), factors.sum(axis=1)  # take: indexing costs twice as much

    def insert(self, slots: Int64, new: Moved, old: Moved, newer: Newer | None = None) -> None:
        """See `RunningSums.insert`."""
        is_new = new.rows >= 0
        is_old = old.rows >= 0
        known = self.known[slots]
        keep = np.where(is_new[:, None], self._powers[:, 1][None, :], 1.0)  # [m, K]
        gain = np.where(is_new, new.weights, 0.0)[:, None]  # [m, 1]
        loss = self._powers.T[np.maximum(known + is_new - 1, 0)] * np.where(is_old, old.weights, 0.0)[:, None]  # [m, K]
        sums, totals = self.sums[slots], self.totals[slots]
        if newer is not None:  # set aside what keeps its rank
            sums_aside, totals_aside = self._ragged(newer)
            sums[newer.at] -= sums_aside
            totals[newer.at] -= totals_aside
            gain = np.repeat(gain, keep.shape[1], axis=1)  # [m, K]
            gain[newer.at] *= self._powers.T[[len(rows) for rows in newer.rows]]
        sums *= keep[:, :, None]
        sums += self.vectors[np.maximum(new.rows, 0)][:, None, :] * gain[:, :, None]
        totals = totals * keep + gain - loss
        if newer is not None:
            sums[newer.at] += sums_aside
            totals[newer.at] += totals_aside
        if is_old.any():
            sums -= loss[:, :, None] * self.vectors[np.maximum(old.rows, 0)][:, None, :]
        self._keep(slots, sums, totals, known + is_new - is_old)

    def _ragged(self, newer: Newer) -> tuple[Float64, Float64]:
        """Sums [l, K, d] and totals [l, K] of what is newer."""
        count, decays = len(newer.rows), len(self.decays)
        sums, totals = np.zeros((count, decays, self.vectors.shape[1])), np.zeros((count, decays))
        for i, of_one in enumerate(newer.rows):
            sums[i], totals[i] = self.sum_of(of_one, None if newer.weights is None else newer.weights[i])
        return sums, totals

    def _factors(self, present: NDArray[np.bool_], times: Int64 | None) -> Float64:
        ranks = present[:, ::-1].cumsum(axis=1)[:, ::-1] - 1
        return np.asarray(self._powers[:, np.maximum(ranks, 0)])


class FadingSums(RunningSums):
    """Sums that go by event time; `decays` are per millisecond.

    Args:
        vectors: rows of the space [n, d].
        decays: λ of each sum, K of them.
        capacity: slots to begin with.
        kernels: as of `DecayedSums`.

    Attributes:
        newest_ms: time of the newest known item [capacity], which weighs its type's weight.
    """

    _slotted = (*RunningSums._slotted, "newest_ms")

    def __init__(
        self, vectors: Float32, decays: tuple[float, ...], capacity: int, kernels: ModuleType | None = None
    ) -> None:
        super().__init__(vectors, decays, capacity, kernels)
        self.newest_ms: Int64 = np.zeros(capacity, dtype=np.int64)

    def load(
        self, slots: Int64, rows: NDArray[np.integer[Any]], base: Int64, weights: Float64 | None, times: Int64 | None
    ) -> None:
        """See `RunningSums.load`."""
        found = self.sum_all(rows, base, weights, times)
        self.sums[slots], self.totals[slots], self.known[slots], self.newest_ms[slots] = found

    def put(self, slot: int, sums: Float64, totals: Float64, known: int, newest_ms: int) -> None:
        """See `RunningSums.put`."""
        super().put(slot, sums, totals, known, newest_ms)
        self.newest_ms[slot] = newest_ms

    def sum_of(
        self, rows: Sequence[int] | Int64, weights: Sequence[float] | Float64 | None, times: Int64 | None = None
    ) -> tuple[Float64, Float64]:
        """Sums [K, d] and totals [K] of one sequence of rows with their times."""
        factors = self._weights_of(_given(times)[0] - _given(times)).T
        if weights is not None:
            factors = factors * weights
        return factors @ self.vectors.take(rows, axis=0), factors.sum(axis=1)

    def insert(self, slots: Int64, new: Moved, old: Moved, newer: Newer | None = None) -> None:
        """See `RunningSums.insert`; `newer` doesn't matter."""
        is_new, is_old = new.rows >= 0, old.rows >= 0
        known, before, arrives = self.known[slots], self.newest_ms[slots], _given(new.times)
        before = np.where(known > 0, before, np.where(is_new, arrives, before))
        newest = np.where(is_new, np.maximum(before, arrives), before)
        keep = self._weights_of(newest - before)  # [m, K]
        gain = self._weights_of(np.where(is_new, newest - arrives, 0)) * np.where(is_new, new.weights, 0.0)[:, None]
        age = np.where(is_old, newest - _given(old.times), 0)
        loss = self._weights_of(age) * np.where(is_old, old.weights, 0.0)[:, None]
        sums = self.sums[slots] * keep[:, :, None]
        sums += self.vectors[np.maximum(new.rows, 0)][:, None, :] * gain[:, :, None]
        totals = self.totals[slots] * keep + gain - loss
        if is_old.any():
            sums -= loss[:, :, None] * self.vectors[np.maximum(old.rows, 0)][:, None, :]
        self._keep(slots, sums, totals, known + is_new - is_old)
        self.newest_ms[slots] = newest

    def _weights_of(self, ages_ms: Int64) -> Float64:
        """What items of so many ages [m] weigh [m, K]."""
        return np.exp(-ages_ms[:, None] * self.decays[None, :])

    def _factors(self, present: NDArray[np.bool_], times: Int64 | None) -> Float64:
        at = _given(times)
        if not at.size:
            return np.zeros((len(self.decays), *present.shape))
        newest = np.where(present, at[None, :], np.int64(0)).max(axis=1)  # [n]
        ages = np.where(present, newest[:, None] - at[None, :], 0)  # [n, M]
        return np.exp(-ages[None] * self.decays[:, None, None])


def _given(times: Int64 | None) -> Int64:
    if times is None:
        msg = "sums that go by time need the times"
        raise ValueError(msg)
    return times
