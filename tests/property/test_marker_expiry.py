"""The end of erasure markers changes nothing that is published: whatever the batches, the backlog, the restarts."""

from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import MINUTE, T0, TYPES, Driver, Erase, Event, examples, message, random_space, streams, topic_of

from stream.core.history import History
from stream.core.history_codec import NEVER, HistoryCodec, marker_erased_at
from stream.core.records import kv_entry
from stream.worker.marker_expiry import stream_time_ms

#: Markers are kept for so long; no event is later than that, which is what the retention of input topics is for.
KEPT_MS = 60 * MINUTE
USERS = ("a", "b")


@st.composite
def logs(draw):
    """Records of three topics, each in the order of their Kafka times: {topic: [(Kafka time, operation)]}."""
    out = {}
    now_ms = T0
    gaps = st.sampled_from([0, 1, 10, 40, 90])
    for gap, user, kind, late in draw(
        st.lists(
            st.tuples(
                gaps, st.sampled_from(USERS), st.sampled_from(["view", "like", "erase", "erase"]), st.integers(0, 60)
            ),
            min_size=5,
            max_size=30,
        )
    ):
        now_ms += gap * MINUTE
        operation = Erase(user, now_ms) if kind == "erase" else Event(user, gap % 7, kind, now_ms - late * MINUTE)
        out.setdefault(topic_of(operation), []).append((now_ms, operation))
    return out


def end_markers(driver, before_ms):
    """What a worker does about markers of erasures before a time, at once; return how many there were."""
    found = {user: (marker_erased_at(state), state) for user, state in driver.states.items()}
    markers = {user: state for user, (at, state) in found.items() if at is not None and at < before_ms}
    if markers:
        result = driver.engine.end_markers(0, markers)
        assert sorted(result.forgotten) == sorted(markers)
        driver.topic |= dict(result.output)
        for key in result.removals:
            assert not driver.kv.pop(key)[16:], "a vector was removed"
        for user in result.forgotten:
            del driver.states[user]
    return len(markers)


def what_is_published(driver):
    """All live records, but for epoch and revision, and the interactions of all histories."""
    records = {}
    for key, entry in driver.kv.items():
        body = kv_entry(entry)[2]
        assert driver.topic[key] == (body or None)
        if body:
            record = driver.record(key.decode().rsplit(":", 1)[1])
            fields = (record.status, record.reason, record.history_len, record.unknown_items, record.as_of)
            records[key] = (*fields, record.vector.round(6).tolist())
    codec = HistoryCodec(TYPES)
    states = {user: History.decode(state, codec, 100).keys for user, state in driver.states.items()}
    return records, {user: keys for user, keys in states.items() if keys}


@settings(max_examples=examples(200))
@given(st.data(), logs())
def test_no_record_depends_on_when_markers_end(data, log):
    space = random_space("items_v1", 3, known=range(6))
    plain, driver = (Driver([space], hot_users=2) for _ in range(2))
    for topic, records in log.items():
        plain.feed(topic, [message(operation) for _, operation in records])
    left = {topic: list(records) for topic, records in log.items()}
    newest_ms = {}
    clock_ms = max(ms for records in log.values() for ms, _ in records)
    newest_order = {}
    while any(left.values()):
        topic = data.draw(st.sampled_from([topic for topic, records in left.items() if records]))
        size = data.draw(st.integers(1, 6))
        batch, left[topic] = left[topic][:size], left[topic][size:]
        newest_ms[topic] = batch[-1][0]
        result = driver.feed(topic, [message(operation) for _, operation in batch])
        for key, entry in result.entries.items():  # law 7: also of who comes back after the marker's end
            assert entry[:16] >= newest_order.get(key, b"")
            newest_order[key] = entry[:16]
        what_next = data.draw(st.sampled_from(["nothing", "look", "look", "restart"]))
        if what_next == "restart":
            driver.restart()
        elif what_next == "look":
            now_ms = stream_time_ms([(newest_ms.get(t), not records) for t, records in left.items()], clock_ms)
            if now_ms is not None:
                end_markers(driver, now_ms - KEPT_MS)
    assert what_is_published(driver) == what_is_published(plain)
    end_markers(driver, clock_ms + KEPT_MS)
    assert what_is_published(driver) == what_is_published(plain)
    assert all(marker_erased_at(state) is None for state in driver.states.values())
    assert all(kv_entry(entry)[2] for entry in driver.kv.values()), "a deletion outlived its marker"


def test_who_comes_back_after_the_markers_end_begins_above_what_was_forgotten():
    driver = Driver([random_space("items_v1", 3)])
    driver.apply(*(Event("a", n, "view", T0 + n) for n in range(5)))
    driver.apply(Erase("a", T0))
    last = driver.kv[driver.key("a")][:16]
    assert end_markers(driver, T0 + 6 * MINUTE) == 1
    assert driver.apply(Event("a", 1, "view", T0 + 10 * MINUTE)).entries[driver.key("a")][:16] > last
    assert History.decode(driver.states[b"a"], HistoryCodec(TYPES), 100).erased_at == NEVER


def test_keys_that_were_left_behind_go_with_the_marker():
    driver = Driver([random_space("items_v1", 3)])
    driver.apply(Erase("a", T0))
    result = driver.engine.end_markers(0, {b"a": driver.states[b"a"]}, [b"uemb:old:items_v1:"])
    assert result.output == [(b"uemb:old:items_v1:a", None)], "the others' tombstones are out since the erasure"
    assert result.removals == [driver.key("a"), b"uemb:old:items_v1:a"]


@given(streams())
def test_a_marker_is_an_erased_history_without_interactions(stream):
    driver = Driver([random_space("items_v1", 3)])
    driver.run([(topic_of(operation), [operation]) for operation in stream])
    for state in driver.states.values():
        history = History.decode(state, HistoryCodec(TYPES), 100)
        want = history.erased_at if not history.keys and history.erased_at != NEVER else None
        assert marker_erased_at(state) == want


def test_time_is_that_of_the_topic_that_is_furthest_behind():
    read, behind = (7, True), (5, False)
    assert stream_time_ms([read, (None, True)], 10) == 10, "a quiet partition has the worker's clock"
    assert stream_time_ms([read, behind, (6, False)], 10) == 5
    assert stream_time_ms([read, (None, False)], 10) is None
    assert stream_time_ms([(20, False)], 10) == 10, "a producer's clock that is ahead"
