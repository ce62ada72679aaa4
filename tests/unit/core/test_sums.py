"""Decayed sums that follow what is done to histories, against the same sums one by one."""

from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.core import sums as sums_module
from stream.core.sums import Moves, RowHistories, RunningSums, Sums

HOUR_MS = 3_600_000
#: Per rank, and per millisecond: half gone after a minute, a day, never.
DECAYS = (0.01, 0.15, 0.0)
BY_TIME = (np.log(2) / 60_000, np.log(2) / (24 * HOUR_MS), 0.0)
NEWEST = 2


class Entry(NamedTuple):
    """An interaction: row -1 where the space lacks its item."""

    row: int
    weight: float
    at: int


class Done(NamedTuple):
    """What is done to a user's history: an entry at a place, or none at -1, after so many have left."""

    user: int
    place: int
    entry: Entry
    gone: int


NOTHING = Entry(-1, 1.0, 0)


def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def naive(history: list[Entry], *, by_time: bool) -> tuple[np.ndarray, np.ndarray, int, list[int]]:
    """Sums, totals, count and newest rows of a history, oldest first."""
    known = [entry for entry in reversed(history) if entry.row >= 0]
    decays = BY_TIME if by_time else DECAYS
    sums, totals = np.zeros((len(decays), 3)), np.zeros(len(decays))
    for k, decay in enumerate(decays):
        for rank, entry in enumerate(known):
            weight = entry.weight * np.exp(-decay * (known[0].at - entry.at if by_time else rank))
            sums[k] += weight * vectors()[entry.row].astype(np.float64)
            totals[k] += weight
    newest = [entry.row for entry in known[:NEWEST]]
    return sums, totals, len(known), newest + [-1] * (NEWEST - len(newest))


def check(got: Sums, histories: list[list[Entry]], *, by_time: bool) -> None:
    wanted = [naive(history, by_time=by_time) for history in histories]
    for part, want in zip(got, zip(*wanted, strict=True), strict=True):
        np.testing.assert_allclose(part, np.array(want), rtol=0, atol=1e-9)


def make(limit: int, capacity: int = 8, *, by_time: bool = False, weighted: bool = True) -> RunningSums:
    decays = BY_TIME if by_time else DECAYS
    return RunningSums(vectors(), decays, limit, capacity, by_time=by_time, weighted=weighted, newest=NEWEST)


def columns(histories: list[list[Entry]]) -> RowHistories:
    flat = [entry for history in histories for entry in history]
    rows, weights, times = (list(part) for part in zip(*flat, strict=True)) if flat else ([], [], [])
    base = np.array([0, *accumulate(map(len, histories))])
    return RowHistories(base, np.array(rows, np.int32), np.array(weights, np.float64), np.array(times, np.int64))


def moves(done: list[Done], slots: list[int], shown: list[int]) -> Moves:
    return Moves(
        np.array([slots[one.user] for one in done]),
        np.array([one.entry.row for one in done], dtype=np.int32),
        np.array([one.entry.weight for one in done]),
        np.array([one.entry.at for one in done]),
        np.array([one.place for one in done]),
        np.array([one.gone for one in done]),
        np.array(shown),
    )


rows = st.integers(-1, 11)
times = st.sampled_from([0, 1, 59_999, 60_000, HOUR_MS, 24 * HOUR_MS, 365 * 24 * HOUR_MS, (1 << 48) - 1])


@pytest.mark.parametrize("by_time", [False, True], ids=["by rank", "by time"])
@given(data=st.data())
def test_following_equals_summing_one_by_one(by_time: bool, data: st.DataObject) -> None:
    """Users side by side: at any place, again and again, with unknown items, what leaves a full history, erasures."""
    limit, weighted = data.draw(st.integers(1, 6)), data.draw(st.booleans())
    weight = st.sampled_from([1.0, 2.0, 0.5]) if weighted else st.just(1.0)
    entries = st.builds(Entry, rows, weight, times | st.integers(0, 100 * HOUR_MS))
    sums, slots = make(limit, by_time=by_time, weighted=weighted), [5, 2, 7]
    some = st.lists(entries, max_size=limit).map(lambda found: sorted(found, key=lambda entry: entry.at))
    histories = [data.draw(some) for _ in slots]
    sums.load(np.array(slots), columns(histories))
    check(sums.read(np.array(slots)), histories, by_time=by_time)
    check(sums.sum_all(columns(histories)), histories, by_time=by_time)
    for _ in range(data.draw(st.integers(0, 4))):
        done: list[Done] = []
        shown: list[int] = []
        states: list[list[Entry]] = []
        for user in data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)):
            history = histories[user]
            if data.draw(st.integers(0, 4)) == 0:  # an erasure, or only to be shown
                gone = data.draw(st.integers(0, len(history)))
                del history[:gone]
                done.append(Done(user, -1, NOTHING, gone))
            else:
                entry, gone = data.draw(entries), int(len(history) == limit)
                if gone:  # what is older than all of a full history doesn't enter it
                    entry = entry._replace(at=max(entry.at, history[0].at))
                del history[:gone]
                place = sum(other.at <= entry.at for other in history)
                history.insert(place, entry)
                done.append(Done(user, place, entry, gone))
            shown.append(len(states) if data.draw(st.booleans()) else -1)
            if shown[-1] >= 0:
                states.append(list(history))
        got = sums.follow(moves(done, slots, shown), len(states))
        if states:
            check(got, states, by_time=by_time)
    check(sums.read(np.array(slots)), histories, by_time=by_time)
    assert not any(part.any() for part in sums.read(np.array([0, 1, 3, 4, 6]))[:3]), "slots of nobody"


@pytest.mark.parametrize("by_time", [False, True], ids=["by rank", "by time"])
def test_a_sum_of_nothing_is_exactly_nothing(by_time: bool) -> None:
    sums = make(2, by_time=by_time)
    arrive = [Done(0, place, Entry(row, 1.0, n), int(n > 1)) for n, (row, place) in enumerate([(3, 0), (5, 1)])]
    leave = [Done(0, 1, Entry(-1, 1.0, 2 + n), 1) for n in range(2)]
    sums.follow(moves([*arrive, *leave], [0], [-1] * 4), 0)
    assert not any(part.any() for part in sums.read(np.array([0]))[:3])
    older = [Done(0, 2, Entry(4, 2.0, 1), 1)]  # by time: older than what was there once
    sums.follow(moves([Done(0, -1, NOTHING, 2), *[one._replace(place=0, gone=0) for one in older]], [0], [-1, -1]), 0)
    check(sums.read(np.array([0])), [[Entry(4, 2.0, 1)]], by_time=by_time)


@pytest.mark.parametrize("max_age", [7, 100_000])
@pytest.mark.parametrize("by_time", [False, True], ids=["by rank", "by time"])
def test_long_histories_do_not_drift(by_time: bool, max_age: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 that arrive as others leave stay within 1e-11 of the sum made afresh, as it is done now and then."""
    monkeypatch.setattr(sums_module, "MAX_AGE", max_age)
    limit, rng = 100, np.random.default_rng(3)
    entries = [Entry(int(row), 1.0, 1000 * n) for n, row in enumerate(rng.integers(-1, 12, size=20_000))]
    done = [Done(0, min(n, limit - 1), entry, int(n >= limit)) for n, entry in enumerate(entries)]
    sums = make(limit, 1, by_time=by_time)
    sums.follow(moves(done, [0], [-1] * len(done)), 0)
    got, want = sums.read(np.array([0])), naive(entries[-limit:], by_time=by_time)
    for part, wanted in zip(got, want, strict=True):
        np.testing.assert_allclose(part[0], wanted, rtol=1e-12, atol=1e-11)


def test_growing_keeps_what_is_there() -> None:
    sums, history = make(5, 2), [Entry(4, 2.0, 0), Entry(-1, 1.0, 1)]
    sums.load(np.array([1]), columns([history]))
    sums.grow(3)
    assert sums.capacity == 3
    check(sums.read(np.array([0, 1, 2])), [[], history, []], by_time=False)
    sums.follow(moves([Done(0, 2, Entry(7, 1.0, 2), 0)], [1], [-1]), 0)
    check(sums.read(np.array([1])), [[*history, Entry(7, 1.0, 2)]], by_time=False)


def test_reading_copies() -> None:
    sums, history = make(5), [Entry(4, 2.0, 0)]
    sums.load(np.array([1]), columns([history]))
    for part in sums.read(np.array([1])):
        part[:] = 9
    check(sums.read(np.array([1])), [history], by_time=False)


def test_types_that_all_weigh_one_need_no_weights() -> None:
    sums, of = make(5), columns([[Entry(4, 1.0, 0), Entry(5, 1.0, 1)]])
    without: Any = of._replace(weights=None)
    for got, want in zip(sums.sum_all(without), sums.sum_all(of), strict=True):
        np.testing.assert_array_equal(got, want)


def test_sums_by_time_can_not_do_without_times() -> None:
    with pytest.raises(ValueError, match="need the times"):
        make(5, by_time=True).sum_all(columns([[Entry(1, 1.0, 0)]])._replace(times=None))
