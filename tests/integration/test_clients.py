"""Clients that know nothing of this code: they find what the README says, and are understood.

One pipeline on real Kafka with integer, UUID and text ids; events come from librdkafka, aiokafka, kcat and Java.
"""

import io
import json
import shutil
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import avro.io
import avro.schema
import numpy as np
import pytest
from aiokafka import AIOKafkaProducer
from confluent_kafka import Producer
from kafka_broker import KafkaBroker, kafka_jars
from pipeline import Event, Pipeline, check_end_state, delete_topics, event_json, expected
from rocksdict import AccessType, Options, Rdict

from stream.config import load_settings
from stream.items import ItemSpace

USER_VERSION = load_settings().versioned_encoder.version
NOW_MS = time.time_ns() // 1_000_000
SCHEMA = files("schemas").joinpath("user_embedding.v1.avsc").read_text()
KINDS = {"view": "view", "like": "like"}


def events_of(prefix: str, seed: int) -> list[Event]:
    """Events of 30 users whose ids are integers, UUIDs and texts beyond ASCII."""
    rng = np.random.default_rng(seed)
    users = [str(seed * 1000 + n) for n in range(10)]
    users += [str(uuid.UUID(int=seed * 1000 + n, version=4)) for n in range(10)]
    users += [f"{prefix} é-日本-{n}" for n in range(10)]
    return [
        (user, str(rng.integers(60)), "view" if rng.random() < 0.5 else "like", int(NOW_MS - rng.integers(1e8)))
        for user in users
        for _ in range(4)
    ]


@pytest.fixture(scope="module")
def item_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty items in eight dimensions."""
    folder = tmp_path_factory.mktemp("items") / "v1"
    ItemSpace.save(folder, "items_v1", range(50), np.random.default_rng(3).normal(size=(50, 8)))
    return folder


@pytest.fixture(scope="module")
def space(item_folder: Path) -> ItemSpace:
    """The item space in `item_folder`."""
    return ItemSpace.load(item_folder)


EVENTS = {name: events_of(name, seed) for seed, name in enumerate(("librdkafka", "aiokafka", "java", "kcat"), 1)}


@pytest.fixture(scope="module")
def pipeline(kafka: KafkaBroker, item_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """All events of `EVENTS`, each through its client, processed by one worker."""
    if shutil.which("kcat") is None:
        pytest.skip("install kcat")
    prefix = f"t{uuid.uuid4().hex[:10]}"
    pipeline = Pipeline(kafka.bootstrap, prefix, tmp_path_factory.mktemp("clients"), item_folder)
    try:
        pipeline.start()
        pipeline.until_ready()
        by_librdkafka(pipeline, EVENTS["librdkafka"])
        by_aiokafka(pipeline, EVENTS["aiokafka"])
        by_java(pipeline, EVENTS["java"])
        by_kcat(pipeline, EVENTS["kcat"], "-X", "partitioner=murmur2_random")
        pipeline.until_committed()
        yield pipeline
        assert pipeline.stop() == 0
    finally:
        pipeline.close()
        delete_topics(kafka.bootstrap, prefix)


def by_librdkafka(pipeline: Pipeline, events: list[Event]) -> None:
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random"})
    for user, item, kind, ts in events:
        producer.produce(pipeline.topics[kind], event_json(user, item, kind, ts), user.encode())
    assert producer.flush(20) == 0


def by_aiokafka(pipeline: Pipeline, events: list[Event]) -> None:
    import asyncio

    async def send() -> None:
        async with AIOKafkaProducer(bootstrap_servers=pipeline.bootstrap) as producer:
            for user, item, kind, ts in events:
                await producer.send(pipeline.topics[kind], event_json(user, item, kind, ts), user.encode())

    asyncio.run(send())


def lines_of(events: list[Event], kind: str) -> str:
    return "".join(
        f"{user}\t{event_json(user, item, kind, ts).decode()}\n" for user, item, k, ts in events if k == kind
    )


def by_java(pipeline: Pipeline, events: list[Event]) -> None:
    for kind in KINDS:
        tool = ["java", "-Dfile.encoding=UTF-8", "-cp", f"{kafka_jars()}/*", "org.apache.kafka.tools.ConsoleProducer"]
        where = ["--bootstrap-server", pipeline.bootstrap, "--topic", pipeline.topics[kind]]
        ended = subprocess.run(
            [*tool, *where, "--reader-property", "parse.key=true"],
            input=lines_of(events, kind).encode(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr.decode()


def by_kcat(pipeline: Pipeline, events: list[Event], *more: str) -> None:
    for kind in KINDS:
        subprocess.run(
            ["kcat", "-P", "-b", pipeline.bootstrap, "-t", pipeline.topics[kind], "-K", "\t", *more],
            input=lines_of(events, kind).encode(),
            check=True,
            timeout=60,
        )


def test_every_client_reaches_the_right_owner(pipeline: Pipeline, space: ItemSpace) -> None:
    events = [event for of_one in EVENTS.values() for event in of_one]
    check_end_state(pipeline, expected(events, space), space, USER_VERSION)
    assert pipeline.read(pipeline.dlq) == []


def test_kcat_and_a_plain_avro_library_read_the_output(pipeline: Pipeline, space: ItemSpace) -> None:
    want = expected([event for of_one in EVENTS.values() for event in of_one], space)
    # lengths first: keys and values may hold any byte
    told = subprocess.run(
        ["kcat", "-C", "-e", "-q", "-b", pipeline.bootstrap, "-t", pipeline.output, "-f", "%p %K %S\n%k%s\n"],
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    last: dict[str, tuple[int, bytes]] = {}
    at = 0
    while at < len(told):
        end = told.index(b"\n", at)
        partition, key_size, size = map(int, told[at:end].split())
        key = told[end + 1 : end + 1 + key_size].decode()
        last[key] = (partition, told[end + 1 + key_size : end + 1 + key_size + size])
        at = end + 1 + key_size + size + 1
    assert set(last) == {f"uemb:{USER_VERSION}:items_v1:{user}" for user in want}
    schema = avro.schema.parse(SCHEMA)
    fingerprint = schema.fingerprint("CRC-64-AVRO")
    for user, fields in want.items():
        _, value = last[f"uemb:{USER_VERSION}:items_v1:{user}"]
        assert value[:2] == b"\xc3\x01"
        assert value[2:10] == fingerprint
        reader = avro.io.DatumReader(schema)
        record: Any = reader.read(avro.io.BinaryDecoder(io.BytesIO(value[10:])))
        assert record["user_id"] == user
        assert {name: record[name] for name in ("status", "reason", "history_len", "unknown_items", "as_of")} == {
            name: fields[name] for name in ("status", "reason", "history_len", "unknown_items", "as_of")
        }
        assert record["depends_on"] == {"item_embedding_version": "items_v1"}
        assert record["user_embedding"]["dim"] == 8
        assert record["user_embedding"]["vector"] == value[-32:]
        # who knows nothing of Avro takes the last 4·dim bytes
        np.testing.assert_allclose(np.frombuffer(value[-4 * 8 :], "<f4"), fields["vector"], rtol=0, atol=1e-6)


def test_the_store_is_read_with_rocksdb_alone(pipeline: Pipeline, space: ItemSpace, tmp_path: Path) -> None:
    """By what the README says of it, without this code."""
    want = expected([event for of_one in EVENTS.values() for event in of_one], space)
    shown = []
    for number, folder in enumerate(sorted(pipeline.kv_path.glob("p-?????"))):
        scratch = tmp_path / str(number)
        shown.append(Rdict(str(folder), Options(raw_mode=True), access_type=AccessType.secondary(str(scratch))))
    assert len(shown) == 4
    for user, fields in want.items():
        key = f"uemb:{USER_VERSION}:items_v1:{user}".encode()
        (entry,) = [found for db in shown if (found := db.get(key)) is not None]
        epoch, revision = struct.unpack(">QQ", entry[:16])
        assert (epoch, revision) == (1, fields["history_len"])
        assert entry[16:18] == b"\xc3\x01"
        np.testing.assert_allclose(np.frombuffer(entry[-32:], "<f4"), fields["vector"], rtol=0, atol=1e-6)


def test_json_on_the_output_topic_has_the_seeds_shape(
    kafka: KafkaBroker, unique: str, space: ItemSpace, item_folder: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline(kafka.bootstrap, unique, tmp_path, item_folder, output_format="json")
    events = EVENTS["librdkafka"]
    try:
        pipeline.start()
        pipeline.until_ready()
        by_librdkafka(pipeline, events)
        # librdkafka's default partitioner is another one: what lands elsewhere is turned away, the rest is applied
        by_kcat(pipeline, EVENTS["kcat"])
        pipeline.until_committed()
        told = subprocess.run(
            ["kcat", "-C", "-e", "-q", "-b", pipeline.bootstrap, "-t", pipeline.output, "-f", "%k\t%s\n"],
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout.decode()
        letters = pipeline.read(pipeline.dlq)
        assert pipeline.stop() == 0
    finally:
        pipeline.close()
        delete_topics(kafka.bootstrap, unique)
    last = dict(line.split("\t", 1) for line in told.splitlines())
    for user, fields in expected(events, space).items():
        record = json.loads(last[f"uemb:{USER_VERSION}:items_v1:{user}"])
        assert record["user_embedding"]["dim"] == 8
        assert record["depends_on"] == {"item_embedding_version": "items_v1"}
        np.testing.assert_allclose(record["user_embedding"]["vector"], fields["vector"], rtol=0, atol=1e-6)
    reasons = {dict(letter.headers())["dlq.reason"] for letter in letters}
    assert reasons == {b"wrong_partition"}
    applied = len(EVENTS["kcat"]) - len(letters)
    assert applied > 0
