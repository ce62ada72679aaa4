"""Decayed sums in batches against the same sums one by one."""

import random
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.core.fast import kernels
from stream.core.sums import MAX_WINDOW, DecayedSums, FadingSums, Moved, Newer

DECAYS = (0.01, 0.15, 0.0)


def vectors(n=12, dim=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def naive(matrix, history, decays=DECAYS):
    """Sums, totals and count of ``(row, weight)`` pairs, oldest first, row -1 unknown."""
    known = [(row, weight) for row, weight in history if row >= 0]
    sums, totals = np.zeros((len(decays), matrix.shape[1])), np.zeros(len(decays))
    for k, decay in enumerate(decays):
        for rank, (row, weight) in enumerate(reversed(known)):
            w = np.exp(-decay * rank) * weight
            sums[k] += w * matrix[row].astype(np.float64)
            totals[k] += w
    return sums, totals, len(known)


def check(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)


def moved(some):
    """What arrives or leaves: ``(row, weight)``, or ``(row, weight, time)``, for each slot."""
    columns = [np.array(column) for column in zip(*some, strict=True)]
    return Moved(columns[0].astype(np.int64), columns[1].astype(np.float64), *columns[2:])


entries = st.tuples(st.integers(-1, 11), st.sampled_from([1.0, 2.0, 0.5]))


@given(st.lists(st.lists(entries, min_size=4, max_size=4), max_size=25), st.integers(1, 6))
def test_appending_equals_summing_one_by_one(rounds, limit):
    """Four users side by side, each with at most `limit` interactions, the oldest leaving as the newest comes."""
    matrix = vectors()
    sums = DecayedSums(matrix, DECAYS, limit, 8)
    histories = [[] for _ in range(4)]
    slots = np.array([6, 0, 3, 1])
    for entering in rounds:
        leaving = [h.pop(0) if len(h) == limit else (-1, 1.0) for h in histories]
        for history, entry in zip(histories, entering, strict=True):
            history.append(entry)
        new, old = np.array(entering), np.array(leaving)
        sums.insert(slots, moved(new), moved(old))
        got = sums.read(slots)
        for i, history in enumerate(histories):
            check((got[0][i], got[1][i], got[2][i]), naive(matrix, history))
    untouched = sums.read(np.array([2, 4, 5, 7]))
    assert not any(part.any() for part in untouched)


def test_a_sum_of_nothing_is_exactly_nothing():
    sums = DecayedSums(vectors(), DECAYS, 2, 1)
    slot = np.array([0])
    for row, gone in [(3, -1), (5, -1), (-1, 3), (-1, 5)]:
        sums.insert(slot, moved([(row, 1.0)]), moved([(gone, 1.0)]))
    assert not any(part.any() for part in sums.read(slot))


def random_states(seed, n_steps, limit=20, unknown=0.2):
    """A user's stream with late inserts and removals: what `window` reads, and each state as a list."""
    rng = random.Random(seed)
    present, states, arrived, left = [], [], {}, {}
    for n in range(5):
        present.append((n, f"old{n}"))
        arrived[present[-1]] = -1
    for step in range(n_steps):
        key = (rng.randrange(100) if rng.random() < 0.2 else 100 + step, step)
        present.append(key)
        present.sort(key=lambda k: (k[0], str(k[1])))
        arrived[key] = step
        while len(present) > limit or (present and rng.random() < 0.05):
            left[present.pop(0)] = step
        states.append(list(present))
    order = sorted(arrived, key=lambda k: (k[0], str(k[1])))
    row = {key: -1 if rng.random() < unknown else rng.randrange(12) for key in order}
    weight = {key: rng.choice([1.0, 2.0, 0.25]) for key in order}
    stays = 1 << 40
    columns = (
        np.array([row[k] for k in order]),
        np.array([weight[k] for k in order]),
        np.array([arrived[k] for k in order]),
        np.array([left.get(k, stays) for k in order]),
    )
    return columns, [[(row[k], weight[k]) for k in state] for state in states]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("n_steps", [1, 2, 50, MAX_WINDOW, MAX_WINDOW + 1, 3 * MAX_WINDOW + 7])
def test_a_window_equals_summing_each_state(n_steps, weighted):
    matrix = vectors()
    sums = DecayedSums(matrix, DECAYS, 20, 1)
    (rows, weights, arrived, left), states = random_states(n_steps, n_steps)
    got = sums.window(rows, weights if weighted else None, arrived, left, np.arange(n_steps))
    assert got[0].shape == (n_steps, 3, 3)
    assert got[1].shape == (n_steps, 3)
    for i in range(0, n_steps, max(1, n_steps // 60)):
        state = states[i] if weighted else [(row, 1.0) for row, _ in states[i]]
        check((got[0][i], got[1][i], got[2][i]), naive(matrix, state))


@given(st.integers(0, 1000), st.integers(1, 40), st.data())
def test_a_window_of_some_states_only(seed, n_steps, data):
    matrix = vectors()
    (rows, weights, arrived, left), states = random_states(seed, n_steps, limit=data.draw(st.integers(1, 20)))
    sums = DecayedSums(matrix, DECAYS, 20, 1)
    wanted = sorted(data.draw(st.sets(st.integers(0, n_steps - 1), min_size=1)))
    got = sums.window(rows, weights, arrived, left, np.array(wanted))
    for i, step in enumerate(wanted):
        check((got[0][i], got[1][i], got[2][i]), naive(matrix, states[step]))


@pytest.mark.parametrize("rows", [[], [-1], [-1, -1]])
def test_a_window_without_known_items_is_zero(rows):
    sums = DecayedSums(vectors(), DECAYS, 5, 1)
    n = len(rows)
    got = sums.window(np.array(rows, np.int64), None, np.full(n, -1), np.full(n, 9), np.array([0, 1]))
    assert [part.shape for part in got] == [(2, 3, 3), (2, 3), (2,)]
    assert not any(part.any() for part in got)


def test_growing_keeps_what_is_there():
    sums = DecayedSums(vectors(), DECAYS, 5, 2)
    sums.insert(np.array([1]), moved([(4, 1.0)]), moved([(-1, 1.0)]))
    before = [part.copy() for part in sums.read(np.array([0, 1]))]
    sums.grow(1)
    sums.grow(3)
    check(sums.read(np.array([0, 1])), before)
    assert sums.sums.shape[0] == sums.totals.shape[0] == sums.known.shape[0] >= 3
    assert not sums.read(np.array([2]))[0].any()


def test_what_is_put_is_read_and_reading_copies():
    sums = DecayedSums(vectors(), DECAYS, 5, 2)
    want = naive(vectors(), [(3, 1.0), (4, 2.0)])
    sums.put(1, *want, 0)
    got = sums.read(np.array([1]))
    check((got[0][0], got[1][0], got[2][0]), want)
    got[0][:] = 9
    check((sums.read(np.array([1]))[0][0],), want[:1])


def test_long_histories_do_not_drift():
    """20,000 appends with evictions stay within 1e-12 of the sum made afresh."""
    matrix, limit = vectors(), 100
    sums = DecayedSums(matrix, DECAYS, limit, 1)
    rng = np.random.default_rng(3)
    rows = rng.integers(-1, 12, size=20_000)
    slot, one = np.array([0]), np.ones(1)
    for i, row in enumerate(rows):
        old = rows[i - limit : i - limit + 1] if i >= limit else np.array([-1])
        sums.insert(slot, Moved(np.array([row]), one), Moved(old, one))
    got = sums.read(slot)
    want = naive(matrix, [(int(row), 1.0) for row in rows[-limit:]])
    np.testing.assert_allclose(got[0][0], want[0], rtol=0, atol=1e-11)
    np.testing.assert_allclose(got[1][0], want[1], rtol=0, atol=1e-11)
    assert got[2][0] == want[2]


def load(sums, slots, histories, weighted):
    """Load whole histories of ``(row, weight, time)``, oldest first."""
    flat = [entry for history in histories for entry in history]
    base = np.array([0, *accumulate(map(len, histories))])
    weights = np.array([w for _, w, _ in flat]) if weighted else None
    at = np.array([t for _, _, t in flat], dtype=np.int64) if isinstance(sums, FadingSums) else None
    sums.load(slots, np.array([row for row, _, _ in flat], dtype=np.int32), base, weights, at)


def check_slots(sums, slots, wanted):
    got = sums.read(slots)
    for i, want in enumerate(wanted):
        check((got[0][i], got[1][i], got[2][i]), want)


@pytest.mark.parametrize("compiled", [False, True])
@given(data=st.data())
def test_inserting_anywhere_equals_summing_one_by_one(compiled, data):
    """Interactions arrive at any rank, the oldest leaves a full history, unknown items (-1) are in between."""
    limit = data.draw(st.integers(1, 6))
    weighted = data.draw(st.booleans())
    some = entries if weighted else st.tuples(st.integers(-1, 11), st.just(1.0))
    matrix = vectors()
    sums = DecayedSums(matrix, DECAYS, limit, 8, kernels() if compiled else None)
    slots = np.array([5, 2, 7])
    histories = [data.draw(st.lists(some, max_size=limit)) for _ in slots]  # oldest first
    load(sums, slots, [[(*entry, 0) for entry in history] for history in histories], weighted)
    check_slots(sums, slots, [naive(matrix, history) for history in histories])
    for _ in range(data.draw(st.integers(0, 8))):
        new, old, late = [], [], []
        for i, history in enumerate(histories):
            gone = history.pop(0) if len(history) == limit else (-1, 1.0)
            entry = data.draw(some)
            at = data.draw(st.integers(0, len(history)))
            history.insert(at, entry)
            newer = [e for e in reversed(history[at + 1 :]) if e[0] >= 0]
            if newer and entry[0] >= 0:
                late.append((i, newer))
            new.append(entry)
            old.append(gone)
        aside = None
        if late:
            rows = [[row for row, _ in newer] for _, newer in late]
            weights = [[weight for _, weight in newer] for _, newer in late]
            aside = Newer(np.array([i for i, _ in late]), rows, weights if weighted else None)
        sums.insert(slots, moved(new), moved(old), aside)
        got = sums.read(slots)
        for i, history in enumerate(histories):
            check((got[0][i], got[1][i], got[2][i]), naive(matrix, history))


# -- by time ------------------------------------------------------------------------------------------------------

HOUR_MS = 3_600_000
#: Per millisecond: half gone after a minute, a day, never.
BY_TIME = (np.log(2) / 60_000, np.log(2) / (24 * HOUR_MS), 0.0)
times = st.sampled_from([0, 1, 59_999, 60_000, HOUR_MS, 24 * HOUR_MS, 365 * 24 * HOUR_MS, (1 << 48) - 1]) | st.integers(
    0, 100 * HOUR_MS
)
timed = st.tuples(st.integers(-1, 11), st.sampled_from([1.0, 2.0, 0.5]), times)


def naive_by_time(matrix, history):
    """Sums, totals and count of ``(row, weight, time)``, in any order, row -1 unknown."""
    known = [entry for entry in history if entry[0] >= 0]
    sums, totals = np.zeros((len(BY_TIME), matrix.shape[1])), np.zeros(len(BY_TIME))
    newest = max((at for _, _, at in known), default=0)
    for k, decay in enumerate(BY_TIME):
        for row, weight, at in known:
            w = weight * np.exp(-decay * (newest - at))
            sums[k] += w * matrix[row].astype(np.float64)
            totals[k] += w
    return sums, totals, len(known)


@pytest.mark.parametrize("compiled", [False, True])
@given(data=st.data())
def test_sums_by_time_equal_summing_one_by_one_whatever_order_they_arrive_in(compiled, data):
    limit = data.draw(st.integers(1, 6))
    weighted = data.draw(st.booleans())
    some = timed if weighted else st.tuples(st.integers(-1, 11), st.just(1.0), times)
    matrix = vectors()
    sums = FadingSums(matrix, BY_TIME, 8, kernels() if compiled else None)
    slots = np.array([5, 2, 7])
    histories = [sorted(data.draw(st.lists(some, max_size=limit)), key=lambda e: e[2]) for _ in slots]
    load(sums, slots, histories, weighted)
    check_slots(sums, slots, [naive_by_time(matrix, history) for history in histories])
    for _ in range(data.draw(st.integers(0, 10))):
        new, old = [], []
        for history in histories:
            entry, gone = data.draw(some), (-1, 1.0, 0)
            if len(history) == limit:
                if entry[2] < history[0][2]:  # too old for it: nothing arrives
                    new.append((-1, 1.0, entry[2]))
                    old.append(gone)
                    continue
                gone = history.pop(0)
            history.append(entry)
            history.sort(key=lambda e: e[2])
            new.append(entry)
            old.append(gone)
        sums.insert(slots, moved(new), moved(old))
        got = sums.read(slots)
        for i, history in enumerate(histories):
            check((got[0][i], got[1][i], got[2][i]), naive_by_time(matrix, history))


@pytest.mark.parametrize("n_steps", [1, 50, MAX_WINDOW + 1])
def test_a_window_by_time_equals_summing_each_state(n_steps):
    matrix, rng = vectors(), random.Random(n_steps)
    sums = FadingSums(matrix, BY_TIME, 1)
    (rows, weights, arrived, left), _ = random_states(n_steps, n_steps)
    at = np.sort([rng.randrange(100 * HOUR_MS) for _ in rows]).astype(np.int64)
    got = sums.window(rows, weights, arrived, left, np.arange(n_steps), at)
    for step in range(n_steps):
        state = [
            (row, weight, when)
            for row, weight, when, a, b in zip(rows, weights, at, arrived, left, strict=True)
            if a <= step < b
        ]
        check((got[0][step], got[1][step], got[2][step]), naive_by_time(matrix, state))


def test_sums_by_time_without_known_items_are_nothing_and_grow():
    sums = FadingSums(vectors(), BY_TIME, 1)
    got = sums.window(np.array([-1]), None, np.array([-1]), np.array([9]), np.array([0, 1]), np.array([5]))
    assert [part.shape for part in got] == [(2, 3, 3), (2, 3), (2,)]
    assert not any(part.any() for part in got)
    sums.insert(np.array([0]), moved([(3, 1.0, 9)]), moved([(-1, 1.0, 0)]))
    sums.grow(3)
    sums.insert(np.array([0]), moved([(-1, 1.0, 50)]), moved([(3, 1.0, 9)]))
    assert not any(part.any() for part in sums.read(np.array([0, 1, 2])))
    sums.insert(np.array([0]), moved([(4, 2.0, 1)]), moved([(-1, 1.0, 0)]))  # older than what was there once
    check([part[0] for part in sums.read(np.array([0]))], naive_by_time(vectors(), [(4, 2.0, 1)]))


def test_sums_by_time_can_not_do_without_times():
    sums = FadingSums(vectors(), BY_TIME, 1)
    with pytest.raises(ValueError, match="need the times"):
        sums.sum_of([1, 2], None)
