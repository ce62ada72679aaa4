"""Encoders behind one protocol: from decayed sums to a unit vector, each with a name bound to its parameters."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stream.core import formulas
from stream.core.formulas import DEGENERATE_NORM, WEIGHT_EPS, Float32, Float64, weighted_mean
from stream.core.space import Space
from stream.errors import SpaceMismatch
from stream.keys import check_version_name

#: Weights further apart would leave rounding of the heavy ones behind in running sums.
MIN_WEIGHT: Final = 1e-3
_HOUR_MS: Final = 3_600_000
#: Half-lives (hours) by time: a second, and a thousand years.
_SHORTEST_H, _LONGEST_H = 1 / 3600, 1000 * 366 * 24.0


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


class MadeFor(NamedTuple):
    """The item version that an encoder was learned from, and the only one that it is of any use in."""

    version: str
    sha256: str
    dim: int


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
    def by_time(self) -> bool:
        """Whether they are per millisecond that an interaction is older than the newest known one, not per rank."""
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

    @property
    def made_for(self) -> MadeFor | None:
        """The one item version that it is of any use in; None for all."""
        ...

    def combine(self, of: Inputs) -> tuple[Float64, NDArray[np.int8]]:
        """Directions [N, d] of N histories, and the `VectorStatus` of each [N]: ``OK`` where there is one."""
        ...


def to_unit(vectors: Float64) -> tuple[Float64, NDArray[np.bool_]]:
    """Directions of vectors [..., d], and which of them are too short to have one [...]."""
    norms = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))
    return vectors / (norms + formulas.NORM_EPS)[..., None], norms < DEGENERATE_NORM


def _degenerate(where: NDArray[np.bool_]) -> NDArray[np.int8]:
    return np.where(where, VectorStatus.DEGENERATE, VectorStatus.OK).astype(np.int8)


def _mixture(alpha_short: float, of: Inputs) -> tuple[Float64, NDArray[np.int8]]:
    """Mixture of the directions of a long and of a short mean, in this order."""
    parts, short_parts = to_unit(of.means)
    mixed = (1 - alpha_short) * parts[:, 0] + alpha_short * parts[:, 1]
    u, short_mix = to_unit(mixed)
    return u, _degenerate(short_mix | short_parts.any(axis=1))


@dataclass(frozen=True)
class AvgEncoder:
    """Recency-weighted average (seed §2)."""

    decay: float = formulas.DECAY
    type_weights: Mapping[str, float] = field(default_factory=dict)
    name: str = "avg"
    by_time: ClassVar[bool] = False
    newest: ClassVar[int] = 0
    made_for: ClassVar[None] = None

    @property
    def decays(self) -> tuple[float, ...]:
        """One sum."""
        return (self.decay,)

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter, written out."""
        return {"decay": float(self.decay)}

    def combine(self, of: Inputs) -> tuple[Float64, NDArray[np.int8]]:
        """The one mean, normalised."""
        u, short = to_unit(of.means[:, 0])
        return u, _degenerate(short)


@dataclass(frozen=True)
class MixEncoder:
    """Short-term and long-term averages, each normalised, then mixed and normalised (seed §3)."""

    alpha_short: float = formulas.ALPHA_SHORT
    decay_long: float = formulas.DECAY_LONG
    decay_short: float = formulas.DECAY_SHORT
    type_weights: Mapping[str, float] = field(default_factory=dict)
    name: str = "mix"
    by_time: ClassVar[bool] = False
    newest: ClassVar[int] = 0
    made_for: ClassVar[None] = None

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

    def combine(self, of: Inputs) -> tuple[Float64, NDArray[np.int8]]:
        """Mixture of the two directions."""
        return _mixture(self.alpha_short, of)


@dataclass(frozen=True)
class TimeMixEncoder:
    """The mixture of §3 with weights that halve with time instead of falling with each later interaction.

    Attributes:
        alpha_short: share of the short-term direction.
        half_life_long_h: hours after which an interaction weighs half in the long-term average.
        half_life_short_h: the same in the short-term average.
        type_weights: factor per type.
        name: short name.
    """

    alpha_short: float = formulas.ALPHA_SHORT
    half_life_long_h: float = 720.0
    half_life_short_h: float = 24.0
    type_weights: Mapping[str, float] = field(default_factory=dict)
    name: str = "mix_time"
    by_time: ClassVar[bool] = True
    newest: ClassVar[int] = 0
    made_for: ClassVar[None] = None

    @property
    def decays(self) -> tuple[float, ...]:
        """Long first, then short, per millisecond."""
        return tuple(math.log(2) / (hours * _HOUR_MS) for hours in (self.half_life_long_h, self.half_life_short_h))

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter, written out."""
        return {
            "alpha_short": float(self.alpha_short),
            "half_life_long_h": float(self.half_life_long_h),
            "half_life_short_h": float(self.half_life_short_h),
        }

    def combine(self, of: Inputs) -> tuple[Float64, NDArray[np.int8]]:
        """Mixture of the two directions."""
        return _mixture(self.alpha_short, of)


def make_encoder(name: str, params: Mapping[str, float], type_weights: Mapping[str, float]) -> Encoder:
    """Build an encoder that is nothing but a formula, by name.

    Raises:
        ValueError: an unknown name, or a parameter the encoder has not.
    """
    kinds: dict[str, Callable[..., Encoder]] = {"avg": AvgEncoder, "mix": MixEncoder, "mix_time": TimeMixEncoder}
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
    half_lives = [hours for name, hours in params.items() if name.startswith("half_life")]
    if not all(_SHORTEST_H <= hours <= _LONGEST_H for hours in half_lives):
        msg = "a half-life must be at least a second (0.0003 hours), and at most a thousand years"
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
    u, status = encoder.combine(inputs_of(sums, totals, known, newest, space=space))
    status[(status == VectorStatus.OK) & ~np.isfinite(u).all(axis=1)] = VectorStatus.DEGENERATE
    status[known == 1] = VectorStatus.TOO_SHORT_HISTORY
    status[known == 0] = VectorStatus.NO_KNOWN_ITEMS
    vectors = u.astype(np.float32)
    vectors[status != VectorStatus.OK] = space.fallback
    return vectors, status


def inputs_of(
    sums: Float64, totals: Float64, known: NDArray[np.int64], newest: NDArray[np.int64], *, space: Space
) -> Inputs:
    """What an encoder sees of N states; arguments as those of `finish`."""
    # In units of the longest row, so that the unit of a dot space decides nothing; 1 in a cosine space.
    means = sums / ((totals + WEIGHT_EPS) * space.max_row_norm)[:, :, None]
    return Inputs(means, _rows_at(newest, space), known)


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
    ages_ms: Float64 | None = None,
    *,
    max_row_norm: float,
    fallback: Float32,
) -> tuple[Float32, VectorStatus]:
    """One user's vector straight from the formula: what every incremental path must equal (law 2).

    Args:
        encoder: the encoder.
        rows: the history's known item vectors [k, d], oldest first.
        weights: type weight of each [k]; None is all ones.
        ages_ms: how much older than the newest each is [k], for an encoder that goes by time.
        max_row_norm: the space's longest row.
        fallback: unit float32 [d].
    """
    if len(rows) < 2:
        return fallback, VectorStatus.TOO_SHORT_HISTORY if len(rows) else VectorStatus.NO_KNOWN_ITEMS
    ages = ages_ms if encoder.by_time else np.arange(len(rows), dtype=np.float64)[::-1]
    if ages is None:
        msg = "this encoder goes by time; give the times of the interactions"
        raise ValueError(msg)
    means = np.stack([weighted_mean(rows, decay, ages, weights) for decay in encoder.decays]) / max_row_norm
    newest = np.zeros((encoder.newest, rows.shape[1]))
    last = rows[::-1][: encoder.newest]
    newest[: len(last)] = last.astype(np.float64) / max_row_norm
    u, status = encoder.combine(Inputs(means[None], newest[None], np.array([len(rows)])))
    if status[0] == VectorStatus.OK and not np.isfinite(u).all():
        return fallback, VectorStatus.DEGENERATE
    return (fallback if status[0] else u[0].astype(np.float32)), VectorStatus(int(status[0]))


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

    def fits(self, space: Space) -> bool:
        """Whether it is of any use in an item space: one that was learned is, where it was learned."""
        made_for = self.encoder.made_for
        return made_for is None or made_for == (space.version, space.sha256, space.dim)

    def check(self, space: Space) -> None:
        """Raise `SpaceMismatch` unless it `fits` (law 4)."""
        if not self.fits(space):
            made_for = self.encoder.made_for
            of = "" if made_for is None else made_for.version
            other = " (other vectors under this name)" if of == space.version else ""
            msg = f"encoder {self.version} was made for item version {of}, not for {space.version}{other}"
            raise SpaceMismatch(msg)

    def embed(
        self,
        space: Space,
        item_ids: Sequence[str | int],
        types: Sequence[str] | None = None,
        times_ms: Sequence[int] | None = None,
    ) -> tuple[Float32, VectorStatus, int]:
        """Vector of a history by hand.

        Args:
            space: the item space.
            item_ids: oldest to newest.
            types: the type of each, for an encoder that weighs types.
            times_ms: the event time of each, for an encoder that goes by time.

        Returns:
            unit float32 [d], its status, and how many items the space lacks.

        Raises:
            SpaceMismatch: the encoder was made for another item version.
            ValueError: the encoder goes by time, and there are no times.
        """
        self.check(space)
        recent = item_ids[-self.history_limit :]
        rows = space.rows(recent)
        known = rows >= 0
        weights = None
        if types is not None and self.encoder.type_weights:
            factor = self.encoder.type_weights
            weights = np.array([factor.get(t, 1.0) for t in types[-self.history_limit :]])[known]
        ages = None
        if times_ms is not None:
            times = np.asarray(times_ms[-self.history_limit :], dtype=np.int64)[known]
            ages = (times.max(initial=0) - times).astype(np.float64)
        vector, status = reference(
            self.encoder,
            space.history_vectors[rows[known]],
            weights,
            ages,
            max_row_norm=space.max_row_norm,
            fallback=space.fallback,
        )
        return vector, status, int((~known).sum())
