"""Workers and readers beside a real schema registry: Confluent's own serdes write events and read vectors."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

import pytest
from confluent_kafka import Producer
from confluent_kafka.schema_registry import Schema, SchemaReference, SchemaRegistryClient, topic_subject_name_strategy
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from own_certificates import make_certificate
from pipeline import Pipeline
from registry_server import Gate, RegistryServer, running_registry

from stream.config import Settings, load_settings
from stream.core.events import EventDecoder, EventRow, EventRules, Reason
from stream.core.framing import frame
from stream.core.records import AVRO_MARKER, decode, newest_schema, unframed
from stream.errors import ConfigError, RegistryError, RegistryRefused
from stream.feed.dataset import Dataset
from stream.items.space import ItemSpace
from stream.kafka.schema_registry import SchemaRegistry
from stream.retrieval.user_matrix import UserMatrix

AVRO: Final = json.dumps(
    {
        "type": "record",
        "name": "Event",
        "namespace": "shop",
        "fields": [
            {"name": "user_id", "type": ["null", "string"]},
            {"name": "item_id", "type": "shop.Item"},
            {"name": "type", "type": {"type": "enum", "name": "Kind", "symbols": ["view", "like"]}},
            {"name": "ts", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        ],
    }
)
ITEM: Final = json.dumps(
    {"type": "record", "name": "Item", "namespace": "shop", "fields": [{"name": "id", "type": "long"}]}
)
DELETION: Final = json.dumps(
    {
        "type": "record",
        "name": "Deletion",
        "fields": [
            {"name": "user_id", "type": "string"},
            {"name": "ts", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        ],
    }
)
JSON: Final = json.dumps({"title": "Event", "type": "object", "properties": {"user_id": {"type": "integer"}}})
PROTO_ITEM: Final = 'syntax = "proto3"; package shop; message Item { string id = 1; }'
PROTO: Final = """
syntax = "proto3";
package shop;
import "shop/item.proto";
import "google/protobuf/timestamp.proto";
enum Kind { view = 0; like = 1; }
message Other { string x = 1; }
message Event {
  message Of { int64 user = 1; }
  string user_id = 1;
  shop.Item item_id = 2;
  Kind type = 3;
  google.protobuf.Timestamp ts = 4;
}
"""
BY_TOPIC: Final = {"subject.name.strategy": topic_subject_name_strategy}
FIELDS: Final = "item_id=item_id.id"
Asking = Callable[..., SchemaRegistry]
T0: Final = 1_700_000_000_000


@pytest.fixture(scope="module")
def registry() -> Iterator[RegistryServer]:
    """One for all tests here, which leave it running."""
    with running_registry() as server:
        yield server


@pytest.fixture
def client(registry: RegistryServer) -> Iterator[SchemaRegistryClient]:
    with SchemaRegistryClient({"url": registry.url}) as client:
        yield client


def settings(url: str, **more: Any) -> Settings:
    return Settings(schema_registry_url=url, **more)  # type: ignore[arg-type]


@pytest.fixture
def asking() -> Iterator[Asking]:
    """Makes what asks a registry; arguments are those of `settings`."""
    with ExitStack() as opened:
        yield lambda url, **more: opened.enter_context(closing(SchemaRegistry(settings(url, **more))))


def event(row: EventRow) -> dict[str, Any]:
    """In the shape of the schemas above, but for the time."""
    return {"user_id": row.user_id, "item_id": {"id": int(row.item_id)}, "type": row.type, "ts": row.ts_ms}


class Writers:
    """Events as producers of four kinds write them."""

    def __init__(self, client: SchemaRegistryClient, topic: str) -> None:
        self._context = SerializationContext(topic, MessageField.VALUE)
        item = client.register_schema(f"{topic}-item", Schema(ITEM, "AVRO"))
        assert item
        references = [SchemaReference("shop.Item", f"{topic}-item", 1)]
        self._avro = AvroSerializer(client, Schema(AVRO, "AVRO", references), conf=BY_TOPIC)
        self._json = JSONSerializer(JSON, client, conf={"subject.name.strategy": lambda *_: f"{topic}-json"})
        self._event = message_of(PROTO, {"shop/item.proto": PROTO_ITEM}, "shop.Event")
        conf = {
            "subject.name.strategy": lambda *_: f"{topic}-proto",
            "reference.subject.name.strategy": lambda _, file: f"{topic}-{file.name}",
            "use.deprecated.format": False,
        }
        self._protobuf = ProtobufSerializer(self._event, client, conf)
        self.all = [self.plain, self.avro, self.protobuf, self.json]

    def plain(self, row: EventRow) -> bytes:
        return json.dumps(event(row)).encode()

    def avro(self, row: EventRow) -> bytes:
        return self._avro({**event(row), "ts": row.ts_ms * 1000}, self._context)  # type: ignore[no-any-return]

    def json(self, row: EventRow) -> bytes:
        return self._json({**event(row), "user_id": int(row.user_id)}, self._context)  # type: ignore[no-any-return]

    def protobuf(self, row: EventRow) -> bytes:
        message = self._event(user_id=row.user_id, item_id={"id": row.item_id}, type=row.type)
        message.ts.FromMilliseconds(row.ts_ms)
        return self._protobuf(message, self._context)  # type: ignore[no-any-return]


def message_of(text: str, imports: dict[str, str], name: str) -> Any:
    """The class of a message of a ``.proto`` file, as protoc makes it."""
    from stream.kafka.schema_registry import _compiled

    pool = DescriptorPool()
    for data in _compiled(text, imports):
        pool.Add(FileDescriptorProto.FromString(data))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def send(pipeline: Pipeline, rows: Sequence[EventRow], values: Sequence[bytes]) -> None:
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random"})
    for row, value in zip(rows, values, strict=True):
        producer.produce(pipeline.topics[row.type], value, row.user_id.encode())
        producer.poll(0)
    assert producer.flush(60) == 0


def letters(pipeline: Pipeline) -> list[str]:
    return sorted(dict(record.headers())["dlq.reason"].decode() for record in pipeline.read(pipeline.dlq))


@pytest.mark.slow
def test_events_of_four_kinds_and_vectors_that_confluents_deserializer_reads(
    films: Dataset,
    space: ItemSpace,
    registry: RegistryServer,
    client: SchemaRegistryClient,
    make_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline = make_pipeline(schema_registry_url=registry.url, event_fields=FIELDS)
    rows = films.events[:2_000]
    writers = Writers(client, pipeline.topics["view"])
    pipeline.start()
    send(pipeline, rows, [writers.all[n % 4](row) for n, row in enumerate(rows)])
    bad = [frame(987_654) + b"x", writers.avro(rows[0])[:-1], writers.avro(rows[0]) + b"x", b"\0\0"]
    send(pipeline, rows[: len(bad)], bad)
    erased = rows[-1].user_id
    write = AvroSerializer(client, DELETION, conf=BY_TOPIC)
    context = SerializationContext(pipeline.deletions, MessageField.VALUE)
    value = write({"user_id": erased, "ts": rows[-1].ts_ms}, context)
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random"})
    producer.produce(pipeline.deletions, value, erased.encode())
    assert producer.flush(60) == 0
    pipeline.until_ready()
    pipeline.until_committed()

    assert letters(pipeline) == sorted([Reason.UNKNOWN_SCHEMA, *[Reason.SCHEMA_MISMATCH] * 3])
    users = {row.user_id for row in rows}
    pipeline.check(len(users))
    read = AvroDeserializer(client)
    context = SerializationContext(pipeline.output, MessageField.VALUE)
    number = client.lookup_schema(f"{pipeline.output}-value", Schema(newest_schema(), "AVRO")).schema_id
    matrix = UserMatrix(space.dim, space.version, load_settings().versioned_encoder.version)
    last = pipeline.last_output()
    for key, value in last.items():
        if value is None:
            assert key.endswith(f":{erased}")
            continue
        theirs, ours = read(value, context), decode(value)
        assert value.startswith(frame(number))
        assert (theirs["user_id"], theirs["revision"], theirs["as_of"]) == (ours.user_id, ours.revision, ours.as_of)
        assert theirs["user_embedding"]["vector"] == value[-4 * space.dim :] == ours.vector.tobytes()
        matrix.apply(key.encode(), value)
    assert len(matrix) == len([value for value in last.values() if value is not None and decode(value).status == "ok"])
    for user, entry in pipeline.stored(users - {erased}).items():
        assert entry is not None
        assert entry[16:].startswith(AVRO_MARKER), user
        assert entry[16:] == unframed(last[next(key for key in last if key.endswith(f":{user}"))] or b"")
    tail = [json.loads(line) for line in pipeline.uemb("tail", "--from-beginning", "-n", "5", "--json").splitlines()]
    assert len(tail) == 5
    assert "schema registry" in pipeline.uemb("doctor")
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_a_registry_that_is_away_is_waited_for_and_nothing_is_rejected(
    films: Dataset, registry: RegistryServer, client: SchemaRegistryClient, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline(schema_registry_url=registry.url, event_fields=FIELDS, delivery_timeout_s=60)
    rows = films.events[:100]
    writers = Writers(client, pipeline.topics["view"])
    values = [writers.avro(row) for row in rows]
    pipeline.start()
    pipeline.until_ready()
    try:
        registry.pause()
        send(pipeline, rows[:50], values[:50])
        pipeline.until(lambda: "trying again" in pipeline.log.read_text(), "the worker misses the registry")
        assert pipeline.committed(pipeline.topics["view"]) == [-1001] * pipeline.partitions
        registry.resume()
        pipeline.until_committed()
        assert "answers again" in pipeline.log.read_text()
        registry.stop()  # what is known is known
        send(pipeline, rows[50:], values[50:])
        pipeline.until_committed()
        assert pipeline.read(pipeline.dlq) == []
        # what is not known is waited for, also by a worker that is told to stop
        send(pipeline, rows[:1], [frame(987_654) + b"x"])
        pipeline.until(lambda: pipeline.log.read_text().count("trying again") == 2, "it misses it again")
        assert pipeline.stop() == 0
        assert pipeline.uemb("verify", code=75).count("\n") == 1
    finally:
        registry.stop()
        registry.start()
    pipeline.check(len({row.user_id for row in rows}))


@pytest.mark.slow
def test_a_worker_gives_up_when_patience_ends(
    films: Dataset, registry: RegistryServer, make_pipeline: Callable[..., Pipeline]
) -> None:
    with Gate(registry.url) as gate:
        pipeline = make_pipeline(schema_registry_url=gate.url, delivery_timeout_s=2)
        pipeline.start()
        pipeline.until_ready()
        gate.status = 500
        send(pipeline, films.events[:1], [frame(987_654) + b"x"])
        assert pipeline.wait() == 75
        assert "the schema registry at" in pipeline.tail()
        assert "(500)" in pipeline.tail()
        assert pipeline.read(pipeline.dlq) == []


# -- without brokers --------------------------------------------------------------------------------------------------


def test_protobuf_that_a_registry_gives_as_text_is_read_like_descriptors(
    registry: RegistryServer, client: SchemaRegistryClient, unique: str, asking: Asking
) -> None:
    client.register_schema(f"{unique}-item", Schema(PROTO_ITEM, "PROTOBUF"))
    reference = SchemaReference("shop/item.proto", f"{unique}-item", 1)
    number = client.register_schema(f"{unique}-value", Schema(PROTO, "PROTOBUF", [reference]))
    asked = asking(registry.url)
    asked.load({number})
    kind = message_of(PROTO, {"shop/item.proto": PROTO_ITEM}, "shop.Event")
    message = kind(user_id="5", item_id={"id": "9"}, type="like")
    message.ts.FromMilliseconds(T0)
    rules = EventRules({"like": 2}, fields={"item_id": "item_id.id"}, ts_unit="s")
    value = frame(number) + b"\2\2" + message.SerializeToString()
    found = EventDecoder(rules, asked.schemas).decode("t", b"5", value, T0)
    assert found == T0.to_bytes(6, "big") + b"9\0like"


def test_a_schema_that_can_not_be_read_or_refers_to_nothing_is_known_to_be_of_no_use(
    registry: RegistryServer, client: SchemaRegistryClient, unique: str, asking: Asking
) -> None:
    endless = {"type": "record", "name": "E", "fields": [{"name": "a", "type": {"type": "array", "items": "null"}}]}
    number = client.register_schema(f"{unique}-value", Schema(json.dumps(endless), "AVRO"))
    asked = asking(registry.url)
    asked.load({number, 987_654})
    decode_event = EventDecoder(EventRules({"like": 2}), asked.schemas).decode
    assert decode_event("t", b"5", frame(number) + b"\0", 0).reason is Reason.SCHEMA_MISMATCH  # type: ignore[union-attr]
    assert decode_event("t", b"5", frame(987_654), 0).reason is Reason.UNKNOWN_SCHEMA  # type: ignore[union-attr]
    assert asked.missing([frame(number), frame(987_654)]) == set()


def test_an_id_that_comes_up_a_moment_late_is_no_unknown_one(
    registry: RegistryServer, client: SchemaRegistryClient, unique: str, asking: Asking
) -> None:
    """One of several registries may be behind the one that its producer asked."""
    number = client.register_schema(f"{unique}-value", Schema(ITEM.replace("shop", unique), "AVRO"))
    with Gate(registry.url) as gate:
        asked = asking(gate.url)
        gate.behind.add(f"/schemas/ids/{number}")
        asyncio.run(asked.fetch({number}))
        assert asked.schemas.reader_of(number) is not None
        assert gate.requests.count(f"/schemas/ids/{number}") == 2


def test_the_output_is_registered_or_looked_up(
    registry: RegistryServer, client: SchemaRegistryClient, unique: str, asking: Asking
) -> None:
    topic = f"{unique}.out"
    strict = asking(registry.url, output_topic=topic, schema_registry_register=False)
    with pytest.raises(ConfigError, match=rf"under subject {topic}-value.*UEMB_SCHEMA_REGISTRY_REGISTER=true"):
        asyncio.run(strict.output_id())
    number = asyncio.run(asking(registry.url, output_topic=topic).output_id())
    assert asyncio.run(strict.output_id()) == number
    assert strict.is_output_id(number)
    other = client.register_schema(f"{unique}-other", Schema(ITEM.replace("shop", unique), "AVRO"))
    assert not strict.is_output_id(other)
    assert not strict.is_output_id(987_654)
    record = "uemb.v1.UserEmbedding"
    for strategy, subject in {"record": record, "topic_record": f"{topic}-{record}"}.items():
        named = asking(registry.url, output_topic=topic, schema_registry_subject=strategy)
        assert asyncio.run(named.output_id()) > 0
        assert subject in client.get_subjects()


def test_a_schema_that_the_subject_does_not_admit_is_refused_in_one_line(
    registry: RegistryServer, client: SchemaRegistryClient, unique: str, asking: Asking
) -> None:
    subject = f"{unique}.out-value"
    client.register_schema(subject, Schema(ITEM, "AVRO"))
    client.set_compatibility(subject, "FULL")
    with pytest.raises(ConfigError, match=rf"subject {subject}, as incompatible") as refused:
        asyncio.run(asking(registry.url, output_topic=f"{unique}.out").output_id())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("way", ["password", "token"])
def test_a_login_is_shown_and_one_that_is_refused_names_its_setting(
    way: str, registry: RegistryServer, tmp_path: Path, unique: str, asking: Asking
) -> None:
    file = tmp_path / "secret"
    file.write_text("s3cret:ü\n" if way == "password" else "s3cret\n")
    login: dict[str, Any] = {f"schema_registry_{way}_file": file, "output_topic": unique}
    if way == "password":
        login["schema_registry_username"] = "worker"
    with Gate(registry.url) as gate:
        gate.authorization = "Basic d29ya2VyOnMzY3JldDrDvA==" if way == "password" else "Bearer s3cret"
        right = asking(gate.url, **login)
        assert right.ask_output_id() > 0
        file.write_text("wrong")
        wrong = asking(gate.url, **login)
        with pytest.raises(RegistryRefused, match=f"lets nobody in.*UEMB_SCHEMA_REGISTRY_{way.upper()}") as refused:
            asyncio.run(wrong.output_id())
        assert "wrong" not in str(refused.value)
        if way == "token":  # read anew for each request
            with pytest.raises(RegistryRefused):
                right.ask_output_id(register=False)
            file.write_text("s3cret")
            assert right.ask_output_id(register=False) > 0


def test_a_certificate_is_checked_against_the_setting(
    registry: RegistryServer, tmp_path: Path, unique: str, asking: Asking
) -> None:
    try:
        server, other = make_certificate(tmp_path, "server"), make_certificate(tmp_path, "other")
        elsewhere = make_certificate(tmp_path, "elsewhere", address="127.0.0.9")
    except FileNotFoundError:
        pytest.skip("no certificates: install openssl")
    with Gate(registry.url, certificate=server) as gate:
        assert asking(gate.url, schema_registry_cafile=server[0], output_topic=unique).ask_output_id() > 0
        with pytest.raises(RegistryRefused, match="UEMB_SCHEMA_REGISTRY_CAFILE"):
            asyncio.run(asking(gate.url, schema_registry_cafile=other[0]).output_id())
    with (
        Gate(registry.url, certificate=elsewhere) as gate,
        pytest.raises(RegistryRefused, match="UEMB_SCHEMA_REGISTRY_CAFILE"),
    ):
        asyncio.run(asking(gate.url, schema_registry_cafile=elsewhere[0]).output_id())
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    with pytest.raises(ConfigError, match="UEMB_SCHEMA_REGISTRY_CAFILE"):
        asking("https://127.0.0.1:1", schema_registry_cafile=empty)


@pytest.mark.parametrize("status", [200, 404, 429, 500, 503])
def test_only_the_registrys_own_word_counts_for_a_schema_that_is_unknown(
    status: int, registry: RegistryServer, asking: Asking
) -> None:
    with Gate(registry.url) as gate:
        gate.status = status
        with pytest.raises(RegistryError, match=r"UEMB_SCHEMA_REGISTRY_URL|answers with an error"):
            asking(gate.url).load({1})


@pytest.mark.parametrize("module", ["httpx2", "google.protobuf", "confluent_kafka.schema_registry"])
def test_without_the_extra_it_is_said_what_to_install(
    module: str, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "stream.core.protobuf_reader", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'user-embedding-stream\[registry\]'"):
        asking("http://127.0.0.1:1")


def test_nobody_at_the_address_is_said_when_patience_ends(asking: Asking) -> None:
    with pytest.raises(RegistryError, match=r"http://127.0.0.1:1 .*UEMB_SCHEMA_REGISTRY_URL"):
        asyncio.run(asking("http://127.0.0.1:1", delivery_timeout_s=0.2).output_id())
