"""Two tables: both models equal their formulas, with all items together and beside a head; and what is refused."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from stream.core.events import EventRow
from stream.errors import ItemSpaceError
from stream.feed.synthetic import synthetic
from stream.items.space import ItemSpace
from stream.learning import factors, two_tables
from stream.learning.build import build_space, learn
from stream.learning.histories import by_user, split_by_time
from stream.learning.two_tables import Ease, NextItem, two_table_vectors, two_tables_of

SMALL = synthetic(users=40, items=60, events=1500).events
HISTORIES = by_user(SMALL, ties=3)
N = len(HISTORIES.ids)
EVERYONE, NOBODY = np.arange(N), np.arange(0)


def lists() -> dict[int, list[int]]:
    """Each user's items in the order that was learned from."""
    found = defaultdict(list)
    for user, item in zip(HISTORIES.user.tolist(), HISTORIES.item.tolist(), strict=True):
        found[user].append(item)
    return found


def plain_ease(items: np.ndarray, ridge: float) -> np.ndarray:
    """Steck's closed form over some items, from loops."""
    seen = np.array([[float(item in row) for item in items] for row in map(set, lists().values())])
    inverse = np.linalg.inv(seen.T @ seen + ridge * np.eye(len(items)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


def plain_next(items: np.ndarray, ridge: float, decay: float, targets: np.ndarray) -> np.ndarray:
    """Ridge regression over some items, from loops."""
    column = {item: n for n, item in enumerate(items.tolist())}
    before, after = [], []
    for row in lists().values():
        for at in range(1, len(row)):
            x, y = np.zeros(len(items)), np.zeros(N)
            for age, item in enumerate(row[:at][::-1][: two_tables._DEPTH]):
                if item in column:
                    x[column[item]] += np.exp(-decay * age)
            y[row[at]] = 1.0
            before.append(x)
            after.append(y)
    x, y = np.array(before), np.array(after)
    return np.linalg.solve(x.T @ x + ridge * np.eye(len(items)), x.T @ y)[:, targets]


def test_ease_equals_its_formula() -> None:
    np.testing.assert_allclose(
        Ease(HISTORIES, EVERYONE, NOBODY, ridge=7.0).weights, plain_ease(EVERYONE, 7.0), atol=1e-9
    )


@pytest.mark.parametrize("block", [13, 50_000])
def test_the_next_item_equals_its_formula(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_tables, "_BLOCK_CASES", block)
    model = NextItem(HISTORIES, EVERYONE, NOBODY, ridge=7.0, decay=0.3)
    np.testing.assert_allclose(model.weights, plain_next(EVERYONE, 7.0, 0.3, EVERYONE), atol=1e-9)


def test_an_item_beside_the_head_is_learned_as_if_it_alone_were_added() -> None:
    head, tail = EVERYONE[EVERYONE % 3 != 0], EVERYONE[EVERYONE % 3 == 0]
    together, following = Ease(HISTORIES, head, tail, ridge=7.0), NextItem(HISTORIES, head, tail, ridge=7.0)
    some = slice(2, 7)
    (to_one, from_one), (to_other, from_other) = together.beside(some), following.beside(some)
    for n, item in enumerate(tail[some]):
        both = np.append(head, item)
        ease = plain_ease(both, 7.0)
        np.testing.assert_allclose(to_one[:, n], ease[:-1, -1], atol=1e-9)
        np.testing.assert_allclose(from_one[n], ease[-1, :-1], atol=1e-9)
        follows = plain_next(both, 7.0, two_tables.NEXT_DECAY, head)
        np.testing.assert_allclose(from_other[n], follows[-1], atol=1e-9)
        alone = plain_next(head, 7.0, two_tables.NEXT_DECAY, np.array([item]))
        np.testing.assert_allclose(to_other[:, n], alone[:, 0], atol=1e-9)


@pytest.mark.parametrize("dense", [0, 400])  # ARPACK and dense
def test_the_tables_are_the_best_of_their_rank(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_DENSE", dense)
    made = two_tables_of(HISTORIES, dim=6, popularity_exponent=0.0)
    assert made.history_vectors is not None
    ease, follows = plain_ease(EVERYONE, two_tables.EASE_RIDGE), NextItem(HISTORIES, EVERYONE, NOBODY).weights
    blend = 0.6 * ease / np.linalg.norm(ease) + 0.4 * follows / np.linalg.norm(follows)
    u, s, vt = np.linalg.svd(blend)
    np.testing.assert_allclose(made.history_vectors @ made.vectors.T, (u[:, :6] * s[:6]) @ vt[:6], atol=1e-9)
    assert made.ids == HISTORIES.ids


def test_popular_rows_of_the_index_are_shorter() -> None:
    plain, weighed = (two_tables_of(HISTORIES, dim=6, popularity_exponent=power) for power in (0.0, 0.3))
    counts = np.bincount(HISTORIES.item, minlength=N)
    np.testing.assert_allclose(weighed.vectors * ((1.0 + counts) ** 0.3)[:, None], plain.vectors, atol=1e-12)
    np.testing.assert_array_equal(weighed.history_vectors, plain.history_vectors)
    assert weighed.popularity.tolist() == counts.tolist()


def test_popular_rows_of_the_history_side_are_shorter() -> None:
    plain, weighed = (two_tables_of(HISTORIES, dim=6, history_exponent=power) for power in (0.0, 0.5))
    counts = np.bincount(HISTORIES.item, minlength=N)
    np.testing.assert_allclose(weighed.history_vectors * ((1.0 + counts) ** 0.5)[:, None], plain.history_vectors)
    np.testing.assert_array_equal(weighed.vectors, plain.vectors)


@pytest.mark.parametrize("side", ["popularity_exponent", "history_exponent"])
def test_without_weighing_popularity_down_fewer_items_are_ever_found(side: str) -> None:
    """Coverage, and the share of the most popular tenth, of what everybody's ten nearest items are."""

    def found(exponent: float) -> tuple[float, float]:
        made = two_tables_of(HISTORIES, dim=6, **{"popularity_exponent": 0.0, side: exponent})
        assert made.history_vectors is not None
        row_of = {item: row for row, item in enumerate(made.ids)}
        users = [
            np.mean([made.history_vectors[row_of[HISTORIES.ids[i]]] for i in of], axis=0) for of in lists().values()
        ]
        shown = np.argsort(-(np.array(users) @ made.vectors.T), axis=1)[:, :10]
        head = np.argsort(-made.popularity)[: len(made.ids) // 10]
        return len(np.unique(shown)) / len(made.ids), float(np.isin(shown, head).mean())

    (coverage, head_share), (wider, less_of_it) = found(0.0), found(0.7)
    assert wider > coverage
    assert less_of_it < head_share


def test_scores_within_the_head_do_not_depend_on_what_lies_beside_it() -> None:
    """With as many dimensions as the head has items nothing is cut off."""
    whole = two_tables_of(HISTORIES, dim=30, head_items=30, popularity_exponent=0.0)
    assert len(whole.ids) == N, "the others are there as well"
    head = np.sort(np.argsort(-whole.popularity, kind="stable")[:30])
    alone = Ease(HISTORIES, head, NOBODY).weights
    follows = NextItem(HISTORIES, head, NOBODY).weights
    blend = 0.6 * alone / np.linalg.norm(alone) + 0.4 * follows / np.linalg.norm(follows)
    assert whole.history_vectors is not None
    np.testing.assert_allclose((whole.history_vectors @ whole.vectors.T)[np.ix_(head, head)], blend, atol=1e-9)


@pytest.mark.parametrize("block", [4, 2_000])
def test_blocks_of_the_tail_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    want = two_tables_of(HISTORIES, dim=6, head_items=20)
    monkeypatch.setattr(two_tables, "_BLOCK_ITEMS", block)
    made = two_tables_of(HISTORIES, dim=6, head_items=20)
    np.testing.assert_allclose(made.vectors, want.vectors, atol=1e-12)
    np.testing.assert_allclose(made.history_vectors, want.history_vectors, atol=1e-12)


def test_the_same_events_in_any_order_give_the_same_bytes() -> None:
    first, again = two_table_vectors(SMALL, dim=8), two_table_vectors(iter(SMALL[::-1]), dim=8)
    assert first.history_vectors is not None
    assert again.history_vectors is not None
    assert first.vectors.tobytes() == again.vectors.tobytes()
    assert first.history_vectors.tobytes() == again.history_vectors.tobytes()


def test_the_order_of_ids_within_one_time_is_not_learned() -> None:
    """Every user takes b and a at once, which files write as a, b: that says nothing of what follows what."""
    rows = [
        EventRow(str(user), item, "view", 1_000 * time) for user in range(200) for time in range(3) for item in "ba"
    ]
    histories = by_user(split_by_time(rows, 1.0)[0], ties=0)
    a, b = NextItem(histories, np.arange(2), NOBODY, ridge=1.0, decay=50.0).weights  # the last item alone
    assert abs(a[1] - b[0]) < 0.1
    assert a[0] > 0.2, "and a may well follow a"


def test_only_the_first_part_by_time_is_used() -> None:
    train, rest = split_by_time(SMALL)
    later = [EventRow(row.user_id, "unseen", "like", row.ts_ms + 1) for row in rest]
    base = two_table_vectors(SMALL, dim=8)
    assert two_table_vectors(train + later, dim=8).vectors.tobytes() == base.vectors.tobytes()


def test_of_too_many_cases_a_random_part_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_tables, "MAX_CASES", 300)
    one, same, other = (two_tables_of(HISTORIES, dim=6, seed=seed).vectors for seed in (1, 1, 2))
    assert one.tobytes() == same.tobytes()
    assert one.tobytes() != other.tobytes()


def events(*histories: str) -> list[EventRow]:
    return [
        EventRow(str(user), item, "view", 1_000 * time)
        for user, items in enumerate(histories)
        for time, item in enumerate(items)
    ]


def test_items_that_occur_with_no_others_are_left_out_and_counted() -> None:
    notes: list[str] = []
    made = two_table_vectors(events("abc", "bca", "z", "y"), dim=2, share=1.0, on_note=notes.append)
    assert made.ids == ["a", "b", "c"]
    assert notes == ["2 of 5 items occur with no others to learn from and are left out"]
    rows = events("abc", "bca", "z", "y")
    beside = two_table_vectors(rows, dim=2, share=1.0, head_items=3, on_note=notes.append)
    assert beside.ids == ["a", "b", "c"]
    assert notes[1:] == ["3 items are learned together, the other 2 beside them, one by one", notes[0]]


@pytest.mark.parametrize(("rows", "are"), [(events("abc"), 3), ([], 0), (events("x", "y"), 2)])
def test_an_impossible_dimension_is_one_line(rows: list[EventRow], are: int) -> None:
    with pytest.raises(ItemSpaceError, match=f"4 dimensions need at least 4 items.*there are {are};"):
        two_table_vectors(rows, dim=4, share=1.0)


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"head_items": 0}, {"popularity_exponent": -1.0}, {"history_exponent": -1.0}, {"share": 0.0}]
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        two_table_vectors(SMALL, **{"dim": 4, **wrong})


def test_a_method_is_chosen_by_name() -> None:
    assert learn(SMALL, "ppmi", dim=4).history_vectors is None
    assert learn(SMALL, dim=4).history_vectors is not None
    with pytest.raises(ValueError, match="choose one of two-tables, ppmi"):
        learn(SMALL, "lda")  # type: ignore[arg-type]


def test_a_space_of_both_tables_is_saved(tmp_path: Any) -> None:
    seen: list[tuple[int, int | None]] = []
    space = build_space(SMALL, tmp_path / "v1", "v1", dim=8, on_progress=lambda *at: seen.append(at))
    made = two_table_vectors(SMALL, dim=8)
    assert made.history_vectors is not None
    assert (space.metric, space.two_sided) == ("dot", True)
    np.testing.assert_allclose(space.vectors, made.vectors.astype(np.float32))
    np.testing.assert_allclose(space.history_vectors, made.history_vectors.astype(np.float32))
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert ItemSpace.load(tmp_path / "v1").sha256 == space.sha256
