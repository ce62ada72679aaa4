"""The evaluation: cases, ranks, intervals and ages equal a plain reading of what they are; nothing later is learned."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from stream.cli.root import cli
from stream.core.events import EventRow
from stream.errors import ConfigError, ItemSpaceError
from stream.feed.synthetic import synthetic
from stream.learning import evaluate as learning
from stream.learning.evaluate import BASE, BEST, TTLS_S, evaluate, find_cases, refreshed
from stream.learning.histories import by_user
from stream.learning.report import markdown, save_figure
from stream.learning.two_tables import Ease

EVENTS = synthetic(users=60, items=50, events=2_500).events
#: What holds of any: an evaluation of `EVENTS` takes seconds.
FEWER = synthetic(users=30, items=50, events=1_000).events
DIM = 6

rows = st.lists(
    st.builds(
        EventRow,
        st.sampled_from("uvw"),
        st.sampled_from("abcdef"),
        st.just("view"),
        st.integers(0, 12).map(lambda n: 1_000 * n),
    ),
    min_size=1,
    max_size=60,
)


def in_order(events: list[EventRow]) -> list[EventRow]:
    return sorted(events, key=lambda row: (row.ts_ms, row.user_id, row.item_id))


@given(rows, st.integers(0, 13), st.booleans(), st.integers(0, 3))
def test_cases_are_what_they_are_said_to_be(events: list[EventRow], cut_s: int, older: bool, seed: int) -> None:
    histories = by_user(in_order(events), ties=seed)
    known = np.isin(np.arange(len(histories.ids)), histories.item[histories.ts_ms < 1_000 * cut_s])
    found = find_cases(histories, 1_000 * cut_s, known, 10_000, 0, older=older)
    want = []
    for user in range(int(histories.user.max()) + 1):
        own = np.flatnonzero(histories.user == user)
        for at, place in enumerate(own):
            before = [p for p in own[:at] if not older or histories.ts_ms[p] < histories.ts_ms[place]]
            seen = {int(histories.item[p]) for p in own[:at]}
            new = int(histories.item[place]) not in seen
            later = histories.ts_ms[place] >= 1_000 * cut_s
            if later and new and known[histories.item[place]] and len(before) >= 2:
                want.append((place, own[0], own[0] + len(before)))
    assert list(zip(*(column.tolist() for column in found), strict=True)) == want


def test_of_many_cases_a_random_part_is_taken() -> None:
    histories = by_user(in_order(EVENTS))
    known = np.ones(len(histories.ids), dtype=np.bool_)
    cut_ms = in_order(EVENTS)[1_500].ts_ms
    whole = find_cases(histories, cut_ms, known, 10_000, 0, older=False)
    some, same, others = (find_cases(histories, cut_ms, known, 50, seed, older=False) for seed in (1, 1, 2))
    assert len(some.place) == 50
    assert set(some.place) <= set(whole.place)
    assert some.place.tolist() == same.place.tolist() != others.place.tolist()


@given(rows, st.sampled_from([1, 2, 5]))
def test_a_cached_vector_is_of_the_events_before_the_last_one_that_found_it_old(
    events: list[EventRow], ttl_s: int
) -> None:
    histories = by_user(in_order(events))
    known = np.ones(len(histories.ids), dtype=np.bool_)
    cases = find_cases(histories, 0, known, 10_000, 0, older=False)
    got = refreshed(histories, cases, ttl_s)
    want = []
    for place, start, _ in zip(*cases, strict=True):
        built_ms, built_of = -(1 << 60), 2
        for at in range(2, place - start + 1):  # the vector is asked for at each event, of what is before it
            if histories.ts_ms[start + at] - built_ms >= 1_000 * ttl_s:
                built_ms, built_of = int(histories.ts_ms[start + at]), at
        want.append(start + built_of)
    assert got.end.tolist() == want
    assert refreshed(histories, cases, 0) == cases


def by_hand(events: list[EventRow], share: float) -> tuple[dict[str, list[bool]], dict[str, set[str]]]:
    """Hits of popularity and of plain EASE, and what they show, from loops over users."""
    ordered = in_order(events)
    cut_ms = ordered[round(len(ordered) * share)].ts_ms
    train = [row for row in ordered if row.ts_ms < cut_ms]
    counts: dict[str, float] = defaultdict(float)
    for row in train:
        counts[row.item_id] += 1
    histories = by_user(train)
    weights = Ease(histories, np.arange(len(histories.ids)), np.arange(0)).weights
    number = {item: n for n, item in enumerate(histories.ids)}
    before: dict[str, list[str]] = defaultdict(list)
    hits: dict[str, list[bool]] = {"popularity": [], "EASE, full matrix": []}
    shown: dict[str, set[str]] = {name: set() for name in hits}
    for row in ordered:
        history = before[row.user_id]
        if row.ts_ms >= cut_ms and len(history) >= 2 and row.item_id in counts and row.item_id not in history:
            of = [number[item] for item in history[-100:] if item in number]
            for name, scores in (
                ("popularity", dict(counts)),
                ("EASE, full matrix", {item: float(weights[of, n].sum()) for item, n in number.items()}),
            ):
                left = {item: score for item, score in scores.items() if item not in history}
                own = left[row.item_id]
                above = sum(score > own for score in left.values())
                beside = sum(score == own for score in left.values()) - 1
                hits[name].append(above + beside / 2 < 10)
                shown[name] |= set(sorted(left, key=lambda item: -left[item])[:10])
        before[row.user_id].append(row.item_id)
    return hits, shown


def test_the_figures_equal_loops_over_users() -> None:
    report = evaluate(EVENTS, dim=DIM, readings=["ordered"], cases=10_000)
    hits, shown = by_hand(EVENTS, 0.8)
    rows = {row.method: row for row in report.rows}
    for name in hits:
        assert report.cases == {"ordered": len(hits[name])}
        assert rows[name].recall_10 == pytest.approx(np.mean(hits[name]))
    ease = rows["EASE, full matrix"]
    assert ease.coverage_10 == pytest.approx(len(shown["EASE, full matrix"]) / report.items)
    assert rows["popularity"].head_share_10 > ease.head_share_10


def test_intervals_hold_the_mean_and_gains_are_paired_with_the_base() -> None:
    report = evaluate(FEWER, dim=DIM, seed=3)
    assert {row.reading for row in report.rows} == {"ordered", "shuffled", "older"}
    base = {row.reading: row for row in report.rows if row.method == BASE}
    for row in report.rows:
        assert row.low <= row.recall_10 <= row.high
        assert row.gain_low <= row.gain <= row.gain_high
        assert row.gain == pytest.approx(row.recall_10 - base[row.reading].recall_10)
        assert row.recall_10 <= row.recall_50
        assert row.ndcg_10 <= row.recall_10
    assert all((row.gain, row.gain_low, row.gain_high) == (0.0, 0.0, 0.0) for row in base.values())
    assert evaluate(FEWER, dim=DIM, seed=3) == report


def test_of_age_zero_is_what_the_table_says() -> None:
    report = evaluate(EVENTS, dim=DIM, readings=["shuffled"])
    recall = {row.method: row.recall_10 for row in report.rows}
    assert [(stale.method, stale.ttl_s) for stale in report.stale] == [(m, s) for m in (BASE, BEST) for s in TTLS_S]
    assert all(stale.recall_10 == recall[stale.method] for stale in report.stale if not stale.ttl_s)


def test_nothing_is_learned_from_what_comes_later() -> None:
    """Other items and orders in the later part change no method's scores for one and the same history."""
    ordered = in_order(EVENTS)
    cut_ms = ordered[2_000].ts_ms
    later = [row._replace(item_id=ordered[n].item_id) if row.ts_ms >= cut_ms else row for n, row in enumerate(ordered)]
    shuffled = [
        row._replace(item_id=later[-1 - n % 400].item_id) if row.ts_ms >= cut_ms else row for n, row in enumerate(later)
    ]
    one, other = (learning._Prepared(in_order(events), cut_ms, None, DIM, 10_000, 0) for events in (ordered, shuffled))
    assert one.all.ids == other.all.ids
    history, times = [np.arange(5), np.arange(7, 17)], [1_000 * np.arange(5), 1_000 * np.arange(10)]
    for name, score in one.methods.items():
        np.testing.assert_array_equal(score(history, times), other.methods[name](history, times), err_msg=name)


def test_methods_that_need_all_items_are_left_out_where_there_are_many() -> None:
    report = evaluate(EVENTS, dim=DIM, readings=["ordered"], head_items=20)
    assert set(report.left_out) == {"ItemKNN, full matrix", "EASE, full matrix"}
    assert "Left out: EASE, full matrix, which needs a matrix of" in markdown(report)


@pytest.mark.parametrize(
    ("events", "wrong", "why"),
    [
        (EVENTS, {"share": 1.0}, "share must be"),
        (EVENTS, {"cases": 0}, "cases at least 1"),
        ([EventRow(str(n % 3), str(n % 9), "view", n) for n in range(90)], {"dim": 2}, "no later event"),
    ],
)
def test_what_can_not_be_evaluated_is_one_line(events: list[EventRow], wrong: dict[str, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        evaluate(events, **{"dim": DIM, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("events", [[], [EventRow("u", "a", "view", 5)] * 9], ids=["none", "one time"])
def test_events_with_nothing_to_learn_from_are_one_line(events: list[EventRow]) -> None:
    with pytest.raises(ItemSpaceError, match="nothing is left to learn from"):
        evaluate(events, dim=DIM)


# -- as people read it --------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lines = ["user_id,item_id,type,ts", *(f"{row.user_id},{row.item_id},{row.type},{row.ts_ms}" for row in FEWER)]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "events.csv"


def test_from_the_command_line(file: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(file), "--dim", str(DIM), "--seed", "3"]
    figure = tmp_path / "figure.png"
    ran = CliRunner().invoke(cli, [*command, "--json", "--figure", str(figure)])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    want = evaluate(FEWER, dim=DIM, seed=3)
    assert (document["events"], document["users"], document["data"]) == (1_000, want.users, "events.csv")
    assert [row["recall_10"] for row in document["rows"]] == [row.recall_10 for row in want.rows]
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = CliRunner().invoke(cli, command).stdout
    assert all(f"{row.recall_10:.3f} [{row.low:.3f}, {row.high:.3f}]" in text for row in want.rows)
    assert CliRunner().invoke(cli, [*command, "--markdown"]).stdout == markdown(want)


def test_a_validation_sees_the_training_part_alone(file: Path) -> None:
    command = ["evaluate", str(file), "--dim", str(DIM), "--json"]
    document = json.loads(CliRunner().invoke(cli, [*command, "--validation"]).stdout)
    assert document["events"] == 800
    assert document["rows"][0]["recall_10"] == evaluate(in_order(FEWER)[:800], dim=DIM).rows[0].recall_10


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(["--movielens"], "not both"), (["--share", "1"], "share must be"), (["--share", "7"], "share must be")],
)
def test_a_command_that_makes_no_sense_is_one_line(arguments: list[str], why: str, file: Path) -> None:
    ran = CliRunner().invoke(cli, ["evaluate", str(file), "--dim", str(DIM), *arguments])
    assert isinstance(ran.exception, ConfigError)
    assert why in str(ran.exception)


def test_a_figure_that_can_not_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = evaluate(FEWER, dim=DIM, readings=["older"])
    for name in ("figure.nonsense", "nowhere/figure.png"):
        with pytest.raises(ConfigError, match="can't be written"):
            save_figure(report, tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"\[plots\]"):
        save_figure(report, tmp_path / "figure.png")
