"""What `send` writes is what a worker with the same settings reads: the decoder is the judge."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.cli.files import FileOptions, shape_of_files
from stream.config import load_settings
from stream.core.events import EARLIEST_TS_MS, MAX_LEAD_MS, EventDecoder, EventRow, EventRules, from_ms, to_ms
from stream.errors import ConfigError
from stream.feed.event_writer import EventWriter
from stream.feed.shape import BadRow, FileShape

NOW_MS = 1_800_000_000_000
TYPES = {"view": 1, "like": 2}
NESTED = {"user_id": "who.uid", "item_id": "what.product.id", "type": "event", "ts": "who.at"}
RULES = [
    EventRules(TYPES),
    EventRules(TYPES, ts_unit="s"),
    EventRules(TYPES, fields=NESTED, ts_unit="iso8601"),
    EventRules(TYPES, fields=NESTED, type_by_topic={"t.like": "like"}),
    EventRules(TYPES, type_by_topic={"t.like": "like", "t.view": "view"}),
]
ids = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
rows = st.builds(EventRow, ids, ids, st.sampled_from(["view", "like"]), st.integers(EARLIEST_TS_MS, NOW_MS))


@pytest.mark.parametrize("rules", RULES)
@given(row=rows)
def test_the_decoder_reads_back_what_was_written(rules, row):
    topic, key, value = EventWriter(rules, "t.{}".format).record(row, NOW_MS)
    native = json.dumps({"user_id": row.user_id, "item_id": row.item_id, "type": row.type, "ts": row.ts_ms}).encode()
    want = EventDecoder(EventRules(TYPES)).decode("any", key, native, NOW_MS)
    assert isinstance(want, bytes)
    assert topic == f"t.{row.type}"
    assert EventDecoder(rules).decode(topic, key, value, NOW_MS) == want


@pytest.mark.parametrize("unit", ["ms", "s", "iso8601"])
@given(ts_ms=st.integers(EARLIEST_TS_MS, 253_402_300_799_999))
def test_times_survive_every_unit(unit, ts_ms):
    assert to_ms(from_ms(ts_ms, unit), unit) == ts_ms


def test_values_are_in_the_producers_shape_without_a_type_where_the_topic_has_one():
    row = EventRow("7", "i", "like", 1_700_000_000_250)
    like = EventWriter(RULES[3], "t.{}".format).record(row, NOW_MS)
    assert json.loads(like[2]) == {"who": {"uid": "7", "at": row.ts_ms}, "what": {"product": {"id": "i"}}}
    view = EventWriter(RULES[2], "t.{}".format, topic="all").record(row._replace(type="view"), NOW_MS)
    assert (view[0], json.loads(view[2])["event"]) == ("all", "view")
    assert json.loads(view[2])["who"]["at"] == "2023-11-14T22:13:20.250Z"


def test_what_a_worker_would_not_take_is_refused_with_its_reason():
    def topic_of(kind):
        raise ValueError("nowhere")

    writer = EventWriter(EventRules(TYPES, frozenset({"shown"})), topic_of, topic=None)
    row = EventRow("u", "i", "view", NOW_MS)
    reasons = [writer.record(row._replace(type=kind), NOW_MS).reason for kind in ("shown", "buy", "view")]
    assert reasons == ["ignored_type", "unknown_type", "no_topic"]
    writer = EventWriter(EventRules(TYPES), str)
    assert not isinstance(writer.record(row._replace(ts_ms=NOW_MS + MAX_LEAD_MS), NOW_MS), BadRow)
    assert writer.record(row._replace(ts_ms=NOW_MS + MAX_LEAD_MS + 1), NOW_MS).reason == "future_timestamp"


@pytest.mark.parametrize("fields", [{"user_id": "id", "item_id": "id"}, {"user_id": "a", "item_id": "a.id"}])
def test_a_mapping_that_no_document_can_have_is_refused(fields):
    with pytest.raises(ConfigError, match=r"UEMB_EVENT_FIELDS.*places of their own"):
        EventWriter(EventRules(TYPES, fields=fields), str).record(EventRow("u", "i", "view", NOW_MS), NOW_MS)


MAPPED = {"event_fields": {"user_id": "uid"}, "event_ts_unit": "s", "event_topics": ("a", "b.like")}
MAPPED["event_type_by_topic"] = {"b.like": "like"}


@pytest.mark.parametrize(
    ("fields", "unit", "kind", "topic", "shape"),
    [
        (None, None, None, None, FileShape({"user_id": "uid"}, "s")),
        (None, "ms", None, "a", FileShape({"user_id": "uid"}, "ms")),
        ("item_id=sku", None, "view", None, FileShape({"item_id": "sku"}, "s", "view")),
        (None, None, None, "b.like", FileShape({"user_id": "uid"}, "s", "like")),
    ],
)
def test_files_look_like_the_topics_but_for_what_the_options_say(fields, unit, kind, topic, shape):
    assert shape_of_files(load_settings(**MAPPED), FileOptions(fields, unit, kind), topic) == shape


@pytest.mark.parametrize(
    ("fields", "kind", "topic", "says"),
    [
        ("uid", None, None, "--fields: write name=value"),
        ("colour=c", None, None, "--fields maps user_id.*it can't map 'colour'"),
        (None, None, "c", r"--topic must be one of UEMB_EVENT_TOPICS \(a, b.like\)"),
        (None, "view", "b.like", "--type view: all events of the topic b.like are of the type like"),
        (None, "buy", None, "the type buy is not among UEMB_EVENT_TYPES"),
    ],
)
def test_options_that_are_wrong_or_contradict_the_settings_are_one_line(fields, kind, topic, says):
    with pytest.raises(ConfigError, match=says) as caught:
        shape_of_files(load_settings(**MAPPED), FileOptions(fields, None, kind), topic)
    assert "EVENT_FIELDS" not in str(caught.value)
