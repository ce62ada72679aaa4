"""Item vectors from interactions: equal to a plain reading of the formulas, and better than popularity on real data."""

import math
import os
from collections import defaultdict

import numpy as np
import pytest

from stream.core.encoders import VectorStatus, VersionedEncoder
from stream.core.events import EventRow
from stream.errors import ItemSpaceError
from stream.feed import dataset
from stream.feed import movielens as ml
from stream.feed.synthetic import synthetic
from stream.items.space import ItemSpace
from stream.learning import factors, ppmi
from stream.learning.build import build_space
from stream.learning.histories import split_by_time
from stream.learning.ppmi import ppmi_vectors

SMALL = synthetic(users=40, items=60, events=1500).events


def oracle(events, *, dim, window, discount):
    """The same vectors from loops over every pair and a dense SVD."""
    histories = defaultdict(list)
    for row in sorted(events, key=lambda r: (r.ts_ms, r.user_id, r.item_id)):
        histories[row.user_id].append(row.item_id)
    counts = defaultdict(float)
    for items in histories.values():
        for i, a in enumerate(items):
            for j, b in enumerate(items):
                if 0 < abs(i - j) <= window and a != b:
                    counts[a, b] += 1
    ids = sorted({a for a, _ in counts})
    occurs = {a: sum(n for (x, _), n in counts.items() if x == a) for a in ids}
    smoothed = sum(n**0.75 for n in occurs.values())
    ppmi = np.zeros((len(ids), len(ids)))
    for (a, b), n in counts.items():
        pmi = math.log(n / (occurs[a] * (occurs[b] ** 0.75 / smoothed)))
        ppmi[ids.index(a), ids.index(b)] = max(pmi, 0.0) * n / (n + discount)
    u, s, _ = np.linalg.svd(ppmi)
    x = u[:, :dim] * np.sqrt(s[:dim])
    return ids, x * np.sign(x[np.abs(x).argmax(axis=0), range(dim)])


@pytest.mark.parametrize("dense_items", [0, 400])  # ARPACK and dense
@pytest.mark.parametrize(("window", "discount"), [(1, 0.0), (3, 20.0), (1000, 5.0)])
def test_vectors_equal_the_plain_formula(window, discount, dense_items, monkeypatch):
    monkeypatch.setattr(factors, "_DENSE", dense_items)
    monkeypatch.setattr(ppmi, "_BLOCK_PAIRS", 700)  # several blocks
    ids, vectors, popularity, *_ = ppmi_vectors(SMALL, dim=6, share=1.0, window=window, discount=discount)
    want_ids, want = oracle(SMALL, dim=6, window=window, discount=discount)
    assert ids == want_ids
    np.testing.assert_allclose(vectors, want, atol=1e-9)
    assert vectors.dtype == np.float64
    assert popularity.tolist() == [sum(row.item_id == i for row in SMALL) for i in ids]


def test_the_same_events_in_any_order_give_the_same_bytes():
    first = ppmi_vectors(SMALL, dim=8)
    again = ppmi_vectors(iter(SMALL[::-1]), dim=8)
    assert first.ids == again.ids
    assert first.vectors.tobytes() == again.vectors.tobytes()
    assert first.popularity.tobytes() == again.popularity.tobytes()


def test_only_the_first_part_by_time_is_used():
    train, rest = split_by_time(SMALL)
    assert (len(train), len(rest)) == (1200, 300)
    assert max(r.ts_ms for r in train) <= min(r.ts_ms for r in rest)
    later = [EventRow(r.user_id, "unseen", "like", r.ts_ms + 1) for r in rest]
    base = ppmi_vectors(SMALL, dim=8)
    assert ppmi_vectors(train + later, dim=8).vectors.tobytes() == base.vectors.tobytes()
    assert base.ids == ppmi_vectors(train, dim=8, share=1.0).ids
    assert base.popularity.sum() == 1200


def events(*histories):
    return [
        EventRow(str(u), item, "view", 1_000 * t) for u, items in enumerate(histories) for t, item in enumerate(items)
    ]


def test_items_without_cooccurrence_are_left_out_and_counted():
    notes = []
    built = ppmi_vectors(events("abc", "bca", "z", "yyy"), dim=2, share=1.0, on_note=notes.append)
    assert built.ids == ["a", "b", "c"]
    assert built.popularity.tolist() == [2, 2, 2]
    assert notes == ["2 of 5 items have no co-occurrence to learn from and are left out"]
    notes.clear()
    ppmi_vectors(events("abc"), dim=2, share=1.0, on_note=notes.append)
    assert notes == []


@pytest.mark.parametrize("dense_items", [0, 400])
def test_an_item_whose_row_is_rounding_noise_is_left_out(dense_items, monkeypatch):
    """Two clusters that never meet, one dimension: the weaker cluster has no direction in it."""
    monkeypatch.setattr(factors, "_DENSE", dense_items)
    built = ppmi_vectors(events("abc", "abc", "abc", "abc", "abc", "xy"), dim=1, share=1.0)
    assert built.ids in (["a", "b", "c"], ["x", "y"])
    assert (np.abs(built.vectors) > 1e-3).all()


def test_the_smallest_input_works():
    ids, vectors, *_ = ppmi_vectors(events("ab"), dim=2, share=1.0)
    assert ids == ["a", "b"]
    assert np.isfinite(vectors).all()
    assert (np.linalg.norm(vectors, axis=1) > 0).all()


@pytest.mark.parametrize(("rows", "there_are"), [(events("abc", "ab"), 3), (events("a", "b"), 0), ([], 0)])
def test_an_impossible_dimension_is_one_line(rows, there_are):
    with pytest.raises(ItemSpaceError, match=rf"^4 dimensions need at least 4 items .* there are {there_are};.*$"):
        ppmi_vectors(rows, dim=4, share=1.0)


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"window": 0}, {"discount": -1}, {"share": 0}, {"share": 1.1}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"at least|share"):
        ppmi_vectors(SMALL, **{"dim": 4, **wrong})


def test_progress_rises_to_its_total():
    seen = []
    ppmi_vectors(SMALL, dim=4, window=5, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_a_space_is_built_saved_and_loads(tmp_path):
    space = build_space(SMALL, tmp_path / "v1", "items_v1", "ppmi", dim=8)
    loaded = ItemSpace.load(tmp_path / "v1")
    built = ppmi_vectors(SMALL, dim=8)
    assert (loaded.version, loaded.metric, loaded.sha256) == ("items_v1", "cosine", space.sha256)
    assert [i.decode() for i in loaded.ids] == built.ids
    unit = built.vectors / np.linalg.norm(built.vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.vectors, unit, atol=1e-6)
    assert loaded.popularity.tolist() == built.popularity.tolist()


def test_neighbours_in_the_synthetic_stream_share_their_topic():
    data = synthetic(users=400, items=300, events=30_000)
    ids, vectors, *_ = ppmi_vectors(data.events, dim=24)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    topic = np.array([data.titles[i].partition("(")[2] for i in ids])
    scores = unit @ unit.T
    np.fill_diagonal(scores, -2)
    nearest = np.argsort(-scores, axis=1)[:, :5]
    assert (topic[nearest] == topic[:, None]).mean() > 0.6  # by chance 0.1


# -- real data


@pytest.fixture(scope="module")
def movielens():
    try:
        return ml.movielens(os.environ.get("UEMB_CACHE_DIR", dataset.DEFAULT_CACHE_DIR))
    except dataset.DatasetUnavailable as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def space(movielens, tmp_path_factory):
    return build_space(movielens.events, tmp_path_factory.mktemp("space") / "v1", "items_v1", "ppmi")


def test_films_lie_near_films_of_their_kind(movielens, space):
    def near(film, n):
        scores = space.vectors @ space.vectors[space.rows([film])[0]]
        return {movielens.titles[space.ids[row].decode()] for row in np.argsort(-scores)[1 : n + 1]}

    assert near("50", 1) == {"Return of the Jedi (1983)"}  # Star Wars
    assert {"Terminator, The (1984)", "Aliens (1986)"} <= near("96", 5)  # Terminator 2
    assert {"Liar Liar (1997)", "Air Force One (1997)"} <= near("288", 8)  # Scream, by season


def test_the_next_film_is_found_twice_as_often_as_by_popularity(movielens, space):
    """Hit rate at 50 over every 8th event of the last 20 %, each from the history before it, seen films left out."""
    train, test = split_by_time(movielens.events)
    seen = defaultdict(list)
    for row in train:
        seen[row.user_id].append(row.item_id)
    encoder = VersionedEncoder()
    asked = hits = popular_hits = 0
    for number, row in enumerate(test):
        history = seen[row.user_id]
        if number % 8 == 0 and row.item_id not in history:
            vector, status, _ = encoder.embed(space, history)
            target = space.rows([row.item_id])[0]
            if status is VectorStatus.OK:
                asked += 1
                old = space.rows(history)
                old = old[old >= 0]
                for scores, count in ((space.vectors @ vector, "near"), (np.array(space.popularity), "popular")):
                    scores[old] = -2
                    hit = target >= 0 and int((scores > scores[target]).sum()) < 50
                    hits += hit and count == "near"
                    popular_hits += hit and count == "popular"
        history.append(row.item_id)
    assert asked > 2000
    assert popular_hits > 0.15 * asked
    assert hits > 0.42 * asked
    assert hits > 2 * popular_hits
