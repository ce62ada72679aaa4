"""Values in the framing of schema registries: what Avro, Protobuf and JSON bodies become, and what is turned away."""

import io
import json
from typing import Any, Final

import fastavro
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2, wrappers_pb2
from hypothesis import given
from hypothesis import strategies as st

from stream.core.batch import BatchDecoder
from stream.core.counters import Counter
from stream.core.events import (
    MAX_LEAD_MS,
    DeletionDecoder,
    EventDecoder,
    EventRules,
    Reason,
    Reject,
)
from stream.core.framing import MAX_UNKNOWN, AvroReader, JsonReader, NotOfSchema, Schemas, frame
from stream.core.protobuf_reader import ProtobufReader

T0: Final = 1_700_000_000_000
NATIVE: Final = EventRules({"view": 1, "like": 2})
SECRET: Final = "payload-that-nobody-may-see"


def record(*fields: tuple[str, Any]) -> dict[str, Any]:
    return {"type": "record", "name": "Event", "fields": [{"name": name, "type": kind} for name, kind in fields]}


def avro(schema: Any, document: Any) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), document)
    return out.getvalue()


EVENT: Final = record(("user_id", "string"), ("item_id", "string"), ("type", "string"), ("ts", "long"))
EVENT_BODY: Final = avro(EVENT, {"user_id": "5", "item_id": "9", "type": "like", "ts": T0})
WANT: Final = T0.to_bytes(6, "big") + b"9\0like"


def decoder(read: Any, rules: EventRules = NATIVE) -> EventDecoder:
    schemas = Schemas()
    schemas.add(7, read)
    return EventDecoder(rules, schemas)


def decode(read: Any, body: bytes, rules: EventRules = NATIVE, topic: str = "t") -> Any:
    return decoder(read, rules).decode(topic, b"5", frame(7) + body, T0)


# -- Avro -------------------------------------------------------------------------------------------------------------


def test_an_event_in_avro_is_the_same_as_in_json() -> None:
    plain = json.dumps({"user_id": 5, "item_id": "9", "type": "like", "ts": T0}).encode()
    assert (
        decode(AvroReader(json.dumps(EVENT)), EVENT_BODY) == WANT == EventDecoder(NATIVE).decode("t", b"5", plain, T0)
    )


def test_plain_json_stays_welcome_beside_framed_values() -> None:
    plain = json.dumps({"user_id": 5, "item_id": "9", "type": "like", "ts": T0}).encode()
    assert decoder(AvroReader(json.dumps(EVENT))).decode("t", b"5", plain, T0) == WANT


def test_nested_records_unions_and_enums_are_mapped_like_json() -> None:
    product = {"type": "record", "name": "Product", "namespace": "shop", "fields": [{"name": "sku", "type": "long"}]}
    kind = {"type": "enum", "name": "Kind", "symbols": ["view", "like"]}
    schema = record(
        ("who", {"type": "record", "name": "Who", "fields": [{"name": "id", "type": ["null", "int", "string"]}]}),
        ("product", ["null", product]),
        ("event", kind),
        ("at", ["null", "double"]),
    )
    rules = EventRules(
        {"view": 1, "like": 2},
        fields={"user_id": "who.id", "item_id": "product.sku", "type": "event", "ts": "at"},
        ts_unit="s",
    )
    body = avro(schema, {"who": {"id": 5}, "product": {"sku": 9}, "event": "like", "at": T0 / 1000})
    assert decode(AvroReader(json.dumps(schema)), body, rules) == WANT
    absent = avro(schema, {"who": {"id": 5}, "product": None, "event": "like", "at": T0 / 1000})
    assert decode(AvroReader(json.dumps(schema)), absent, rules).reason is Reason.WRONG_TYPE


def test_elements_of_an_array_are_interactions() -> None:
    item = {"type": "record", "name": "Item", "fields": [{"name": "id", "type": "string"}]}
    schema = record(("user_id", "string"), ("items", {"type": "array", "items": item}), ("ts", "long"))
    rules = EventRules({"buy": 1}, fields={"item_id": "items[].id"}, type_by_topic={"t": "buy"})
    body = avro(schema, {"user_id": "5", "items": [{"id": "a"}, {"id": "b"}], "ts": T0})
    ts = T0.to_bytes(6, "big")
    assert decode(AvroReader(json.dumps(schema)), body, rules) == (ts + b"a\0buy", ts + b"b\0buy")


@pytest.mark.parametrize("unit", ["ms", "s", "iso8601"])
@pytest.mark.parametrize("kind", ["", "local-"])
@pytest.mark.parametrize(("name", "per_ms"), [("millis", 1), ("micros", 1_000), ("nanos", 1_000_000)])
def test_a_time_that_its_schema_names_needs_no_unit(name: str, per_ms: int, kind: str, unit: Any) -> None:
    ts = {"type": "long", "logicalType": f"{kind}timestamp-{name}"}
    schema = record(("user_id", "string"), ("item_id", "string"), ("type", "string"), ("ts", ["null", ts]))
    plain = record(("user_id", "string"), ("item_id", "string"), ("type", "string"), ("ts", ["null", "long"]))
    body = avro(plain, {"user_id": "5", "item_id": "9", "type": "like", "ts": T0 * per_ms + per_ms - 1})
    rules = EventRules({"view": 1, "like": 2}, ts_unit=unit)
    assert decode(AvroReader(json.dumps(schema)), body, rules) == WANT


def test_other_logical_types_are_what_they_are_in_bytes() -> None:
    ids = {"type": "string", "logicalType": "uuid"}
    schema = record(
        ("user_id", "string"),
        ("item_id", ids),
        ("type", "string"),
        ("ts", "long"),
        ("price", {"type": "bytes", "logicalType": "decimal", "precision": 4}),
        ("day", {"type": "int", "logicalType": "date"}),
    )
    item = "00000000-0000-4000-8000-00000000000A"  # upper case, as its producer writes it
    plain = record(
        ("user_id", "string"),
        ("item_id", "string"),
        ("type", "string"),
        ("ts", "long"),
        ("price", "bytes"),
        ("day", "int"),
    )
    body = avro(plain, {"user_id": "5", "item_id": item, "type": "like", "ts": T0, "price": b"\1", "day": 2**31 - 1})
    assert decode(AvroReader(json.dumps(schema)), body) == T0.to_bytes(6, "big") + item.encode() + b"\0like"


def test_names_of_other_schemas_are_known() -> None:
    sku = {"type": "record", "name": "shop.Sku", "fields": [{"name": "id", "type": "string"}]}
    product = {"type": "record", "name": "shop.Product", "fields": [{"name": "sku", "type": "shop.Sku"}]}
    schema = record(("user_id", "string"), ("product", "shop.Product"), ("type", "string"), ("ts", "long"))
    whole = record(
        ("user_id", "string"),
        ("product", {**product, "fields": [{"name": "sku", "type": sku}]}),
        ("type", "string"),
        ("ts", "long"),
    )
    body = avro(whole, {"user_id": "5", "product": {"sku": {"id": "9"}}, "type": "like", "ts": T0})
    rules = EventRules({"view": 1, "like": 2}, fields={"item_id": "product.sku.id"})
    read = AvroReader(json.dumps(schema), [json.dumps(sku), json.dumps(product)])
    assert decode(read, body, rules) == WANT
    with pytest.raises(NotOfSchema, match="can't be used"):
        AvroReader(json.dumps(schema))


@pytest.mark.parametrize("body", [EVENT_BODY[:n] for n in range(len(EVENT_BODY))] + [EVENT_BODY + b"\0"])
def test_a_body_that_is_cut_or_goes_on_is_a_mismatch(body: bytes) -> None:
    assert decode(AvroReader(json.dumps(EVENT)), body).reason is Reason.SCHEMA_MISMATCH


@pytest.mark.parametrize(
    "element",
    [
        "null",
        {"type": "null"},
        {"type": "record", "name": "Empty", "fields": []},
        {"type": "record", "name": "Outer", "fields": [{"name": "a", "type": "null"}]},
        {"type": "fixed", "name": "None", "size": 0},
    ],
)
def test_a_few_bytes_never_stand_for_millions_of_elements(element: Any) -> None:
    deep = record(("a", ["null", {"type": "map", "values": {"type": "array", "items": element}}]))
    with pytest.raises(NotOfSchema, match="take no bytes"):
        AvroReader(json.dumps(deep))


def test_a_schema_that_names_itself_can_be_read() -> None:
    tree = record(("children", {"type": "array", "items": "Event"}), ("next", ["null", "Event"]))
    assert AvroReader(json.dumps(tree))(b"\0\0") == {"children": [], "next": None}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"type": "record"}', '{"type": "array"}', '"shop.Unknown"', "7"])
def test_what_is_no_schema_is_refused_in_one_way(text: str) -> None:
    with pytest.raises(NotOfSchema):
        AvroReader(text)(b"")


# -- Protobuf ---------------------------------------------------------------------------------------------------------

_SCALARS: Final = {"string": 9, "int64": 3, "bytes": 12, "enum": 14, "message": 11}


def proto_file() -> descriptor_pb2.FileDescriptorProto:
    """What protoc makes of the text in `tests/integration/test_schema_registry.py`, by hand."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="shop", syntax="proto3")
    file.dependency.extend(["google/protobuf/timestamp.proto", "google/protobuf/wrappers.proto"])
    file.message_type.add(name="Other").field.add(name="x", number=1, type=_SCALARS["string"], label=1)
    event = file.message_type.add(name="Event")

    def field(name: str, kind: str, type_name: str = "", *, repeated: bool = False) -> None:
        number = len(event.field) + 1
        made = event.field.add(name=name, number=number, type=_SCALARS[kind], label=3 if repeated else 1)
        if type_name:
            made.type_name = type_name

    field("user_id", "int64")
    field("items", "message", ".shop.Event.Item", repeated=True)
    field("type", "enum", ".shop.Kind")
    field("at", "message", ".google.protobuf.Timestamp")
    field("ts", "int64")
    field("source", "message", ".google.protobuf.StringValue")
    field("tags", "string", repeated=True)
    item = event.nested_type.add(name="Item")
    item.field.add(name="id", number=1, type=_SCALARS["string"], label=1, proto3_optional=True, oneof_index=0)
    item.oneof_decl.add(name="_id")
    kind = file.enum_type.add(name="Kind")
    kind.value.add(name="view", number=0)
    kind.value.add(name="like", number=1)
    return file


FILES: Final = [
    timestamp_pb2.DESCRIPTOR.serialized_pb,
    wrappers_pb2.DESCRIPTOR.serialized_pb,
    proto_file().SerializeToString(),
]


@pytest.fixture(scope="module")
def event_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    for data in FILES:
        pool.AddSerializedFile(data)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Event"))


#: Of the second message of the file: one place, which is 1, as zigzag varints.
SECOND: Final = b"\x02\x02"


def protobuf(message: Any, place: bytes = SECOND) -> bytes:
    return place + message.SerializeToString()


def test_an_event_in_protobuf_is_the_same_as_in_json(event_class: Any) -> None:
    event = event_class(user_id=5, items=[{"id": "9"}], type=1, ts=T0)
    rules = EventRules({"view": 1, "like": 2}, fields={"item_id": "items[0].id"})
    assert decode(ProtobufReader(FILES), protobuf(event), rules) == WANT


def test_repeated_messages_are_interactions_and_a_timestamp_needs_no_unit(event_class: Any) -> None:
    event = event_class(user_id=5, items=[{"id": "9"}, {"id": "8"}], type=1)
    event.at.FromMilliseconds(T0)
    rules = EventRules({"like": 2}, fields={"item_id": "items[].id", "ts": "at"}, ts_unit="iso8601")
    assert decode(ProtobufReader(FILES), protobuf(event), rules) == (WANT, T0.to_bytes(6, "big") + b"8\0like")


def test_a_field_of_proto3_that_was_not_sent_has_its_default_and_one_with_presence_is_missing(event_class: Any) -> None:
    rules = EventRules({"view": 1, "like": 2}, fields={"item_id": "items[0].id"})
    event = event_class(user_id=5, items=[{"id": "9"}], ts=T0)  # the enum's first name is not on the wire
    assert decode(ProtobufReader(FILES), protobuf(event), rules) == T0.to_bytes(6, "big") + b"9\0view"
    event.items[0].ClearField("id")
    assert decode(ProtobufReader(FILES), protobuf(event), rules) == Reject(
        Reason.MISSING_FIELD, "no field at the path items[0].id"
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nothing", Reason.MISSING_FIELD),
        ("at", Reason.MISSING_FIELD),  # that message was not sent
        ("tags[0]", Reason.MISSING_FIELD),
        ("tags.x", Reason.WRONG_TYPE),
        ("items", Reason.WRONG_TYPE),
        ("type.x", Reason.WRONG_TYPE),
    ],
)
def test_what_is_not_there_says_so(event_class: Any, path: str, reason: Reason) -> None:
    event = event_class(user_id=5, items=[{"id": "9"}], type=1, ts=T0)
    rules = EventRules({"view": 1, "like": 2}, fields={"item_id": path})
    found = decode(ProtobufReader(FILES), protobuf(event), rules)
    assert found.reason is reason


@pytest.mark.parametrize(
    "place",
    [
        b"",
        b"\x80",
        b"\x02",
        b"\x02\x80",
        b"\x02\x08",
        b"\x01",
        b"\x04\x02\x02",
        b"\xfe\x7f",
        b"\xff\xff\xff\xff\xff\x0f",
    ],
)
def test_a_message_that_the_schema_does_not_have_is_a_mismatch(place: bytes) -> None:
    assert decode(ProtobufReader(FILES), place).reason is Reason.SCHEMA_MISMATCH


def test_the_first_message_is_written_as_one_zero(event_class: Any) -> None:
    read = ProtobufReader(FILES)
    assert read(b"\0")["x"] == read(b"\x02\0")["x"] == ""
    with pytest.raises(KeyError):
        read(b"\x04\x02\0")["id"]  # the nested one: place 1, then 0


def test_damaged_protobuf_is_a_mismatch() -> None:
    assert decode(ProtobufReader(FILES), SECOND + b"\x0a\xff").reason is Reason.SCHEMA_MISMATCH


@pytest.mark.parametrize("files", [[], [b"\xff"], FILES[2:]])
def test_what_is_no_protobuf_schema_is_refused(files: list[bytes]) -> None:
    with pytest.raises(NotOfSchema, match="can't be used"):
        ProtobufReader(files)


# -- framing ----------------------------------------------------------------------------------------------------------


def test_json_with_a_schema_is_read_as_json() -> None:
    body = json.dumps({"user_id": 5, "item_id": "9", "type": "like", "ts": str(T0)}).encode()
    assert decode(JsonReader(), body) == WANT
    damaged = decode(JsonReader(), b"{")
    assert damaged.reason is Reason.NOT_JSON
    assert "REGISTRY" not in damaged.detail


def test_an_id_that_the_registry_does_not_have_and_a_schema_that_can_not_be_read_are_told_apart() -> None:
    assert decode(None, EVENT_BODY) == Reject(Reason.UNKNOWN_SCHEMA, "the schema registry has no schema 7")
    assert decode(NotOfSchema("of no use"), EVENT_BODY) == Reject(Reason.SCHEMA_MISMATCH, "schema 7: of no use")


@pytest.mark.parametrize("value", [frame(7)[:n] for n in range(1, 5)])
def test_a_value_that_ends_within_its_framing_is_a_mismatch(value: bytes) -> None:
    assert decoder(None).decode("t", b"5", value, T0).reason is Reason.SCHEMA_MISMATCH


def test_without_a_registry_a_framed_value_is_no_json_and_the_setting_is_named() -> None:
    found = EventDecoder(NATIVE).decode("t", b"5", frame(7) + EVENT_BODY, T0)
    assert isinstance(found, Reject)
    assert found.reason is Reason.NOT_JSON
    assert "UEMB_SCHEMA_REGISTRY_URL" in found.detail


def test_what_is_asked_for_is_asked_once_and_what_was_unknown_again() -> None:
    schemas = Schemas()
    values = [frame(7) + b"x", frame(8), b"{}", None, b"\0\0", frame(7)]
    assert schemas.missing(values) == {7, 8}
    schemas.add(7, JsonReader())
    schemas.add(8, None)
    assert schemas.missing(values) == set()
    schemas.forget_unknown()
    assert schemas.missing(values) == {8}


def test_ids_that_mean_nothing_fill_no_memory_and_take_no_schemas_place() -> None:
    schemas = Schemas()
    schemas.add(0, JsonReader())
    for number in range(1, MAX_UNKNOWN + 11):
        schemas.add(number, None)
    assert schemas.missing([frame(0), frame(10), frame(11)]) == {10}
    assert schemas.reader_of(0) is not None


def test_erasures_are_framed_too() -> None:
    schema = record(
        ("user_id", "string"), ("ts", {"type": "long", "logicalType": "timestamp-millis"}), ("why", "string")
    )
    schemas = Schemas()
    schemas.add(7, AvroReader(json.dumps(schema)))
    body = avro(
        record(("user_id", "string"), ("ts", "long"), ("why", "string")), {"user_id": "5", "ts": T0, "why": "x"}
    )
    decode = DeletionDecoder(schemas).decode
    assert decode(b"5", frame(7) + body, T0) == T0 + MAX_LEAD_MS
    assert decode(b"5", frame(8) + body, T0) == Reject(Reason.UNKNOWN_SCHEMA, "the schema registry has no schema 8")
    assert isinstance(found := decode(b"6", frame(7) + body, T0), Reject)
    assert found.reason is Reason.KEY_MISMATCH


def test_what_led_to_a_framed_event_is_counted() -> None:
    schema = record(*((f["name"], f["type"]) for f in EVENT["fields"]), ("source", "string"))
    rules = EventRules({"view": 1, "like": 2}, source="source", own_sources=frozenset({"ours"}))
    event = {"user_id": "5", "item_id": "9", "type": "like", "ts": T0, "source": "ours"}

    class Record:
        key, value, timestamp = b"5", frame(7) + avro(schema, event), T0

    found = BatchDecoder(decoder(AvroReader(json.dumps(schema)), rules), 1).events("t", 0, [Record()], ())
    assert (found.counts[Counter.SOURCED], found.counts[Counter.SELF_CAUSED]) == (1, 1)


def test_an_id_that_its_schema_calls_a_time_is_a_number_like_others() -> None:
    moment = {"type": "long", "logicalType": "timestamp-millis"}
    schema = record(("user_id", moment), ("item_id", moment), ("type", "string"), ("ts", moment))
    plain = record(("user_id", "long"), ("item_id", "long"), ("type", "string"), ("ts", "long"))
    body = frame(7) + avro(plain, {"user_id": T0, "item_id": 9, "type": "view", "ts": T0})
    decode = decoder(AvroReader(json.dumps(schema))).decode
    assert decode("t", str(T0).encode(), body, T0) == T0.to_bytes(6, "big") + b"9\0view"
    assert isinstance(found := decode("t", b"5", body, T0), Reject)
    assert found.reason is Reason.KEY_MISMATCH


@given(st.binary(max_size=64), st.sampled_from(["avro", "protobuf", "json"]))
def test_any_body_is_an_event_or_a_reject(body: bytes, kind: str) -> None:
    nested = record(
        ("user_id", ["null", "string", {"type": "map", "values": "double"}]),
        ("item_id", {"type": "array", "items": EVENT}),
        ("type", {"type": "enum", "name": "K", "symbols": ["a"]}),
        ("ts", {"type": "fixed", "name": "F", "size": 3}),
    )
    for read in {
        "avro": [AvroReader(json.dumps(EVENT)), AvroReader(json.dumps(nested).replace('"Event"', '"Outer"', 1))],
        "protobuf": [ProtobufReader(FILES)],
        "json": [JsonReader()],
    }[kind]:
        found = decode(read, body)
        assert isinstance(found, Reject | bytes | None)


@pytest.mark.parametrize("schema", [EVENT, record(("user_id", "int")), record(("ts", "string"))])
def test_no_payload_is_in_what_is_said(schema: Any) -> None:
    body = avro(EVENT, {"user_id": SECRET, "item_id": SECRET, "type": SECRET, "ts": -1})
    found = decode(AvroReader(json.dumps(schema)), body)
    assert isinstance(found, Reject)
    assert SECRET not in found.detail
