"""What an event costs to decode, as plain JSON and in the framing of schema registries: CPU µs, no broker.

    python tests/bench/bench_decode.py [--events 20000] [--json]

The same events each time: four fields, the time as a number, decoded one by one as a batch's are; best of seven rounds.
Plain JSON in our own names, and in a producer's; Avro and Protobuf with a time that their schema names.
"""

import argparse
import io
import json
import time
from collections.abc import Callable

import fastavro
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from stream.cli.bench.load import START_MS
from stream.core.events import EventDecoder, EventRules
from stream.core.framing import AvroReader, JsonReader, Schemas, frame
from stream.core.protobuf_reader import ProtobufReader

ROUNDS = 7
NATIVE = EventRules({"view": 1, "like": 2})
OTHERS = EventRules({"view": 1, "like": 2}, fields={"user_id": "uid", "item_id": "sku", "type": "event", "ts": "at"})
FIELDS = ("user_id", "item_id", "type", "ts")


def avro_writer() -> tuple[str, Callable[[dict[str, object]], bytes]]:
    kind = {"type": "enum", "name": "Kind", "symbols": ["view", "like"]}
    kinds = dict(zip(FIELDS, ("string", "string", kind, "long"), strict=True))
    schema = {"type": "record", "name": "Event", "fields": [{"name": n, "type": t} for n, t in kinds.items()]}
    parsed = fastavro.parse_schema(schema)
    named = {**schema, "fields": [*schema["fields"][:3], {"name": "ts", "type": {"type": "long", "logicalType": "timestamp-millis"}}]}  # fmt: skip  # noqa: E501

    def write(event: dict[str, object]) -> bytes:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, parsed, event)
        return frame(1) + out.getvalue()

    return json.dumps(named), write


def protobuf_writer() -> tuple[bytes, Callable[[dict[str, object]], bytes]]:
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="shop", syntax="proto3")
    message = file.message_type.add(name="Event")
    string, enum, int64 = 9, 14, 3
    for number, (name, kind) in enumerate(zip(FIELDS, (string, string, enum, int64), strict=True), 1):
        field = message.field.add(name=name, number=number, type=kind, label=1)
        if kind == enum:
            field.type_name = ".shop.Kind"
    values = file.enum_type.add(name="Kind").value
    values.add(name="view", number=0)
    values.add(name="like", number=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    event_class = message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Event"))
    return file.SerializeToString(), lambda event: frame(2) + b"\0" + event_class(**event).SerializeToString()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    events: list[dict[str, object]] = [
        {"user_id": str(n % 5_000), "item_id": str(n % 2_000), "type": "like", "ts": START_MS + n}
        for n in range(args.events)
    ]
    keys = [str(event["user_id"]).encode() for event in events]
    avro_schema, to_avro = avro_writer()
    protobuf_file, to_protobuf = protobuf_writer()
    schemas = Schemas()
    for number, read in enumerate((AvroReader(avro_schema), ProtobufReader([protobuf_file]), JsonReader()), 1):
        schemas.add(number, read)
    kinds: dict[str, tuple[EventRules, Callable[[dict[str, object]], bytes]]] = {
        "JSON": (NATIVE, lambda event: json.dumps(event).encode()),
        "JSON, other names": (
            OTHERS,
            lambda event: json.dumps(dict(zip(("uid", "sku", "event", "at"), event.values(), strict=True))).encode(),
        ),
        "JSON, framed": (NATIVE, lambda event: frame(3) + json.dumps(event).encode()),
        "Avro, framed": (NATIVE, to_avro),
        "Protobuf, framed": (NATIVE, to_protobuf),
    }
    want = None
    found: dict[str, dict[str, float]] = {}
    for name, (rules, write) in kinds.items():
        values = [write(event) for event in events]
        decode = EventDecoder(rules, schemas).decode
        best = float("inf")
        for _ in range(ROUNDS):
            at = time.process_time()
            decoded = [decode("t", key, value, START_MS * 2) for key, value in zip(keys, values, strict=True)]
            best = min(best, time.process_time() - at)
        want = want or decoded
        assert decoded == want, name
        found[name] = {"us": round(1e6 * best / len(events), 2), "bytes": len(values[-1])}
    if args.json:
        print(json.dumps(found))
    else:
        for name, one in found.items():
            print(f"{name:<20} {one['us']:5.2f} µs {one['bytes']:4.0f} bytes")


if __name__ == "__main__":
    main()
