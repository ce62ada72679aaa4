"""Popularity lists: counts against a plain sum, an item version that stays as it was, and every way to be damaged."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples, make_space

from stream.core.events import EventRow
from stream.errors import ItemSpaceError
from stream.items import popularity
from stream.items.manifest import file_sha256
from stream.items.popularity import NAME, Tally, top_rows, write_popularity
from stream.items.space import ItemSpace

ITEMS = ["a", "b", "7", "é"]
DAY_MS = 86_400_000
T0 = 1_700_000_000_000
WEIGHTS = {"view": 1.0, "like": 2.0}
SPACE = make_space("items_v1", ITEMS, np.eye(4) + 0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ItemSpace.save(tmp_path / "items", "items_v1", ITEMS, np.eye(4) + 0.1)
    return tmp_path / "items"


def event(item: str, days: float = 0.0, kind: str = "view") -> EventRow:
    return EventRow("u", item, kind, T0 + round(days * DAY_MS))


def write(folder: Path, events: Iterable[EventRow], version: str = "p1", half_life: float | None = None) -> ItemSpace:
    write_popularity(folder, ItemSpace.load(folder), version, events, type_weights=WEIGHTS, half_life_days=half_life)
    return ItemSpace.load(folder)


def test_events_are_counted_by_weight_and_what_does_not_count_is_told(folder: Path) -> None:
    events = [event("a"), event("a"), event("b", kind="like"), event("7"), event("gone"), event("a", kind="shown")]
    space = write(folder, events)
    assert space.popular(10) == [("a", 2.0), ("b", 2.0), ("7", 1.0)]
    assert space.popular(2) == [("a", 2.0), ("b", 2.0)]
    assert space.popular(0) == []
    assert space.popularity_version == "p1"
    made = json.loads((folder / NAME).read_text())
    assert (made["events"], made["not_counted"], made["unknown_items"], made["as_of"]) == (4, 1, 1, T0)


def test_an_event_counts_half_at_its_half_life_from_the_newest(folder: Path) -> None:
    events = [event("a", 0), event("a", 10), event("b", 20), event("7", 30, "like")]
    space = write(folder, events, half_life=10.0)
    assert space.popular(3) == [("7", 2.0), ("b", 0.5), ("a", 0.375)]


rows = st.builds(
    lambda item, days, kind: event(item, days, kind),
    st.sampled_from([*ITEMS, "gone"]),
    st.integers(0, 3000),
    st.sampled_from(["view", "like", "shown"]),
)


@settings(max_examples=examples(80))
@given(st.lists(rows, max_size=40), st.sampled_from([None, 0.5, 30.0]), st.randoms(), st.integers(1, 7))
def test_a_tally_is_the_plain_sum_in_whatever_order_and_pieces(
    events: list[EventRow], half_life: float | None, rng: random.Random, chunk: int
) -> None:
    newest = max((e.ts_ms for e in events if e.type in WEIGHTS and e.item_id in ITEMS), default=0)
    want = np.zeros(len(ITEMS))
    for e in events:
        if e.type in WEIGHTS and e.item_id in ITEMS:
            age_days = (newest - e.ts_ms) / DAY_MS
            want[ITEMS.index(e.item_id)] += WEIGHTS[e.type] * (
                1.0 if half_life is None else 0.5 ** (age_days / half_life)
            )
    before, popularity._CHUNK = popularity._CHUNK, chunk  # type: ignore[misc]
    try:
        for _ in range(2):
            tally = Tally(SPACE, WEIGHTS, half_life)
            tally.add(events[: len(events) // 2])
            tally.add(events[len(events) // 2 :])
            np.testing.assert_allclose(tally.scores(), want, rtol=1e-6, atol=1e-36)
            assert tally.as_of == newest
            assert tally.events + tally.not_counted + tally.unknown_items == len(events)
            rng.shuffle(events)
    finally:
        popularity._CHUNK = before  # type: ignore[misc]


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(-2, 40))
def test_the_top_is_the_head_of_the_sorted_list(values: list[int], k: int) -> None:
    scores = np.array(values, dtype=np.float32)
    want = sorted((row for row in range(len(values)) if values[row] > 0), key=lambda row: (-values[row], row))
    assert top_rows(scores, k).tolist() == want[: max(0, k)]


def test_a_new_list_leaves_the_item_version_as_it_was(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    before = ItemSpace.load(folder)
    first = write(folder, [event("a")], "p1")
    assert first.sha256 == before.sha256
    assert first.popular(1) == [("a", 1.0)]
    second = write(folder, [event("b")], "p2")
    assert (second.popularity_version, second.popular(1)) == ("p2", [("b", 1.0)])
    assert (first.popularity_version, first.popular(1)) == ("p1", [("a", 1.0)]), "a loaded space stays with its list"
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert {path.name for path in folder.iterdir()} - files.keys() == {NAME, "popularity-p1.npy", "popularity-p2.npy"}


def test_a_name_is_given_once(folder: Path) -> None:
    write(folder, [event("a")])
    with pytest.raises(ItemSpaceError, match=r"^[^\n]*popularity p1 already[^\n]*$"):
        write(folder, [event("b")])
    assert ItemSpace.load(folder).popular(1) == [("a", 1.0)]


@pytest.mark.parametrize("half_life", [0.0, -1.0, float("nan"), float("inf")])
def test_a_half_life_that_is_none_is_refused(folder: Path, half_life: float) -> None:
    with pytest.raises(ItemSpaceError, match="half-life"):
        write(folder, [event("a")], half_life=half_life)


@pytest.mark.parametrize("version", ["", "a b", "../x", "current"])
def test_what_is_no_name_is_refused(folder: Path, version: str) -> None:
    with pytest.raises(ItemSpaceError):
        write(folder, [event("a")], version)


@pytest.mark.parametrize("events", [[], [event("gone")], [event("a", kind="shown")]])
def test_nothing_to_count_is_an_error_and_leaves_nothing(folder: Path, events: list[EventRow]) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ItemSpaceError, match="none of the events"):
        write(folder, events)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_bad_row_leaves_the_old_list(folder: Path) -> None:
    write(folder, [event("a")])

    def broken() -> Iterable[EventRow]:
        yield event("b")
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        write(folder, broken(), "p2")
    assert ItemSpace.load(folder).popular(1) == [("a", 1.0)]


def test_without_a_list_the_popularity_of_the_version_itself_counts(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "own", "items_v1", ITEMS, np.eye(4) + 0.1, popularity=[0, 3, 1, 2])
    assert space.popular(2) == [("b", 3.0), ("é", 2.0)]
    assert space.popularity_version is None
    assert write(tmp_path / "own", [event("a")]).popular(2) == [("a", 1.0)]


def test_without_any_the_error_says_how_to_make_one(folder: Path) -> None:
    space = ItemSpace.load(folder)
    assert space.popularity_version is None
    with pytest.raises(ItemSpaceError, match="uemb items popular"):
        space.popular(3)
    write(folder, [event("a")])
    assert space.popular(3) == [("a", 1.0)], "made meanwhile"


def _edit(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        made = json.loads((folder / NAME).read_text())
        (folder / NAME).write_text(json.dumps({**made, **changes}))

    return damage


def _no_list(folder: Path) -> None:
    (folder / "popularity-p1.npy").unlink()


def _other_list(folder: Path) -> None:
    np.save(folder / "popularity-p1.npy", np.ones(4, dtype=np.float32))


def _short_list(folder: Path) -> None:
    np.save(folder / "popularity-p1.npy", np.ones(3, dtype=np.float32))
    _edit(sha256=file_sha256(folder / "popularity-p1.npy"))(folder)


@pytest.mark.parametrize(
    "damage",
    [
        _no_list,
        _other_list,
        _short_list,
        _edit(format=2),
        _edit(version="../p1"),
        _edit(version="p2"),
        _edit(items_sha256="0" * 64),
        _edit(events="many"),
        lambda folder: (folder / NAME).write_text("{"),
    ],
)
def test_damage_is_named_and_does_not_keep_the_vectors_from_loading(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    write(folder, [event("a")])
    damage(folder)
    space = ItemSpace.load(folder)  # a worker needs no popularity
    for use in (lambda: space.popular(1), lambda: space.popularity_version):
        with pytest.raises(ItemSpaceError, match=r"^[^\n]*popularity[^\n]*$"):
            use()
