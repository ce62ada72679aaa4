"""The seed's functions: ours against the seed's own text, and the safety that the contract adds."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_space

from stream.core import formulas as ours
from stream.errors import UnknownItemError

HISTORY = [311, 98, 712, 45, 45, 901]  # the seed's example input
FROZEN = [-0.04208359, -0.05193588, -0.12896905, 0.04772047]  # coordinates 0, 1, 24 and 47 of its mixed vector


# -- the seed, word for word (§1-§5; `log` is its module's logger) ------------------------------------------------


def l2_normalize(x: np.ndarray, axis=-1, eps: float = 1e-12) -> np.ndarray:
    n = np.linalg.norm(x, axis=axis, keepdims=True)
    return x / (n + eps)


def safe_take_item_emb(item_ids: np.ndarray, item_emb: np.ndarray) -> np.ndarray:
    return item_emb[item_ids]


def user_embed_avg(history_item_ids: np.ndarray, item_emb: np.ndarray, *, decay: float = 0.05) -> np.ndarray:
    L = int(history_item_ids.shape[0])
    if L == 0:
        raise ValueError("empty_history")

    t = np.arange(L, dtype=np.float32)
    w = np.exp(decay * (t - (L - 1))).astype(np.float32)
    w = w / (w.sum() + 1e-12)

    X = safe_take_item_emb(history_item_ids, item_emb)
    u = (X * w[:, None]).sum(axis=0)
    return l2_normalize(u)


def user_embed_mix(history_item_ids: np.ndarray, item_emb: np.ndarray, *, alpha_short: float = 0.6) -> np.ndarray:
    u_long = user_embed_avg(history_item_ids, item_emb, decay=0.01)
    u_short = user_embed_avg(history_item_ids, item_emb, decay=0.15)
    u = (1 - alpha_short) * u_long + alpha_short * u_short
    return l2_normalize(u)


def make_user_features(history_item_ids: np.ndarray, item_emb: np.ndarray) -> np.ndarray:
    X = safe_take_item_emb(history_item_ids, item_emb)
    mean = X.mean(axis=0)
    last = X[-1]
    short = (X[-5:]).mean(axis=0) if X.shape[0] >= 5 else mean
    return np.concatenate([mean, short, last], axis=0)


def user_embed_learned(history_item_ids, item_emb, mlp) -> np.ndarray:
    feat = make_user_features(history_item_ids, item_emb)
    u = mlp(feat)
    return l2_normalize(u)


def fallback_user_embedding(d: int) -> np.ndarray:
    return l2_normalize(np.ones((d,), dtype=np.float32))


def build_user_embedding(user_id: int, history_item_ids: list[int], item_emb: np.ndarray) -> np.ndarray:
    try:
        h = np.asarray(history_item_ids, dtype=np.int64)
        if h.size < 2:
            raise ValueError("too_short_history")
        return user_embed_mix(h, item_emb)
    except Exception:
        return fallback_user_embedding(item_emb.shape[1])


# -- golden -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items():
    """A seeded float32 matrix [1000, 48] of unit rows."""
    rows = np.random.default_rng(42).normal(size=(1000, 48))
    return l2_normalize(rows).astype(np.float32)


def same(one, other):
    assert one.dtype == np.float32
    assert one.shape == other.shape
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_the_seeds_example_gives_the_seeds_vectors(items):
    h = np.array(HISTORY)
    same(ours.user_embed_avg(h, items), user_embed_avg(h, items))
    same(ours.user_embed_avg(h, items, decay=0.3), user_embed_avg(h, items, decay=0.3))
    same(ours.user_embed_mix(h, items), user_embed_mix(h, items))
    same(ours.user_embed_mix(h, items, alpha_short=0.1), user_embed_mix(h, items, alpha_short=0.1))
    same(ours.build_user_embedding(42, HISTORY, items), build_user_embedding(42, HISTORY, items))
    same(ours.fallback_user_embedding(48), fallback_user_embedding(48))
    np.testing.assert_array_equal(ours.make_user_features(h, items), make_user_features(h, items))
    np.testing.assert_array_equal(ours.safe_take_item_emb(h, items), safe_take_item_emb(h, items))
    np.testing.assert_array_equal(ours.l2_normalize(items), l2_normalize(items))

    def mlp(features):
        return features[:48] - 2 * features[48:96] + 0.5 * features[96:]

    same(ours.user_embed_learned(h, items, mlp), user_embed_learned(h, items, mlp))


def test_the_seeds_example_in_frozen_numbers(items):
    """So that neither we nor numpy can drift unseen."""
    vector = ours.user_embed_mix(np.array(HISTORY), items)
    exact = user_embed_mix(np.array(HISTORY), items.astype(np.float64))
    np.testing.assert_allclose(vector, exact, rtol=0, atol=1e-6)
    np.testing.assert_allclose(vector[[0, 1, 24, 47]], FROZEN, rtol=0, atol=1e-6)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=300), st.floats(0, 1), st.floats(0, 0.5))
def test_any_history_gives_the_seeds_vectors(history, alpha, decay):
    items = l2_normalize(np.random.default_rng(1).normal(size=(1000, 8))).astype(np.float32)
    h, exact = np.array(history), items.astype(np.float64)
    mean = user_embed_avg(h, exact, decay=decay)
    same(ours.user_embed_avg(h, items, decay=decay), mean)
    # the seed's weights are float32 rounded: where both directions nearly cancel, rounding is all there is
    u = (1 - alpha) * user_embed_avg(h, exact, decay=0.01) + alpha * user_embed_avg(h, exact, decay=0.15)
    if np.linalg.norm(u) > 0.5:
        np.testing.assert_allclose(ours.user_embed_mix(h, items, alpha_short=alpha), l2_normalize(u), rtol=0, atol=2e-6)


def test_repeats_and_order_count(items):
    assert not np.allclose(ours.user_embed_mix([1, 2], items), ours.user_embed_mix([2, 1], items))
    assert not np.allclose(ours.user_embed_mix([1, 2], items), ours.user_embed_mix([1, 1, 2], items))
    same(ours.user_embed_mix([7, 7, 7], items), items[7])


# -- shapes, zeros, unknown items ---------------------------------------------------------------------------------


def test_l2_normalize_keeps_zero_and_takes_an_axis():
    assert ours.l2_normalize(np.zeros(3)).tolist() == [0, 0, 0]
    np.testing.assert_allclose(ours.l2_normalize([[3.0, 0.0], [4.0, 2.0]], axis=0), [[0.6, 0.0], [0.8, 1.0]], atol=1e-9)
    assert ours.l2_normalize(np.ones(4), eps=2.0).tolist() == [0.25] * 4


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 3), (0, 3), (2, 0)])
def test_indices_may_be_one_history_or_a_batch(items, shape):
    index = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(ours.safe_take_item_emb(index, items), items[index])


def test_indices_may_be_lists_and_unsigned(items):
    np.testing.assert_array_equal(ours.safe_take_item_emb([1, 2], items), items[[1, 2]])
    np.testing.assert_array_equal(ours.safe_take_item_emb(np.array([1, 2], np.uint64), items), items[[1, 2]])
    assert ours.safe_take_item_emb([], items).shape == (0, 48)


@pytest.mark.parametrize(
    "index", [[-1], [1000], [0, 1000], [[0, 1], [2, -1]], [2**40], np.array([2**64 - 1], np.uint64), [-(2**63)]]
)
def test_unknown_items_are_an_error_not_a_wrapped_row(items, index):
    with pytest.raises(UnknownItemError):
        ours.safe_take_item_emb(np.asarray(index), items)
    with pytest.raises(IndexError):
        ours.safe_take_item_emb(np.asarray(index), items)


@pytest.mark.parametrize("index", [[0.0], [1.5], [float("nan")], ["1"], [None], [True]])
def test_what_is_no_integer_is_no_item(items, index):
    with pytest.raises(UnknownItemError):
        ours.safe_take_item_emb(index, items)


@pytest.mark.parametrize("function", [ours.user_embed_avg, ours.user_embed_mix, ours.make_user_features])
def test_empty_and_unknown_histories_raise(items, function):
    with pytest.raises(ValueError, match=r"\Aempty_history\Z"):
        function(np.array([], dtype=np.int64), items)
    with pytest.raises(ValueError, match=r"\Aempty_history\Z"):
        function([], items)
    with pytest.raises(UnknownItemError):
        function(np.array([1, 1000]), items)
    with pytest.raises(UnknownItemError):
        function(np.array([1, -1]), items)


# -- learned ------------------------------------------------------------------------------------------------------


def test_features_are_mean_short_and_last(items):
    rows = items[[1, 2, 3]]
    features = ours.make_user_features([1, 2, 3], items)
    assert features.shape == (144,)
    np.testing.assert_allclose(features[:48], rows.mean(axis=0), atol=1e-7)
    np.testing.assert_array_equal(features[48:96], features[:48])
    np.testing.assert_array_equal(features[96:], rows[-1])
    longer = ours.make_user_features([9, 1, 2, 3, 4, 5], items)
    np.testing.assert_allclose(longer[48:96], items[1:6].mean(axis=0), atol=1e-7)


def test_a_learned_vector_is_a_unit_vector_of_the_items_dimension(items):
    vector = ours.user_embed_learned([1, 2], items, lambda features: 100 * features[:48])
    assert vector.dtype == np.float32
    assert abs(float(np.linalg.norm(vector)) - 1) <= 1e-5
    for wrong in (lambda f: f, lambda f: f[:47], lambda f: f[None, :48], lambda _: 1.0):
        with pytest.raises(ValueError, match="dimension 48"):
            ours.user_embed_learned([1, 2], items, wrong)
    with pytest.raises(ValueError, match="empty_history"):
        ours.user_embed_learned([], items, lambda features: features[:48])


# -- fail open ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 48, 256])
def test_the_bare_fallback_is_ones_over_root_d(d):
    vector = ours.fallback_user_embedding(d)
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, np.full(d, 1 / np.sqrt(d)), rtol=0, atol=1e-7)


def test_a_space_brings_its_own_fallback():
    space = make_space("v", ["a", "b"], np.array([[1.0, 0.0], [0.8, 0.6]]))
    same(ours.fallback_user_embedding(space), space.fallback)
    same(ours.build_user_embedding(1, [0], space), space.fallback)
    same(ours.build_user_embedding(1, [0, 1], space), user_embed_mix(np.array([0, 1]), space.vectors))


@pytest.mark.parametrize("history", [[], [5], [1000], [-1, 5], [5, 1000, -3], np.array([], np.int64), np.array([5])])
def test_fewer_than_two_known_items_give_the_fallback(items, history):
    same(ours.build_user_embedding(1, history, items), fallback_user_embedding(48))


def test_unknown_items_are_dropped_before_they_count(items):
    got = ours.build_user_embedding(1, [-1, 3, 1000, 10**30, 4, -(10**30)], items)
    same(got, user_embed_mix(np.array([3, 4]), items))


BROKEN = [
    None,
    5,
    "ab",
    "x",
    object(),
    [None, 1, 2],
    ["x", "y"],
    [[1, 2], [3, 4]],
    [float("nan"), 1.0],
    [float("inf"), 1.0],
    {"a": 1},
    [b"1", object()],
    np.array(["a", "b"]),
    np.array([np.nan, 1.0]),
    [10**400, 1, 2],
]


@pytest.mark.parametrize("history", BROKEN, ids=lambda value: f"{value!r:.20}")
@pytest.mark.parametrize("user_id", [1, "u", None, object(), float("nan")], ids=["int", "str", "None", "object", "nan"])
def test_building_never_raises(items, history, user_id):
    vector = ours.build_user_embedding(user_id, history, items)
    assert vector.dtype == np.float32
    assert vector.shape == (48,)
    assert abs(float(np.linalg.norm(vector)) - 1) <= 1e-5


@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((0, 4), np.float32),
        np.zeros((3, 4), np.float32),
        np.full((3, 4), np.nan, np.float32),
        np.full((3, 4), np.inf, np.float32),
        np.array([[1, 0, 0, 0], [-1, 0, 0, 0], [np.inf, -np.inf, 0, 0]], np.float32),
        np.full((3, 4), "x"),
        np.full((3, 4), None, dtype=object),
    ],
    ids=["empty", "zero", "nan", "inf", "mixed", "text", "object"],
)
def test_building_never_raises_whatever_the_matrix_holds(matrix):
    same(ours.build_user_embedding(1, [0, 1, 2], matrix), fallback_user_embedding(4))


@given(st.lists(st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=3), st.booleans()), max_size=6))
def test_building_gives_a_unit_vector_for_anything(history):
    matrix = np.eye(4, dtype=np.float32)
    vector = ours.build_user_embedding("u", history, matrix)
    assert abs(float(np.linalg.norm(vector)) - 1) <= 1e-5


@pytest.mark.parametrize("decay", [0.01, 0.15])
def test_degenerate_sums_are_the_fallback_here_too(decay):
    """What is left of two rows that cancel is rounding and no direction, whoever asks."""
    rows = np.array([[3.0, 4.0], [-3.0, -4.0]]) * np.array([[1.0], [np.exp(-decay)]])
    space = make_space("v", ["a", "b", "c"], np.array([*rows, [1.0, 0.0]]), metric="dot")
    same(ours.build_user_embedding(1, [0, 1], space), space.fallback)
    same(ours.build_user_embedding(1, [0, 1], space.vectors), fallback_user_embedding(2))


def test_fallbacks_are_logged_once_a_minute_and_without_ids(items, caplog):
    caplog.set_level(logging.WARNING)
    for n in range(50):
        ours.build_user_embedding(f"user-{n}@example.com", [f"item-{n}-secret", 1], items)
        ours.build_user_embedding(f"user-{n}@example.com", [n], items)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "secret" not in text
    assert "example.com" not in text
    assert len(caplog.records) <= 3  # one a reason
