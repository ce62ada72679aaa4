"""Law 2: the vector is a function of the history, in every state and on every way there; against `oracle.Oracle`."""

import json
import random
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger import Ledger, check_end, check_every_event
from oracle import Oracle, check_record
from strategies import (
    DELETIONS,
    MINUTE,
    T0,
    TYPES,
    Driver,
    Erase,
    Event,
    Message,
    arrivals,
    examples,
    message,
    random_chunks,
    random_space,
    random_stream,
    small_spaces,
    streams,
)

from stream.core import kinds
from stream.core.encoders import AvgEncoder, MixEncoder, VersionedEncoder
from stream.core.events import EventRules
from stream.core.records import decode


@pytest.mark.parametrize("limit", [2, 100, 1000])
@pytest.mark.parametrize("dim", [1, 2, 48, 256])
def test_every_state_equals_the_formula(dim, limit):
    rng = random.Random(dim * 10_000 + limit)
    space = random_space("items_v1", dim)
    stream = random_stream(rng, 300, users=1, erasures=0.01)
    driver = Driver([space], VersionedEncoder(MixEncoder(), limit))
    check_every_event(driver, Oracle(limit, [space]), random_chunks(rng, stream, 6))


@settings(max_examples=examples(60))
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


@pytest.mark.parametrize("most", [1, 5])
@given(data=st.data(), stream=streams())
def test_kinds_that_are_forgotten_now_and_then_change_nothing(data, stream, most):
    """As in a catalogue that is larger than what is remembered of it: numbers begin anew between any two steps."""
    old, new = (random_space(f"items_v{n}", 2, known=("a", "b", 3, "é")) for n in (1, 2))
    encoder = VersionedEncoder(MixEncoder(type_weights={"like": 3.0}), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "_MEMO_LIMIT", most)
        driver = Driver([old, new], encoder)
        check_every_event(driver, Oracle(3, [old, new], type_weights={"like": 3.0}), data.draw(arrivals(stream)))
        driver.engine.embed(0, driver.states, (encoder.version, "items_v2"))


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
    driver.serve([old, new])
    passed = data.draw(st.integers(joins, leaves))  # the pass over all users comes some batches later
    driver.run(batches[joins:passed])
    result = driver.embed((encoder.version, "items_v2"))
    assert not result.states
    driver.kv |= result.entries
    driver.topic |= dict(result.output)
    driver.run(batches[passed:leaves])
    driver.serve([new])
    driver.run(batches[leaves:])
    oracle = Oracle(limit, [new], type_weights=weights)
    for operation in stream:
        oracle.erase(*operation) if isinstance(operation, Erase) else oracle.event(*operation)
    for key in [key for key in driver.kv if b":items_v1:" in key]:
        del driver.kv[key], driver.topic[key]
    check_end(driver, oracle)


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
