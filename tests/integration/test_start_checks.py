"""What a worker refuses at its start: wrong topics, items, stores, and settings that existing state was not made for.

A refusal is one clear line and a non-zero exit, and leaves everything as it was.
"""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import warm_start
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic
from doctor import diagnose
from kafka_broker import KafkaBroker
from pipeline import UEMB, Event, Pipeline, check_end_state, delete_topics, expected
from topic_admin import delete_topic

from stream.config import load_settings
from stream.core.events import EventRow
from stream.errors import UembError
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.kafka import topics
from stream.kafka.topics import prepare_topics
from stream.kv.rocksdb.writer import RocksKV
from stream.retrieval.reader import EmbeddingReader

USER_VERSION = load_settings().versioned_encoder.version
COMPACT, DELETE = {"cleanup.policy": "compact"}, {"cleanup.policy": "delete"}
LARGE = {"max.message.bytes": "2000000"}
#: A refused start that takes longer is one that hangs.
PATIENCE_S = 120
#: So long a start waits for a broker that isn't there; for all the rest it takes what starts take on this machine.
BROKER_PATIENCE_S = 20
NOW_MS = time.time_ns() // 1_000_000


class Case(NamedTuple):
    """One wrong thing, and what the error must name; {topic} is the wrong topic's name."""

    says: tuple[str, ...]
    kind: str = ""
    partitions: int = 4
    config: Mapping[str, str] = {}
    settings: Mapping[str, str] = {}
    code: int = 2
    logged: bool = False  # beside the line that says so
    whole: bool = True  # a whole worker, or only its check of the topics: a process takes a second of a core


RIGHT = {
    "view": Case((), "view", 4, DELETE),
    "like": Case((), "like", 4, DELETE),
    "deletions": Case((), "deletions", 4, COMPACT),
    "changelog": Case((), "changelog", 4, COMPACT),
    "output": Case((), "output", 4, COMPACT),
    "dlq": Case((), "dlq", 1, {**DELETE, **LARGE}),
    "versions": Case((), "versions", 1, COMPACT),
    "status": Case((), "status", 1, COMPACT),
}
CASES = {
    "no_broker": Case(
        ("127.0.0.1:1", "UEMB_BOOTSTRAP_SERVERS"), settings={"UEMB_BOOTSTRAP_SERVERS": "127.0.0.1:1"}, code=75
    ),
    "session_timeout_that_the_broker_refuses": Case(
        ("UEMB_SESSION_TIMEOUT_S",), settings={"UEMB_SESSION_TIMEOUT_S": "0.5"}, logged=True
    ),
    "event_topic_has_3_partitions": Case(("{topic}", "3 partitions"), "like", 3, DELETE),
    "deletion_topic_has_2_partitions": Case(("{topic}", "2 partitions"), "deletions", 2, COMPACT),
    "changelog_has_5_partitions": Case(("{topic}", "5 partitions"), "changelog", 5, COMPACT),
    "output_has_1_partition": Case(("{topic}", "1 partition"), "output", 1, COMPACT),
    "output_not_compacted": Case(("{topic}", "must be compact"), "output", 4, DELETE),
    "output_compacted_and_deleted": Case(
        ("{topic}", "must be compact"), "output", 4, {"cleanup.policy": "compact,delete"}, whole=False
    ),
    "changelog_not_compacted": Case(("{topic}", "must be compact"), "changelog", 4, DELETE, whole=False),
    "deletion_topic_not_compacted": Case(("{topic}", "must be compact"), "deletions", 4, DELETE, whole=False),
    "event_topic_compacted": Case(("{topic}", "is compacted"), "view", 4, COMPACT),
    "event_topic_outlives_erasure_markers": Case(
        ("UEMB_ERASURE_MARKER_RETENTION is 3600 s", "{topic}", "3660 s"),
        "view",
        config={**DELETE, "retention.ms": "3600000", "segment.ms": "60000"},
        settings={"UEMB_ERASURE_MARKER_RETENTION": "1h"},
        whole=False,
    ),
    "event_topic_for_ever_and_erasure_markers_not": Case(
        ("{topic}", "for ever", "UEMB_ERASURE_MARKER_RETENTION"),
        "view",
        config={**DELETE, "retention.ms": "-1"},
        settings={"UEMB_ERASURE_MARKER_RETENTION": "3650d"},
        whole=False,
    ),
    "dead_letters_compacted": Case(("{topic}", "is compacted"), "dlq", 1, {**COMPACT, **LARGE}, whole=False),
    "dead_letters_admit_too_little": Case(("{topic}", "max.message.bytes"), "dlq", 1, DELETE),
    "changelog_admits_too_little": Case(
        ("{topic}", "max.message.bytes"), "changelog", 4, {**COMPACT, "max.message.bytes": "20000"}, whole=False
    ),
    "output_admits_too_little": Case(
        ("{topic}", "max.message.bytes"), "output", 4, {**COMPACT, "max.message.bytes": "16000"}, whole=False
    ),
    "control_topic_not_compacted": Case(("{topic}", "must be compact"), "versions", 1, DELETE, whole=False),
    "no_items": Case(("UEMB_ITEMS is not set", "no item version is active"), settings={"UEMB_ITEMS": ""}),
    "items_missing": Case(("{folder}/nowhere", "manifest.json"), settings={"UEMB_ITEMS": "{folder}/nowhere"}),
    "items_damaged": Case(("{folder}/damaged", "vectors.npy"), settings={"UEMB_ITEMS": "{folder}/damaged"}),
    "items_of_a_pipe": Case(("{folder}/pipe", "no regular file"), settings={"UEMB_ITEMS": "{folder}/pipe"}),
    "store_of_another_application": Case(
        ("'another'", "UEMB_KV_URL"), settings={"UEMB_KV_URL": "rocksdb://{folder}/others"}
    ),
    "store_of_another_partition_count": Case(("7 partitions",), settings={"UEMB_KV_URL": "rocksdb://{folder}/sevens"}),
    "store_of_no_known_kind": Case(("UEMB_KV_URL",), settings={"UEMB_KV_URL": "leveldb:///x"}),
    "state_folder_that_can_not_be": Case(("{folder}/file",), settings={"UEMB_STATE_DIR": "{folder}/file/state"}),
    "store_that_can_not_be": Case(
        ("UEMB_KV_URL", "{folder}/file"), settings={"UEMB_KV_URL": "rocksdb://{folder}/file/kv"}
    ),
    "no_home": Case(
        ("UEMB_STATE_DIR /proc/nobody/state",), settings={"HOME": "/proc/nobody", "UEMB_STATE_DIR": "~/state"}
    ),
    "credentials_missing": Case(("UEMB_SASL_",), settings={"UEMB_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}),
}


class Ended(NamedTuple):
    """How a start ended; a code of None: it went on running."""

    code: int | None
    stderr: str
    took_s: float


def start_and_wait(environment: Mapping[str, str], patience_s: float = PATIENCE_S) -> Ended:
    """Run a worker that should end by itself."""
    began = time.monotonic()
    try:
        ended = warm_start.run([*UEMB, "worker"], environment, patience_s)
    except subprocess.TimeoutExpired as exc:
        return Ended(None, str(exc.stderr), time.monotonic() - began)
    return Ended(ended.returncode, ended.stderr, time.monotonic() - began)


def check_topics_only(environment: Mapping[str, str]) -> Ended:
    """What a worker does about topics at its start."""
    settings = {k.removeprefix("UEMB_").lower(): v for k, v in environment.items() if k.startswith("UEMB_")}
    began = time.monotonic()
    try:
        prepare_topics(load_settings(**settings), dim=8)
    except UembError as exc:
        return Ended(exc.exit_code, f"uemb: {exc}\n", time.monotonic() - began)
    return Ended(0, "", time.monotonic() - began)


def check_refusal(ended: Ended, *says: str, code: int = 2, logged: bool = False) -> None:
    """One line that names what is wrong, no traceback, and the right exit code; `logged`: beside a line in the log."""
    assert ended.code is not None, f"it went on running:\n{ended.stderr}"
    assert "Traceback" not in ended.stderr, ended.stderr
    is_log = re.compile(
        r"\d{4}-\d\d-\d\d .* (CRITICAL stream\.worker\.app: stopping|(WARNING|ERROR) aiokafka\.consumer)"
    ).match
    lines = [line for line in ended.stderr.splitlines() if not (logged and is_log(line))]
    assert [line[:6] for line in lines] == ["uemb: "], ended.stderr
    assert not [what for what in says if what not in lines[0]], lines[0]
    assert ended.code == code, ended.stderr


def create(admin: AdminClient, topics: Mapping[str, Case]) -> None:
    new = [NewTopic(name, t.partitions, 1, config=dict(t.config)) for name, t in topics.items()]
    for future in admin.create_topics(new, operation_timeout=60).values():
        future.result()


def topic_configs(admin: AdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    asked = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, name) for name in names])
    return {topic.name: {k: v.value for k, v in future.result().items()} for topic, future in asked.items()}


@pytest.fixture(scope="module")
def item_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty items in eight dimensions: what is tested here needs no real ones."""
    folder = tmp_path_factory.mktemp("items") / "v1"
    ItemSpace.save(folder, "items_v1", range(50), np.random.default_rng(3).normal(size=(50, 8)))
    return folder


@pytest.fixture(scope="module")
def space(item_folder: Path) -> ItemSpace:
    """The item space in `item_folder`."""
    return ItemSpace.load(item_folder)


@pytest.fixture(scope="module")
def prefix() -> str:
    """What all names of `CASES` on the broker begin with."""
    return f"t{uuid.uuid4().hex[:10]}"


@pytest.fixture(scope="module")
def started(
    kafka: KafkaBroker, item_folder: Path, prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Case, dict[str, str], dict[str, str], Future[Ended]]]]:
    """Starts of all `CASES`, under way while the tests run: one waits 20 s for a broker that isn't there."""
    folder = tmp_path_factory.mktemp("start")
    shutil.copytree(item_folder, folder / "damaged")
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "manifest.json")
    vectors = bytearray((folder / "damaged" / "vectors.npy").read_bytes())
    vectors[-3] ^= 1
    (folder / "damaged" / "vectors.npy").write_bytes(vectors)
    (folder / "file").write_text("not a folder")
    asyncio.run(RocksKV(folder / "others").update_meta(lambda meta: replace(meta, app="another")))
    asyncio.run(RocksKV(folder / "sevens").update_meta(lambda meta: replace(meta, app=prefix, partitions=7)))
    ours = {"changelog": f"{prefix}-user-history-changelog", "status": f"{prefix}-item-status"}
    right = {ours.get(kind, f"{prefix}.{kind}"): topic for kind, topic in RIGHT.items()}
    wrong: dict[str, Case] = {}
    environments, names = {}, {}
    for number, (name, case) in enumerate(CASES.items()):
        topic = dict.fromkeys(RIGHT, "") | {kind: f"{prefix}.{kind}" for kind in RIGHT}
        app = prefix
        if case.kind == "changelog":
            app = f"{prefix}{number}"
            topic["changelog"] = f"{app}-user-history-changelog"
        elif case.kind:
            topic[case.kind] = f"{prefix}.{name}"
        if case.kind:
            wrong[topic[case.kind]] = case
        names[name] = {"topic": topic.get(case.kind, ""), "folder": str(folder)}
        environments[name] = {
            **{k: v for k, v in os.environ.items() if not k.startswith("UEMB_")},
            "UEMB_BOOTSTRAP_SERVERS": kafka.bootstrap,
            "UEMB_APP_ID": app,
            "UEMB_EVENT_TOPICS": f"{topic['view']},{topic['like']}",
            "UEMB_DELETION_TOPIC": topic["deletions"],
            "UEMB_OUTPUT_TOPIC": topic["output"],
            "UEMB_DLQ_TOPIC": topic["dlq"],
            "UEMB_ITEM_VERSIONS_TOPIC": topic["versions"],
            "UEMB_ITEMS": str(item_folder),
            "UEMB_KV_URL": f"rocksdb://{folder}/kv",
            "UEMB_STATE_DIR": str(folder / "state"),
            "UEMB_LOG_LEVEL": "warning",
            "UEMB_HTTP": "",
            **{k: v.format(**names[name]) for k, v in case.settings.items()},
        }
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 2})
    create(admin, right | wrong)
    with ThreadPoolExecutor(3) as pool:
        yield {
            name: (
                case,
                names[name],
                environments[name],
                pool.submit(start_and_wait if case.whole else check_topics_only, environments[name]),
            )
            for name, case in CASES.items()
        }
    now = {name for name in admin.list_topics(timeout=60).topics if name.startswith(prefix)}
    delete_topics(kafka.bootstrap, prefix)
    assert now == set(right | wrong), "a worker that refused has made topics"


@pytest.fixture(autouse=True)
def _starts_run_meanwhile(started: object) -> None:
    """Have the starts of `CASES` under way from the first test on."""


def events_of(users: range, count: int, kind: str = "view") -> list[Event]:
    """`count` events of each user, an hour to a day ago."""
    rng = np.random.default_rng(len(users) + count)
    ts = NOW_MS - rng.integers(3_600_000, 86_400_000, size=(len(users), count))
    items = rng.integers(50, size=(len(users), count))
    return [(str(u), str(items[i, n]), kind, int(ts[i, n])) for n in range(count) for i, u in enumerate(users)]


@pytest.mark.slow
def test_settings_that_existing_state_was_not_made_for(
    space: ItemSpace, make_pipeline: Callable[..., Pipeline], subtests: pytest.Subtests
) -> None:
    pipeline = make_pipeline(partitions=3)
    pipeline.partitions = 3
    pipeline.start()
    pipeline.until_ready()
    events = events_of(range(1, 13), 5)
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([EventRow(*event) for event in events])
    pipeline.until_committed()
    assert pipeline.stop() == 0
    check_topics(pipeline)

    def refused(*says: str, **settings: str) -> None:
        quiet = {**pipeline.environment, "UEMB_LOG_LEVEL": "warning"}
        ended = start_and_wait({**quiet, **{f"UEMB_{name.upper()}": value for name, value in settings.items()}})
        with subtests.test(**settings):
            check_refusal(ended, *says, logged=True)

    refused("UEMB_HISTORY_LIMIT=100", history_limit="50")
    refused("like:2", "UEMB_EVENT_TYPES", event_types="view:1")
    refused("like:2", "UEMB_EVENT_TYPES", event_types="view:1,like:3")
    other = {"output_topic": f"{pipeline.app_id}b.out", "dlq_topic": f"{pipeline.app_id}b.dlq"}
    refused(repr(pipeline.app_id), "UEMB_KV_URL", app_id=f"{pipeline.app_id}b", **other)
    check_end_state(pipeline, expected(events, space), space, USER_VERSION)

    # an appended type and an alias are accepted, and kept
    later = {"UEMB_EVENT_TYPES": "view:1,like:2,share:3", "UEMB_USER_VERSION": "user_v7"}
    pipeline.start(**later)
    pipeline.until_ready()
    shares = [("1", "7", "share", NOW_MS - 1000), ("1", "8", "share", NOW_MS - 500)]
    with Feeder(pipeline.bootstrap, {"share": pipeline.topics["like"]}) as feeder:
        feeder.send([EventRow(*event) for event in shares])
    pipeline.until_committed()
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        found = reader.get("1")
    assert (found.status, found.user_embedding_version, found.history_len) == ("ok", "user_v7", 7)
    assert pipeline.read(pipeline.dlq) == []
    assert pipeline.stop() == 0
    refused("share:3", "UEMB_EVENT_TYPES", user_version="user_v7")
    pipeline.environment.update(later)
    refused("'user_v7'", "UEMB_USER_VERSION", encoder="avg")
    refused("'user_v7'", "UEMB_USER_VERSION", encoder="avg", kv_url=f"{pipeline.kv_url}-new")


def check_topics(pipeline: Pipeline) -> None:
    """The worker has made its topics: three partitions each, and the right policies and limits."""
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    made = {name: t for name, t in admin.list_topics(timeout=60).topics.items() if name.startswith(pipeline.app_id)}
    control = {pipeline.item_versions, pipeline.item_status}
    ours = {*pipeline.inputs, pipeline.output, pipeline.dlq, pipeline.changelog, *control}
    assert set(made) == ours
    counts = {name: len(topic.partitions) for name, topic in made.items() if name != pipeline.dlq}
    assert counts == {name: 1 if name in control else 3 for name in ours - {pipeline.dlq}}
    configs = topic_configs(admin, sorted(ours))
    compacted = {name for name, config in configs.items() if config["cleanup.policy"] == "compact"}
    assert compacted == {pipeline.deletions, pipeline.changelog, pipeline.output, *control}
    assert {config["cleanup.policy"] for name, config in configs.items() if name not in compacted} == {"delete"}
    inputs = max(int(configs[name]["max.message.bytes"]) for name in pipeline.inputs)
    assert int(configs[pipeline.dlq]["max.message.bytes"]) >= inputs + (64 << 10)


def test_a_refused_worker_does_not_change_what_readers_follow(make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([EventRow(*event) for event in events_of(range(1, 3), 3)])
    pipeline.until_committed()
    assert pipeline.stop() == 0
    refused = {**pipeline.environment, "UEMB_HISTORY_LIMIT": "50"}
    ended = start_and_wait(refused)
    assert "UEMB_HISTORY_LIMIT=100" in ended.stderr
    found = diagnose(refused)
    assert found.code == 1
    (line,) = found.of("failed")
    assert line.startswith("changelog: ")
    assert "UEMB_HISTORY_LIMIT=100" in line
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        found = reader.get("1")
    assert (found.status, found.reason, found.user_embedding_version) == ("ok", "", USER_VERSION)


def test_histories_are_nobody_elses_to_read(make_pipeline: Callable[..., Pipeline]) -> None:
    """Whatever the umask, and also where the folder was there and open to all."""
    pipeline = make_pipeline()
    own = [pipeline.state, pipeline.kv_path]
    (pipeline.state / pipeline.app_id / "v1" / "tables").mkdir(parents=True)
    (pipeline.state / pipeline.app_id / "v1" / "tables" / "note").write_text("")
    pipeline.kv_path.mkdir()
    for path in (*own, *pipeline.state.rglob("*")):
        path.chmod(0o755)
    umask = os.umask(0)
    try:
        pipeline.start()
    finally:
        os.umask(umask)
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([EventRow(*event) for event in events_of(range(1, 9), 2)])
    pipeline.until_committed()
    modes = {path: path.stat().st_mode & 0o777 for folder in own for path in [folder, *folder.rglob("*")]}
    assert len(modes) > 2 * pipeline.partitions
    assert {path: mode for path, mode in modes.items() if mode & 0o077} == {}
    assert pipeline.stop() == 0


def test_what_another_application_writes_to_is_its_own(make_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    first = make_pipeline()
    first.start()
    first.until_ready()
    second = make_pipeline(kv_url=f"rocksdb://{tmp_path / 'kv2'}", state_dir=tmp_path / "state2")
    name = f"{first.app_id}-second"
    second.environment["UEMB_APP_ID"] = name
    second.log = tmp_path / "second.log"
    for setting, topic in (("UEMB_OUTPUT_TOPIC", first.output), ("UEMB_DLQ_TOPIC", first.dlq)):
        second.start()
        assert second.wait() == 2
        said = second.log.read_text().splitlines()[-1]
        assert said.startswith(f"uemb: {setting}: application {first.app_id} writes to {topic}; name another")
        second.environment[setting] = f"{name}.{setting.lower()}"
    second.start()  # inputs, erasures and item versions may be shared
    second.until_ready()
    assert second.stop() == 0
    second.environment["UEMB_OUTPUT_TOPIC"] = first.output
    assert first.stop() == 0
    delete_topic(first.bootstrap, first.item_status)  # as the line says, of an application that is no more
    second.start()
    second.until_ready_again()
    assert second.stop() == 0


def test_a_worker_that_waits_to_start_ends_when_it_is_told_to(make_pipeline: Callable[..., Pipeline]) -> None:
    """Here for a store that is away, for which it would wait a minute."""
    pipeline = make_pipeline(kv_url="redis://127.0.0.1:1/0")
    pipeline.start()
    pipeline.until(lambda: "nothing is committed meanwhile" in pipeline.tail(), "it waits")
    assert pipeline.stop() == 0
    assert "did not stop in time" not in pipeline.log.read_text()


def test_a_state_folder_that_a_paused_worker_holds(make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    before = pipeline.epochs()
    assert pipeline.process is not None
    pipeline.process.send_signal(signal.SIGSTOP)
    try:
        # the group drops the paused worker after its session timeout, and gives its partitions to the next
        ended = start_and_wait({**pipeline.environment, "UEMB_LOG_LEVEL": "warning", "UEMB_KV_LOCK_PATIENCE_S": "1"})
    finally:
        pipeline.process.send_signal(signal.SIGCONT)
    pipeline.until_epochs_rise(before)  # one that finds out by an event that its partition was given away stops
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([EventRow(*event) for event in events_of(range(1, 9), 2)])
    pipeline.until_committed()
    assert pipeline.stop() == 0
    check_refusal(ended, str(pipeline.state), "UEMB_STATE_DIR", code=75, logged=True)


#: What the doctor takes for wrong settings, and what no broker tells of beforehand.
OF_SETTINGS = ("store_of_no_known_kind", "credentials_missing")
TOLD_LATE = ("session_timeout_that_the_broker_refuses",)


@pytest.mark.parametrize("name", sorted(CASES, key=lambda name: name == "no_broker"))
def test_refused_and_told_by_the_doctor(
    name: str, started: Mapping[str, tuple[Case, dict[str, str], dict[str, str], Future[Ended]]]
) -> None:
    case, names, environment, starting = started[name]
    ended = starting.result()
    start_s = started["store_of_no_known_kind"][-1].result().took_s  # of one that is refused before it asks anybody
    # what only the broker can refuse is refused while the worker runs, and logged
    says = [what.format(**names) for what in case.says]
    check_refusal(ended, *says, code=case.code, logged=case.logged)
    assert ended.took_s < BROKER_PATIENCE_S + 20 * start_s, "it waited for what would not come"
    if name in TOLD_LATE:
        return
    found = diagnose(environment)
    assert found.code == (2 if name in OF_SETTINGS else 1), found.lines
    assert any(all(what in line for what in says) for line in found.of("failed")), found.wrong


def test_a_topic_that_brokers_do_not_know_yet_decides_the_size_of_letters(
    kafka: KafkaBroker, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has just made it: a broker's first answer about all topics may be older than that."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    topic, letters = f"{unique}.view", f"{unique}.dlq"
    create(admin, {topic: Case((), config={"max.message.bytes": "3000000"})})
    real, asked = topics.list_topics, []

    def at_first_without(*args: object, **options: object) -> object:
        cluster = real(*args, **options)
        if not asked:
            cluster.topics.pop(topic)
        asked.append(args)
        return cluster

    monkeypatch.setattr(topics, "list_topics", at_first_without)
    names = {"app_id": unique, "event_topics": topic, "deletion_topic": f"{unique}.gone", "dlq_topic": letters}
    names |= {"output_topic": f"{unique}.out", "item_versions_topic": f"{unique}.versions"}
    try:
        prepare_topics(load_settings(bootstrap_servers=kafka.bootstrap, **names), dim=8)
        assert int(topic_configs(admin, [letters])[letters]["max.message.bytes"]) == 3_000_000 + (64 << 10)
    finally:
        delete_topics(kafka.bootstrap, unique)
