"""Encoders behind one protocol: from decayed sums to a unit vector, each with a name bound to its parameters."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stream.core import formulas
from stream.core.formulas import DEGENERATE_NORM, WEIGHT_EPS, Float32, Float64, decayed_mean
from stream.core.space import Space
from stream.keys import check_version_name

#: Weights further apart would leave rounding of the heavy ones behind in running sums.
MIN_WEIGHT: Final = 1e-3


class VectorStatus(IntEnum):
    """What a vector is; the text that records carry is in `REASONS`."""

    OK = 0
    NO_KNOWN_ITEMS = 1
    TOO_SHORT_HISTORY = 2
    DEGENERATE = 3
    ENCODER_ERROR = 4


#: Record fields ``(status, reason)`` by `VectorStatus`.
REASONS: Final = (
    ("ok", ""),
    ("fallback", "no_known_items"),
    ("fallback", "too_short_history"),
    ("fallback", "degenerate"),
    ("fallback", "encoder_error"),
)


class Inputs(NamedTuple):
    """What encoders see of N histories; only items that the space has count, and its longest row has length 1.

    Attributes:
        means: recency-weighted means [N, K, d], one for each of the encoder's decays.
        newest: the newest rows [N, M, d], newest first, zeros where a history has fewer; M as the encoder asks for.
        known: number of rows in each history [N].
    """

    means: Float64
    newest: Float64
    known: NDArray[np.int64]


class Encoder(Protocol):
    """Maps what it asks for of a history's known item rows to a direction in the items' space.

    `name` is part of the default version; a type that `type_weights` doesn't list weighs 1.
    """

    @property
    def name(self) -> str:
        """Short name."""
        ...

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays whose sums it combines, K of them."""
        ...

    @property
    def newest(self) -> int:
        """How many of the newest rows it sees one by one, M of them."""
        ...

    @property
    def type_weights(self) -> Mapping[str, float]:
        """Factor per interaction type, in the means."""
        ...

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter, written out."""
        ...

    def combine(self, of: Inputs) -> tuple[Float64, NDArray[np.bool_]]:
        """Directions [N, d] of N histories, and which of them have none [N]."""
        ...


def _unit(vectors: Float64) -> tuple[Float64, NDArray[np.bool_]]:
    norms = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))
    return vectors / (norms + formulas.NORM_EPS)[..., None], norms < DEGENERATE_NORM


@dataclass(frozen=True)
class AvgEncoder:
    """Recency-weighted average (seed §2)."""

    decay: float = formulas.DECAY
    type_weights: Mapping[str, float] = field(default_factory=dict)
    name: str = "avg"
    newest: ClassVar[int] = 0

    @property
    def decays(self) -> tuple[float, ...]:
        """One sum."""
        return (self.decay,)

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter, written out."""
        return {"decay": float(self.decay)}

    def combine(self, of: Inputs) -> tuple[Float64, NDArray[np.bool_]]:
        """The one mean, normalised."""
        return _unit(of.means[:, 0])


@dataclass(frozen=True)
class MixEncoder:
    """Short-term and long-term averages, each normalised, then mixed and normalised (seed §3)."""

    alpha_short: float = formulas.ALPHA_SHORT
    decay_long: float = formulas.DECAY_LONG
    decay_short: float = formulas.DECAY_SHORT
    type_weights: Mapping[str, float] = field(default_factory=dict)
    name: str = "mix"
    newest: ClassVar[int] = 0

    @property
    def decays(self) -> tuple[float, ...]:
        """Long first, then short."""
        return (self.decay_long, self.decay_short)

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter, written out."""
        return {
            "alpha_short": float(self.alpha_short),
            "decay_long": float(self.decay_long),
            "decay_short": float(self.decay_short),
        }

    def combine(self, of: Inputs) -> tuple[Float64, NDArray[np.bool_]]:
        """Mixture of the two directions."""
        parts, short_parts = _unit(of.means)
        mixed = (1 - self.alpha_short) * parts[:, 0] + self.alpha_short * parts[:, 1]
        u, short_mix = _unit(mixed)
        return u, short_mix | short_parts.any(axis=1)


def make_encoder(name: str, params: Mapping[str, float], type_weights: Mapping[str, float]) -> Encoder:
    """Build an encoder by name.

    Raises:
        ValueError: an unknown name, or a parameter the encoder has not.
    """
    kinds: dict[str, Callable[..., Encoder]] = {"avg": AvgEncoder, "mix": MixEncoder}
    if name not in kinds:
        msg = f"unknown encoder {name!r}; choose one of {', '.join(sorted(kinds))}"
        raise ValueError(msg)
    if not all(MIN_WEIGHT <= v <= 1 / MIN_WEIGHT for v in type_weights.values()):
        msg = f"type weights must be from {MIN_WEIGHT:g} to {1 / MIN_WEIGHT:g}"
        raise ValueError(msg)
    if unknown := set(params) - set(kinds[name]().params):
        msg = f"encoder {name!r} has the parameters {', '.join(kinds[name]().params)}, not {sorted(unknown)[0]!r}"
        raise ValueError(msg)
    if not all(np.isfinite(v) and v >= 0 for v in params.values()) or not 0 <= params.get("alpha_short", 0) <= 1:
        msg = "encoder parameters must be finite and not negative, alpha_short at most 1"
        raise ValueError(msg)
    return kinds[name](**params, type_weights=dict(type_weights))


def encoder_hash(encoder: Encoder, history_limit: int) -> str:
    """The sha256 (hex) of everything that decides a vector besides history and item space (law 4)."""
    weights = {t: float(w) for t, w in encoder.type_weights.items() if float(w) != 1.0}
    description = {"encoder": encoder.name, "params": encoder.params, "type_weights": weights, "L": int(history_limit)}
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def user_version(encoder: Encoder, history_limit: int, alias: str | None = None) -> str:
    """Name of the user-embedding version: the alias, else ``{encoder}-{first 8 hex of its hash}``."""
    return check_version_name(alias or f"{encoder.name}-{encoder_hash(encoder, history_limit)[:8]}")


def finish(
    encoder: Encoder,
    sums: Float64,
    totals: Float64,
    known: NDArray[np.int64],
    newest: NDArray[np.int64],
    *,
    space: Space,
) -> tuple[Float32, NDArray[np.int8]]:
    """Vectors and their `VectorStatus` for N states.

    Args:
        encoder: what combines them.
        sums: weighted sums of known rows [N, K, d].
        totals: sums of the weights [N, K].
        known: number of known items in each history [N].
        newest: rows of the newest known items [N, M], newest first, -1 where there are fewer.
        space: whose rows they are.

    Returns:
        float32 [N, d] unit vectors, and [N] statuses.
    """
    # In units of the longest row, so that the unit of a dot space decides nothing; 1 in a cosine space.
    means = sums / ((totals + WEIGHT_EPS) * space.max_row_norm)[:, :, None]
    u, degenerate = encoder.combine(Inputs(means, _rows_at(newest, space), known))
    status = np.zeros(len(known), dtype=np.int8)
    status[degenerate | ~np.isfinite(u).all(axis=1)] = VectorStatus.DEGENERATE
    status[known == 1] = VectorStatus.TOO_SHORT_HISTORY
    status[known == 0] = VectorStatus.NO_KNOWN_ITEMS
    vectors = u.astype(np.float32)
    vectors[status != VectorStatus.OK] = space.fallback
    return vectors, status


def _rows_at(newest: NDArray[np.int64], space: Space) -> Float64:
    """The rows [N, M, d] in units of the longest, zeros for -1."""
    if not newest.size:
        return np.zeros((*newest.shape, space.dim))
    rows = space.history_vectors[np.maximum(newest, 0)].astype(np.float64) / space.max_row_norm
    rows[newest < 0] = 0.0
    return np.asarray(rows)


def reference(
    encoder: Encoder,
    rows: NDArray[Any],
    weights: Float64 | None = None,
    *,
    max_row_norm: float,
    fallback: Float32,
) -> tuple[Float32, VectorStatus]:
    """One user's vector straight from the formula: what every incremental path must equal (law 2).

    Args:
        encoder: the encoder.
        rows: the history's known item vectors [k, d], oldest first.
        weights: type weight of each [k]; None is all ones.
        max_row_norm: the space's longest row.
        fallback: unit float32 [d].
    """
    if len(rows) < 2:
        return fallback, VectorStatus.TOO_SHORT_HISTORY if len(rows) else VectorStatus.NO_KNOWN_ITEMS
    means = np.stack([decayed_mean(rows, decay, weights) for decay in encoder.decays]) / max_row_norm
    newest = np.zeros((encoder.newest, rows.shape[1]))
    last = rows[::-1][: encoder.newest]
    newest[: len(last)] = last.astype(np.float64) / max_row_norm
    u, degenerate = encoder.combine(Inputs(means[None], newest[None], np.array([len(rows)])))
    if degenerate[0] or not np.isfinite(u).all():
        return fallback, VectorStatus.DEGENERATE
    return u[0].astype(np.float32), VectorStatus.OK


@dataclass(frozen=True)
class VersionedEncoder:
    """An encoder, the history length it is used with, and the name that the pair goes by (law 4).

    >>> VersionedEncoder(MixEncoder(), 100).version, VersionedEncoder(MixEncoder(), 50).version
    ('mix-edd8f311', 'mix-6b2543d8')
    >>> VersionedEncoder(MixEncoder(), 50, alias="user_v7").version
    'user_v7'

    Attributes:
        encoder: the formula and its parameters.
        history_limit: L, how many interactions a history retains.
        alias: a name of one's own (``user_v7``) instead of the default one.
    """

    encoder: Encoder = field(default_factory=MixEncoder)
    history_limit: int = 100
    alias: str | None = None

    @property
    def version(self) -> str:
        """The user-embedding version."""
        return user_version(self.encoder, self.history_limit, self.alias)

    @property
    def hash(self) -> str:
        """The sha256 (hex) of all that decides a vector."""
        return encoder_hash(self.encoder, self.history_limit)

    def embed(
        self, space: Space, item_ids: Sequence[str | int], types: Sequence[str] | None = None
    ) -> tuple[Float32, VectorStatus, int]:
        """Vector of a history (item ids, oldest to newest), its status, and how many items the space lacks."""
        recent = item_ids[-self.history_limit :]
        rows = space.rows(recent)
        known = rows >= 0
        weights = None
        if types is not None and self.encoder.type_weights:
            factor = self.encoder.type_weights
            weights = np.array([factor.get(t, 1.0) for t in types[-self.history_limit :]])[known]
        vector, status = reference(
            self.encoder,
            space.history_vectors[rows[known]],
            weights,
            max_row_norm=space.max_row_norm,
            fallback=space.fallback,
        )
        return vector, status, int((~known).sum())
