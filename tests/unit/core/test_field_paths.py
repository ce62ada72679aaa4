"""Paths into events: keys that hold dots, elements of arrays, and what several interactions of one event are."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.config import load_settings
from stream.core.events import EventDecoder, EventRow, EventRules, Reason, Reject
from stream.core.field_paths import MAX_ELEMENTS, NoValue, Values, parse_path
from stream.core.history import History
from stream.core.history_codec import HistoryCodec, sort_key
from stream.errors import ConfigError
from stream.feed.event_writer import EventWriter

T0 = 1_700_000_000_000
TYPES = {"view": 1, "like": 2}
PURCHASE = EventRules(TYPES, fields={"item_id": "items[].item_id", "user_id": r"user\.id"})


def at(document, *paths):
    return Values([parse_path(path) for path in paths]).of(document)


@pytest.mark.parametrize(
    ("path", "document", "want"),
    [
        ("a", {"a": 1}, [(1,)]),
        ("a.b", {"a": {"b": 1}, "a.b": 2}, [(1,)]),
        (r"a\.b", {"a": {"b": 1}, "a.b": 2}, [(2,)]),
        (r"a\[0\]", {"a[0]": 3}, [(3,)]),
        (r"a\\b", {"a\\b": 3}, [(3,)]),
        ("a[1].b", {"a": [0, {"b": 1}]}, [(1,)]),
        ("a[]", {"a": [3, 4]}, [(3,), (4,)]),
        ("a[].b.c", {"a": [{"b": {"c": 1}}, {"b": {"c": 2}}]}, [(1,), (2,)]),
        ("a.b[][0]", {"a": {"b": [[1], [2, 3]]}}, [(1,), (2,)]),
        ("a[]", {"a": []}, []),
    ],
)
def test_values_at_paths(path, document, want):
    assert at(document, path) == want


def test_what_is_outside_of_the_array_is_the_same_for_each_element():
    document = {"user": 7, "items": [{"id": 1, "n": 2}, {"id": 3, "n": 4}]}
    assert at(document, "user", "items[].id", "items[].n") == [(7, 1, 2), (7, 3, 4)]


@pytest.mark.parametrize(
    ("path", "document", "missing"),
    [
        ("a.b", {"a": 1}, False),
        ("a.b", {"a": {}}, True),
        ("a[0]", {"a": {}}, False),
        ("a[0]", {"a": "text"}, False),
        ("a[0].b", {"a": ["text"]}, False),
        ("a[1]", {"a": [0]}, True),
        ("a[]", {"a": {}}, False),
        ("a[].b", {"a": [{"b": 1}, {}]}, True),
        ("a[].b", {"a": [{"b": 1}, 2]}, False),
        ("a[]", {"a": [0] * (MAX_ELEMENTS + 1)}, False),
    ],
)
def test_what_is_not_there(path, document, missing):
    with pytest.raises(NoValue) as caught:
        at(document, path)
    assert caught.value.missing is missing


@pytest.mark.parametrize(
    "path", ["", ".", "a.", ".a", "a..b", "[]", "[0]", "a[", "a[x]", "a[-1]", "a[]b", "a[][]", "a\\"]
)
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match=r"path|two"):
        parse_path(path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("item_id=a..b", "UEMB_EVENT_FIELDS.*no path"),
        ("item_id=a[].b,ts=c[].d", "different arrays"),
        ("user_id=a[].b", "of one user"),
    ],
)
def test_settings_that_name_no_place_are_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        load_settings(event_fields=fields)


interactions = st.lists(
    st.tuples(st.sampled_from(["1", "2", "é"]), st.sampled_from([*TYPES, "seen"]), st.integers(T0, T0 + 3)), max_size=8
)


@given(interactions)
def test_an_event_of_several_items_is_the_set_of_its_interactions(elements):
    rules = EventRules(
        TYPES, frozenset({"seen"}), fields={"item_id": "i[].id", "type": "i[].kind", "ts": "i[].at"}, ts_unit="ms"
    )
    value = json.dumps({"user_id": 5, "i": [{"id": item, "kind": kind, "at": ts} for item, kind, ts in elements]})
    found = EventDecoder(rules).decode("t", b"5", value.encode(), T0)
    alone = EventDecoder(EventRules(TYPES, frozenset({"seen"})))
    want = [
        alone.decode("t", b"5", json.dumps({"user_id": 5, "item_id": i, "type": k, "ts": ts}).encode(), T0)
        for i, k, ts in elements
    ]
    keys = list(found) if isinstance(found, tuple) else [found]
    assert [key for key in keys if key is not None] == [key for key in want if key is not None]
    histories = [History(HistoryCodec(TYPES), 3), History(HistoryCodec(TYPES), 3)]
    for history, order in zip(histories, (keys, [*reversed(keys), *keys]), strict=True):
        for key in filter(None, order):
            history.add(key)
    assert histories[0].keys == histories[1].keys


def test_one_element_at_fault_turns_the_whole_event_away():
    decode = EventDecoder(PURCHASE).decode
    items = [{"item_id": 1}, {"item_id": 2.5}]
    value = {"user.id": 5, "type": "like", "ts": T0, "items": items}
    found = decode("t", b"5", json.dumps(value).encode(), T0)
    assert isinstance(found, Reject)
    assert found.reason is Reason.WRONG_TYPE
    value["items"] = items[:1]
    assert isinstance(decode("t", b"5", json.dumps(value).encode(), T0), bytes)
    value["items"] = []
    assert decode("t", b"5", json.dumps(value).encode(), T0) is None


@pytest.mark.parametrize(
    "fields", [{"item_id": "items[].id"}, {"item_id": "a.items[0].id", "ts": r"t\.s", "type": "a.b"}]
)
def test_what_is_written_is_read_back(fields):
    rules = EventRules(TYPES, fields=fields)
    topic, key, value = EventWriter(rules, lambda _: "t").record(EventRow("5", "7", "like", T0), T0)
    assert EventDecoder(rules).decode(topic, key, value, T0) == sort_key(T0, b"7", b"like")
