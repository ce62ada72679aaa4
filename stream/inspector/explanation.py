"""Why a user's vector is what it is: what each interaction adds to it, and where it would lie without; no I/O.

A mixture of means is linear in the items but for the lengths that it divides by, so its vector falls apart into what
each item adds: ``u = sum(c_i x_i)``, and ``1 = u.u = sum(c_i x_i.u)``. The summands are the `pulls`. What a model makes
of a history does not fall apart; how far the vector turns without an interaction can be said of any encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stream.core.encoders import (
    AvgEncoder,
    Encoder,
    Inputs,
    MixEncoder,
    TimeMixEncoder,
    VectorStatus,
    VersionedEncoder,
)
from stream.core.formulas import WEIGHT_EPS, Float32, Float64
from stream.core.history import Interaction
from stream.core.space import Space

#: Histories with one interaction less that are combined at once: 10,000 of 768 dimensions would fill a gigabyte.
_AT_ONCE: Final = 256


@dataclass(frozen=True, eq=False)
class Explanation:
    """A vector, and what it is made of.

    Attributes:
        vector: unit float32 [d], as a worker publishes it.
        status: what it is.
        known: which of the interactions the item version knows, oldest first [L].
        parts: names of the encoder's means, K of them.
        shares: weight of each interaction in each mean [K, L], 0 for one that is not known; each mean's sum to 1.
        pulls: what each adds to the vector, along it [L]; they sum to 1, one that draws elsewhere has less than 0. None
            for a model, and where there is no vector of the user's own.
        turns: degrees that the vector turns if the interaction is taken out [L]; 0 for one that is not known, NaN where
            no vector of the user's own is left.
    """

    vector: Float32
    status: VectorStatus
    known: NDArray[np.bool_]
    parts: tuple[str, ...]
    shares: Float64
    pulls: Float64 | None
    turns: Float64


def explain(encoder: VersionedEncoder, space: Space, history: Sequence[Interaction]) -> Explanation:
    """Take a vector apart.

    Args:
        encoder: the encoder and its history length.
        space: an item space that it fits.
        history: what is retained, oldest first.

    Raises:
        SpaceMismatch: the encoder was made for another item version.
    """
    items, types = [one.item_id for one in history], [one.type for one in history]
    vector, status, _ = encoder.embed(space, items, types, [one.ts_ms for one in history])
    kind, rows = encoder.encoder, space.rows(items)
    known = rows >= 0
    of = _Known(
        kind,
        space.history_vectors[rows[known]].astype(np.float64) / space.max_row_norm,
        np.array([kind.type_weights.get(one, 1.0) for one in types])[known],
        np.array([one.ts_ms for one in history], dtype=np.int64)[known],
    )
    shares = np.zeros((len(kind.decays), len(history)))
    turns = np.zeros(len(history)) if status == VectorStatus.OK else np.where(known, np.nan, 0.0)
    pulls = None
    if known.any():
        weights = of.weights(of.ages())
        shares[:, known] = weights / weights.sum(axis=1, keepdims=True)
    if status == VectorStatus.OK:
        turns[known] = of.turns()
        mixing = _mixing(kind)
        if mixing is not None:
            pulls = np.zeros(len(history))
            pulls[known] = of.pulls(shares[:, known], mixing)
    return Explanation(vector, status, known, _part_names(kind), shares, pulls, turns)


def _mixing(encoder: Encoder) -> Float64 | None:
    """How much of each mean's direction the vector has, before it is normalised [K]; None for a model."""
    match encoder:
        case AvgEncoder():
            return np.ones(1)
        case MixEncoder(alpha_short=alpha) | TimeMixEncoder(alpha_short=alpha):
            return np.array([1 - alpha, alpha])
    return None


def _part_names(encoder: Encoder) -> tuple[str, ...]:
    match encoder:
        case AvgEncoder():
            return ("mean",)
        case MixEncoder() | TimeMixEncoder():
            return ("long", "short")
    return tuple("mean" if decay == 0 else f"decay {decay:g}" for decay in encoder.decays)


class _Known:
    """The n interactions of a history whose items are known, oldest first.

    Args:
        encoder: what combines them.
        rows: of their items [n, d], in units of the space's longest.
        factors: weight of each one's type [n].
        times: event time of each in ms [n].
    """

    def __init__(self, encoder: Encoder, rows: Float64, factors: Float64, times: NDArray[np.int64]) -> None:
        self._encoder = encoder
        self._rows = rows
        self._factors = factors
        self._times = times

    def ages(self) -> Float64:
        """Age of each [n]: its rank, or milliseconds, from the newest on."""
        if self._encoder.by_time:
            return np.asarray(self._times.max() - self._times, dtype=np.float64)
        return np.arange(len(self._times), dtype=np.float64)[::-1]

    def weights(self, ages: Float64) -> Float64:
        """Weight of each in each mean [K, n], for the first ones of them where there are ages of fewer [n]."""
        decays = np.array(self._encoder.decays)
        return np.asarray(np.exp(-decays[:, None] * ages) * self._factors[: len(ages)])

    def pulls(self, shares: Float64, mixing: Float64) -> Float64:
        """What each adds to the vector, along it [n]."""
        means = shares @ self._rows
        each = (mixing / np.linalg.norm(means, axis=1)) @ shares  # of each item's row in the mixture [n]
        mixed = each @ self._rows
        return np.asarray(each * (self._rows @ mixed) / (mixed @ mixed))

    def turns(self) -> Float64:
        """Degrees that the vector turns without each of them [n], NaN where nothing is left."""
        n = len(self._rows)
        if n < 3:
            return np.full(n, np.nan)
        weights = self.weights(self.ages())
        whole = self._directions((weights @ self._rows)[None], weights.sum(axis=1)[None], np.array([n]))[0]
        sums, totals = self._sums_without_each(weights)
        turns = np.empty(n)
        for start in range(0, n, _AT_ONCE):
            out = np.arange(start, min(n, start + _AT_ONCE))
            vectors, status = self._directions(sums[out], totals[out], out)
            apart = np.linalg.norm(vectors - whole, axis=1)
            angles = np.degrees(2 * np.arcsin(np.minimum(apart / 2, 1.0)))
            turns[out] = np.where(status == VectorStatus.OK, angles, np.nan)
        return turns

    def _sums_without_each(self, weights: Float64) -> tuple[Float64, Float64]:
        """Weighted sums [n, K, d] and sums of weights [n, K], each without one of the interactions."""
        weighted = np.concatenate([weights[:, :, None] * self._rows, weights[:, :, None]], axis=2)
        older, newer = np.zeros_like(weighted), np.zeros_like(weighted)
        np.cumsum(weighted[:, :-1], axis=1, out=older[:, 1:])
        np.cumsum(weighted[:, :0:-1], axis=1, out=newer[:, -2::-1])
        if not self._encoder.by_time:  # what is older than the one that is taken out is a rank younger without it
            older *= np.exp(np.array(self._encoder.decays))[:, None, None]
        left = np.moveaxis(older + newer, 1, 0)
        if self._encoder.by_time:  # without the newest, all are younger by as much, which may be too much for a factor
            again = self.weights((self._times[-2] - self._times[:-1]).astype(np.float64))
            left[-1] = np.concatenate([again @ self._rows[:-1], again.sum(axis=1)[:, None]], axis=1)
        return left[:, :, :-1], left[:, :, -1]

    def _directions(self, sums: Float64, totals: Float64, out: NDArray[np.int64]) -> tuple[Float64, NDArray[np.int8]]:
        """Directions [m, d] of histories without one of the interactions each [m], and their statuses; n: with all."""
        n, m = len(self._rows), self._encoder.newest
        places = n - 1 - np.arange(m)
        places = places - (places <= out[:, None]) * (out < n)[:, None]
        newest = np.where((places >= 0)[:, :, None], self._rows[np.maximum(places, 0)], 0.0)
        known = n - (out < n).astype(np.int64)
        return self._encoder.combine(Inputs(sums / (totals + WEIGHT_EPS)[:, :, None], newest, known))
