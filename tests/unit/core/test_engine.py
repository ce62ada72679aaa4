"""The batch step: what is counted, turned away, published, and sent again (laws 5-7)."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
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
    message,
    of_events,
    random_space,
    streams,
)

from stream.core.batch import Batch, Op
from stream.core.encoders import AvgEncoder, MixEncoder, VersionedEncoder
from stream.core.engine import Engine
from stream.core.events import EventRules, Reason
from stream.core.history import History
from stream.core.history_codec import HistoryCodec, sort_key, stored_order
from stream.core.records import decode, encode, framed, kv_entry, to_json, unframed
from stream.core.space_engine import Pair
from stream.errors import StateError
from stream.keys import partition_of

SPACE = random_space("items_v1", 4, known=["a", "b", "c", *range(20)])
TOPIC = "user-events.view"


def view(user, item, minute=0):
    return Event(user, item, "view", T0 + minute * MINUTE)


def driver(limit=100, **options):
    spaces = options.pop("spaces", [SPACE])
    return Driver(spaces, VersionedEncoder(options.pop("encoder", MixEncoder()), limit), **options)


def revisions(result):
    return [None if value is None else decode(value).revision for _, value in result.output]


def nothing(result):
    return result.states == {} == result.entries and result.output == []


def counted(result):
    return {name: n for name, n in of_events(result.counts).items() if n}


# -- one event in, one vector out ---------------------------------------------------------------------------------


def test_one_event_in_one_record_out():
    d = driver()
    result = d.apply(view(42, "a"))
    ((key, value),) = result.output
    assert key == f"uemb:{d.encoder.version}:items_v1:42".encode()
    assert result.entries == {key: (1).to_bytes(8, "big") + (1).to_bytes(8, "big") + value}
    assert list(result.states) == [b"42"]
    record = decode(value)
    assert (record.status, record.reason, record.history_len, record.as_of) == ("fallback", "too_short_history", 1, T0)
    assert value[-16:] == record.vector.astype("<f4").tobytes() == SPACE.fallback.tobytes()


def test_one_record_per_applied_event_in_log_order():
    d = driver()
    result = d.apply(view("u", "a"), view("v", "a"), view("u", "b", 1), view("u", "c", 2))
    users = [key.decode().rsplit(":", 1)[1] for key, _ in result.output]
    assert list(zip(users, revisions(result), strict=True)) == [("u", 1), ("v", 1), ("u", 2), ("u", 3)]
    assert counted(result) == {"applied": 4}
    assert {user: stored_order(state) for user, state in result.states.items()} == {b"u": (1, 3), b"v": (1, 1)}


@pytest.mark.parametrize("elements", [2, 9, 300])
def test_one_record_per_event_of_several_items(elements):
    """A small record of many elements must not become as many records, each with a vector in it."""
    d = driver(rules=EventRules(TYPES, fields={"item_id": "of[]"}))
    event = {"user_id": "u", "type": "view", "ts": T0, "of": list(range(elements))}
    records = [Message(b"u", json.dumps(event | {"ts": ts}).encode()) for ts in (T0, T0 + 1, T0 + 1)]
    result = d.feed(TOPIC, records)
    assert revisions(result) == [elements, 2 * elements]
    assert revisions(d.feed(TOPIC, records[1:])) == [2 * elements]
    oracle = Oracle(100, [SPACE])
    for ts in (T0, T0 + 1):
        for item in range(elements):
            oracle.event("u", item, "view", ts)
    check_record(d.record("u"), oracle.expected("u"))


def test_revision_counts_changes_only():
    d = driver(limit=2)
    d.apply(view("u", "a", 5), view("u", "b", 6), view("u", "c", 7))
    d.apply(view("u", "b", 6))
    d.apply(view("u", "a", 1))
    d.apply(Erase("u", T0 - 10 * MINUTE))
    d.apply(Erase("u", T0 - 10 * MINUTE))
    d.apply(Erase("u", T0 - 20 * MINUTE))
    assert d.record("u").revision == 4
    d.restart()
    d.apply(view("u", "d", 8))
    assert d.record("u").revision == 5


def test_integer_and_text_ids_are_one_user_and_one_item():
    d = driver()
    d.apply(Event(5, 7, "view", T0), Event("5", "7", "view", T0), Event("5", 7, "view", T0))
    assert d.record("5").history_len == 1
    assert (d.counts["applied"], d.counts["duplicate"]) == (1, 2)


def test_an_empty_batch_causes_nothing():
    d = driver()
    result = d.feed(TOPIC, [])
    assert nothing(result)
    assert not counted(result)


# -- counters and rejects -----------------------------------------------------------------------------------------


def test_every_record_is_counted_once_by_what_became_of_it():
    d = driver(limit=2, rules=EventRules(TYPES, frozenset({"impression"})))
    d.apply(Erase("v", T0))
    bad = Message(b"u", b"{", LATE_ENOUGH)
    records = [message(e) for e in (view("u", "a", 5), view("u", "b", 6), view("u", "c", 7))]
    records += [message(e) for e in (view("u", "b", 6), view("u", "a", 5), view("v", "a", 5), view("v", "a", 6))]
    records += [message(Event("u", "a", "impression", T0)), bad, message(Event("u", "a", "buy", T0))]
    result = d.feed(TOPIC, records)
    want = {"applied": 4, "duplicate": 1, "too_old": 1, "erased": 1, "ignored": 1, "rejected": 2}
    assert counted(result) == want
    assert sum(want.values()) == len(records)


def test_rejects_carry_their_records_index_and_the_neighbours_go_on():
    d = driver()
    records = [
        message(view("u", "a")),
        Message(b"u", None),
        Message(None, b"{}"),
        message(view("u", "b", 1)),
        Message(b"u", b"not json"),
        message(view("u", "c", 2)),
    ]
    batch = d.decode(TOPIC, records)
    assert [(index, reject.reason) for index, reject in batch.rejects] == [
        (1, Reason.NULL_VALUE),
        (2, Reason.NULL_KEY),
        (4, Reason.NOT_JSON),
    ]
    assert d.feed(TOPIC, records).counts["applied"] == 3
    assert d.record("u").history_len == 3


def test_a_batch_of_bad_records_only_publishes_nothing():
    d = driver()
    result = d.feed(TOPIC, [Message(b"u", b"{")] * 5)
    assert nothing(result)
    assert counted(result) == {"rejected": 5}


@pytest.mark.parametrize("kind", ["event", "erasure", "cached"])
def test_records_on_another_partition_are_turned_away(kind):
    users = [str(n) for n in range(50)]
    partitions, own = 4, 2
    d = driver(partition=own, partitions=partitions)
    if kind == "cached":
        d.feed(TOPIC, [message(view(u, "a")) for u in users if partition_of(u.encode(), partitions) == own])
    if kind == "erasure":
        batch = d.decode(DELETIONS, [message(Erase(user, T0)) for user in users])
    else:
        batch = d.decode(TOPIC, [message(view(user, "b", 1)) for user in users])
    turned_away = {users[index] for index, reject in batch.rejects if reject.reason is Reason.WRONG_PARTITION}
    assert turned_away == {user for user in users if partition_of(user.encode(), partitions) != own}
    assert len(batch.ops) == len(users) - len(turned_away) > 0
    assert counted(batch)["rejected"] == len(turned_away)


def test_a_mismatched_key_is_that_whatever_its_partition():
    d = driver(partition=0, partitions=1000)
    batch = d.decode(TOPIC, [Message(b"nobody", message(view("u", "a")).value)])
    assert [reject.reason for _, reject in batch.rejects] == [Reason.KEY_MISMATCH]


def test_only_users_that_are_not_in_memory_are_asked_for():
    d = driver()
    d.apply(view("u", "a"))
    batch = d.decode(TOPIC, [message(view(u, "b", 1)) for u in ("u", "v", "w", "v")])
    assert d.engine.missing([batch]) == {0: [b"v", b"w"]}


def test_ignored_types_leave_no_trace():
    d = driver(rules=EventRules(TYPES, frozenset({"impression"})))
    result = d.feed(TOPIC, [message(Event("u", "a", "impression", T0 + n)) for n in range(3)])
    assert nothing(result)
    assert counted(result) == {"ignored": 3}
    d.apply(view("u", "a"))
    result = d.feed(TOPIC, [message(Event("u", "a", "impression", T0 + 9))])
    assert not result.output
    assert d.record("u").revision == 1


# -- sent again when seen again (law 5) ---------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True], ids=["in memory", "from stored bytes"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_duplicate_sends_the_current_state_again(restarted, repeats):
    d = driver()
    d.apply(view("u", "a"), view("u", "b", 1), view("u", "c", 2))
    before, kv = d.record("u"), dict(d.kv)
    if restarted:
        d.restart()
    result = d.apply(*[view("u", "b", 1)] * repeats)
    assert counted(result) == {"duplicate": repeats}
    assert revisions(result) == [3]
    assert stored_order(result.states[b"u"]) == (d.epoch, 3)
    ((key, value),) = result.output
    assert result.entries[key] == d.epoch.to_bytes(8, "big") + (3).to_bytes(8, "big") + value
    assert decode(value).epoch == d.epoch == (2 if restarted else 1)
    check_record(decode(value), {"history_len": 3, "as_of": before.as_of, "vector": before.vector, "norm": before.norm})
    if not restarted:
        assert d.kv == kv


def test_a_duplicate_beside_a_change_is_published_with_it():
    d = driver()
    d.apply(view("u", "a"))
    result = d.apply(view("u", "a"), view("u", "b", 1), view("u", "a"))
    assert revisions(result) == [2]
    assert counted(result) == {"applied": 1, "duplicate": 2}


def test_the_same_event_twice_in_the_batch_that_brings_it():
    d = driver()
    result = d.apply(view("u", "a"), view("u", "a"))
    assert revisions(result) == [1]


def test_a_covered_erasure_sends_the_current_state_again():
    d = driver()
    d.apply(view("u", "a"), view("u", "b", 20))
    d.apply(Erase("u", T0))
    assert (d.record("u").history_len, d.record("u").revision) == (1, 3)
    d.restart()
    for ts in (T0, T0 - 3 * MINUTE):
        result = d.apply(Erase("u", ts))
        assert revisions(result) == [3]
        assert stored_order(result.states[b"u"]) == (2, 3)


def test_a_covered_erasure_of_an_erased_user_sends_the_tombstone_again():
    d = driver()
    d.apply(view("u", "a"))
    d.apply(Erase("u", T0))
    d.restart()
    result = d.apply(Erase("u", T0))
    key = d.key("u")
    assert result.output == [(key, None)]
    assert kv_entry(result.entries[key]) == (2, 2, b"")
    assert stored_order(result.states[b"u"]) == (2, 2)


def test_what_is_too_old_does_nothing():
    d = driver(limit=2)
    d.apply(view("u", "a", 1), view("u", "b", 2))
    for late in (view("u", "z", 0), Event("u", "a", "like", T0 + 1 * MINUTE)):  # "like" comes before "view"
        result = d.apply(late)
        assert counted(result) == {"too_old": 1}
        assert nothing(result)


def test_what_is_erased_before_it_arrives_does_nothing():
    d = driver()
    d.apply(Erase("u", T0))
    result = d.apply(view("u", "a"), view("u", "a", 5))
    assert counted(result) == {"erased": 2}
    assert nothing(result)
    assert d.record("u") is None


def test_a_user_can_be_sent_again_on_request():
    """For a store that lost writes: whoever has a state is sent, whoever has none is not."""
    d = driver()
    d.apply(view("u", "a"), view("u", "b", 1))
    d.apply(Erase("gone", T0))
    before = d.record("u")
    d.restart()
    batch = Batch(0, [Op(user, None) for user in (b"u", b"gone", b"nobody")])
    result = d.step(batch)
    published = dict(result.output)
    assert published.keys() == result.entries.keys() == {d.key("u"), d.key("gone")}
    assert published[d.key("gone")] is None
    again = decode(published[d.key("u")])
    assert (again.epoch, again.revision, again.history_len) == (2, 2, 2)
    np.testing.assert_allclose(again.vector, before.vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("topic", [TOPIC, DELETIONS])
def test_what_causes_nothing_must_be_where_its_key_belongs_too(topic):
    d = driver(rules=EventRules(TYPES, frozenset({"seen"})), partition=1, partitions=3)
    value = None if topic == DELETIONS else b'{"user_id": %d, "item_id": 1, "type": "seen", "ts": %d}'
    records = [SimpleNamespace(key=b"%d" % n, value=value and value % (n, T0), timestamp=T0) for n in range(30)]
    here = [partition_of(record.key, 3) == 1 for record in records]
    decoded = d.decode(topic, records)
    assert [index for index, _ in decoded.rejects] == [n for n, is_here in enumerate(here) if not is_here]
    assert {reject.reason for _, reject in decoded.rejects} == {Reason.WRONG_PARTITION}
    assert decoded.placed == sum(here)


def test_a_withdrawn_erasure_is_counted_and_changes_nothing():
    d = driver()
    d.apply(view("u", "a"))
    d.apply(Erase("u", T0))
    result = d.feed(DELETIONS, [Message(b"u", None), Message(b"never-seen", None)])
    assert counted(result) == {"withdrawn": 2}
    assert nothing(result)
    assert counted(d.apply(view("u", "a"))) == {"erased": 1}


@given(st.data(), streams(max_size=15))
def test_a_crash_between_any_two_writes_loses_nothing(data, stream):
    """State is stored and publications are lost: replaying the batch publishes what was lost."""
    batches = data.draw(arrivals(stream))
    if not batches:
        return
    d = driver(limit=3)
    lost = data.draw(st.integers(0, len(batches) - 1))
    d.run(batches[:lost])
    kept = dict(d.kv), dict(d.topic)
    d.run(batches[lost : lost + 1])
    d.kv, d.topic = (dict(part) for part in kept)  # neither the output nor the store was written
    d.restart()
    d.run(batches[lost:])
    oracle = Oracle(3, [SPACE])
    for operation in stream:
        oracle.erase(*operation) if isinstance(operation, Erase) else oracle.event(*operation)
    for user in oracle.users():
        want = oracle.expected(user)
        if want is None:
            assert d.kv.get(d.key(user), b"\0" * 16)[16:] == b""
            if oracle.erased_at.get(user) is not None:
                assert d.topic[d.key(user)] is None
                assert d.key(user) in d.kv
        else:
            check_record(d.record(user), want)


# -- erasures -----------------------------------------------------------------------------------------------------


def test_an_erased_user_leaves_a_tombstone_a_prefix_and_a_marker():
    d = driver()
    d.apply(view("u", "a"), view("u", "b", 1))
    result = d.apply(Erase("u", T0))
    key = d.key("u")
    assert result.output == [(key, None)]
    assert result.entries == {key: (1).to_bytes(8, "big") + (3).to_bytes(8, "big")}
    assert counted(result) == {"erasures": 1}
    state = History.decode(result.states[b"u"], HistoryCodec(TYPES), 100)
    assert (state.keys, state.erased_at, state.revision) == ([], T0 + LEAD_MS, 3)
    assert b"a" not in result.states[b"u"][25:]


def test_the_marker_survives_restarts_and_new_interactions():
    d = driver()
    d.apply(Erase("u", T0))
    d.restart()
    assert counted(d.apply(view("u", "a", 5))) == {"erased": 1}
    d.apply(view("u", "a", 6), view("u", "b", 7))
    assert d.record("u").status == "ok"
    d.restart()
    assert counted(d.apply(view("u", "c", 5))) == {"erased": 1}
    assert History.decode(d.states[b"u"], HistoryCodec(TYPES), 100).erased_at == T0 + LEAD_MS


def test_an_erasure_takes_what_it_covers_and_leaves_the_rest():
    d, oracle = driver(), Oracle(100, [SPACE])
    events = [view("u", item, minute) for minute, item in enumerate(["a", "b", "c", 1, 2, 3, 4, 5])]
    for event in events:
        oracle.event(*event)
    d.apply(*events)
    oracle.erase("u", T0 - 2 * MINUTE)
    d.apply(Erase("u", T0 - 2 * MINUTE))
    assert d.record("u").history_len == 4
    check_record(d.record("u"), oracle.expected("u"))


def test_an_erasure_of_somebody_unknown_is_kept():
    d = driver()
    result = d.apply(Erase("never-seen", T0))
    assert result.output == [(d.key("never-seen"), None)]
    assert stored_order(d.states[b"never-seen"]) == (1, 1)
    assert counted(d.apply(view("never-seen", "a"))) == {"erased": 1}


# -- many users, many events --------------------------------------------------------------------------------------


def test_leaving_memory_frees_slots_and_changes_nothing():
    rng = random.Random(4)
    d, oracle = driver(limit=5, hot_users=3), Oracle(5, [SPACE])
    for n in range(150):
        events = [view(rng.randrange(40), rng.randrange(25), n * 10 + i) for i in range(rng.randrange(1, 12))]
        for event in events:
            oracle.event(*event)
        d.apply(*events)
    for user in oracle.users():
        check_record(d.record(user), oracle.expected(user))
    assert d.engine._users.capacity == d.engine._publishers[0]._sums.capacity <= 64


def test_more_users_in_a_batch_than_memory_holds():
    d, oracle = driver(hot_users=2), Oracle(100, [SPACE])
    for minute in range(3):
        events = [view(user, (user + minute) % 25, minute) for user in range(300)]
        for event in events:
            oracle.event(*event)
        d.apply(*events)
    for user in range(300):
        check_record(d.record(user), oracle.expected(user))


@pytest.mark.parametrize("latest", [False, True])
@pytest.mark.parametrize("order", ["in order", "reversed", "shuffled"])
def test_a_user_with_3000_events_in_one_batch(order, latest):
    d, oracle = driver(publish_latest=latest), Oracle(100, [SPACE])
    d.apply(view("u", "a", -1), view("other", "a"))
    oracle.event(*view("u", "a", -1))
    events = [view("u", n % 25, n) for n in range(3000)]
    if order == "reversed":
        events.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(events)
    result = d.apply(*events[:1500], view("other", "b", 1), *events[1500:])
    published = iter([decode(value) for key, value in result.output if key.endswith(b":u")])
    revision, kept = 1, [T0 - MINUTE]
    for n, event in enumerate(events):
        oracle.event(*event)
        kept = sorted([*kept, event.ts])[-100:]
        if event.ts not in kept:
            continue
        revision += 1
        if not latest:
            record = next(published)
            assert record.revision == revision
            if n % 97 == 0:
                check_record(record, oracle.expected("u"), n)
    if latest:
        assert next(published).revision == revision
    assert next(published, None) is None
    check_record(d.record("u"), oracle.expected("u"))
    assert len([key for key, _ in result.output if key.endswith(b":other")]) == 1
    d.apply(view("u", "c", 5000))
    oracle.event(*view("u", "c", 5000))
    check_record(d.record("u"), oracle.expected("u"))


@pytest.mark.parametrize("per_batch", [1, 2, 3, 4, 5, 6, 9])
def test_several_events_of_several_users_in_one_batch(per_batch):
    d, oracle = driver(limit=6, encoder=AvgEncoder(0.3)), Oracle(6, [SPACE], avg_decay=0.3)
    minute = 0
    for _ in range(8):
        events = []
        for i in range(per_batch):
            minute += 1
            events += [view(user, (minute * 7 + user) % 25, minute) for user in range(3) if user <= i or user == 0]
        for event in events:
            oracle.event(*event)
        d.apply(*events)
        for user in oracle.users():
            check_record(d.record(user), oracle.expected(user), (per_batch, minute, user))


# -- ways of publishing -------------------------------------------------------------------------------------------


def test_publishing_the_latest_sends_one_record_a_user():
    d = driver(publish_latest=True)
    result = d.apply(view("u", "a"), view("v", "a"), view("u", "b", 1), view("u", "c", 2), view("v", "b", 1))
    assert revisions(result) == [3, 2] or revisions(result) == [2, 3]
    assert counted(result) == {"applied": 5}
    assert {key for key, _ in result.output} == set(result.entries)
    assert revisions(d.apply(view("u", "a"))) == [3]


def test_json_output_says_what_the_store_says():
    d = driver(json_output=True)
    result = d.apply(view("é", "a"), view("é", "b", 1))
    for key, value in result.output:
        document = json.loads(value)
        assert document["user_id"] == "é"
        assert document["user_embedding"]["dim"] == len(document["user_embedding"]["vector"]) == 4
        assert key == d.key("é")
    stored = d.record("é")
    assert json.loads(result.output[-1][1]) == json.loads(json.dumps(to_json(stored)))
    vector = np.array(document["user_embedding"]["vector"], dtype=np.float32)
    assert vector.tobytes() == stored.vector.tobytes()
    assert d.apply(Erase("é", T0)).output == [(d.key("é"), None)]
    assert kv_entry(d.kv[d.key("é")])[2] == b""


def test_framed_output_is_the_record_of_the_store_under_the_schemas_id():
    d = driver(schema_id=7)
    result = d.apply(view("é", "a"), view("é", "b", 1))
    key, value = result.output[-1]
    assert value == framed(kv_entry(d.kv[key])[2], 7)
    assert value.startswith(b"\0\0\0\0\7")
    assert value.endswith(decode(value).vector.tobytes())
    assert encode(decode(value)) == unframed(value) == kv_entry(d.kv[key])[2]
    assert d.apply(Erase("é", T0)).output == [(d.key("é"), None)]


def test_two_spaces_publish_two_records_under_one_revision():
    other = random_space("items_v2", 7, known=["a", "zz"], seed=3)
    d = driver(spaces=[SPACE, other])
    result = d.apply(view("u", "a"), view("u", "b", 1))
    keys = [d.key("u", 0), d.key("u", 1)]
    assert sorted(key for key, _ in result.output) == sorted(keys * 2)
    assert set(result.entries) == set(keys)
    one, two = d.record("u", 0), d.record("u", 1)
    assert (one.revision, one.epoch, one.as_of) == (two.revision, two.epoch, two.as_of)
    assert (one.reason, one.unknown_items, len(one.vector)) == ("", 0, 4)
    assert (two.reason, two.unknown_items, len(two.vector)) == ("too_short_history", 1, 7)
    result = d.apply(Erase("u", T0))
    assert sorted(result.output) == [(key, None) for key in sorted(keys)]


# -- damage -------------------------------------------------------------------------------------------------------


def test_a_stored_state_that_can_not_be_read_stops_the_step():
    d = driver()
    d.apply(view("u", "a"))
    d.restart()
    d.states[b"u"] = d.states[b"u"][:-1]
    with pytest.raises(StateError):
        d.apply(view("u", "b", 1))


def test_every_publication_is_under_the_present_epoch():
    d = driver()
    d.apply(view("u", "a"))
    d.epoch = 7
    d.engine.claim(0, 7)
    result = d.apply(view("u", "b", 1))
    assert decode(result.output[0][1]).epoch == 7
    assert stored_order(result.states[b"u"]) == (7, 2)


def test_memory_is_bounded_by_the_hot_cache_whatever_passes_through():
    pairs = [Pair(VersionedEncoder(MixEncoder(), 100), SPACE)]
    engine = Engine(pairs, EventRules(TYPES), partitions=1, hot_users=2_000)
    engine.claim(0, 1)
    key = sort_key(T0, b"3", b"view")
    for start in range(0, 40_000, 400):
        batch = Batch(0, [Op(str(user).encode(), key) for user in range(start, start + 400)])
        engine.apply([batch], {0: dict.fromkeys(engine.missing([batch]).get(0, ()))})
        assert len(engine._users.slots[0]) <= 2_000
    assert engine._users.capacity == engine._publishers[0]._sums.capacity <= 4 * 2_000
    assert len(engine._users.slots[0]) == 2_000
