"""The seed's formulas, one user at a time: the reference that every faster path must equal.

All sums run in float64 on float32 item rows; the cast to float32 comes last.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream.errors import UnknownItemError

if TYPE_CHECKING:
    from stream.items import ItemSpace

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


class OncePerMinute(logging.Filter):
    """Lets one record a minute of each message through; a burst of fallbacks is one line, not a flood."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is the first of its message within a minute."""
        text = record.getMessage()
        if record.created < self._next.get(text, 0.0):
            return False
        self._next[text] = record.created + 60.0
        return True


log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())


def l2_normalize(x: ArrayLike, axis: int = -1, eps: float = NORM_EPS) -> NDArray[Any]:
    """Scale `x` to unit length along `axis` (seed §1); zero stays zero."""
    array = np.asarray(x)
    return np.asarray(array / (np.linalg.norm(array, axis=axis, keepdims=True) + eps))


def is_unit(vector: Float32) -> bool:
    """Whether a float32 vector [d] has length 1, measured in float64; one with NaN or infinity has not (law 3)."""
    wide = vector.astype(np.float64)
    return abs(math.sqrt(wide.dot(wide)) - 1.0) <= UNIT_TOLERANCE


def safe_take_item_emb(item_ids: ArrayLike, item_emb: NDArray[Any]) -> NDArray[Any]:
    """Rows of `item_emb` [n, d] at the indices `item_ids` [L] or [B, L] (seed §1).

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

    Args:
        rows: item vectors of the history, oldest first, at least one.
        decay: the newest weighs 1, each older one ``exp(-decay)`` of its successor.
        weights: extra factor per row [L], for example by interaction type; None is all ones.
    """
    length = rows.shape[0]
    w = np.exp(decay * (np.arange(length, dtype=np.float64) - (length - 1)))
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

    Raises:
        ValueError: ``empty_history``.
        UnknownItemError: an index outside `item_emb`.
    """
    mean = decayed_mean(_history_rows(history_item_ids, item_emb), decay)
    return l2_normalize(mean).astype(np.float32)


def user_embed_mix(history_item_ids: ArrayLike, item_emb: NDArray[Any], *, alpha_short: float = ALPHA_SHORT) -> Float32:
    """Mixture of a long-term and a short-term average of a history [L]; unit float32 [d] (seed §3).

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


def fallback_user_embedding(d: "int | ItemSpace") -> Float32:
    """The stable default [d] of a space: its own fallback, or ``ones/√d`` for a bare dimension (seed §5)."""
    if isinstance(d, int):
        return l2_normalize(np.ones(d, dtype=np.float64)).astype(np.float32)
    return d.fallback


def build_user_embedding(
    user_id: int | str,
    history_item_ids: Sequence[int],
    item_emb: "NDArray[Any] | ItemSpace",
) -> Float32:
    """The mixed vector of a history (row indices, newest last), or the fallback; never raises (seed §5).

    Indices that the matrix lacks are dropped; fewer than two that it has give the fallback.
    """
    matrix, longest = (
        (item_emb, None) if isinstance(item_emb, np.ndarray) else (item_emb.vectors, item_emb.max_row_norm)
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
