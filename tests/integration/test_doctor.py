"""`uemb doctor` on real parts: what is sound is found so, each fault is named, and nothing is changed by looking."""

import asyncio
import hashlib
import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from acl_admin import Acls
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from doctor import Diagnosis, diagnose
from kafka_broker import KafkaBroker, free_ports
from onnx_models import linear
from pipeline import Pipeline
from redis_cluster import RedisCluster
from redis_server import RedisServer
from secured_broker import (
    BOTH,
    CLIENT,
    FAULTS,
    LOGIN,
    PASSWORDS,
    SECRETS,
    TLS,
    SecuredBroker,
    running_secured_broker,
    there,
)

from stream.config import load_settings
from stream.core.encoders import MadeFor
from stream.core.events import EventRow
from stream.encoders.folder import save_encoder
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.kafka.embedded_broker import DevBroker
from stream.kafka.grants import Grant
from stream.kafka.topic_owners import topics_record
from stream.kv.stores import open_writer

NOW_MS = time.time_ns() // 1_000_000


@pytest.fixture(scope="module")
def kafka(secured_kafka: SecuredBroker) -> KafkaBroker:
    """A broker with a listener of each kind."""
    return secured_kafka


@pytest.fixture
def unused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    """One of this test's own."""
    with running_secured_broker(tmp_path_factory.mktemp("unused")) as broker:
        yield broker


@pytest.fixture(scope="module")
def item_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty items in eight dimensions: what is tested here needs no real ones."""
    folder = tmp_path_factory.mktemp("items") / "v1"
    ItemSpace.save(folder, "items_v1", range(50), np.random.default_rng(3).normal(size=(50, 8)))
    return folder


def everything_in(*folders: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, time of change and hash of all that lies in folders."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")] if folder.exists() else []:
            about = path.stat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path)] = about.st_mode, about.st_mtime_ns, content
    return found


def topics_of(bootstrap: str) -> dict[str, int]:
    """All topics, internal ones too, and their partitions."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})
    return {name: len(topic.partitions) for name, topic in admin.list_topics(timeout=60).topics.items()}


def groups_of(bootstrap: str) -> set[str]:
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})
    return {group.group_id for group in admin.list_consumer_groups().result().valid}


def fed(pipeline: Pipeline) -> Pipeline:
    """Its worker has done something, and runs."""
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([EventRow(str(n % 9), str(n % 50), "view", NOW_MS - 1000 * n) for n in range(90)])
    pipeline.until_committed()
    return pipeline


def test_brokers_that_nobody_has_used_stay_so(
    unused: SecuredBroker, item_folder: Path, unique: str, tmp_path: Path
) -> None:
    """No topic is made there, that of the groups' offsets neither, and no folder here; whatever the client may see."""
    pipeline = Pipeline(unused.bootstrap, unique, tmp_path, item_folder)
    found = diagnose(pipeline.environment)
    assert (found.code, found.wrong) == (0, [])
    (topics,) = [line["detail"] for line in found.lines if line["check"] == "topics"]
    assert all(name in topics for name in (pipeline.output, pipeline.changelog, pipeline.dlq)), topics
    for name, value in {**LOGIN, "sasl_username": "app", "sasl_password": PASSWORDS["app"]}.items():
        pipeline.environment[f"UEMB_{name.upper()}"] = value
    pipeline.environment["UEMB_BOOTSTRAP_SERVERS"] = unused.at["SASL"]
    check_named(diagnose(pipeline.environment), f"not allowed to Read group {unique}")
    acls = Acls(unused.bootstrap)
    for grants in ([Grant(("Describe",), "group", unique)], [Grant(("Read",), "group", unique)]):
        acls.give(grants)
        assert diagnose(pipeline.environment).statuses["group"] == "skipped"
    assert topics_of(unused.bootstrap) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_sound_set_up_is_found_so_and_left_as_it_is(make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = fed(make_pipeline())
    epochs, topics, groups = pipeline.epochs(), topics_of(pipeline.bootstrap), groups_of(pipeline.bootstrap)
    log = pipeline.log.read_text()
    running = diagnose(pipeline.environment)
    assert (running.code, running.wrong) == (0, [])
    assert {check for check, status in running.statuses.items() if status == "skipped"} == {"grants transactional id"}
    said = {line["check"]: line["detail"] for line in running.lines}
    assert said["group"] == f"1 worker in {pipeline.app_id}"
    assert "UEMB_HISTORY_LIMIT=100" in said["changelog"]
    assert said["store's owner"] == f"it belongs to {pipeline.app_id}, 4 partitions"
    assert "items_v1 (50 items, 8 dims, cosine)" in said["versions"]
    # the worker goes on as before
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([EventRow("1", "7", "view", NOW_MS)])
    pipeline.until_committed()
    assert pipeline.epochs() == epochs
    assert not [line for line in pipeline.log.read_text()[len(log) :].splitlines() if " INFO " not in line]
    assert pipeline.stop() == 0
    folders = everything_in(pipeline.kv_path, pipeline.state)
    lengths = {name: pipeline.length(name) for name in (pipeline.changelog, pipeline.output, pipeline.dlq)}
    stopped = diagnose(pipeline.environment)
    assert (stopped.code, stopped.wrong) == (0, [])
    assert everything_in(pipeline.kv_path, pipeline.state) == folders
    assert {name: pipeline.length(name) for name in lengths} == lengths
    assert topics_of(pipeline.bootstrap) == topics
    assert groups_of(pipeline.bootstrap) == groups


def test_lines_for_people(make_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.environment["UEMB_ITEMS"] = str(tmp_path / "nowhere")
    said = pipeline.uemb("doctor", code=1).splitlines()
    assert "failed   items' folder: item space " in "\n".join(said)
    assert said[1].startswith(f"ok       names {pipeline.bootstrap}: 127.0.0.1")
    failed = next(n for n, line in enumerate(said) if line.startswith("failed "))
    assert said[failed + 1].startswith("         → ")
    assert said[failed + 2].startswith("skipped  items: items' folder must be in order first")
    assert "failed" in said[-1]


# -- the way to the brokers ------------------------------------------------------------------------------------------


@pytest.fixture
def settings(kafka: SecuredBroker, tmp_path: Path, item_folder: Path) -> Callable[..., dict[str, str]]:
    """Makes an environment; files of certificates are those of the broker."""

    def make(listener: str = "PLAINTEXT", **given: str) -> dict[str, str]:
        own = {
            "bootstrap_servers": kafka.at.get(listener, kafka.bootstrap),
            "items": str(item_folder),
            "state_dir": str(tmp_path / "state"),
            "kv_url": f"rocksdb://{tmp_path / 'kv'}",
        }
        return {f"UEMB_{k.upper()}": v for k, v in {**own, **there(kafka.ca.parent, given)}.items()}

    return make


def check_named(found: Diagnosis, *says: str, code: int = 1) -> None:
    """One line of what is wrong says it all."""
    assert found.code == code, found.lines
    wrong = found.of("failed")
    assert any(all(what in line for what in says) for line in wrong), wrong
    text = json.dumps(found.lines)
    assert not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_connection_is_named(fault: str, settings: Callable[..., dict[str, str]]) -> None:
    listener, given, cause = FAULTS[fault]
    found = diagnose(settings(listener, **given))
    of_settings = {"no password", "two passwords", "missing password", "missing CA"}
    check_named(found, cause, code=2 if fault in of_settings else 1)
    if fault not in of_settings:
        assert (found.statuses["topics"], found.statuses["changelog"]) == ("skipped", "skipped")
        assert found.statuses["items"] == "ok"  # what does not depend on it is looked at all the same


@pytest.mark.parametrize("listener", ["PLAINTEXT", "SSL", "MTLS", "SASL", "SASLSSL"])
def test_a_sound_connection_of_each_kind(listener: str, settings: Callable[..., dict[str, str]]) -> None:
    given = {"PLAINTEXT": {}, "SSL": TLS, "MTLS": {**TLS, **CLIENT}, "SASL": LOGIN, "SASLSSL": BOTH}[listener]
    found = diagnose(settings(listener, **given))
    assert (found.code, found.of("failed")) == (0, [])
    (tls,) = [line["detail"] for line in found.lines if line["check"].startswith("TLS ")]
    assert ("valid for 89 more days" if listener in ("SSL", "MTLS", "SASLSSL") else "plain text") in tls
    # the client's own has two days left
    warned = [line["check"] for line in found.lines if line["status"] == "warning"]
    assert warned == (["own certificate"] if listener == "MTLS" else [])


def test_a_client_certificate_that_ended(settings: Callable[..., dict[str, str]]) -> None:
    ended = {"ssl_certfile": "ended.pem", "ssl_keyfile": "ended-key.pem"}
    check_named(
        diagnose(settings("SSL", **TLS, **ended)), "own certificate", "ended.pem ended on 2020-02-01", "renewed"
    )


class _BadRequest(socketserver.BaseRequestHandler):
    """What many a web server says to whom it does not understand."""

    def handle(self) -> None:
        self.request.recv(1 << 10)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


@pytest.fixture
def web_port() -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _BadRequest) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("servers", "says"),
    [
        ("nowhere.invalid:9092", ("names nowhere.invalid:9092", "name server")),
        ("127.0.0.1:{closed}", ("ports 127.0.0.1:{closed}", "Connection refused", "UEMB_BOOTSTRAP_SERVERS")),
        ("127.0.0.1", ("names 127.0.0.1", "is no host:port")),
        ("127.0.0.1:{redis}", ("TLS 127.0.0.1:{redis}", "no answer", "whether it is a Kafka broker")),
        ("127.0.0.1:{http}", ("TLS 127.0.0.1:{http}", "does not speak Kafka's protocol", "UEMB_BOOTSTRAP_SERVERS")),
    ],
)
def test_an_address_that_is_none_of_a_broker(
    servers: str, says: tuple[str, ...], settings: Callable[..., dict[str, str]], redis: RedisServer, web_port: int
) -> None:
    (closed,) = free_ports(1)
    names = {"closed": closed, "redis": redis.port, "http": web_port}
    found = diagnose(settings(bootstrap_servers=servers.format(**names)))
    check_named(found, *(what.format(**names) for what in says))
    assert found.statuses["login"] == "skipped"


def test_one_of_several_servers_that_is_away_is_a_warning(
    kafka: SecuredBroker, settings: Callable[..., dict[str, str]]
) -> None:
    (closed,) = free_ports(1)
    found = diagnose(settings(bootstrap_servers=f"nowhere.invalid:1,127.0.0.1:{closed},{kafka.bootstrap}"))
    assert (found.code, found.of("failed")) == (0, [])
    assert [line.partition(": ")[0] for line in found.wrong] == ["names nowhere.invalid:1", f"ports 127.0.0.1:{closed}"]
    assert found.statuses["topics"] == "ok"


def test_brokers_that_send_their_clients_astray(settings: Callable[..., dict[str, str]]) -> None:
    found = diagnose(settings("ASTRAY"))
    # the client learns at times where it is sent to, and at times no more than that nobody is there
    check_named(found, "127.0.0.1:1", "advertised.listeners")
    assert found.statuses["topics"] == "skipped"


@pytest.fixture
def silent() -> Iterator[Callable[[], int]]:
    """Makes ports of which nothing is ever heard: connections are made by the system, or not even that."""
    with ExitStack() as held:

        def make() -> int:
            return int(held.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0)).getsockname()[1])

        yield make


def test_it_ends_soon_where_nobody_answers(settings: Callable[..., dict[str, str]], silent: Callable[[], int]) -> None:
    """As soon with five servers as with one: all are asked at a time."""

    def took_s(servers: int) -> float:
        addresses = ",".join(f"127.0.0.1:{silent()}" for _ in range(servers))
        began = time.monotonic()
        found = diagnose(settings(bootstrap_servers=addresses, kv_url=f"redis://127.0.0.1:{silent()}/0"))
        took_s = time.monotonic() - began
        assert found.code == 1
        assert found.statuses["store"] == "failed"
        assert len([line for line in found.of("failed") if line.startswith("TLS 127.0.0.1:")]) == servers
        return took_s

    alone_s = took_s(1)
    assert took_s(5) < 2 * alone_s


# -- what is there ---------------------------------------------------------------------------------------------------


def test_what_another_application_writes_to(kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 2})
    theirs = f"{pipeline.app_id}-other-item-status"
    admin.create_topics([NewTopic(theirs, 1, 1)], operation_timeout=60)[theirs].result()
    pipeline.say(theirs, *topics_record(load_settings(output_topic=pipeline.output, dlq_topic="another.dlq")))
    says = f"application {pipeline.app_id}-other writes to {pipeline.output}"
    check_named(diagnose(pipeline.environment), "topics' owner", "UEMB_OUTPUT_TOPIC", says, "name another")


async def owned_by(url: str, **meta: object) -> str:
    """Have a store belong to somebody."""
    store = open_writer(url)
    await store.update_meta(lambda before: replace(before, **meta))  # type: ignore[arg-type]
    await store.close()
    return url


async def test_a_redis_is_judged_and_left_as_it_is(
    settings: Callable[..., dict[str, str]], make_redis: Callable[..., RedisServer]
) -> None:
    redis = make_redis(requirepass="kv-secret-4", maxmemory_policy="allkeys-lru")
    await owned_by(redis.url, app="user-embeddings", partitions=4)
    client = redis.client()
    before = {key: client.get(key) for key in client.keys("*")}
    found = await in_thread(settings(kv_url=redis.url))
    assert found.code == 0
    (warned,) = found.wrong
    assert "has maxmemory-policy allkeys-lru" in warned
    assert "set maxmemory-policy noeviction" in warned
    assert f"Redis {client.info()['redis_version']}" in "".join(found.of("ok"))
    assert "kv-secret-4" not in json.dumps(found.lines)
    assert {key: client.get(key) for key in client.keys("*")} == before
    client.config_set("maxmemory-policy", "noeviction")
    found = await in_thread(settings(kv_url=redis.url))
    assert (found.code, found.wrong) == (0, [])
    client.close()


async def in_thread(environment: Mapping[str, str]) -> Diagnosis:
    """The command has an event loop of its own."""
    return await asyncio.to_thread(diagnose, environment)


async def test_a_store_that_is_no_store_of_ours(
    settings: Callable[..., dict[str, str]], redis: RedisServer, tmp_path: Path
) -> None:
    theirs = await owned_by(f"rocksdb://{tmp_path / 'theirs'}", app="another")
    check_named(await in_thread(settings(kv_url=theirs)), "store's owner", "'another'", "another UEMB_KV_URL")
    check_named(await in_thread(settings(kv_url=await owned_by(redis.url, app="another"))), "'another'")
    (tmp_path / "theirs" / "meta.json").write_text("{")
    check_named(await in_thread(settings(kv_url=theirs)), "store: ", "meta.json is damaged", "remove the store")
    other = await owned_by(
        f"rocksdb://{tmp_path / 'hash'}", app="user-embeddings", encoders={"uemb:encoder:user_v7": "0" * 64}
    )
    found = await in_thread(settings(kv_url=other, user_version="user_v7"))
    check_named(found, "'user_v7' names other parameters", "UEMB_USER_VERSION")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda url: url.replace("redis://", "redis://:no@"), "refused the login"),
        (lambda url: url[:-1] + "99", "has no database 99"),
        (lambda url: url.replace("redis://", "redis+cluster://").removesuffix("/0"), "is not part of a cluster"),
        (lambda url: "memory://here", "has no readers"),
    ],
)
def test_a_store_that_can_not_be_used(
    change: Callable[[str], str], says: str, settings: Callable[..., dict[str, str]], redis: RedisServer
) -> None:
    check_named(diagnose(settings(kv_url=change(redis.url))), "store: ", says, "UEMB_KV_URL")


def test_a_cluster_is_judged(settings: Callable[..., dict[str, str]], cluster: RedisCluster) -> None:
    found = diagnose(settings(kv_url=cluster.url))
    assert (found.code, found.wrong) == (0, [])
    assert any("3 servers with Redis" in line for line in found.of("ok"))


def test_encoders_and_items_that_the_control_topic_names(
    make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """One that can't be loaded stops nobody while another is served, and everybody once it is."""
    pipeline = fed(make_pipeline())
    second = tmp_path / "v2"
    ItemSpace.save(second, "items_v2", range(50), np.random.default_rng(4).normal(size=(50, 8)))
    pipeline.uemb("items", "publish", str(second))
    pipeline.uemb("encoder", "publish", "avg", "--as", "mean")
    assert pipeline.stop() == 0
    found = diagnose(pipeline.environment)
    assert (found.code, found.wrong) == (0, [])
    (versions,) = [line for line in found.of("ok") if line.startswith("versions: ")]
    assert "items_v2 (50 items" in versions
    assert "mean" in versions
    vectors = bytearray((second / "vectors.npy").read_bytes())
    vectors[-3] ^= 1
    (second / "vectors.npy").write_bytes(vectors)
    found = diagnose(pipeline.environment)
    assert found.code == 0
    (warned,) = found.wrong
    assert warned.startswith("versions items_v2: is refused, serving goes on: ")
    (second / "manifest.json").unlink()
    check_named(diagnose(pipeline.environment), "control topic", str(second), "manifest.json")


def test_a_learned_encoder(settings: Callable[..., dict[str, str]], item_folder: Path, tmp_path: Path) -> None:
    space, folder = ItemSpace.load(item_folder), tmp_path / "encoder"
    weights = np.random.default_rng(5).normal(size=(3 * space.dim, space.dim))
    save_encoder(folder, linear(weights), MadeFor(space.version, space.sha256, space.dim))
    learned = {"encoder": "learned", "encoder_folder": str(folder)}
    found = diagnose(settings(**learned))
    assert (found.code, found.wrong) == (0, [])
    assert any("encoders learned-" in line for line in found.of("ok"))
    other = tmp_path / "v2"
    ItemSpace.save(other, "items_v2", range(50), np.random.default_rng(4).normal(size=(50, 8)))
    check_named(diagnose(settings(**learned, items=str(other))), "versions: ", "items_v1")
    model = bytearray((folder / "model.onnx").read_bytes())
    model[-3] ^= 1
    (folder / "model.onnx").write_bytes(model)
    check_named(diagnose(settings(**learned)), "versions: ", str(folder), "model.onnx")
    (folder / "encoder.json").unlink()
    check_named(diagnose(settings(**learned)), "settings: UEMB_ENCODER_FOLDER", str(folder), code=2)


def test_a_clock_that_is_behind_a_workers(kafka: KafkaBroker, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 2})
    output = NewTopic(pipeline.output, 4, 1, config={"cleanup.policy": "compact"})
    admin.create_topics([output], operation_timeout=60)[pipeline.output].result()
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "log_level": 2})
    producer.produce(pipeline.output, b"", b"k", timestamp=time.time_ns() // 1_000_000 + 1_800_000)
    assert producer.flush(60) == 0
    found = diagnose(pipeline.environment)
    assert found.code == 0
    (warned,) = found.wrong
    assert re.fullmatch(r"clock: .* 1[78]\d\d s ahead of this host's clock; set the clocks of all hosts by NTP", warned)


def test_the_embedded_broker_is_asked_for_no_more_than_it_answers(settings: Callable[..., dict[str, str]]) -> None:
    with DevBroker() as embedded:
        found = diagnose(settings(bootstrap_servers=embedded.bootstrap))
        assert topics_of(embedded.bootstrap) == {}
    assert (found.code, found.wrong) == (0, [])
    skipped = [line for line in found.lines if line["status"] == "skipped"]
    assert {line["detail"] for line in skipped} == {"embedded broker"}
    assert {"grants", "topics", "topics' owner", "group", "changelog"} <= {line["check"] for line in skipped}


def test_every_wrong_setting_is_named(settings: Callable[..., dict[str, str]]) -> None:
    found = diagnose(settings(partitions="0", history_limit="x", history_limt="7"))
    assert found.code == 2
    assert [line.partition(": ")[2].partition(":")[0] for line in found.of("failed")] == [
        "UEMB_PARTITIONS",
        "UEMB_HISTORY_LIMIT",
    ]
    (warned,) = found.of("warning")
    assert "UEMB_HISTORY_LIMT is not a setting" in warned
    found = diagnose(settings(dlq_topic="", encoder="x", replication_factor="0", security_protocol="SASL_SSL"))
    assert found.code == 2
    assert len(found.of("failed")) == 4, found.wrong


def test_usage_is_exit_2(make_pipeline: Callable[..., Pipeline]) -> None:
    assert "no such option" in make_pipeline().uemb("doctor", "--fix", code=2).lower()


def test_a_state_folder_that_can_not_be_written(settings: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """On a file system that takes no writes, from root neither."""
    check_named(diagnose(settings(state_dir="/proc/1/state")), "UEMB_STATE_DIR /proc/1/state", "can't be written to")
    own = tmp_path / "state" / "user-embeddings"
    own.mkdir(parents=True, mode=0o755)
    found = diagnose(settings())
    assert found.code == 0
    assert found.wrong == [f"state folder: UEMB_STATE_DIR {own} is open to other users; chmod 700 {own}"]
