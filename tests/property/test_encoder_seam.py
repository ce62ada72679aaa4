"""An encoder may ask for the newest rows, and histories may be summed in a matrix of their own: law 2 holds.

The encoder here is the seed's learned one (its §4) with a fixed random matrix for a model; no release ships it.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger import check_end, check_every_event
from oracle import DEGENERATE, Oracle, normalize
from strategies import Driver, arrivals, make_space, random_chunks, random_stream, streams

from stream.core.encoders import Inputs, VersionedEncoder
from stream.items import ItemSpace
from stream.records import decode

NEWEST = 5


def model(dim: int) -> np.ndarray:
    """From features [3d] to a direction [d]."""
    return np.random.default_rng(dim).normal(size=(3 * dim, dim))


@dataclass(frozen=True)
class FeatureEncoder:
    """Mean of all, mean of the newest five, newest; then the model."""

    type_weights: Mapping[str, float] = field(default_factory=dict)
    name: str = "features"
    decays: tuple[float, ...] = (0.0,)
    newest: int = NEWEST

    @property
    def params(self) -> dict[str, Any]:
        return {}

    def combine(self, of: Inputs) -> tuple[np.ndarray, np.ndarray]:
        mean, last = of.means[:, 0], of.newest[:, 0]
        short = np.where((of.known >= NEWEST)[:, None], of.newest.mean(axis=1), mean)
        features = np.concatenate([mean, short, last], axis=1)
        u = features @ model(mean.shape[1])
        norms = np.linalg.norm(u, axis=1)
        return u / (norms + 1e-12)[:, None], norms < DEGENERATE


class FeatureOracle(Oracle):
    """The same from the whole history, written as the seed has it."""

    def _vector(self, version, known):
        fallback = self._fallback[version]
        if len(known) < 2:
            return ("too_short_history" if known else "no_known_items"), fallback
        space = self._spaces[version]
        rows = np.asarray(space.history_vectors[[row for row, _ in known]], dtype=np.float64) / space.max_row_norm
        mean = rows.mean(axis=0)
        short = rows[-NEWEST:].mean(axis=0) if len(rows) >= NEWEST else mean
        u = np.concatenate([mean, short, rows[-1]]) @ model(rows.shape[1])
        return ("degenerate", fallback) if np.linalg.norm(u) < DEGENERATE else ("", normalize(u).astype(np.float32))


def two_sided(dim: int, items: int = 30) -> ItemSpace:
    sides = np.random.default_rng(7).normal(size=(2, items, dim))
    return make_space("items_v1", range(items), sides[0], metric="dot", history=sides[1])


@pytest.mark.parametrize("limit", [2, 5, 6, 100])
@pytest.mark.parametrize("mean", [1, 6, 200])
@pytest.mark.parametrize("hot_users", [1, 10_000])
def test_every_state_equals_the_formula(limit: int, mean: int, hot_users: int) -> None:
    rng = random.Random(limit * 1_000 + mean)
    space = two_sided(8)
    stream = random_stream(rng, 300, users=2, late=0.2, erasures=0.01)
    driver = Driver([space], VersionedEncoder(FeatureEncoder(), limit), hot_users=hot_users)
    check_every_event(driver, FeatureOracle(limit, [space]), random_chunks(rng, stream, mean))


@given(st.data(), streams(), st.sampled_from([2, 3, 100]))
def test_every_state_of_a_small_stream_equals_the_formula(data, stream, limit) -> None:
    space = make_space("items_v1", ["a", 3, "é"], np.array([[1.0, 0.5], [-2.0, 1.0], [0.25, 3.0]]), metric="dot")
    driver = Driver([space], VersionedEncoder(FeatureEncoder(), limit), hot_users=data.draw(st.integers(1, 3)))
    check_every_event(driver, FeatureOracle(limit, [space]), data.draw(arrivals(stream)))


def test_users_who_are_silent_get_the_same_vectors_in_a_new_space() -> None:
    rng = random.Random(5)
    space = two_sided(4)
    encoder = VersionedEncoder(FeatureEncoder(), 20)
    driver, oracle = Driver([space], encoder), FeatureOracle(20, [space])
    check_every_event(driver, oracle, random_chunks(rng, random_stream(rng, 200, users=4), 20))
    result, _ = driver.engine.embed(dict(driver.states), space.version, 1)
    cold = {key: entry[16:] for key, entry in result.entries.items()}
    for user in oracle.users():
        want = oracle.expected(user)
        if want is not None:
            got = decode(cold[driver.key(user)])
            np.testing.assert_allclose(got.vector, want["vector"], atol=1e-6)
    check_end(driver, oracle)


def test_a_history_by_hand_equals_the_formula() -> None:
    space, encoder, oracle = two_sided(4), VersionedEncoder(FeatureEncoder(), 20), FeatureOracle(20, [two_sided(4)])
    for n in range(9):
        oracle.event("u", n * 7 % 31, "view", 1_700_000_000_000 + n)
        history = [item for _, item, _ in oracle.history("u")]
        vector, _, unknown = encoder.embed(space, history)
        want = oracle.expected("u")
        assert want is not None
        assert unknown == want["unknown_items"]
        np.testing.assert_allclose(vector, want["vector"], atol=1e-6)
