"""Clients that are not ours agree: producers in C, Python and Java; kcat, Apache's Avro and plain bytes as readers.

What a reader does here follows `schemas/README.md` and the committed schema, and nothing of `stream`.
"""

import asyncio
import io
import json
import shutil
import struct
import subprocess
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import avro.io
import avro.schema
import numpy as np
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2
from confluent_kafka import Producer
from kafka_broker import BrokerError, KafkaBroker, kafka_jars
from pipeline import Event, Pipeline, check_end_state, delete_topics, event_json, expected
from rocksdict import AccessType, Options, Rdict

from stream.config import load_settings
from stream.feed.dataset import Dataset
from stream.items.space import ItemSpace

USER_VERSION = load_settings().versioned_encoder.version
SCHEMA = (Path(__file__).parents[2] / "schemas" / "user_embedding.v1.avsc").read_text()
EVENTS_PER_USER: Final = 40
USERS_PER_PRODUCER: Final = 18
_PROCESS_TIMEOUT_S: Final = 60


class Record(NamedTuple):
    """A record as kcat prints it."""

    partition: int
    key: bytes
    value: bytes | None
    headers: bytes


# -- producers --------------------------------------------------------------------------------------------------------

Lines = Sequence[tuple[bytes, bytes]]  # key and value of each record


def by_confluent(bootstrap: str, topic: str, lines: Lines) -> None:
    """librdkafka with the Java clients' partitioner."""
    failed: list[object] = []
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random"})
    for key, value in lines:
        producer.produce(topic, value, key, on_delivery=lambda error, _: error and failed.append(error))
    assert producer.flush(_PROCESS_TIMEOUT_S) == 0
    assert failed == []


def by_aiokafka(bootstrap: str, topic: str, lines: Lines) -> None:
    """aiokafka with its default partitioner."""

    async def send() -> None:
        async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
            await asyncio.gather(*[await producer.send(topic, value, key) for key, value in lines])

    asyncio.run(send())


def by_java(bootstrap: str, topic: str, lines: Lines) -> None:
    """The Java client, as Kafka's console producer."""
    java = ["java", "-cp", f"{kafka_jars()}/*", "org.apache.kafka.tools.ConsoleProducer"]
    reader = ["--reader-property", "parse.key=true", "--reader-property", "key.separator=|"]
    feed([*java, "--bootstrap-server", bootstrap, "--topic", topic, *reader], lines)


def by_kcat(bootstrap: str, topic: str, lines: Lines, *settings: str) -> None:
    """kcat, told to partition as the Java clients do."""
    chosen = settings or ("-X", "partitioner=murmur2_random")
    feed(["kcat", "-P", "-b", bootstrap, "-t", topic, "-K", "|", *chosen], lines)


def feed(command: Sequence[str], lines: Lines) -> None:
    """Run a producer that reads ``key|value`` lines."""
    text = b"".join(key + b"|" + value + b"\n" for key, value in lines)
    done = subprocess.run(command, input=text, capture_output=True, timeout=_PROCESS_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")


PRODUCERS = {"confluent": by_confluent, "aiokafka": by_aiokafka, "java": by_java, "kcat": by_kcat}


# -- readers ----------------------------------------------------------------------------------------------------------


def read_by_kcat(bootstrap: str, topic: str) -> list[Record]:
    """All records of a topic; lengths are printed before the bytes, which may hold anything."""
    layout = ["-f", "%p %K %S %h\n%k%s"]
    command = ["kcat", "-C", "-q", "-e", "-b", bootstrap, "-t", topic, "-o", "beginning", *layout]
    done = subprocess.run(command, capture_output=True, timeout=_PROCESS_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    out = io.BytesIO(done.stdout)
    records = []
    while line := out.readline():
        partition, key_bytes, value_bytes, headers = line.rstrip(b"\n").split(b" ", 3)
        key = out.read(int(key_bytes))
        value = None if int(value_bytes) < 0 else out.read(int(value_bytes))
        records.append(Record(int(partition), key, value, headers))
    return records


def owner(user: bytes, partitions: int) -> int:
    """The partition of a key, by aiokafka's own murmur2."""
    return int((murmur2(user) & 0x7FFFFFFF) % partitions)


def user_of(key: bytes) -> bytes:
    """User id out of ``uemb:{user_version}:{item_version}:{user_id}``; the id may hold colons."""
    return key.split(b":", 3)[3]


def tail_vector(data: bytes, dim: int) -> np.ndarray:
    """What a client without Avro takes: the last 4·dim bytes."""
    return np.frombuffer(data[-4 * dim :], dtype="<f4")


def check_vector(vector: np.ndarray, want: np.ndarray, user: str) -> None:
    np.testing.assert_allclose(vector, want, rtol=0, atol=1e-6, err_msg=user)


# -- one run that all look at -----------------------------------------------------------------------------------------


class Run(NamedTuple):
    pipeline: Pipeline
    events: dict[str, list[Event]]  # by producer
    want: dict[str, dict[str, Any]]
    output: list[Record]


@pytest.fixture(scope="module", autouse=True)
def _kcat() -> None:
    if shutil.which("kcat") is None:
        pytest.skip("no kcat: install it (apt-get install kcat)")


@pytest.fixture(scope="module")
def run(
    kafka: KafkaBroker, films: Dataset, space: ItemSpace, item_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """A worker fed by every producer with users of its own; the output as kcat reads it."""
    if shutil.which("java") is None:
        pytest.skip("no Java client: install Java (java)")
    try:
        kafka_jars()
    except BrokerError as exc:
        pytest.skip(f"no Java client: {exc}")
    unique = f"t{uuid.uuid4().hex[:10]}"
    pipeline = Pipeline(kafka.bootstrap, unique, tmp_path_factory.mktemp("independent"), item_folder)
    try:
        pipeline.start()
        pipeline.until_ready()
        names = list(PRODUCERS)
        events = {
            name: events_of(films, range(1 + i, 1 + len(names) * USERS_PER_PRODUCER, len(names)))
            for i, name in enumerate(names)
        }
        for name, produce in PRODUCERS.items():
            for kind, topic in pipeline.topics.items():
                produce(kafka.bootstrap, topic, lines_of(events[name], kind))
        pipeline.until_committed()
        want = expected([event for own in events.values() for event in own], space)
        yield Run(pipeline, events, want, read_by_kcat(kafka.bootstrap, pipeline.output))
        assert pipeline.stop() == 0
    finally:
        pipeline.close()
        delete_topics(kafka.bootstrap, unique)


def events_of(films: Dataset, numbers: Sequence[int]) -> list[Event]:
    """Real interactions of some users, under integer, UUID and non-ASCII ids in turn; some get a fallback."""
    events: list[Event] = []
    for n in numbers:
        user = (str(n), str(uuid.uuid5(uuid.NAMESPACE_OID, str(n))), f"Zoë:{n} 東京")[n % 3]
        own = [row for row in films.events if row.user_id == str(n)]
        events += [(user, row.item_id, row.type, row.ts_ms) for row in own[: EVENTS_PER_USER if n % 10 else 1]]
    return events


def lines_of(events: Sequence[Event], kind: str) -> list[tuple[bytes, bytes]]:
    """Records of one type; an integer id is sent as one."""
    return [
        (user.encode(), event_json(int(user) if user.isdecimal() else user, int(item), type_, ts))
        for user, item, type_, ts in events
        if type_ == kind
    ]


# -- tests ------------------------------------------------------------------------------------------------------------


def test_every_producer_lands_on_the_right_owner(run: Run, space: ItemSpace) -> None:
    pipeline = run.pipeline
    where: dict[bytes, set[int]] = {}
    for topic in pipeline.topics.values():
        for record in read_by_kcat(pipeline.bootstrap, topic):
            where.setdefault(record.key, set()).add(record.partition)
    for name, events in run.events.items():
        users = {user.encode() for user, *_ in events}
        assert len(users) == USERS_PER_PRODUCER
        assert {u: where[u] for u in users} == {u: {owner(u, pipeline.partitions)} for u in users}, name
        assert {owner(u, pipeline.partitions) for u in users} == set(range(pipeline.partitions)), name
    assert read_by_kcat(pipeline.bootstrap, pipeline.dlq) == []
    check_end_state(pipeline, run.want, space, USER_VERSION)


def test_kcat_and_apache_avro_read_the_output(run: Run, space: ItemSpace) -> None:
    schema = avro.schema.parse(SCHEMA)
    header = b"\xc3\x01" + schema.fingerprint("CRC-64-AVRO")
    reader = avro.io.DatumReader(schema)
    last: dict[str, dict[str, Any]] = {}
    for record in run.output:
        assert record.value is not None
        user = user_of(record.key)
        assert record.key == f"uemb:{USER_VERSION}:{space.version}:".encode() + user
        assert record.partition == owner(user, run.pipeline.partitions)
        assert record.value.startswith(header)
        body = io.BytesIO(record.value[len(header) :])
        fields = reader.read(avro.io.BinaryDecoder(body))
        assert body.read() == b""
        assert fields["user_id"] == user.decode()
        assert fields["user_embedding"]["dim"] == space.dim
        assert fields["user_embedding"]["vector"] == record.value[-4 * space.dim :]
        order = fields["epoch"], fields["revision"]
        before = last.get(fields["user_id"])
        assert before is None or order >= (before["epoch"], before["revision"])
        last[fields["user_id"]] = fields
    assert set(last) == set(run.want)
    assert {fields["status"] for fields in last.values()} == {"ok", "fallback"}
    for user, want in run.want.items():
        got = last[user]
        names = ("status", "reason", "history_len", "unknown_items", "as_of")
        assert {name: got[name] for name in names} == {name: want[name] for name in names}, user
        assert got["user_embedding_version"] == USER_VERSION
        assert got["depends_on"] == {"item_embedding_version": space.version}
        assert got["user_embedding"]["norm"] == pytest.approx(np.linalg.norm(want["vector"].astype("f8")), abs=1e-6)
        check_vector(np.frombuffer(got["user_embedding"]["vector"], "<f4"), want["vector"], user)


def test_a_client_without_avro_takes_the_last_bytes_of_topic_and_store(
    run: Run, space: ItemSpace, tmp_path: Path
) -> None:
    last = {record.key: record.value for record in run.output}
    folders = sorted(path for path in run.pipeline.kv_path.glob("p-*") if path.is_dir())
    assert [path.name for path in folders] == [f"p-{n:05d}" for n in range(run.pipeline.partitions)]
    store = [
        Rdict(str(path), Options(raw_mode=True), access_type=AccessType.secondary(str(tmp_path / path.name)))
        for path in folders
    ]
    try:
        for user, want in run.want.items():
            key = f"uemb:{USER_VERSION}:{space.version}:{user}".encode()
            value, entry = last[key], store[owner(user.encode(), len(store))][key]
            assert value is not None
            check_vector(tail_vector(value, space.dim), want["vector"], user)
            check_vector(tail_vector(entry, space.dim), want["vector"], user)
            assert entry[16:] == value
            fields = avro.io.DatumReader(avro.schema.parse(SCHEMA)).read(avro.io.BinaryDecoder(io.BytesIO(value[10:])))
            assert struct.unpack(">QQ", entry[:16]) == (fields["epoch"], fields["revision"])
    finally:
        for database in store:
            database.close()


@pytest.mark.slow
def test_kcat_reads_json_and_its_default_partitioner_is_turned_away(
    films: Dataset, space: ItemSpace, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline(output_format="json")
    pipeline.start()
    pipeline.until_ready()
    topic = pipeline.topics["view"]
    good, tried = events_of(films, range(1, 10)), events_of(films, range(10, 40))
    good, tried = ([(u, i, "view", ts) for u, i, _, ts in events] for events in (good, tried))
    # Some records of the topic are well placed: a worker that sees none stops, for its producer can't be right.
    by_kcat(pipeline.bootstrap, topic, lines_of(good, "view"))
    pipeline.until_committed()
    by_kcat(pipeline.bootstrap, topic, lines_of(tried, "view"), "-X", "partitioner=consistent_random")
    pipeline.until_committed()

    def by_luck(event: Event) -> bool:
        user = event[0].encode()
        return zlib.crc32(user) % pipeline.partitions == owner(user, pipeline.partitions)

    applied = [*good, *filter(by_luck, tried)]
    refused = [event for event in tried if not by_luck(event)]
    assert len(good) < len(applied)
    dead = read_by_kcat(pipeline.bootstrap, pipeline.dlq)
    assert sorted((r.key, r.value) for r in dead) == sorted(lines_of(refused, "view"))
    assert all(b"dlq.reason=wrong_partition" in record.headers.split(b",") for record in dead)

    want = expected(applied, space)
    last = {
        user_of(r.key).decode(): json.loads(r.value or b"") for r in read_by_kcat(pipeline.bootstrap, pipeline.output)
    }
    assert set(last) == set(want)
    for user, fields in want.items():
        got = last[user]
        assert got["user_id"] == user
        assert (got["status"], got["reason"], got["as_of"]) == (fields["status"], fields["reason"], fields["as_of"])
        assert got["user_embedding_version"] == USER_VERSION
        assert got["depends_on"] == {"item_embedding_version": space.version}
        assert set(got["user_embedding"]) == {"dim", "norm", "vector"}
        assert got["user_embedding"]["dim"] == space.dim
        assert got["user_embedding"]["norm"] == pytest.approx(1, abs=1e-5)
        check_vector(np.array(got["user_embedding"]["vector"], dtype="f4"), fields["vector"], user)
    assert pipeline.stop() == 0
