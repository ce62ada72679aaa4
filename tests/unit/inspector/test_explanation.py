"""What each interaction adds to a vector, held against the formulas themselves."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import linear
from strategies import random_space

from stream.core.encoders import AvgEncoder, MadeFor, MixEncoder, TimeMixEncoder, VectorStatus, VersionedEncoder
from stream.core.history import Interaction
from stream.core.learned_encoder import LearnedEncoder
from stream.embedding import l2_normalize, user_embed_avg, user_embed_mix
from stream.encoders.onnx_model import OnnxModel
from stream.inspector.explanation import explain

SPACE = random_space("items_v1", 8)
DOT = random_space("items_v1", 8, metric="dot")
ITEMS = [item.decode() for item in SPACE.ids]
WEIGHTS = {"like": 3.0}


def learned() -> LearnedEncoder:
    rng = np.random.default_rng(3)
    data = linear(rng.normal(size=(32, 8)))
    model = OnnxModel(lambda: data, "model.onnx")
    made_for = MadeFor(SPACE.version, SPACE.sha256, 8)
    return LearnedEncoder(model, "0" * 64, made_for, ("mean", "mean:3", "decay:0.3", "last"), WEIGHTS)


ENCODERS = {
    "avg": AvgEncoder(0.4, WEIGHTS),
    "mix": MixEncoder(type_weights=WEIGHTS),
    "mix, steep": MixEncoder(0.6, 0.5, 3.0),
    "mix_time": TimeMixEncoder(half_life_long_h=24, half_life_short_h=0.01, type_weights=WEIGHTS),
    "learned": learned(),
}


@st.composite
def histories(draw: st.DrawFn, most: int = 12) -> list[Interaction]:
    """Histories with ties, gaps of years, and items that nobody knows."""
    gaps = draw(st.lists(st.sampled_from([0, 1, 60_000, 86_400_000, 10**11]), min_size=0, max_size=most))
    times = list(itertools.accumulate(gaps, initial=10**12))
    one = st.tuples(st.sampled_from([*ITEMS[:6], "nobody"]), st.sampled_from(["view", "like"]))
    rows = {(t, *draw(one)) for t in times}
    return [Interaction(*row) for row in sorted(rows)]


def embedded(encoder: VersionedEncoder, space, history: list[Interaction]) -> tuple[np.ndarray, VectorStatus]:
    columns = [one.item_id for one in history], [one.type for one in history], [one.ts_ms for one in history]
    return encoder.embed(space, *columns)[:2]


@pytest.mark.parametrize("space", [SPACE, DOT], ids=["cosine", "dot"])
@pytest.mark.parametrize("name", ENCODERS)
@given(history=histories())
def test_an_explanation_is_what_the_formulas_say(name: str, space, history: list[Interaction]) -> None:
    if name == "learned" and space is DOT:
        return  # it was made for the other
    encoder = VersionedEncoder(ENCODERS[name], 100)
    found = explain(encoder, space, history)
    vector, status = embedded(encoder, space, history)
    np.testing.assert_array_equal(found.vector, vector)
    assert found.status == status
    known = np.array([one.item_id != "nobody" for one in history])
    assert (found.known == known).all()
    assert (found.shares[:, ~known] == 0).all()
    assert (found.turns[~known] == 0).all()
    if known.any():
        np.testing.assert_allclose(found.shares.sum(axis=1), 1, atol=1e-12)
    if status != VectorStatus.OK:
        assert found.pulls is None
        assert np.isnan(found.turns[known]).all()
        return
    for n in np.flatnonzero(known):
        without, left = embedded(encoder, space, history[:n] + history[n + 1 :])
        if left != VectorStatus.OK:
            assert np.isnan(found.turns[n])
            continue
        degrees = np.degrees(2 * np.arcsin(min(1.0, np.linalg.norm(without.astype("f8") - vector) / 2)))
        assert abs(found.turns[n] - degrees) < 1e-4  # of float32 vectors
    if found.pulls is None:
        assert name == "learned"
        return
    assert abs(found.pulls.sum() - 1) < 1e-9
    # a sum of the items, each as often as it is said to pull, lies along the vector
    rows = space.history_vectors[space.rows([one.item_id for one in history])].astype("f8")
    along = rows @ vector
    weight = np.divide(found.pulls, along, out=np.zeros(len(along)), where=(np.abs(along) > 1e-9) & known)
    if (np.abs(along[known]) > 1e-3).all():
        np.testing.assert_allclose(weight @ rows, vector, atol=1e-4)


def test_shares_are_the_weights_of_the_seed() -> None:
    """Of the mixture as the public formulas have it: the shares, put into a plain sum, give their vectors."""
    history = [Interaction(10**12 + n, item, "view") for n, item in enumerate(ITEMS[:7])]
    found = explain(VersionedEncoder(MixEncoder(), 100), SPACE, history)
    rows = SPACE.rows([one.item_id for one in history])
    assert found.parts == ("long", "short")
    for shares, decay in zip(found.shares, (0.01, 0.15), strict=True):
        mean = l2_normalize(shares @ SPACE.vectors[rows].astype("f8"))
        np.testing.assert_allclose(mean, user_embed_avg(rows, SPACE.vectors, decay=decay), atol=1e-6)
    np.testing.assert_allclose(found.vector, user_embed_mix(rows, SPACE.vectors), atol=1e-6)


def test_one_that_draws_elsewhere_has_a_pull_below_0() -> None:
    away = int(np.argmin(SPACE.vectors @ SPACE.vectors[0]))
    assert SPACE.vectors[away] @ SPACE.vectors[0] < 0
    history = [Interaction(n, ITEMS[0 if n < 9 else away], "view") for n in range(10)]
    found = explain(VersionedEncoder(MixEncoder(), 100), SPACE, history)
    assert found.pulls is not None
    assert found.pulls[-1] < 0 < found.pulls[:9].min()
    assert found.turns[-1] == found.turns.max()


def test_many_are_taken_out_piece_by_piece() -> None:
    history = [Interaction(n, ITEMS[n * n % len(ITEMS)], "view") for n in range(700)]
    encoder = VersionedEncoder(learned(), 1_000)
    found = explain(encoder, SPACE, history)
    turns = found.turns
    assert (found.status, found.pulls) == (VectorStatus.OK, None)
    vector = embedded(encoder, SPACE, history)[0]
    for n in (0, 255, 256, 512, 699):
        without = embedded(encoder, SPACE, history[:n] + history[n + 1 :])[0]
        assert abs(turns[n] - np.degrees(2 * np.arcsin(np.linalg.norm(without.astype("f8") - vector) / 2))) < 1e-4
