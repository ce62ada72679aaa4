"""The laws 1-4 of the contract, against `oracle.Oracle`."""

import hashlib
import json
import random
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import LEAD_MS, Oracle, check_record
from strategies import (
    DELETIONS,
    LATE_ENOUGH,
    MINUTE,
    T0,
    TYPES,
    Driver,
    Erase,
    Event,
    Message,
    arrivals,
    interactions,
    make_space,
    message,
    random_chunks,
    random_space,
    random_stream,
    small_spaces,
    streams,
    topic_of,
)

from stream.core.encoders import AvgEncoder, MixEncoder, VersionedEncoder, encoder_hash, make_encoder, user_version
from stream.core.events import EventRules
from stream.core.history import History, Outcome
from stream.core.history_codec import NEVER, TS_BYTES, HistoryCodec, sort_key
from stream.core.records import decode, kv_entry
from stream.core.space_engine import fallback_record
from stream.errors import StateError

CODEC = HistoryCodec(TYPES)


# -- law 1: history is a set --------------------------------------------------------------------------------------


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


# -- law 2: the vector is a function of the history ---------------------------------------------------------------


class Ledger:
    """What each revision of each user must be published as."""

    def __init__(self, oracle, spaces):
        self.oracle = oracle
        self.spaces = spaces
        self.revisions = {}
        self.want = {}

    def fold(self, operation):
        oracle, user = self.oracle, str(operation.user)
        before = oracle.history(user), oracle.erased_at.get(user)
        if isinstance(operation, Erase):
            oracle.erase(user, operation.ts)
        else:
            oracle.event(*operation)
        if before != (oracle.history(user), oracle.erased_at.get(user)):
            revision = self.revisions[user] = self.revisions.get(user, 0) + 1
            for space in self.spaces:
                self.want[space.version, user, revision] = oracle.expected(user, space.version)
            return user, revision
        return None

    def check(self, result, changes):
        """Every change is published, in order, each as the oracle says; what is sent again is the present state."""
        published = {}
        for key, value in result.output:
            _, _, version, user = key.decode().split(":", 3)
            record = None if value is None else decode(value)
            if record is not None:
                check_record(record, self.want[version, user, record.revision], (version, user, record.revision))
            published.setdefault(version, []).append((user, record and record.revision))
        for space in self.spaces:
            want = [(user, self.want[space.version, user, r] and r) for user, r in changes]
            got = published.get(space.version, [])
            again = got[len(want) :]
            assert got[: len(want)] == want
            assert len(set(again)) == len(again)
            assert not {user for user, _ in again} & {user for user, _ in changes}
            for user, revision in again:
                current = self.revisions[user]
                assert revision == (self.want[space.version, user, current] and current)


def check_every_event(driver, oracle, batches):
    ledger = Ledger(oracle, driver.spaces)
    for topic, operations in batches:
        changes = [change for operation in operations if (change := ledger.fold(operation))]
        ledger.check(driver.feed(topic, [message(operation) for operation in operations]), changes)
    check_end(driver, oracle)


def check_end(driver, oracle):
    """Store, topic and stored history of every user are what the oracle says."""
    for user in oracle.users():
        for space in driver.spaces:
            index = driver.spaces.index(space)
            want = oracle.expected(user, space.version)
            record = driver.record(user, index)
            if want is None:
                assert record is None
                assert driver.topic.get(driver.key(user, index)) is None
                continue
            check_record(record, want, user)
            assert record.user_embedding_version == driver.encoder.version
            assert record.vector.dtype == np.float32
            assert abs(float(np.linalg.norm(record.vector.astype(np.float64))) - 1) <= 1e-5
    for user, stored in driver.states.items():
        history = History.decode(stored, CODEC, driver.encoder.history_limit)
        assert [tuple(i) for i in history.interactions()] == oracle.history(user.decode())
        assert history.erased_at == oracle.erased_at.get(user.decode(), NEVER)


@pytest.mark.parametrize("limit", [2, 100, 1000])
@pytest.mark.parametrize("dim", [1, 2, 48, 256])
def test_every_state_equals_the_formula(dim, limit):
    rng = random.Random(dim * 10_000 + limit)
    space = random_space("items_v1", dim)
    stream = random_stream(rng, 300, users=1, erasures=0.01)
    driver = Driver([space], VersionedEncoder(MixEncoder(), limit))
    check_every_event(driver, Oracle(limit, [space]), random_chunks(rng, stream, 6))


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 300),
    st.sampled_from([1, 2, 48, 256]),
    st.sampled_from([2, 100, 1000]),
    st.sampled_from([1, 3, 20, 200]),
    st.sampled_from([1, 2, 10_000]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_every_state_equals_the_formula_whatever_the_workload(seed, length, dim, limit, mean, hot_users, late):
    rng = random.Random(seed)
    space = random_space("items_v1", dim, seed=seed % 1000)
    stream = random_stream(rng, length, users=rng.choice([1, 3]), late=late, erasures=rng.choice([0.0, 0.03]))
    driver = Driver([space], VersionedEncoder(MixEncoder(), limit), hot_users=hot_users)
    check_every_event(driver, Oracle(limit, [space]), random_chunks(rng, stream, mean))


@given(st.data(), streams(), small_spaces(), st.sampled_from([2, 3, 100]))
def test_every_state_of_a_small_stream_equals_the_formula(data, stream, space, limit):
    driver = Driver([space], VersionedEncoder(MixEncoder(), limit), hot_users=data.draw(st.integers(1, 3)))
    check_every_event(driver, Oracle(limit, [space]), data.draw(arrivals(stream)))


@given(st.data(), streams(max_size=20), st.sampled_from([2, 3, 100]))
def test_every_encoder_equals_the_formula(data, stream, limit):
    space = random_space("items_v1", 3, known=("a", "b", 3, "é"), metric="dot")
    weights = data.draw(st.dictionaries(st.sampled_from(sorted(TYPES)), st.sampled_from([0.25, 1.0, 2.0, 10.0])))
    if data.draw(st.booleans()):
        decay = data.draw(st.sampled_from([0.0, 0.05, 1.0, 50.0, 1000.0]))
        encoder, oracle = AvgEncoder(decay, weights), Oracle(limit, [space], avg_decay=decay, type_weights=weights)
    else:
        alpha = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        long, short = data.draw(st.tuples(*2 * [st.sampled_from([0.0, 0.01, 0.4, 5.0])]))
        encoder = MixEncoder(alpha, long, short, weights)
        oracle = Oracle(limit, [space], alpha_short=alpha, decay_long=long, decay_short=short, type_weights=weights)
    check_every_event(Driver([space], VersionedEncoder(encoder, limit)), oracle, data.draw(arrivals(stream)))


SEVERAL = EventRules(TYPES, fields={"item_id": "of[].item", "type": "of[].type", "ts": "of[].ts"})


@st.composite
def several(draw, users=("u", 7)):
    """Events of several interactions each, and erasures."""
    element = st.tuples(
        st.integers(0, 20).map(lambda n: T0 + n * MINUTE),
        st.sampled_from(["a", "b", "3", "é", "unknown"]),
        st.sampled_from(sorted(TYPES)),
    )
    events = st.tuples(st.sampled_from(users), st.lists(element, max_size=4) | st.lists(element, max_size=12))
    erasures = st.builds(Erase, st.sampled_from(users), st.integers(0, 20).map(lambda n: T0 + n * MINUTE))
    happened = draw(st.lists(st.one_of(events, events, events, erasures), max_size=8))
    again = draw(st.lists(st.sampled_from(happened), max_size=4)) if happened else []
    return draw(st.permutations([*happened, *again]))


def message_of_several(user, elements):
    of = [{"item": item, "type": kind, "ts": ts} for ts, item, kind in elements]
    return Message(str(user).encode(), json.dumps({"user_id": user, "of": of}).encode())


@given(st.data(), several(), small_spaces(), st.sampled_from([2, 3, 100]), st.booleans())
def test_an_event_of_several_items_is_published_once_as_its_interactions_sent_apart(data, log, space, limit, weighted):
    encoder = VersionedEncoder(MixEncoder(type_weights={"like": 3.0} if weighted else {}), limit)
    driver = Driver([space], encoder, SEVERAL, hot_users=data.draw(st.integers(1, 3)))
    latest = Driver([space], encoder, SEVERAL, publish_latest=True)
    apart = Driver([space], encoder)
    oracle = Oracle(limit, [space], type_weights=encoder.encoder.type_weights)
    ledger = Ledger(oracle, [space])
    cuts = data.draw(st.lists(st.integers(0, len(log)), max_size=4))
    for start, end in pairwise([0, *sorted(cuts), len(log)]):
        for erases, group in groupby(log[start:end], lambda one: isinstance(one, Erase)):
            operations, changes, records = [], [], []
            for one in group:
                parts = [one] if erases else [Event(one[0], item, kind, ts) for ts, item, kind in one[1]]
                changes += [change for part in parts if (change := ledger.fold(part))][-1:]
                records.append(message(one) if erases else message_of_several(*one))
                operations += parts
            topic = DELETIONS if erases else "user-events"
            ledger.check(driver.feed(topic, records), changes)
            latest.feed(topic, records)
            apart.feed(topic, [message(operation) for operation in operations])
    for each in (driver, latest, apart):
        check_end(each, oracle)
    assert driver.states == latest.states == apart.states


@given(st.data(), streams())
def test_any_order_and_any_batches_end_in_the_same_records(data, stream):
    space = random_space("items_v1", 2, known=("a", "b", 3, "é"))
    encoder = VersionedEncoder(MixEncoder(), 4)
    ends = []
    for _ in range(2):
        driver = Driver([space], encoder, hot_users=data.draw(st.integers(1, 3)))
        driver.run(data.draw(arrivals(stream)))
        ends.append(driver)
    for user in ("u", 7):
        one, other = (driver.record(user) for driver in ends)
        assert (one is None) == (other is None)
        if one is not None:
            names = ("user_id", "status", "reason", "history_len", "unknown_items", "as_of", "item_embedding_version")
            check_record(one, {n: getattr(other, n) for n in (*names, "vector", "norm")})
    oracle = Oracle(4, [space])
    for operation in stream:
        oracle.erase(*operation) if isinstance(operation, Erase) else oracle.event(*operation)
    for driver in ends:
        check_end(driver, oracle)


@given(st.data(), streams())
def test_a_restart_from_stored_bytes_changes_nothing(data, stream):
    """A crash after any batch, with any part of what was delivered before it delivered again."""
    space = random_space("items_v1", 2, known=("a", "b", 3, "é"))
    batches = data.draw(arrivals(stream))
    cut = data.draw(st.integers(0, len(batches)))
    back = data.draw(st.integers(0, cut))
    driver = Driver([space], VersionedEncoder(MixEncoder(), 3))
    driver.run(batches[:cut])
    driver.restart()
    driver.run(batches[back:])
    oracle = Oracle(3, [space])
    for operation in stream:
        oracle.erase(*operation) if isinstance(operation, Erase) else oracle.event(*operation)
    check_end(driver, oracle)


@given(st.data(), streams())
def test_publishing_only_the_latest_ends_in_the_same(data, stream):
    space = random_space("items_v1", 3, known=("a", "b", 3, "é"))
    batches = data.draw(arrivals(stream))
    every, latest = (Driver([space], VersionedEncoder(MixEncoder(), 3), publish_latest=p) for p in (False, True))
    every.run(batches)
    latest.run(batches)
    assert every.states == latest.states
    assert every.kv.keys() == latest.kv.keys()
    assert every.topic.keys() == latest.topic.keys()
    for key, entry in every.kv.items():
        assert entry[:16] == latest.kv[key][:16]
        assert (every.topic[key] is None) == (latest.topic[key] is None) == (len(entry) == 16)
        if len(entry) > 16:
            one, other = decode(entry[16:]), decode(latest.kv[key][16:])
            np.testing.assert_allclose(one.vector, other.vector, rtol=0, atol=1e-6)
            assert (one.reason, one.history_len, one.as_of) == (other.reason, other.history_len, other.as_of)


@given(st.data(), streams(), st.sampled_from([2, 100]))
def test_two_spaces_at_once(data, stream, limit):
    """Spaces of other dimensions, with other items, in one pass: each as if it were alone."""
    old = random_space("items_v1", 2, known=("a", "b", 3))
    new = random_space("items_v2", 5, known=("b", "é", str(3), "new"), seed=1, metric="dot")
    driver = Driver([old, new], VersionedEncoder(MixEncoder(), limit), hot_users=data.draw(st.integers(1, 3)))
    check_every_event(driver, Oracle(limit, [old, new]), data.draw(arrivals(stream)))


@given(st.data(), streams(), st.sampled_from([2, 100]), st.booleans())
def test_a_space_that_joins_and_one_that_leaves_midway(data, stream, limit, weighted):
    """After live updates from some batch on, and one pass over all users, nobody can tell since when it was there."""
    old = random_space("items_v1", 2, known=("a", "b", 3))
    new = random_space("items_v2", 5, known=("b", "é", str(3), "new"), seed=1, metric="dot")
    weights = {"like": 3.0} if weighted else {}
    encoder = VersionedEncoder(MixEncoder(type_weights=weights), limit)
    batches = data.draw(arrivals(stream))
    joins, leaves = sorted(data.draw(st.tuples(*2 * [st.integers(0, len(batches))])))
    driver = Driver([old], encoder, hot_users=data.draw(st.integers(1, 3)))
    driver.run(batches[:joins])
    driver.spaces = [old, new]
    driver.engine.serve(driver.spaces)
    passed = data.draw(st.integers(joins, leaves))  # the pass over all users comes some batches later
    driver.run(batches[joins:passed])
    result, _ = driver.engine.embed(driver.states, "items_v2", driver.epoch)
    assert not result.states
    driver.kv |= result.entries
    driver.topic |= dict(result.output)
    driver.run(batches[passed:leaves])
    driver.spaces = [new]
    driver.engine.serve(driver.spaces)
    driver.run(batches[leaves:])
    oracle = Oracle(limit, [new], type_weights=weights)
    for operation in stream:
        oracle.erase(*operation) if isinstance(operation, Erase) else oracle.event(*operation)
    for key in [key for key in driver.kv if b":items_v1:" in key]:
        del driver.kv[key], driver.topic[key]
    check_end(driver, oracle)


@given(st.data(), streams())
def test_a_stored_state_read_in_part_says_what_it_says_decoded(data, stream):
    driver = Driver([random_space("items_v1", 2)], VersionedEncoder(MixEncoder(), 5))
    driver.run(data.draw(arrivals(stream)))
    codec = driver.engine.codec
    for state in driver.states.values():
        history, stored = History.decode(state, codec, 5), codec.stored(state)
        assert (stored.revision, stored.as_of_ms) == (history.revision, history.as_of_ms)
        assert [codec.item_and_type(body) for body in stored.bodies] == [key[TS_BYTES:] for key in history.keys]
        cut = data.draw(st.integers(0, len(state) - 1))
        with pytest.raises(StateError):
            codec.stored(state[:cut])


@pytest.mark.parametrize("mean", [1, 3, 8])
def test_two_spaces_at_once_with_users_that_stay_in_memory(mean):
    old, new = random_space("items_v1", 2), random_space("items_v2", 5, known=range(15, 40), seed=1, metric="dot")
    rng = random.Random(mean)
    stream = random_stream(rng, 200, late=0.02)
    driver = Driver([old, new], VersionedEncoder(MixEncoder(), 7))
    check_every_event(driver, Oracle(7, [old, new]), random_chunks(rng, stream, mean))


def test_running_sums_stay_right_over_many_events():
    """At L=1000 with evictions, one user in memory all along."""
    limit, space = 1000, random_space("items_v1", 2, metric="dot")
    oracle = Oracle(limit, [space])
    driver = Driver([space], VersionedEncoder(MixEncoder(), limit))
    rng = random.Random(5)
    stream = [Event("u", rng.randrange(40), "view", T0 + i) for i in range(4000)]
    for start in range(0, len(stream), 4):
        piece = stream[start : start + 4]
        for event in piece:
            oracle.event(*event)
        driver.apply(*piece)
        if start % 500 == 0:
            check_record(driver.record("u"), oracle.expected("u"))
    check_end(driver, oracle)


# -- law 3: unit norm or nothing ----------------------------------------------------------------------------------


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


# -- law 4: never mix spaces --------------------------------------------------------------------------------------


def contract_version(encoder, params, type_weights, limit):
    description = {"encoder": encoder, "params": params, "type_weights": type_weights, "L": limit}
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"{encoder}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:8]}"


def test_default_versions_are_the_contracts_formula():
    mix = {"alpha_short": 0.6, "decay_long": 0.01, "decay_short": 0.15}
    assert user_version(MixEncoder(), 100) == contract_version("mix", mix, {}, 100)
    assert user_version(AvgEncoder(), 100) == contract_version("avg", {"decay": 0.05}, {}, 100)
    assert VersionedEncoder().version == contract_version("mix", mix, {}, 100)
    text = (
        '{"L":100,"encoder":"mix","params":{"alpha_short":0.6,"decay_long":0.01,"decay_short":0.15},"type_weights":{}}'
    )
    assert encoder_hash(MixEncoder(), 100) == hashlib.sha256(text.encode()).hexdigest()


numbers = st.floats(0, 1, allow_subnormal=False).map(abs)
weights = st.dictionaries(st.sampled_from(["view", "like", "achat", "köp"]), st.sampled_from([0.5, 1.0, 1, 2, 2.0]))


@given(st.tuples(numbers, numbers, numbers), weights, st.integers(2, 1000))
def test_versions_follow_the_formula_for_all_parameters(values, type_weights, limit):
    params = dict(zip(("alpha_short", "decay_long", "decay_short"), map(float, values), strict=True))
    listed = {name: float(weight) for name, weight in type_weights.items() if weight != 1.0}
    encoder = make_encoder("mix", params, type_weights)
    assert user_version(encoder, limit) == contract_version("mix", params, listed, limit)


def test_a_parameter_given_as_an_integer_is_the_same_parameter():
    assert user_version(make_encoder("avg", {"decay": 1}, {}), 100) == contract_version("avg", {"decay": 1.0}, {}, 100)
    assert user_version(AvgEncoder(np.float64(0.05)), 100) == user_version(AvgEncoder(), 100)
    spelled_out = make_encoder("mix", {"alpha_short": 0.6, "decay_long": 0.01, "decay_short": 0.15}, {"view": 1})
    assert user_version(spelled_out, 100) == user_version(MixEncoder(), 100)


def test_whatever_decides_a_vector_is_in_the_name():
    versions = [
        user_version(encoder, limit)
        for encoder in [
            AvgEncoder(),
            AvgEncoder(0.06),
            MixEncoder(),
            MixEncoder(alpha_short=0.5),
            MixEncoder(decay_long=0.02),
            MixEncoder(decay_short=0.2),
            MixEncoder(type_weights={"like": 2.0}),
            MixEncoder(type_weights={"like": 3.0}),
            MixEncoder(type_weights={"view": 2.0}),
            MixEncoder(type_weights={"view": 2.0, "like": 2.0}),
        ]
        for limit in (2, 99, 100)
    ]
    assert len(set(versions)) == len(versions)


def test_an_alias_replaces_the_name_and_not_the_hash():
    plain, named = VersionedEncoder(), VersionedEncoder(alias="user_v7")
    assert named.version == "user_v7"
    assert named.hash == plain.hash
    assert plain.version == f"mix-{plain.hash[:8]}"
    assert VersionedEncoder(AvgEncoder(), alias="user_v7").hash != named.hash


@pytest.mark.parametrize(
    "alias", ["fallback", "encoder", "epoch", "watermark", "app", "current", "a:b", "a b", "x" * 65, "é", "a\n"]
)
def test_an_alias_must_be_a_version_name(alias):
    with pytest.raises(ValueError, match="version name"):
        _ = VersionedEncoder(alias=alias).version


@pytest.mark.parametrize(
    ("name", "params", "type_weights"),
    [
        ("sum", {}, {}),
        ("avg", {"alpha_short": 0.5}, {}),
        ("mix", {"decay": 0.5}, {}),
        ("mix", {"name": 0.5}, {}),
        ("mix", {"type_weights": 0.5}, {}),
        ("mix", {"alpha_short": 1.5}, {}),
        ("mix", {"alpha_short": -0.1}, {}),
        ("mix", {"decay_long": float("nan")}, {}),
        ("mix", {"decay_short": float("inf")}, {}),
        ("avg", {"decay": -1.0}, {}),
        ("avg", {}, {"like": 0.0}),
        ("avg", {}, {"like": -1.0}),
        ("avg", {}, {"like": float("nan")}),
    ],
)
def test_encoders_refuse_what_they_are_not_made_for(name, params, type_weights):
    with pytest.raises(ValueError, match=r"encoder|weights"):
        make_encoder(name, params, type_weights)


@given(st.data(), streams(max_size=12))
def test_every_record_names_the_pair_it_was_made_from(data, stream):
    spaces = [random_space("items_v1", 2, known=("a", "b")), random_space("items_v2", 3, known=("a", 3), seed=1)]
    driver = Driver(spaces, VersionedEncoder(alias="user_v7"))
    for topic, operations in data.draw(arrivals(stream)):
        for key, value in driver.feed(topic, [message(operation) for operation in operations]).output:
            _, user_v, item_v, user = key.decode().split(":", 3)
            assert user_v == "user_v7"
            if value is not None:
                record = decode(value)
                assert (record.user_embedding_version, record.item_embedding_version) == (user_v, item_v)
                assert record.user_id == user
                assert len(record.vector) == {"items_v1": 2, "items_v2": 3}[item_v]


def test_the_fallback_record_carries_the_pair_too():
    space = random_space("items_v1", 4)
    record = fallback_record(space, VersionedEncoder(alias="user_v7"))
    assert (record.user_embedding_version, record.item_embedding_version) == ("user_v7", "items_v1")
    assert record.status == "fallback"
    assert record.vector.tobytes() == space.fallback.tobytes()
    assert abs(record.norm - 1) <= 1e-5


# -- the oracle itself --------------------------------------------------------------------------------------------


def test_the_oracle_on_a_case_worked_out_by_hand():
    space = make_space("v", ["a", "b"], np.array([[1.0, 0.0], [0.0, 1.0]]))
    oracle = Oracle(2, [space], avg_decay=np.log(2.0))
    for ts, item in [(3, "b"), (1, "b"), (2, "a"), (3, "b")]:
        oracle.event("u", item, "view", ts * LEAD_MS)
    want = oracle.expected("u")
    assert (want["history_len"], want["unknown_items"], want["as_of"]) == (2, 0, 3 * LEAD_MS)
    np.testing.assert_allclose(want["vector"], np.array([1.0, 2.0]) / np.sqrt(5), atol=1e-7)  # 1/2 : 1
    oracle.erase("u", LEAD_MS)
    assert oracle.expected("u")["reason"] == "too_short_history"
    oracle.erase("u", 2 * LEAD_MS)
    assert oracle.expected("u") is None
    assert oracle.expected("nobody") is None
    assert LATE_ENOUGH > T0


def test_streams_hold_what_they_promise():
    """The strategies reach the cases they exist for: several topics, erasures between events, duplicates."""
    rng = random.Random(1)
    stream = random_stream(rng, 300, erasures=0.05)
    assert {topic_of(o) for o in stream} == {"user-events.view", "user-events.like", "user-deletions"}
    assert len(set(stream)) < len(stream)
    assert any(a.ts > b.ts for a, b in pairwise(stream))
    batches = random_chunks(rng, stream, 5)
    assert sum(len(chunk.operations) for chunk in batches) == len(stream)
    assert kv_entry(b"\0" * 16) == (0, 0, b"")
