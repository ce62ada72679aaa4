"""The seed's formulas, one user at a time: the reference that every faster path must equal.

All sums run in float64 on float32 item rows; the cast to float32 comes last.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream.core.space import Space
from stream.errors import UnknownItemError
from stream.logs import OncePerMinute

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

NORM_EPS: Final = 1e-12
WEIGHT_EPS: Final = 1e-12
#: A sum shorter than this share of the space's largest row has no direction worth serving.
DEGENERATE_NORM: Final = 1e-6
DECAY: Final = 0.05
DECAY_LONG: Final = 0.01
DECAY_SHORT: Final = 0.15
ALPHA_SHORT: Final = 0.6
#: Furthest from 1 that the length of a published vector may be (law 3).
UNIT_TOLERANCE: Final = 1e-5
#: The same in float32, where a thousand dimensions add up to errors far below this.
_NEARLY: Final = 1e-2


log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())


def l2_normalize(x: ArrayLike, axis: int = -1, eps: float = NORM_EPS) -> NDArray[Any]:
    """Scale `x` to unit length along `axis` (seed §1); zero stays zero.

    >>> print(l2_normalize([[3.0, 4.0], [0.0, 0.0]]))
    [[0.6 0.8]
     [0.  0. ]]
    """
    array = np.asarray(x)
    return np.asarray(array / (np.linalg.norm(array, axis=axis, keepdims=True) + eps))


def is_unit(vector: Float32) -> bool:
    """Whether a float32 vector [d] has length 1, measured in float64; one with NaN or infinity has not (law 3)."""
    if not abs(np.vdot(vector, vector) - 1.0) < _NEARLY:  # damaged bytes: numpy warns of some NaNs when it widens them
        return False
    wide = vector.astype(np.float64)
    return abs(math.sqrt(wide.dot(wide)) - 1.0) <= UNIT_TOLERANCE


def are_unit(vectors: Float32) -> NDArray[np.bool_]:
    """The same of many [n, d], at once."""
    with np.errstate(invalid="ignore"):  # damaged bytes: see `is_unit`
        wide = vectors.astype(np.float64)
        norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        return np.asarray(np.abs(norms - 1.0) <= UNIT_TOLERANCE)


def unit_vector(values: ArrayLike) -> Float32:
    """Whatever numbers have a direction [d], as a float32 vector of length 1; one that has it stays as it is.

    >>> print(unit_vector([3, 4]))
    [0.6 0.8]

    Raises:
        ValueError: they are not one finite vector that is longer than nothing.
    """
    try:
        vector = np.array(values, dtype=np.float32)
    except (TypeError, ValueError) as exc:
        msg = "a vector must be one row of numbers"
        raise ValueError(msg) from exc
    if vector.ndim != 1 or not np.isfinite(vector).all() or not np.linalg.norm(vector) > NORM_EPS:
        msg = "a vector must be one row of finite numbers that are not all zero"
        raise ValueError(msg)
    return vector if is_unit(vector) else l2_normalize(vector.astype(np.float64)).astype(np.float32)


def safe_take_item_emb(item_ids: ArrayLike, item_emb: NDArray[Any]) -> NDArray[Any]:
    """Rows of `item_emb` [n, d] at the indices `item_ids` [L] or [B, L] (seed §1).

    >>> print(safe_take_item_emb([1, 1, 0], np.eye(2)))
    [[0. 1.]
     [0. 1.]
     [1. 0.]]
    >>> safe_take_item_emb([-1], np.eye(2))
    Traceback (most recent call last):
    stream.errors.UnknownItemError: item index outside 0..1

    Raises:
        UnknownItemError: an index is negative or at least n; nothing wraps around.
    """
    index = np.asarray(item_ids)
    if index.size == 0:
        index = index.astype(np.int64)
    if index.dtype.kind not in "iu":
        msg = f"item indices must be integers, not {index.dtype}"
        raise UnknownItemError(msg)
    if index.size and (index.min() < 0 or index.max() >= item_emb.shape[0]):
        msg = f"item index outside 0..{item_emb.shape[0] - 1}"
        raise UnknownItemError(msg)
    return np.asarray(item_emb[index])


def decayed_mean(rows: NDArray[Any], decay: float, weights: Float64 | None = None) -> Float64:
    """Recency-weighted mean [d] of `rows` [L, d], newest last (seed §2).

    >>> print(decayed_mean(np.eye(2), decay=np.log(3)))  # the older one weighs a third
    [0.25 0.75]

    Args:
        rows: item vectors of the history, oldest first, at least one.
        decay: the newest weighs 1, each older one ``exp(-decay)`` of its successor.
        weights: extra factor per row [L], for example by interaction type; None is all ones.
    """
    length = rows.shape[0]
    return weighted_mean(rows, decay, (length - 1) - np.arange(length, dtype=np.float64), weights)


def weighted_mean(rows: NDArray[Any], decay: float, ages: Float64, weights: Float64 | None = None) -> Float64:
    """Mean [d] of `rows` [L, d], each weighing ``exp(-decay · age)`` times its weight [L]; None is all ones."""
    w = np.exp(-decay * ages)
    if weights is not None:
        w = w * weights
    w = w / (w.sum() + WEIGHT_EPS)
    return np.asarray(w @ rows.astype(np.float64))


def _history_rows(history_item_ids: ArrayLike, item_emb: NDArray[Any]) -> NDArray[Any]:
    rows = safe_take_item_emb(history_item_ids, item_emb)
    if rows.shape[0] == 0:
        msg = "empty_history"
        raise ValueError(msg)
    return rows


def user_embed_avg(history_item_ids: ArrayLike, item_emb: NDArray[Any], *, decay: float = DECAY) -> Float32:
    """Recency-weighted average of a history [L], newest last; unit float32 [d] (seed §2).

    >>> print(user_embed_avg([0, 1], np.eye(2), decay=np.log(3)).round(3))  # along (1, 3)
    [0.316 0.949]

    Raises:
        ValueError: ``empty_history``.
        UnknownItemError: an index outside `item_emb`.
    """
    mean = decayed_mean(_history_rows(history_item_ids, item_emb), decay)
    return l2_normalize(mean).astype(np.float32)


def user_embed_mix(history_item_ids: ArrayLike, item_emb: NDArray[Any], *, alpha_short: float = ALPHA_SHORT) -> Float32:
    """Mixture of a long-term and a short-term average of a history [L]; unit float32 [d] (seed §3).

    >>> history = [0] * 20 + [1] * 5  # an old taste, and a new one
    >>> for alpha_short in (0.0, 0.6, 1.0):
    ...     print(user_embed_mix(history, np.eye(2), alpha_short=alpha_short).round(2))
    [0.96 0.27]
    [0.81 0.59]
    [0.65 0.76]

    Raises:
        ValueError: ``empty_history``.
        UnknownItemError: an index outside `item_emb`.
    """
    rows = _history_rows(history_item_ids, item_emb)
    u_long = l2_normalize(decayed_mean(rows, DECAY_LONG))
    u_short = l2_normalize(decayed_mean(rows, DECAY_SHORT))
    return l2_normalize((1 - alpha_short) * u_long + alpha_short * u_short).astype(np.float32)


def make_user_features(history_item_ids: ArrayLike, item_emb: NDArray[Any]) -> NDArray[Any]:
    """Input [3d] of a learned encoder: mean of all, mean of the newest five, newest (seed §4).

    >>> print(make_user_features([0] * 5 + [1] * 5, np.eye(2)))
    [0.5 0.5 0.  1.  0.  1. ]

    Raises:
        ValueError: ``empty_history``.
        UnknownItemError: an index outside `item_emb`.
    """
    rows = _history_rows(history_item_ids, item_emb)
    mean = rows.mean(axis=0)
    short = rows[-5:].mean(axis=0) if rows.shape[0] >= 5 else mean
    return np.concatenate([mean, short, rows[-1]], axis=0)


def user_embed_learned(
    history_item_ids: ArrayLike, item_emb: NDArray[Any], mlp: Callable[[NDArray[Any]], ArrayLike]
) -> Float32:
    """Unit float32 [d] from a model that maps features [3d] to the item space (seed §4).

    Raises:
        ValueError: ``empty_history``, or the model's output has not the items' dimension.
    """
    u = np.asarray(mlp(make_user_features(history_item_ids, item_emb)))
    if u.shape != (item_emb.shape[1],):
        msg = f"the model returned shape {u.shape}, the item space has dimension {item_emb.shape[1]}"
        raise ValueError(msg)
    return l2_normalize(u).astype(np.float32)


def fallback_user_embedding(d: int | Space) -> Float32:
    """The stable default [d] of a space: its own fallback, or ``ones/√d`` for a bare dimension (seed §5).

    >>> print(fallback_user_embedding(4))
    [0.5 0.5 0.5 0.5]
    """
    if isinstance(d, int):
        return l2_normalize(np.ones(d, dtype=np.float64)).astype(np.float32)
    return d.fallback


def build_user_embedding(
    user_id: int | str,
    history_item_ids: Sequence[int],
    item_emb: NDArray[Any] | Space,
) -> Float32:
    """The mixed vector of a history (row indices, newest last), or the fallback; never raises (seed §5).

    Indices that the matrix lacks are dropped; fewer than two that it has give the fallback.

    >>> print(build_user_embedding(42, [0, 0, 99], np.eye(4)))
    [1. 0. 0. 0.]
    >>> print(build_user_embedding(42, [0], np.eye(4)))
    [0.5 0.5 0.5 0.5]
    """
    matrix, longest = (
        (item_emb, None) if isinstance(item_emb, np.ndarray) else (item_emb.history_vectors, item_emb.max_row_norm)
    )
    try:
        known = [i for i in map(int, history_item_ids) if 0 <= i < matrix.shape[0]]
        if len(known) >= 2 and _has_direction(matrix[known], longest):
            return user_embed_mix(known, matrix)
        reason = "too_short_history" if len(known) < 2 else "degenerate"
    except Exception as exc:  # noqa: BLE001 - retrieval must get a vector whatever the caller passed
        reason = type(exc).__name__  # its text may hold what the caller passed
    log.warning("user_embed_fallback: %s", reason)
    return fallback_user_embedding(matrix.shape[1] if isinstance(item_emb, np.ndarray) else item_emb)


def _has_direction(rows: NDArray[Any], longest: float | None) -> bool:
    """Whether the mixture of `rows` [L, d], oldest first, is more than rounding (law 3)."""
    scale = longest if longest is not None else float(np.linalg.norm(rows.astype(np.float64), axis=1).max())
    means = [decayed_mean(rows, decay) / scale for decay in (DECAY_LONG, DECAY_SHORT)]
    mixed = (1 - ALPHA_SHORT) * l2_normalize(means[0]) + ALPHA_SHORT * l2_normalize(means[1])
    return all(float(np.linalg.norm(part)) >= DEGENERATE_NORM for part in (*means, mixed))
