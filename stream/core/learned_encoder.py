"""Encoders that were learned: a model from features of the history to the items' space (seed §4)."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from stream.core.encoders import Inputs, MadeFor, VectorStatus, to_unit
from stream.core.formulas import Float64

#: Input of a learned encoder as the seed has it (§4): mean of all, mean of the newest five, newest.
SEED_FEATURES: Final = ("mean", "mean:5", "last")
_MEAN_OF: Final = re.compile(r"mean:([1-9][0-9]?)")
_DECAY: Final = re.compile(r"decay:([0-9.e-]+)")


@dataclass(frozen=True)
class LearnedEncoder:
    """A model from features of the history to the items' space (seed §4).

    Attributes:
        model: from features, float64 [n, F·d], to directions [n, d]; what it says of one row must not depend on others.
        model_sha256: hash (hex) of the model.
        made_for: the item version that it was learned from.
        features: F of ``mean`` (of all), ``mean:N`` (of the newest N, of all where there are fewer), ``decay:λ`` (the
            recency-weighted mean) and ``last`` (the newest), in the order in which the model takes them, each [d]; of
            known items, in units of the space's longest row.
        type_weights: factor per type, in ``mean`` and ``decay:λ``.
        name: short name.

    Raises:
        ValueError: a feature is none of these.
    """

    model: Callable[[Float64], NDArray[Any]]
    model_sha256: str
    made_for: MadeFor
    features: tuple[str, ...] = SEED_FEATURES
    type_weights: Mapping[str, float] = field(default_factory=dict)
    name: str = "learned"
    by_time: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.features:
            msg = "an encoder needs at least one feature"
            raise ValueError(msg)
        for feature in self.features:
            found = _DECAY.fullmatch(feature)
            if feature in ("mean", "last") or _MEAN_OF.fullmatch(feature):
                continue
            try:
                fine = found is not None and math.isfinite(float(found[1]))
            except ValueError:
                fine = False
            if not fine:
                msg = f"a feature is mean, mean:N, decay:RATE or last, not {feature[:40]!r}"
                raise ValueError(msg)

    @property
    def decays(self) -> tuple[float, ...]:
        """Those that its features need; means of the newest few fall back on the mean of all."""
        return tuple(sorted({d for f in self.features if (d := _decay_of(f)) is not None}))

    @property
    def newest(self) -> int:
        """As many as its features need."""
        return max(_newest_of(feature) for feature in self.features)

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter, written out."""
        return {
            "features": list(self.features),
            "model_sha256": self.model_sha256,
            "item_version": self.made_for.version,
            "items_sha256": self.made_for.sha256,
            "dim": self.made_for.dim,
        }

    def features_of(self, of: Inputs) -> Float64:
        """What the model is given of N histories [N, F·d]."""
        decays, parts = self.decays, []
        for feature in self.features:
            decay, newest = _decay_of(feature), _newest_of(feature)
            part = of.newest[:, 0] if decay is None else of.means[:, decays.index(decay)]
            if decay is not None and newest:
                part = np.where((of.known >= newest)[:, None], of.newest[:, :newest].mean(axis=1), part)
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def combine(self, of: Inputs) -> tuple[Float64, NDArray[np.int8]]:
        """What the model says, normalised; ``ENCODER_ERROR`` where it fails, or says no vector of finite numbers."""
        said = np.zeros((len(of.known), of.means.shape[2]))
        status = np.zeros(len(of.known), dtype=np.int8)
        asked = np.flatnonzero(of.known >= 2)  # nobody asks for the others'
        if asked.size:
            said[asked], sound = self._say(self.features_of(of)[asked], said.shape[1])
            status[asked[~sound]] = VectorStatus.ENCODER_ERROR
        u, short = to_unit(said)
        status[short & (status == VectorStatus.OK)] = VectorStatus.DEGENERATE
        return u, status

    def _say(self, features: Float64, dim: int) -> tuple[Float64, NDArray[np.bool_]]:
        """The model's directions [n, d], zeros where there is none, and where there is one [n]."""
        try:
            said = np.asarray(self.model(features), dtype=np.float64)
        except Exception:  # noqa: BLE001 - whatever a model does of some users, others have vectors
            said = np.zeros(0)
        if said.shape == (len(features), dim):
            sound: NDArray[np.bool_] = np.asarray(np.isfinite(said).all(axis=1))
            return np.where(sound[:, None], said, 0.0), sound
        if len(features) > 1:  # one of them may spoil it for all, and a vector hangs on its own history alone
            each = [self._say(row[None], dim) for row in features]
            return np.concatenate([one[0] for one in each]), np.concatenate([one[1] for one in each])
        return np.zeros((len(features), dim)), np.zeros(len(features), dtype=np.bool_)


def _decay_of(feature: str) -> float | None:
    """Decay of the mean that a feature is, or falls back on."""
    if feature == "last":
        return None
    found = _DECAY.fullmatch(feature)
    return float(found[1]) if found else 0.0


def _newest_of(feature: str) -> int:
    found = _MEAN_OF.fullmatch(feature)
    return int(found[1]) if found else int(feature == "last")
