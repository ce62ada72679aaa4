"""A naive second implementation of what the stream must publish, written from the contract and the seed's formulas.

It keeps every interaction it ever saw and sorts when asked; it shares no code with `stream`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

LEAD_MS = 5 * 60 * 1000  # an erasure reaches as far as an event's own time may run ahead
EPS = 1e-12  # the seed's
DEGENERATE = 1e-6


class Space(Protocol):
    """What the oracle reads of an item space: names and numbers, none of its conclusions."""

    version: str
    ids: Sequence[bytes]
    vectors: np.ndarray
    history_vectors: np.ndarray


def normalize(x: np.ndarray) -> np.ndarray:
    """Seed §1."""
    return x / (np.linalg.norm(x) + EPS)


def decayed_mean(rows: np.ndarray, decay: float, weights: np.ndarray) -> np.ndarray:
    """Seed §2 up to its normalisation; `rows` [k, d] oldest first, one extra weight each."""
    k = len(rows)
    t = np.arange(k)
    w = np.exp(decay * (t - (k - 1))) * weights
    w = w / (w.sum() + EPS)
    return (rows * w[:, None]).sum(axis=0)


class Oracle:
    """Every user's set of interactions, and the record it must end in.

    Args:
        limit: L.
        spaces: item spaces; the first one is the default of `expected`.
        avg_decay: the decay of encoder ``avg``; None is encoder ``mix`` with the next three.
        half_lives_h: hours of encoder ``mix_time``, long and short, instead of the two decays.
        alpha_short: share of the short-term direction.
        decay_long: decay of the long-term average.
        decay_short: decay of the short-term average.
        type_weights: factor per type; a type that is not listed weighs 1.
    """

    def __init__(
        self,
        limit: int,
        spaces: Iterable[Space],
        *,
        avg_decay: float | None = None,
        half_lives_h: tuple[float, float] | None = None,
        alpha_short: float = 0.6,
        decay_long: float = 0.01,
        decay_short: float = 0.15,
        type_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.limit = limit
        self.avg_decay = avg_decay
        self.half_lives_h = half_lives_h
        self.alpha_short = alpha_short
        self.decays = (decay_long, decay_short)
        self.type_weights = dict(type_weights or {})
        self.interactions: dict[str, set[tuple[int, str, str]]] = {}
        self.erased_at: dict[str, int] = {}
        self._spaces = {space.version: space for space in spaces}
        self._rows = {
            space.version: {item.decode(): row for row, item in enumerate(space.ids)} for space in self._spaces.values()
        }
        self._longest: dict[str, float] = {}
        self._fallback: dict[str, np.ndarray] = {}
        for version, space in self._spaces.items():
            matrix = np.asarray(space.vectors, dtype=np.float64)
            longest = float(np.sqrt((matrix**2).sum(axis=1)).max())
            centroid = matrix.mean(axis=0)
            gone = np.linalg.norm(centroid) <= DEGENERATE * longest
            history = np.asarray(space.history_vectors, dtype=np.float64)
            self._longest[version] = float(np.sqrt((history**2).sum(axis=1)).max())
            self._fallback[version] = normalize(np.ones(matrix.shape[1]) if gone else centroid).astype(np.float32)

    # -- the fold -------------------------------------------------------------------------------------------------

    def event(self, user: int | str, item: int | str, kind: str, ts_ms: int) -> None:
        """One admitted interaction, in any order and as often as you like."""
        self.interactions.setdefault(str(user), set()).add((ts_ms, str(item), kind))

    def erase(self, user: int | str, ts_ms: int) -> None:
        """One erasure; `ts_ms` is the time in the deletion record."""
        self.erased_at[str(user)] = max(self.erased_at.get(str(user), -1), ts_ms + LEAD_MS)

    # -- what follows from it -------------------------------------------------------------------------------------

    def users(self) -> set[str]:
        """Everyone who was ever named."""
        return {*self.interactions, *self.erased_at}

    def history(self, user: int | str) -> list[tuple[int, str, str]]:
        """What is retained: the greatest L by ``(ts, item, type)`` after the erasure, oldest first."""
        floor = self.erased_at.get(str(user), -1)
        left = [i for i in self.interactions.get(str(user), ()) if i[0] > floor]
        return sorted(left, key=lambda i: (i[0], i[1].encode(), i[2].encode()))[-self.limit :]

    def expected(self, user: int | str, version: str | None = None) -> dict[str, Any] | None:
        """Fields of the user's record in a space, all but ``epoch`` and ``revision``; None where there is none."""
        if version is None:
            version = next(iter(self._spaces))
        history = self.history(user)
        if not history:
            return None
        row_of = self._rows[version]
        known = [(row_of[i], self.type_weights.get(kind, 1.0), at) for at, i, kind in history if i in row_of]
        reason, vector = self._vector(version, known)
        return {
            "user_id": str(user),
            "status": "fallback" if reason else "ok",
            "reason": reason,
            "history_len": len(history),
            "unknown_items": len(history) - len(known),
            "as_of": history[-1][0],
            "item_embedding_version": version,
            "vector": vector,
            "norm": float(np.linalg.norm(vector.astype(np.float64))),
        }

    def _vector(self, version: str, known: Sequence[tuple[int, float, int]]) -> tuple[str, np.ndarray]:
        fallback = self._fallback[version]
        if len(known) < 2:
            return ("too_short_history" if known else "no_known_items"), fallback
        rows = np.asarray(self._spaces[version].history_vectors[[row for row, _, _ in known]], dtype=np.float64)
        weights = np.array([weight for _, weight, _ in known])
        if self.avg_decay is not None:
            mean = decayed_mean(rows, self.avg_decay, weights)
            if np.linalg.norm(mean) < DEGENERATE * self._longest[version]:
                return "degenerate", fallback
            return "", normalize(mean).astype(np.float32)
        if self.half_lives_h is not None:
            hours = np.array([(known[-1][2] - at) / 3_600_000 for _, _, at in known])
            u_long, u_short = (
                np.average(rows, axis=0, weights=weights * 0.5 ** (hours / half)) for half in self.half_lives_h
            )
        else:
            u_long, u_short = (decayed_mean(rows, decay, weights) for decay in self.decays)
        if min(np.linalg.norm(u_long), np.linalg.norm(u_short)) < DEGENERATE * self._longest[version]:
            return "degenerate", fallback
        mixed = (1 - self.alpha_short) * normalize(u_long) + self.alpha_short * normalize(u_short)
        if np.linalg.norm(mixed) < DEGENERATE:  # its two parts have length 1, whatever the space's rows have
            return "degenerate", fallback
        return "", normalize(mixed).astype(np.float32)


def check_record(got: Any, want: Mapping[str, Any], where: object = "") -> None:
    """Assert that a decoded record (by attributes) has the expected fields; vector and norm to 1e-6."""
    exact = {name: value for name, value in want.items() if name not in ("vector", "norm")}
    assert {name: getattr(got, name) for name in exact} == exact, where
    np.testing.assert_allclose(got.vector, want["vector"], rtol=0, atol=1e-6, err_msg=str(where))
    assert abs(got.norm - want["norm"]) <= 1e-6, where
