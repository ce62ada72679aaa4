"""Encoders that are learned: features of the history, and a model of whatever kind that may fail; law 2 holds."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger import check_end, check_every_event
from oracle import DEGENERATE, Oracle, normalize
from strategies import TYPES, Driver, Event, arrivals, make_space, random_chunks, random_stream, streams

from stream.core.encoders import Inputs, MadeFor, MixEncoder, VectorStatus, VersionedEncoder
from stream.core.learned_encoder import LearnedEncoder
from stream.core.space_engine import Pair
from stream.errors import SpaceMismatch
from stream.items import ItemSpace
from stream.records import decode

NEWEST = 5


def weights(dim: int) -> np.ndarray:
    """From features [3d] to a direction [d]."""
    return np.random.default_rng(dim).normal(size=(3 * dim, dim))


def made_for(space: ItemSpace) -> MadeFor:
    return MadeFor(space.version, space.sha256, space.dim)


def learned(space: ItemSpace, model=None, **options) -> LearnedEncoder:
    """The seed's encoder (its §4), by default with a fixed random matrix for a model."""
    return LearnedEncoder(model or (lambda x: x @ weights(space.dim)), "0" * 64, made_for(space), **options)


class FeatureOracle(Oracle):
    """The same from the whole history, written as the seed has it."""

    def _vector(self, version, known):
        fallback = self._fallback[version]
        if len(known) < 2:
            return ("too_short_history" if known else "no_known_items"), fallback
        space = self._spaces[version]
        rows = np.asarray(space.history_vectors[[row for row, _, _ in known]], dtype=np.float64) / space.max_row_norm
        mean = rows.mean(axis=0)
        short = rows[-NEWEST:].mean(axis=0) if len(rows) >= NEWEST else mean
        u = np.concatenate([mean, short, rows[-1]]) @ weights(rows.shape[1])
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
    driver = Driver([space], VersionedEncoder(learned(space), limit), hot_users=hot_users)
    check_every_event(driver, FeatureOracle(limit, [space]), random_chunks(rng, stream, mean))


@given(st.data(), streams(), st.sampled_from([2, 3, 100]))
def test_every_state_of_a_small_stream_equals_the_formula(data, stream, limit) -> None:
    space = make_space("items_v1", ["a", 3, "é"], np.array([[1.0, 0.5], [-2.0, 1.0], [0.25, 3.0]]), metric="dot")
    driver = Driver([space], VersionedEncoder(learned(space), limit), hot_users=data.draw(st.integers(1, 3)))
    check_every_event(driver, FeatureOracle(limit, [space]), data.draw(arrivals(stream)))


def test_users_who_are_silent_get_the_same_vectors_in_a_new_space() -> None:
    rng = random.Random(5)
    space = two_sided(4)
    encoder = VersionedEncoder(learned(space), 20)
    driver, oracle = Driver([space], encoder), FeatureOracle(20, [space])
    check_every_event(driver, oracle, random_chunks(rng, random_stream(rng, 200, users=4), 20))
    result = driver.embed((encoder.version, space.version))
    cold = {key: entry[16:] for key, entry in result.entries.items()}
    for user in oracle.users():
        want = oracle.expected(user)
        if want is not None:
            got = decode(cold[driver.key(user)])
            np.testing.assert_allclose(got.vector, want["vector"], atol=1e-6)
    check_end(driver, oracle)


def test_a_history_by_hand_equals_the_formula() -> None:
    space, oracle = two_sided(4), FeatureOracle(20, [two_sided(4)])
    encoder = VersionedEncoder(learned(space), 20)
    for n in range(9):
        oracle.event("u", n * 7 % 31, "view", 1_700_000_000_000 + n)
        history = [item for _, item, _ in oracle.history("u")]
        vector, _, unknown = encoder.embed(space, history)
        want = oracle.expected("u")
        assert want is not None
        assert unknown == want["unknown_items"]
        np.testing.assert_allclose(vector, want["vector"], atol=1e-6)


# -- features -----------------------------------------------------------------------------------------------------


def inputs(encoder: LearnedEncoder, known: int, dim: int = 2) -> Inputs:
    """A history of rows ``(1, 10)``, ``(2, 20)``… of length 1 in the space's units, oldest first."""
    rows = np.outer(np.arange(1, known + 1), [1.0, 10.0])
    means = [np.average(rows, axis=0, weights=np.exp(-d * np.arange(known)[::-1])) for d in encoder.decays]
    newest = np.zeros((encoder.newest, dim))
    last = rows[::-1][: encoder.newest]
    newest[: len(last)] = last
    return Inputs(np.array(means).reshape(1, -1, dim), newest[None], np.array([known]))


@pytest.mark.parametrize(
    ("features", "known", "want"),
    [
        (("mean", "mean:5", "last"), 6, [3.5, 35, 4, 40, 6, 60]),  # as stream.embedding.make_user_features says
        (("mean", "mean:5", "last"), 4, [2.5, 25, 2.5, 25, 4, 40]),
        (("last",), 3, [3, 30]),
        (("mean:2", "mean:99"), 3, [2.5, 25, 2, 20]),
        (("decay:0.6931471805599453", "mean"), 2, [5 / 3, 50 / 3, 1.5, 15]),
    ],
)
def test_features_are_what_they_are_called(features, known, want) -> None:
    encoder = learned(two_sided(2), features=features)
    np.testing.assert_allclose(encoder.features_of(inputs(encoder, known))[0], want, rtol=1e-12)


@pytest.mark.parametrize("features", [(), ("median",), ("mean:0",), ("mean:100",), ("decay:",), ("decay:1e",), ("",)])
def test_what_is_no_feature_is_refused(features) -> None:
    with pytest.raises(ValueError, match="feature"):
        learned(two_sided(2), features=features)


# -- models that fail ---------------------------------------------------------------------------------------------

BAD_MODELS = {
    "raises": lambda x: 1 / 0,
    "says nothing": lambda x: None,
    "a vector too short": lambda x: x[:, :3],
    "one vector for all": lambda x: x[0, :4],
    "not a number": lambda x: np.full((len(x), 4), np.nan),
    "infinite": lambda x: np.full((len(x), 4), np.inf),
    "texts": lambda x: np.full((len(x), 4), "x"),
}


@pytest.mark.parametrize("model", BAD_MODELS.values(), ids=BAD_MODELS)
def test_whoever_a_model_fails_for_gets_the_fallback_and_is_counted(model) -> None:
    space = two_sided(4)
    driver = Driver([space], VersionedEncoder(learned(space, model), 20))
    driver.apply(*[Event(user, item, "view", 1_700_000_000_000 + item) for user in "ab" for item in (1, 2)])
    for user in "ab":
        record = driver.record(user)
        assert (record.status, record.reason) == ("fallback", "encoder_error")
        np.testing.assert_array_equal(record.vector, space.fallback)
    assert driver.counts["encoder_errors"] == 2  # a history of one item has its own reason
    vector, status, _ = driver.encoder.embed(space, [1, 2])
    assert status is VectorStatus.ENCODER_ERROR
    np.testing.assert_array_equal(vector, space.fallback)


@pytest.mark.parametrize("fails", ["alone", "for all", "with a number"])
def test_a_user_that_a_model_fails_for_costs_no_other_the_vector(fails) -> None:
    """A vector hangs on its own history alone, whoever else is in the batch."""
    space = two_sided(4)
    bad = space.history_vectors[7].astype(np.float64) / space.max_row_norm

    def model(x: np.ndarray) -> np.ndarray:
        hit = np.isclose(x[:, -4:], bad).all(axis=1)
        said = x @ weights(4)
        if hit.any() and fails == "for all":
            raise ArithmeticError
        if fails == "alone" and hit.any() and len(x) == 1:
            raise ArithmeticError
        said[hit] = np.nan
        return said

    driver = Driver([space], VersionedEncoder(learned(space, model), 20))
    sound = Driver([space], VersionedEncoder(learned(space), 20))
    events = [Event(user, item, "view", 1_700_000_000_000 + n) for user in "abc" for n, item in enumerate([1, 2, 3])]
    events.append(Event("b", 7, "view", 1_700_000_000_009))
    for one in (driver, sound):
        one.apply(*events)
    assert driver.record("b").reason == "encoder_error"
    for user in "ac":
        assert driver.record(user).status == "ok"
        np.testing.assert_allclose(driver.record(user).vector, sound.record(user).vector, atol=1e-6)


def test_a_model_that_says_zero_gives_no_direction() -> None:
    space = two_sided(4)
    driver = Driver([space], VersionedEncoder(learned(space, lambda x: np.zeros((len(x), 4))), 20))
    driver.apply(*[Event("a", item, "view", 1_700_000_000_000 + item) for item in (1, 2)])
    assert driver.record("a").reason == "degenerate"


# -- the space that it was made for -------------------------------------------------------------------------------


def test_an_encoder_in_another_space_is_refused_for_its_neighbours_would_be_wrong() -> None:
    """Law 4. Without the check: unit vectors, status ok, and not one item of the user's taste among the nearest."""
    rng = np.random.default_rng(5)
    tastes = np.repeat(np.eye(4), 10, axis=0) + rng.normal(scale=0.05, size=(40, 4))
    turned = tastes @ np.linalg.qr(rng.normal(size=(4, 4)))[0]  # the same items, learned anew: another basis
    old, new = make_space("items_v1", range(40), tastes), make_space("items_v2", range(40), turned)
    target = np.eye(4)

    def head(x: np.ndarray) -> np.ndarray:  # learned on v1: the taste of the newest item, made sharp
        return target[np.abs(x[:, -4:]).argmax(axis=1)]

    encoder = VersionedEncoder(learned(old, head), 20)
    history = [0, 1, 2, 3]

    def hits(vector: np.ndarray, space: ItemSpace) -> int:
        return len(set(np.argsort(-(space.vectors @ vector))[:10].tolist()) & set(range(10)))

    assert hits(encoder.embed(old, history)[0], old) == 10
    for refused in (
        lambda: encoder.check(new),
        lambda: encoder.embed(new, history),
        lambda: Driver([new], encoder),
        lambda: Driver([old], encoder).serve([old, new]),
    ):
        with pytest.raises(SpaceMismatch, match="was made for item version items_v1, not for items_v2"):
            refused()
    unchecked = VersionedEncoder(learned(new, head), 20)  # what would be published without the check
    vector, status, _ = unchecked.embed(new, history)
    assert status is VectorStatus.OK
    assert math.isclose(np.linalg.norm(vector), 1, abs_tol=1e-5)
    assert hits(vector, new) < 5


def test_other_vectors_under_the_name_it_was_made_for_are_refused() -> None:
    space = two_sided(4)
    assert VersionedEncoder(learned(space), 20).fits(space)
    encoder = VersionedEncoder(LearnedEncoder(np.asarray, "0" * 64, made_for(space)._replace(sha256="f" * 64)), 20)
    assert not encoder.fits(space)
    with pytest.raises(SpaceMismatch, match="other vectors under this name"):
        encoder.check(space)


def test_an_engine_publishes_an_encoder_only_where_it_belongs() -> None:
    space, other = two_sided(4), make_space("items_v2", range(30), np.random.default_rng(1).normal(size=(30, 4)))
    encoder, mix = VersionedEncoder(learned(space), 20), VersionedEncoder(MixEncoder(), 20)
    driver = Driver([space], encoder)
    driver.engine.serve([Pair(mix, space), Pair(mix, other), Pair(encoder, space)])
    driver.run([("user-events.view", [Event("u", 1, "view", 1_700_000_000_000)])])
    assert {tuple(key.split(b":")[1:3]) for key in driver.kv} == {
        (mix.version.encode(), b"items_v1"),
        (mix.version.encode(), b"items_v2"),
        (encoder.version.encode(), b"items_v1"),
    }
    assert set(TYPES) >= {"view"}


def test_the_name_of_an_encoder_hangs_on_all_that_decides_its_vectors() -> None:
    space = two_sided(4)
    base = learned(space)
    others = [
        LearnedEncoder(base.model, "1" * 64, base.made_for),
        LearnedEncoder(base.model, base.model_sha256, base.made_for._replace(version="items_v2")),
        LearnedEncoder(base.model, base.model_sha256, base.made_for._replace(sha256="f" * 64)),
        learned(space, features=("mean", "last")),
        learned(space, type_weights={"like": 2.0}),
    ]
    names = {VersionedEncoder(encoder, 20).version for encoder in [base, *others]}
    assert len(names) == 6
    assert all(name.startswith("learned-") for name in names)
