"""Law 1: a history is a set, however it came together."""

from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    MINUTE,
    T0,
    TYPES,
    interactions,
)

from stream.core.history import History, Outcome
from stream.core.history_codec import NEVER, HistoryCodec, sort_key

CODEC = HistoryCodec(TYPES)


def naive(adds, erased_at, limit):
    """Top `limit` of the set that the erasure leaves."""
    left = {i for i in adds if i[0] > erased_at}
    return sorted(left, key=lambda i: (i[0], i[1].encode(), i[2].encode()))[-limit:]


def build(adds, erasures=(), limit=3):
    history = History(CODEC, limit)
    for ts, item, kind in adds:
        history.add(sort_key(ts, item.encode(), kind.encode()))
    for erased_at in erasures:
        history.erase(erased_at)
    return history


def content(history):
    return [tuple(i) for i in history.interactions()], history.erased_at


limits = st.sampled_from([1, 2, 3, 5, 100])
some = st.lists(interactions, max_size=8)
erasure_times = st.lists(st.integers(0, 20).map(lambda n: T0 + n * MINUTE), max_size=2)


@given(st.data(), st.lists(interactions, max_size=20), erasure_times, limits)
def test_any_order_with_duplicates_and_erasures_ends_in_the_same_set(data, adds, erasures, limit):
    steps = [("add", a) for a in adds] + [("erase", e) for e in erasures]
    steps += data.draw(st.lists(st.sampled_from(steps), max_size=5)) if steps else []
    history = History(CODEC, limit)
    for what, value in data.draw(st.permutations(steps)):
        if what == "erase":
            history.erase(value)
        else:
            ts, item, kind = value
            history.add(sort_key(ts, item.encode(), kind.encode()))
    erased_at = max(erasures, default=NEVER)
    assert content(history) == (naive(adds, erased_at, limit), erased_at)


@given(some, some, erasure_times, erasure_times, limits)
def test_merge_is_the_join_of_both_and_commutes(a, b, ea, eb, limit):
    x, y = build(a, ea, limit), build(b, eb, limit)
    erased_at = max([*ea, *eb], default=NEVER)
    one, other = x.merge(y), y.merge(x)
    assert content(one) == content(other) == (naive([*a, *b], erased_at, limit), erased_at)
    assert one.revision == other.revision >= max(x.revision, y.revision)


@given(some, some, some, erasure_times, erasure_times, erasure_times, limits)
def test_merge_is_associative(a, b, c, ea, eb, ec, limit):
    x, y, z = build(a, ea, limit), build(b, eb, limit), build(c, ec, limit)
    assert content(x.merge(y).merge(z)) == content(x.merge(y.merge(z)))


@given(some, erasure_times, limits)
def test_merge_is_idempotent_and_changes_neither_argument(a, ea, limit):
    x, y = build(a, ea, limit), build(a, ea, limit)
    merged = x.merge(y)
    assert (content(merged), merged.revision) == (content(x), x.revision)
    assert content(x) == content(y) == (naive(a, max(ea, default=NEVER), limit), max(ea, default=NEVER))


@given(st.lists(interactions, max_size=15), limits)
def test_outcomes_say_what_happened(adds, limit):
    history = History(CODEC, limit)
    seen = set()
    for ts, item, kind in adds:
        before, revision = content(history), history.revision
        outcome, evicted = history.add(sort_key(ts, item.encode(), kind.encode()))
        kept = naive(seen, NEVER, limit)
        seen.add((ts, item, kind))
        if (ts, item, kind) in kept:
            want = Outcome.DUPLICATE
        elif (ts, item, kind) in naive(seen, NEVER, limit):
            want = Outcome.APPLIED
        else:
            want = Outcome.TOO_OLD
        assert outcome is want
        if want is Outcome.APPLIED:
            assert history.revision == revision + 1
            gone = [sort_key(t, i.encode(), k.encode()) for t, i, k in {*kept} - {*naive(seen, NEVER, limit)}]
            assert gone == ([] if evicted is None else [evicted])
        else:
            assert (content(history), history.revision, evicted) == (before, revision, None)


def test_an_erasure_reaches_its_own_time_and_no_further():
    history = build([(T0, "a", "view"), (T0 + 1, "b", "view")], limit=5)
    assert history.erase(T0) == (True, [sort_key(T0, b"a", b"view")])
    assert history.add(sort_key(T0, "\U0010ffff".encode(), b"view"))[0] is Outcome.ERASED
    assert history.add(sort_key(T0 + 1, b"c", b"view"))[0] is Outcome.APPLIED
    assert history.erase(T0) == (False, [])
    assert history.erase(T0 - 1) == (False, [])
    assert history.erased_at == T0
