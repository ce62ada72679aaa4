"""Law 3: unit norm or nothing."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ledger import check_every_event
from oracle import Oracle, check_record
from strategies import (
    MINUTE,
    T0,
    Driver,
    Erase,
    Event,
    arrivals,
    make_space,
    random_space,
    streams,
)

from stream.core.encoders import AvgEncoder, MixEncoder, VersionedEncoder, make_encoder


def outcome_of(space, items, encoder=None, types=None):
    """Record of one user with this history, oldest first, one event a batch; also from a cold start."""
    driver = Driver([space], VersionedEncoder(encoder or MixEncoder(), 100))
    for n, item in enumerate(items):
        driver.apply(Event("u", item, types[n] if types else "view", T0 + n))
    warm = driver.record("u")
    driver.restart()
    driver.apply(Event("u", items[0], types[0] if types else "view", T0))  # a duplicate: sent again, summed afresh
    cold = driver.record("u")
    assert (warm.status, warm.reason) == (cold.status, cold.reason)
    np.testing.assert_allclose(warm.vector, cold.vector, rtol=0, atol=1e-6)
    assert abs(float(np.linalg.norm(warm.vector.astype(np.float64))) - 1) <= 1e-5
    assert abs(warm.norm - 1) <= 1e-5
    return warm


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        (["x"], "no_known_items"),
        (["x", "y", "z"], "no_known_items"),
        (["a"], "too_short_history"),
        (["x", "a", "y"], "too_short_history"),
        (["a", "a"], ""),
        (["a", "x", "b"], ""),
    ],
)
def test_reasons_of_short_histories(items, reason):
    space = make_space("items_v1", ["a", "b"], np.array([[1.0, 0.2], [0.3, 1.0]]))
    record = outcome_of(space, items)
    assert (record.status, record.reason) == ("fallback" if reason else "ok", reason)
    if reason:
        assert record.vector.tobytes() == space.fallback.tobytes()
    assert record.history_len == len(items)
    assert record.unknown_items == sum(item in "xyz" for item in items)


def test_a_short_history_is_that_even_where_its_row_is_degenerate():
    space = make_space("items_v1", ["a", "tiny"], np.array([[1.0, 0.2], [1e-8, 0.0]]), metric="dot")
    assert outcome_of(space, ["tiny"]).reason == "too_short_history"
    assert outcome_of(space, ["x", "tiny"]).reason == "too_short_history"
    assert outcome_of(space, ["tiny", "tiny"]).reason == "degenerate"
    assert outcome_of(space, ["tiny", "a"]).reason == ""


def test_opposite_vectors_are_degenerate():
    space = make_space("items_v1", ["a", "b", "c"], np.array([[0.6, 0.8], [-0.6, -0.8], [1.0, 0.0]]))
    flat = AvgEncoder(decay=0.0)
    assert outcome_of(space, ["a", "b"], flat).reason == "degenerate"
    assert outcome_of(space, ["a", "b", "a", "b"], flat).reason == "degenerate"
    assert outcome_of(space, ["a", "b", "c"], flat).reason == ""
    assert outcome_of(space, ["a", "b"], AvgEncoder(decay=0.05)).reason == ""
    assert outcome_of(space, ["a", "b"], flat).vector.tobytes() == space.fallback.tobytes()


@pytest.mark.parametrize(
    ("which", "rows", "alpha"),
    [
        ("long", [[1.0, 2.0], [-np.exp(-0.01), -2 * np.exp(-0.01)]], 0.6),
        ("short", [[1.0, 2.0], [-np.exp(-0.15), -2 * np.exp(-0.15)]], 0.6),
        ("mixed", [[-1.0, 0.0], [0.95, 0.0]], 0.5),
    ],
)
def test_each_sum_of_the_mixture_can_be_degenerate(which, rows, alpha):
    """Histories a, b whose long, short or mixed sum vanishes while the others don't."""
    space = make_space("items_v1", ["a", "b", "c"], np.array([*rows, [1.0, 1.0]]), metric="dot")
    record = outcome_of(space, ["a", "b"], MixEncoder(alpha_short=alpha))
    assert (record.status, record.reason) == ("fallback", "degenerate"), which
    assert record.vector.tobytes() == space.fallback.tobytes()
    assert outcome_of(space, ["a", "b", "c"], MixEncoder(alpha_short=alpha)).reason == ""


def test_no_direction_is_left_over_when_all_known_items_are_gone():
    space = make_space("items_v1", ["a"], np.array([[1.0, 0.0]]))
    driver = Driver([space], VersionedEncoder(AvgEncoder(), 2))
    for n, item in enumerate(["a", "a", "x", "y"]):
        driver.apply(Event("u", item, "view", T0 + n))
    assert driver.record("u").reason == "no_known_items"
    driver.apply(Event("u", "a", "view", T0 + 9))
    assert driver.record("u").reason == "too_short_history"


@given(
    st.lists(st.sampled_from(["a", "b", "c", "x"]), min_size=1, max_size=8),
    st.sampled_from([1e-30, 1e-20, 1e-12, 1e-9, 1e-7, 1e-4, 1.0, 1e4, 1e7, 1e12, 1e20, 1e30]),
    st.sampled_from([1.0, 1e-3, 1e3]),
)
@example(["a", "b"], 1e-9, 1.0)
def test_extreme_magnitudes_in_dot_spaces_still_give_unit_vectors(items, scale, ratio):
    rows = np.array([[1.0, 0.5], [-0.25, 1.0], [2.0, -1.0]]) * scale
    rows[1] *= ratio
    record = outcome_of(make_space("items_v1", ["a", "b", "c"], rows, metric="dot"), items)
    assert np.isfinite(record.vector).all()


@given(
    st.lists(st.sampled_from(["a", "b", "c", "x"]), min_size=1, max_size=8),
    st.sampled_from([-24, -10, 10, 20, 24, 40, 100]),
)
@example(["a", "a"], 24)
def test_the_unit_in_which_a_dot_space_is_measured_decides_nothing(items, power):
    """`degenerate` is relative to the longest row, so a power of two changes neither status nor direction."""
    rows = np.array([[1.0, 0.5], [-0.25, 1.0], [2.0, -1.0]])
    one = outcome_of(make_space("items_v1", ["a", "b", "c"], rows, metric="dot"), items)
    other = outcome_of(make_space("items_v1", ["a", "b", "c"], rows * 2.0**power, metric="dot"), items)
    assert (one.status, one.reason) == (other.status, other.reason)
    np.testing.assert_allclose(one.vector, other.vector, rtol=0, atol=1e-5)


@given(st.data(), streams(max_size=20))
def test_one_dominating_row_does_not_blur_the_others(data, stream):
    """Rows of very different length in one space: incremental sums still equal the formula."""
    rows = np.array([[1e5, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.3, 0.1, -0.4]])
    space = make_space("items_v1", ["a", "b", 3, "é"], rows, metric="dot")
    batches = data.draw(arrivals(stream))
    check_every_event(Driver([space], VersionedEncoder(AvgEncoder(), 3)), Oracle(3, [space], avg_decay=0.05), batches)


@pytest.mark.parametrize("weight", [1e-12, 1e-6, 1e-3, 1e3, 1e6, 1e9, 1e12])
def test_the_weight_of_an_interaction_that_left_leaves_no_trace(weight):
    """However much a type may weigh, it is gone without residue once its interactions are."""
    space = make_space("items_v1", ["a", "b", "c"], np.array([[1.0, 0.1], [0.0, 1.0], [0.7, -0.7]]))
    weights = {"like": weight}
    try:
        encoder = make_encoder("avg", {}, weights)
    except ValueError:
        return  # refusing it is right too
    driver = Driver([space], VersionedEncoder(encoder, 3))
    oracle = Oracle(3, [space], avg_decay=0.05, type_weights=weights)
    kinds = {"l": "like", "v": "view"}
    for n, (item, kind) in enumerate([("a", "l"), ("b", "v"), ("c", "v"), ("b", "v"), ("c", "v"), ("a", "l")]):
        kind = kinds[kind]
        driver.apply(Event("u", item, kind, T0 + n))
        oracle.event("u", item, kind, T0 + n)
        check_record(driver.record("u"), oracle.expected("u"), n)


@given(st.data(), streams())
def test_users_without_interactions_have_no_record(data, stream):
    space = random_space("items_v1", 2, known=("a", "b"))
    driver = Driver([space])
    everything = [*stream, Erase("u", T0 + 40 * MINUTE)]
    driver.run(data.draw(arrivals(everything)))
    assert driver.record("u") is None
    assert driver.topic[driver.key("u")] is None
    assert len(driver.kv[driver.key("u")]) == 16
