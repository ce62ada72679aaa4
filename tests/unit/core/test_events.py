"""Validated events: what is admitted, what is turned away and why, field mapping, and the published schemas."""

import json
import re
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import LATE_ENOUGH, T0, TYPES, Event, ids, message

from stream.core.events import (
    EARLIEST_TS_MS,
    MAX_LEAD_MS,
    DeletionDecoder,
    EventDecoder,
    EventRules,
    Reason,
    Reject,
    Unread,
)
from stream.core.history_codec import MAX_TS_MS, sort_key
from stream.keys import INT64_MAX, INT64_MIN, MAX_ID_BYTES

RULES = EventRules(TYPES, frozenset({"impression"}))
TOPIC = "user-events.view"
SECRET = "hunter2"


def schema(name):
    return json.loads(files("schemas").joinpath(name).read_text())


def value(**changes):
    """An event's JSON: raw texts by field, ``...`` leaves one out."""
    fields = {"user_id": "5", "item_id": "311", "type": '"view"', "ts": str(T0), **changes}
    return ("{" + ",".join(f'"{name}":{text}' for name, text in fields.items() if text is not ...) + "}").encode()


def decode(data, key=b"5", record_ts=LATE_ENOUGH, rules=RULES, topic=TOPIC):
    return EventDecoder(rules).decode(topic, key, data, record_ts)


# -- what is admitted ---------------------------------------------------------------------------------------------

GOOD = [
    (value(), b"5", (T0, "311", "view")),
    (value(user_id='"5"'), b"5", (T0, "311", "view")),
    (value(item_id='"311"'), b"5", (T0, "311", "view")),
    (value(user_id="-5"), b"-5", (T0, "311", "view")),
    (value(user_id="-0"), b"0", (T0, "311", "view")),
    (value(user_id='"-0"'), b"-0", (T0, "311", "view")),
    (value(user_id='"05"'), b"05", (T0, "311", "view")),
    (value(user_id=str(INT64_MAX)), str(INT64_MAX).encode(), (T0, "311", "view")),
    (value(user_id=str(INT64_MIN)), str(INT64_MIN).encode(), (T0, "311", "view")),
    (value(item_id=f'"{2**63}"'), b"5", (T0, str(2**63), "view")),
    (value(user_id='"\\u00e9"'), "é".encode(), (T0, "311", "view")),
    (value(user_id='"é"'), "é".encode(), (T0, "311", "view")),
    (value(user_id='"\\ud83d\\ude00"'), "\U0001f600".encode(), (T0, "311", "view")),
    (value(user_id=f'"{"x" * 256}"'), b"x" * 256, (T0, "311", "view")),
    (value(item_id=f'"{"é" * 128}"'), b"5", (T0, "é" * 128, "view")),
    (value(item_id='" "'), b"5", (T0, " ", "view")),
    (value(type='"like"'), b"5", (T0, "311", "like")),
    (value(extra='{"a":[1,null]}', note='"x"'), b"5", (T0, "311", "view")),
    (value(ts=str(EARLIEST_TS_MS)), b"5", (EARLIEST_TS_MS, "311", "view")),
    (
        b'{"user_id":1,"ts":0,"user_id":5,"type":"x","item_id":311,"ts":%d,"type":"view"}' % T0,
        b"5",
        (T0, "311", "view"),
    ),
    (b" \n\t" + value() + b"\r\n ", b"5", (T0, "311", "view")),
    (b'{"\\u0075ser_id":5,"item_id":311,"type":"view","ts":%d}' % T0, b"5", (T0, "311", "view")),
]


@pytest.mark.parametrize(("data", "key", "want"), GOOD, ids=[f"good{n}" for n in range(len(GOOD))])
def test_good_events(data, key, want):
    ts, item, kind = want
    assert decode(data, key) == sort_key(ts, item.encode(), kind.encode())


@given(ids, ids, st.sampled_from(sorted(TYPES)), st.integers(EARLIEST_TS_MS, LATE_ENOUGH))
def test_every_well_formed_event_is_admitted(user, item, kind, ts):
    key, data, record_ts = message(Event(user, item, kind, ts))
    assert decode(data, key, record_ts) == sort_key(ts, str(item).encode(), kind.encode())


def test_ignored_types_are_valid_and_not_admitted():
    assert decode(value(type='"impression"')) is None
    assert decode(value(type='"impression"', ts="5")).reason is Reason.IMPLAUSIBLE_TIMESTAMP
    assert decode(value(type='"impression"', item_id='""')).reason is Reason.INVALID_ID
    assert decode(value(type='"impression"'), key=b"6").reason is Reason.KEY_MISMATCH


def test_an_event_may_run_five_minutes_ahead_of_its_record():
    assert MAX_LEAD_MS == 300_000
    assert not isinstance(decode(value(), record_ts=T0 - MAX_LEAD_MS), Reject)
    assert decode(value(), record_ts=T0 - MAX_LEAD_MS - 1).reason is Reason.FUTURE_TIMESTAMP
    assert not isinstance(decode(value(), record_ts=-1), Reject)  # a record without a timestamp bounds nothing
    assert not isinstance(decode(value(ts=str(MAX_TS_MS)), record_ts=MAX_TS_MS), Reject)


# -- what is turned away ------------------------------------------------------------------------------------------

R = Reason
BAD = [
    # not one JSON document in UTF-8
    (b"", R.NOT_JSON),
    (b" ", R.NOT_JSON),
    (b"hello", R.NOT_JSON),
    (b"{", R.NOT_JSON),
    (value()[:-1], R.NOT_JSON),
    (value() + b"x", R.NOT_JSON),
    (value() + b"\0", R.NOT_JSON),
    (value() + value(), R.NOT_JSON),
    (value()[:-1] + b",}", R.NOT_JSON),
    (b"\xef\xbb\xbf" + value(), R.NOT_JSON),
    (value().decode().encode("utf-16"), R.NOT_JSON),
    (value(ts="NaN"), R.NOT_JSON),
    (value(ts="Infinity"), R.NOT_JSON),
    (value(user_id="05"), R.NOT_JSON),
    (value(user_id="+5"), R.NOT_JSON),
    (value(user_id="0x5"), R.NOT_JSON),
    (value(user_id="'5'"), R.NOT_JSON),
    (value(user_id='"\\x35"'), R.NOT_JSON),
    (value(item_id='"\\ud800"'), R.NOT_JSON),
    (value(item_id='"\\udc00x"'), R.NOT_JSON),
    (value().replace(b"311", b'"\xff"'), R.NOT_JSON),
    (value().replace(b"311", b'"\xc3"'), R.NOT_JSON),
    (value().replace(b"311", b'"\xed\xa0\x80"'), R.NOT_JSON),
    (value().replace(b"311", b'"\xc0\x80"'), R.NOT_JSON),
    (value().replace(b"311", b'"a\nb"'), R.NOT_JSON),
    (value().replace(b"311", b'"a\0b"'), R.NOT_JSON),
    (b'{"x":' * 100_000, R.NOT_JSON),
    (value(x="[" * 100_000 + "]" * 100_000), R.NOT_JSON),
    (value(x='{"a":' * 50_000 + "1" + "}" * 50_000), R.NOT_JSON),
    (b"\x00\x00\x00\x00\x01" + value(), R.NOT_JSON),  # a schema registry's prefix
    # of the wrong type
    (b"null", R.WRONG_TYPE),
    (b"5", R.WRONG_TYPE),
    (b'"view"', R.WRONG_TYPE),
    (b"[]", R.WRONG_TYPE),
    (b"[" + value() + b"]", R.WRONG_TYPE),
    (value(user_id="5.0"), R.WRONG_TYPE),
    (value(user_id="5e0"), R.WRONG_TYPE),
    (value(user_id="-0.0"), R.WRONG_TYPE),
    (value(item_id="3.5"), R.WRONG_TYPE),
    (value(user_id="true"), R.WRONG_TYPE),
    (value(item_id="false"), R.WRONG_TYPE),
    (value(user_id="null"), R.WRONG_TYPE),
    (value(user_id="[5]"), R.WRONG_TYPE),
    (value(item_id='{"id":5}'), R.WRONG_TYPE),
    (value(type="1"), R.WRONG_TYPE),
    (value(type="null"), R.WRONG_TYPE),
    (value(ts='"soon"'), R.WRONG_TYPE),
    (value(ts=f"{T0}.5"), R.WRONG_TYPE),
    (value(ts="true"), R.WRONG_TYPE),
    (value(ts="null"), R.WRONG_TYPE),
    (value(ts="1e400"), R.WRONG_TYPE),
    # incomplete
    (b"{}", R.MISSING_FIELD),
    (value(user_id=...), R.MISSING_FIELD),
    (value(item_id=...), R.MISSING_FIELD),
    (value(type=...), R.MISSING_FIELD),
    (value(ts=...), R.MISSING_FIELD),
    (value(type=..., Type='"view"'), R.MISSING_FIELD),
    # ids that are none
    (value(user_id='""'), R.INVALID_ID),
    (value(item_id='""'), R.INVALID_ID),
    (value(user_id=f'"{"x" * 257}"'), R.INVALID_ID),
    (value(item_id=f'"{"x" * 257}"'), R.INVALID_ID),
    (value(item_id=f'"{"é" * 129}"'), R.INVALID_ID),
    (value(item_id=f'"{"x" * 1_000_000}"'), R.INVALID_ID),
    (value(item_id='"a\\u0000"'), R.INVALID_ID),
    (value(item_id='"a\\n"'), R.INVALID_ID),
    (value(item_id='"\\u007f"'), R.INVALID_ID),
    (value(item_id='"\\u0085"'), R.INVALID_ID),
    (value(user_id=str(2**63)), R.INVALID_ID),
    (value(item_id=str(-(2**63) - 1)), R.INVALID_ID),
    (value(item_id=str(2**64)), R.INVALID_ID),
    (value(item_id=str(10**100)), R.INVALID_ID),
    # of another user
    (value(user_id="6"), R.KEY_MISMATCH),
    (value(user_id='"05"'), R.KEY_MISMATCH),
    (value(user_id='"5 "'), R.KEY_MISMATCH),
    (value(user_id='"é"'), R.KEY_MISMATCH),
    # types
    (value(type='"buy"'), R.UNKNOWN_TYPE),
    (value(type='"View"'), R.UNKNOWN_TYPE),
    (value(type='""'), R.UNKNOWN_TYPE),
    (value(type=f'"{"x" * 100_000}"'), R.UNKNOWN_TYPE),
    # times
    (value(ts=str(T0 // 1000)), R.IMPLAUSIBLE_TIMESTAMP),
    (value(ts="0"), R.IMPLAUSIBLE_TIMESTAMP),
    (value(ts="-1"), R.IMPLAUSIBLE_TIMESTAMP),
    (value(ts=str(EARLIEST_TS_MS - 1)), R.IMPLAUSIBLE_TIMESTAMP),
    (value(ts=str(2**48)), R.IMPLAUSIBLE_TIMESTAMP),
    (value(ts=str(2**63)), R.IMPLAUSIBLE_TIMESTAMP),
    (value(ts=str(-(2**63) - 1)), R.IMPLAUSIBLE_TIMESTAMP),
    (value(ts=str(LATE_ENOUGH + MAX_LEAD_MS + 1)), R.FUTURE_TIMESTAMP),
    (value(ts=str(MAX_TS_MS)), R.FUTURE_TIMESTAMP),
    (value(ts=str(T0 * 1000)), R.IMPLAUSIBLE_TIMESTAMP),  # microseconds
]


@pytest.mark.parametrize(("data", "reason"), BAD, ids=[f"{n}-{reason}" for n, (_, reason) in enumerate(BAD)])
def test_bad_events_have_a_reason(data, reason):
    reject = decode(data)
    assert isinstance(reject, Reject)
    assert reject.reason is reason, reject.detail
    assert reject.detail
    assert len(reject.detail) < 200


def test_keys_and_values_must_be_there():
    assert decode(value(), key=None).reason is Reason.NULL_KEY
    assert decode(None).reason is Reason.NULL_VALUE
    assert decode(None, key=None).reason is Reason.NULL_KEY
    assert decode(value(), key=b"").reason is Reason.KEY_MISMATCH
    assert decode(value(), key=b"5 ").reason is Reason.KEY_MISMATCH
    assert decode(value(), key=b'"5"').reason is Reason.KEY_MISMATCH
    assert decode(value(), key=b"\xff").reason is Reason.KEY_MISMATCH
    assert decode(value(), key=(5).to_bytes(8, "big")).reason is Reason.KEY_MISMATCH  # a Java LongSerializer


@pytest.mark.parametrize("digits", [400, 4300, 4301, 100_000])
@pytest.mark.parametrize("name", ["user_id", "item_id", "ts"])
def test_numbers_of_any_length_have_a_reason(name, digits):
    for sign in ("", "-"):
        reject = decode(value(**{name: sign + "1" * digits}))
        assert reject.reason in (Reason.INVALID_ID, Reason.WRONG_TYPE, Reason.IMPLAUSIBLE_TIMESTAMP)


def test_every_value_reason_is_reached_here():
    reached = {reason for _, reason in BAD} | {Reason.NULL_KEY, Reason.NULL_VALUE}
    elsewhere = {Reason.WRONG_PARTITION, Reason.EXPANDS_BEYOND_LIMIT, Reason.UNKNOWN_SCHEMA, Reason.SCHEMA_MISMATCH}
    assert reached | elsewhere == set(Reason)
    assert len(BAD) >= 30


def test_what_was_not_read_is_told_from_a_record_without_key():
    unread = Unread("a batch of 9 bytes")
    for reject in (EventDecoder(RULES).decode(TOPIC, None, unread, T0), DeletionDecoder().decode(None, unread, T0)):
        assert reject == Reject(Reason.EXPANDS_BEYOND_LIMIT, "a batch of 9 bytes")


def test_neighbours_of_a_bad_event_are_admitted():
    decoder = EventDecoder(RULES)
    for data, _ in BAD:
        assert isinstance(decoder.decode(TOPIC, b"5", data, LATE_ENOUGH), Reject)
        assert decoder.decode(TOPIC, b"5", value(), LATE_ENOUGH) == sort_key(T0, b"311", b"view")


def test_details_hold_no_payload():
    quoted = f'"{SECRET}"'
    tries = [
        value(user_id=quoted),
        value(item_id=f'"{SECRET}\\u0000"'),
        value(item_id=f'"{SECRET * 50}"'),
        value(type=quoted),
        value(ts=quoted),
        value(ts=f'{{"{SECRET}":1}}'),
        value(item_id=f"[{quoted}]"),
        value(user_id=f'"{SECRET}\\ud800"'),
        value().replace(b"311", b'"' + SECRET.encode() + b'\xff"'),
        f"{SECRET}".encode(),
        f'"{SECRET}"'.encode(),
        f'{{"{SECRET}":{SECRET}}}'.encode(),
        f'{{"{SECRET}":1}}'.encode(),
    ]
    mapped = EventRules(TYPES, fields={"user_id": "u.id", "ts": "when"}, ts_unit="iso8601")
    for data in tries:
        for rules in (RULES, mapped):
            for key in (b"5", SECRET.encode() + b"x"):
                reject = decode(data, key, rules=rules)
                assert isinstance(reject, Reject)
                assert SECRET not in reject.detail
    data = json.dumps({"u": {"id": SECRET}, "item_id": 1, "type": "view", "when": SECRET}).encode()
    assert SECRET not in decode(data, SECRET.encode(), rules=mapped).detail
    assert SECRET not in DeletionDecoder().decode(b"5", value(user_id=quoted), LATE_ENOUGH).detail


pieces = st.sampled_from(
    ["{", "}", "[", "]", ":", ",", '"', "\\", " ", "é", "\0", "5", "1e5", "-", "null", "true", str(T0), '"\\ud83d"']
) | st.sampled_from(['"user_id"', '"item_id"', '"type"', '"ts"', '"view"', '"\\u0000"'])
any_value = st.one_of(
    st.binary(max_size=60),
    st.lists(pieces, max_size=20).map(lambda parts: "".join(parts).encode()),
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(
                ids, st.integers(), st.floats(), st.none(), st.booleans(), st.just("view"), st.lists(st.integers())
            )
            for name in ("user_id", "item_id", "type", "ts", "when")
        },
    ).map(lambda document: json.dumps(document).encode()),
)
MAPPINGS = [
    RULES,
    EventRules(TYPES, ts_unit="s"),
    EventRules(TYPES, ts_unit="iso8601", fields={"ts": "when"}),
    EventRules(TYPES, type_by_topic={TOPIC: "like"}),
]


@given(any_value, st.sampled_from(MAPPINGS), st.sampled_from([b"5", b"", b"\xff", None]))
def test_no_bytes_raise(data, rules, key):
    result = decode(data, key, rules=rules)
    assert isinstance(result, Reject | bytes | None)
    if isinstance(result, Reject):
        assert isinstance(result.reason, Reason)


@given(any_value, st.sampled_from([b"5", b"\xff", None]))
def test_no_bytes_raise_as_erasures_either(data, key):
    assert isinstance(DeletionDecoder().decode(key, data, LATE_ENOUGH), Reject | int | None)


# -- field mapping ------------------------------------------------------------------------------------------------

SHOP = EventRules(
    TYPES,
    frozenset({"impression"}),
    fields={"user_id": "uid", "item_id": "product.id", "type": "event", "ts": "occurred_at"},
)


def shop(ts=T0, uid=5, product=None, event="view"):
    document = {"uid": uid, "product": {"id": 311} if product is None else product, "event": event, "occurred_at": ts}
    return json.dumps({**document, "user_id": "someone", "ts": 0}).encode()


def test_producers_may_name_things_otherwise():
    assert decode(shop(), rules=SHOP) == sort_key(T0, b"311", b"view")
    assert decode(shop(event="impression"), rules=SHOP) is None
    assert decode(shop(uid="5", product={"id": "311", "x": 1}), rules=SHOP) == sort_key(T0, b"311", b"view")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"product": {}}, R.MISSING_FIELD),
        ({"product": 311}, R.WRONG_TYPE),
        ({"product": [311]}, R.WRONG_TYPE),
        ({"product": {"id": True}}, R.WRONG_TYPE),
        ({"product": {"id": 311.0}}, R.WRONG_TYPE),
        ({"product": {"id": None}}, R.WRONG_TYPE),
        ({"product": {"id": ""}}, R.INVALID_ID),
        ({"product": {"id": 2**63}}, R.INVALID_ID),
        ({"uid": 5.0}, R.WRONG_TYPE),
        ({"uid": True}, R.WRONG_TYPE),
        ({"uid": 6}, R.KEY_MISMATCH),
        ({"event": 1}, R.WRONG_TYPE),
        ({"event": "buy"}, R.UNKNOWN_TYPE),
        ({"ts": str(T0) + "x"}, R.WRONG_TYPE),
        ({"ts": float(T0)}, R.WRONG_TYPE),
        ({"ts": True}, R.WRONG_TYPE),
        ({"ts": 5}, R.IMPLAUSIBLE_TIMESTAMP),
        ({"ts": -(10**30)}, R.IMPLAUSIBLE_TIMESTAMP),
        ({"ts": LATE_ENOUGH + MAX_LEAD_MS + 1}, R.FUTURE_TIMESTAMP),
    ],
    ids=str,
)
def test_mapped_events_are_checked_like_native_ones(changes, reason):
    assert decode(shop(**changes), rules=SHOP).reason is reason


@pytest.mark.parametrize("data", [b"[]", b"5", b"null", b"{}", b"", b"{", b"\xef\xbb\xbf{}", b"[" * 100_000])
def test_mapped_values_that_are_no_object(data):
    assert decode(data, rules=SHOP).reason in (R.WRONG_TYPE, R.MISSING_FIELD, R.NOT_JSON)
    assert decode(data, rules=SHOP).reason is decode(data).reason or data == b"[" * 100_000


@pytest.mark.parametrize(
    ("ts", "want"),
    [
        (T0 // 1000, T0),
        (T0 / 1000, T0),
        (T0 / 1000 + 0.123, T0 + 123),
        (1_700_000_000.001, 1_700_000_000_001),
        (EARLIEST_TS_MS // 1000, EARLIEST_TS_MS),
    ],
)
def test_times_in_seconds(ts, want):
    rules = EventRules(TYPES, ts_unit="s")
    assert decode(value(ts=json.dumps(ts)), rules=rules) == sort_key(want, b"311", b"view")


@pytest.mark.parametrize(
    ("ts", "reason"),
    [
        (str(T0), R.IMPLAUSIBLE_TIMESTAMP),
        ("5", R.IMPLAUSIBLE_TIMESTAMP),
        ("-1.5", R.IMPLAUSIBLE_TIMESTAMP),
        ("1e300", R.IMPLAUSIBLE_TIMESTAMP),
        (f"{(LATE_ENOUGH + MAX_LEAD_MS) // 1000 + 1}", R.FUTURE_TIMESTAMP),
        (f'"{T0 // 1000}x"', R.WRONG_TYPE),
        ("true", R.WRONG_TYPE),
        ("null", R.WRONG_TYPE),
        ("NaN", R.NOT_JSON),
    ],
)
def test_bad_times_in_seconds(ts, reason):
    assert decode(value(ts=ts), rules=EventRules(TYPES, ts_unit="s")).reason is reason


@pytest.mark.parametrize(
    "text",
    [
        "2023-11-14T22:13:20Z",
        "2023-11-14T22:13:20.000+00:00",
        "2023-11-14T23:13:20+01:00",
        "2023-11-14T17:43:20-04:30",
        "2023-11-14T22:13:20",
        "2023-11-14 22:13:20",
        "20231114T221320Z",
    ],
)
def test_times_in_iso_8601(text):
    rules = EventRules(TYPES, ts_unit="iso8601")
    assert decode(value(ts=json.dumps(text)), rules=rules) == sort_key(T0, b"311", b"view")


def test_iso_8601_to_the_millisecond():
    rules = EventRules(TYPES, ts_unit="iso8601")
    for text, ms in [("20.1", 100), ("20.123", 123), ("20.123999", 123), ("20,5", 500)]:
        got = decode(value(ts=f'"2023-11-14T22:13:{text}Z"'), rules=rules)
        assert got == sort_key(T0 + ms, b"311", b"view"), text


@pytest.mark.parametrize(
    ("ts", "reason"),
    [
        (str(T0), R.WRONG_TYPE),
        ('""', R.WRONG_TYPE),
        ('"yesterday"', R.WRONG_TYPE),
        ('"2023-13-01T00:00:00Z"', R.WRONG_TYPE),
        ('"2023-11-14T22:13:20Z trailing"', R.WRONG_TYPE),
        ('"1970-01-20T16:13:20Z"', R.IMPLAUSIBLE_TIMESTAMP),
        ('"0001-01-01T00:00:00+23:59"', R.IMPLAUSIBLE_TIMESTAMP),
        ('"9999-12-31T23:59:59-23:59"', R.FUTURE_TIMESTAMP),
    ],
)
def test_bad_times_in_iso_8601(ts, reason):
    assert decode(value(ts=ts), rules=EventRules(TYPES, ts_unit="iso8601")).reason is reason


def test_the_type_may_follow_from_the_topic():
    rules = EventRules(TYPES, frozenset({"impression"}), type_by_topic={"likes": "like", "seen": "impression"})
    untyped = value(type=...)
    assert decode(untyped, rules=rules, topic="likes") == sort_key(T0, b"311", b"like")
    assert decode(value(), rules=rules, topic="likes") == sort_key(T0, b"311", b"like")
    assert decode(value(type="7"), rules=rules, topic="likes") == sort_key(T0, b"311", b"like")
    assert decode(untyped, rules=rules, topic="seen") is None
    assert decode(untyped, rules=rules, topic=TOPIC).reason is Reason.MISSING_FIELD
    assert decode(value(), rules=rules, topic=TOPIC) == sort_key(T0, b"311", b"view")


# -- erasures -----------------------------------------------------------------------------------------------------


def erase(data, key=b"5", record_ts=LATE_ENOUGH):
    return DeletionDecoder().decode(key, data, record_ts)


def test_an_erasure_reaches_the_permitted_lead_further():
    assert erase(b'{"user_id":5,"ts":%d}' % T0) == T0 + MAX_LEAD_MS
    assert erase(b'{"user_id":"5","ts":%d,"why":"x"}' % T0) == T0 + MAX_LEAD_MS
    assert erase(b'{"user_id":5,"ts":%d}' % MAX_TS_MS, record_ts=MAX_TS_MS) == MAX_TS_MS
    assert erase(None) is None


@pytest.mark.parametrize(
    ("data", "key", "reason"),
    [
        (b'{"user_id":5,"ts":1}', None, R.NULL_KEY),
        (None, None, R.NULL_KEY),
        (b"", b"5", R.NOT_JSON),
        (b"[]", b"5", R.WRONG_TYPE),
        (b"{}", b"5", R.MISSING_FIELD),
        (b'{"user_id":5}', b"5", R.MISSING_FIELD),
        (b'{"user_id":5,"ts":"x"}', b"5", R.WRONG_TYPE),
        (b'{"user_id":true,"ts":5}', b"5", R.WRONG_TYPE),
        (b'{"user_id":"","ts":%d}' % T0, b"", R.INVALID_ID),
        (b'{"user_id":6,"ts":%d}' % T0, b"5", R.KEY_MISMATCH),
        (b'{"user_id":5,"ts":%d}' % (T0 // 1000), b"5", R.IMPLAUSIBLE_TIMESTAMP),
        (b'{"user_id":5,"ts":%d}' % 2**48, b"5", R.IMPLAUSIBLE_TIMESTAMP),
        (b'{"user_id":5,"ts":%d}' % MAX_TS_MS, b"5", R.FUTURE_TIMESTAMP),
        (b'{"user_id":5,"ts":%d}' % (LATE_ENOUGH + MAX_LEAD_MS + 1), b"5", R.FUTURE_TIMESTAMP),
    ],
)
def test_bad_erasures_have_a_reason(data, key, reason):
    reject = erase(data, key)
    assert isinstance(reject, Reject)
    assert reject.reason is reason


# -- the published schemas ----------------------------------------------------------------------------------------


def test_every_reason_is_published_and_no_other():
    published = schema("dead_letter_reasons.v1.json")["enum"]
    assert set(published) == {reason.value for reason in Reason}
    assert all(published.values())


def id_schemas():
    event, deletion = schema("user_event.v1.schema.json"), schema("user_deletion.v1.schema.json")
    assert {event["properties"][name]["$ref"] for name in ("user_id", "item_id")} == {"#/$defs/id"}
    return [event["$defs"]["id"], deletion["properties"]["user_id"]]


def test_the_schemas_bounds_are_the_codes():
    for name in ("user_event.v1.schema.json", "user_deletion.v1.schema.json"):
        document = schema(name)
        ts = document["properties"]["ts"]
        assert (ts["type"], ts["minimum"], ts["maximum"]) == ("integer", EARLIEST_TS_MS, MAX_TS_MS)
        assert set(document["required"]) == set(document["properties"])
        assert document.get("additionalProperties", True) is True
    for definition in id_schemas():
        text, number = definition["oneOf"]
        assert (text["type"], text["minLength"], text["maxLength"]) == ("string", 1, MAX_ID_BYTES)
        assert (number["type"], number["minimum"], number["maximum"]) == ("integer", INT64_MIN, INT64_MAX)


def test_the_schemas_pattern_refuses_what_the_code_refuses():
    for definition in id_schemas():
        pattern = re.compile(definition["oneOf"][0]["pattern"])
        for code in [*range(0x2100), 0xD7FF, 0xE000, 0xFEFF, 0xFFFD, 0x10FFFF]:
            data = value(item_id=json.dumps("a" + chr(code)))
            assert bool(pattern.fullmatch("a" + chr(code))) == (not isinstance(decode(data), Reject)), hex(code)


def test_the_schemas_required_fields_are_the_codes():
    for name in schema("user_event.v1.schema.json")["required"]:
        assert decode(value(**{name: ...})).reason is Reason.MISSING_FIELD
