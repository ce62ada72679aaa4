"""A broker with an access list: what is missing is one line, the listed grants suffice, replacing them stops nobody."""

import asyncio
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path

import pytest
from acl_admin import Acls
from aiokafka.structs import TopicPartition
from click.testing import CliRunner
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer
from confluent_kafka import TopicPartition as Place
from confluent_kafka.admin import AdminClient, NewTopic
from doctor import diagnose
from kafka_broker import KafkaBroker
from kv_entries import eventually
from odd_records import Sender
from pipeline import Pipeline, erase
from secured_broker import PASSWORDS, SecuredBroker, running_secured_broker

from stream.cli.bench import command, footprint, load, throughput
from stream.cli.bench.grants import check_grants
from stream.cli.bench.load import Load
from stream.cli.bench.throughput import Sizes
from stream.cli.dlq.replay import Replayer
from stream.cli.follow import follow
from stream.cli.root import cli
from stream.config import Settings
from stream.core.events import EventRow
from stream.errors import NotAllowed, UembError
from stream.feed.dataset import Dataset
from stream.feed.send_run import Outgoing
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.kafka import brokers
from stream.kafka.brokers import list_topics
from stream.kafka.clients import Clients
from stream.kafka.connection import librdkafka_config
from stream.kafka.grants import BENCH_PREFIX, ROLES, TOPIC_REFUSED, Grant, needed, single, worker
from stream.kafka.group import check_group
from stream.kafka.topics import create_topics, prepare_topics, survey_topics
from stream.rollout.client import RolloutClient

LOGIN = {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "app", "sasl_password": PASSWORDS["app"]}
UNCHECKED_WORKER = [sys.executable, str(Path(__file__).parent.parent / "faults" / "unchecked_worker.py")]


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """A broker with an access list; who comes over PLAINTEXT may do all."""
    with running_secured_broker(tmp_path_factory.mktemp("secured")) as broker:
        yield broker


@pytest.fixture(scope="module")
def filled(
    kafka: SecuredBroker, item_folder: Path, films: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pipeline]:
    """A pipeline of the user `app` with topics, users, erasures and dead letters; its worker is stopped."""
    # letters are references to records, which a replay reads again, where these are so large
    settings = {"dlq_max_bytes": 1 << 16, **LOGIN}
    app = Pipeline(kafka.bootstrap, "grants", tmp_path_factory.mktemp("filled"), item_folder, **settings)
    app.environment["UEMB_BOOTSTRAP_SERVERS"] = kafka.at["SASL"]
    acls = Acls(kafka.bootstrap)
    acls.give(ROLES["worker"].grants(settings_of(app)))
    app.start()
    app.until_ready()
    with Feeder(app.bootstrap, app.topics) as feeder:
        feeder.send(films.events[:500])
    send_bad(app, b"{" * 70_000)
    app.until_committed()
    assert app.stop() == 0
    yield app
    app.close()


@pytest.fixture
def acls(filled: Pipeline) -> Iterator[Acls]:
    """What `app` may do: nothing."""
    acls = Acls(filled.bootstrap)
    acls.take()
    filled.log.unlink(missing_ok=True)
    yield acls
    filled.kill()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs a command of a pipeline in this process; returns its exit code and all that it says."""

    def run(pipeline: Pipeline, *words: str) -> tuple[int, str]:
        for name, value in pipeline.environment.items():
            if name.startswith("UEMB_"):
                monkeypatch.setenv(name, value)
        brokers._reached.clear()
        result = CliRunner().invoke(cli, words)
        if isinstance(result.exception, UembError):
            return 2, str(result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


def settings_of(pipeline: Pipeline) -> Settings:
    given = {k.removeprefix("UEMB_").lower(): v for k, v in pipeline.environment.items() if k.startswith("UEMB_")}
    return Settings(**given)


def send_bad(pipeline: Pipeline, value: bytes = b"{") -> None:
    """A bad record on each input topic."""
    sender = Sender(pipeline.bootstrap)
    for topic in pipeline.inputs:
        sender.send(topic, b"1", value)
    sender.flush()


def refused(pipeline: Pipeline) -> str:
    """The one line with which a worker ended by itself."""
    assert pipeline.wait() == 2
    log = pipeline.log.read_text()
    assert "Traceback" not in log
    assert "in time" not in log
    (line,) = [line for line in log.splitlines() if line.startswith("uemb: ")]
    return line.removeprefix("uemb: ")


#: By role, commands that each of its grants is needed by, and what else it runs; all succeed with what is listed.
COMMANDS = {
    "sender": ["send {events}"],
    "reader": ["tail --from-beginning -n 1"],
    "release": ["items status", "items publish {second}", "items status films_v2 --compare 5"],
    "eraser": ["delete 1"],
    "auditor": ["verify --patience 0", "dlq list", "doctor --role auditor"],
    "replayer": ["dlq list", "dlq replay"],
}
ALSO = {
    "release": [
        "items activate films_v2 --force",
        "items rollback --force",
        "items retire films_v2",
        "encoder publish avg --as tuned",
        "encoder activate tuned --force",
        "encoder status",
        "encoder rollback --force",
    ],
    "auditor": ["dlq show {letter}", "items status"],
    "replayer": ["dlq show {letter}"],
}
QUICK = ("sender", "reader", "eraser")
#: Roles that tests of their own are for.
OTHERS = {
    "worker": "test_a_start_names_each_grant",
    "operator": "test_partitions_are_raised_with_what_is_listed_and_no_less",
    "bench": "test_the_bench_names_each_grant_before_it_begins",
}


def tell(role: str, grant: Grant, line: str) -> None:
    """A row of the table that these tests draw with `-s`."""
    print(f"| {role} | {grant} | {'may be missing: ' if grant.optional else ''}{line} |")


def line_of(said: str, grant: Grant) -> str:
    """The one line that names a grant, be it of an error or among others."""
    named = re.compile(rf"not allowed to {re.escape(str(grant))}(?=[;: )]|$)")
    lines = [line.strip() for line in said.splitlines() if named.search(line)]
    assert lines, f"{grant} is not named: {said}"
    return lines[0]


def test_no_role_is_without_a_test() -> None:
    assert {*COMMANDS, *OTHERS} == set(ROLES)
    assert all(name in globals() for name in OTHERS.values())


@pytest.mark.parametrize("role", [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in COMMANDS])
def test_each_role_names_what_is_missing_and_needs_no_more_than_is_listed(
    role: str,
    filled: Pipeline,
    acls: Acls,
    run: Callable[..., tuple[int, str]],
    releases: Pipeline,
    tmp_path: Path,
) -> None:
    events = tmp_path / "events.csv"
    events.write_text("user_id,item_id,type,ts\n1,2,view,1700000000000\n1,2,like,1700000000000\n")
    app = releases if role == "release" else filled
    (letter,) = [f"{record.partition()}:{record.offset()}" for record in filled.read(filled.dlq)][:1]
    words = {"events": events, "second": releases.folder / "v2", "letter": letter}
    lines = [line.format(**words).split() for line in COMMANDS[role]]
    also = [line.format(**words).split() for line in ALSO.get(role, [])]
    listed = ROLES[role].grants(settings_of(app))
    for line in lines:
        code, said = run(app, *line)
        assert (code, "not allowed to " in said) == (1 if "doctor" in line else 2, True), said
    acls.give(listed)
    for grant in sorted(single(listed), key=attrgetter("operations"), reverse=True):  # without Write nothing changes
        with acls.without([grant]):
            answers = [(line[0], *run(app, *line)) for line in lines]
        refused = [answer for answer in answers if answer[1]]
        if grant.optional:
            assert not refused, refused
            tell(role, grant, line_of("\n".join(said for *_, said in answers), grant))
            continue
        assert refused, f"{role} does without {grant}"
        named = [(name, code, said) for name, code, said in refused if "not allowed to " in said]
        assert named, refused  # what else fails does so for that: there is no version to compare, say
        for name, code, said in named:
            line = line_of(said, grant)
            if name != "doctor":  # which tells of more than one thing
                assert (code, line) == (2, said)
        tell(role, grant, line_of(named[0][2], grant))
    for line in (*lines, *also):
        code, said = run(app, *line)
        assert (code, "not allowed to " in said) == (0, False), said


@pytest.fixture(scope="module")
def releases(filled: Pipeline, space: ItemSpace) -> Iterator[Pipeline]:
    """The same application with a control topic on which versions come and go, and a second version to publish."""
    app = Pipeline(filled.bootstrap, filled.app_id, filled.folder, Path(filled.environment["UEMB_ITEMS"]))
    app.environment = {**filled.environment, "UEMB_ITEM_VERSIONS_TOPIC": "grants.releases"}
    admin = AdminClient({"bootstrap.servers": filled.bootstrap, "log_level": 2})
    for made in admin.create_topics([NewTopic("grants.releases", 1, config={"cleanup.policy": "compact"})]).values():
        made.result()
    ItemSpace.save(filled.folder / "v2", "films_v2", [i.decode() for i in space.ids], space.vectors[:, ::-1])
    yield app
    app.close()


def test_a_client_that_has_given_up_says_why(filled: Pipeline, acls: Acls, capfd: pytest.CaptureFixture[str]) -> None:
    """One that numbers its records needs leave for that first, and is told no before or after it has some to send."""
    settings = settings_of(filled)
    acls.give(needed("reader", settings))
    topic = filled.topics["view"]
    with Feeder(settings.bootstrap_servers, client_config=librdkafka_config(settings)) as feeder:
        until_given_up(feeder._producer)
        with pytest.raises(NotAllowed, match=f"not allowed to Write topic {topic};"):
            feeder.send_records([Outgoing(topic, b"1", b"{}", None)])
    with Replayer(settings) as replayer:  # which is left without a word
        until_given_up(replayer._producer)
    assert capfd.readouterr().err == ""


def until_given_up(producer: Producer) -> None:
    """Wait for it without asking the client how it is, which tells only once."""
    while True:
        try:
            producer.produce("grants.none", b"")
        except KafkaException:
            return
        time.sleep(0.02)


def test_other_commands_say_one_line(filled: Pipeline, acls: Acls, run: Callable[..., tuple[int, str]]) -> None:
    for line in ("dlq show 0:0", "items activate films_v1", "repartition --partitions 6"):
        code, said = run(filled, *line.split())
        assert (code, said.count("\n")) == (2, 0), said
        assert said.startswith("not allowed to "), said


def test_the_bench_names_each_grant_before_it_begins(
    filled: Pipeline, acls: Acls, run: Callable[..., tuple[int, str]]
) -> None:
    """It takes minutes, and some of its grants are used at the end only."""
    listed = needed("bench", settings_of(filled))
    acls.give(listed)
    for grant in single(listed):
        with acls.without([grant]):
            code, said = run(filled, "bench", "--quick")
        assert code == 2
        assert line_of(said, grant) == said
        tell("bench", grant, said)
    check_grants(settings_of(filled))
    topics = AdminClient({"bootstrap.servers": filled.bootstrap, "log_level": 2}).list_topics(timeout=60).topics
    assert not [name for name in topics if name.startswith(BENCH_PREFIX)]


@pytest.mark.slow
def test_the_bench_needs_no_more_than_is_listed(
    filled: Pipeline, acls: Acls, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few users, and little to do for each of the systems that it compares."""
    acls.give(needed("bench", settings_of(filled)))
    sizes = Sizes(rounds=1, worker_events=2_000, peer_events=300, sweep_events=100)
    monkeypatch.setattr(throughput, "Sizes", lambda **_: sizes)
    monkeypatch.setattr(load, "Load", lambda: Load(users=100, length=20, items=500))
    monkeypatch.setattr(command, "latencies", lambda *_: {})
    monkeypatch.setattr(footprint, "_USERS", 50)
    code, said = run(filled, "bench", "--quick", "--json")
    assert code == 0, said


@pytest.mark.slow
def test_partitions_are_raised_with_what_is_listed_and_no_less(
    acls: Acls,
    run: Callable[..., tuple[int, str]],
    films: Dataset,
    kafka: SecuredBroker,
    make_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:500])
    pipeline.until_committed()
    assert pipeline.stop() == 0
    erase(pipeline, films.events[:500])  # which are to be sent on
    pipeline.environment |= {f"UEMB_{name.upper()}": value for name, value in LOGIN.items()}
    pipeline.environment["UEMB_BOOTSTRAP_SERVERS"] = kafka.at["SASL"]
    needs = needed("operator", settings_of(pipeline))
    acls.give(needs)
    for partitions, grant in enumerate(
        single(needs), 5
    ):  # a run raises what it may, and what has grown needs it no more
        with acls.without([grant]):
            code, said = run(pipeline, "repartition", "--partitions", str(partitions))
        assert code == 2, f"it does without {grant}: {said}"
        tell("operator", grant, line_of(said, grant))
    code, said = run(pipeline, "repartition", "--partitions", str(partitions + 1))
    assert code == 0, said


def test_the_doctor_names_each_grant_that_is_missing(filled: Pipeline, acls: Acls) -> None:
    settings = settings_of(filled)
    needs = worker(settings)
    acls.give(ROLES["worker"].grants(settings))
    found = diagnose(filled.environment)
    assert (found.code, found.wrong) == (0, [])
    assert [line for line in found.of("skipped") if str(needs[-1]) in line]
    for grant in single(needs):
        if grant.kind != "transactional id":  # of which no broker tells before it is used
            with acls.without([grant]):
                found = diagnose(filled.environment)
            assert found.code == 1, f"it does not miss {grant}"
            assert [line for line in found.of("failed") if f"not allowed to {grant};" in line], found.wrong
    with acls.without([Grant(("DescribeConfigs",), "topic", filled.output)]):
        found = diagnose(filled.environment)
    (line,) = found.wrong
    assert f"not allowed to DescribeConfigs topic {filled.output}: these settings are not checked" in line
    another = {**filled.environment, "UEMB_OUTPUT_TOPIC": "grants.another"}
    acls.give([Grant(("Read", "Write"), "topic", "grants.another")])
    found = diagnose(another)
    assert [line for line in found.of("failed") if "not allowed to Create topic grants.another" in line], found.wrong


def test_the_list_is_printed(filled: Pipeline, run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(filled, "acl", "--role", "worker")
    assert code == 0
    lines = [line for line in said.splitlines() if not line.startswith("#")]
    assert len(lines) == len(ROLES["worker"].grants(settings_of(filled)))
    assert f"--allow-principal User:app --operation Read --operation Write --topic {filled.changelog}\n" in said
    assert "--operation Write --transactional-id grants- --resource-pattern-type prefixed\n" in said
    assert "#   not a must: topics that are not there yet\n" in said
    code, said = run(filled, "acl", "--role", "reader", "--user", "ann")
    assert said.endswith(f"--allow-principal User:ann --operation Read --topic {filled.output}\n")
    code, said = run(filled, "acl")
    assert all(f"# {role}: " in said for role in ROLES)
    assert "User:sender --operation Write" in said


def test_a_start_names_all_that_is_missing(filled: Pipeline, acls: Acls) -> None:
    filled.start()
    line = refused(filled)
    assert all(grant.kind != "topic" or str(grant) in line for grant in worker(settings_of(filled))), line


def test_a_start_names_each_grant(
    filled: Pipeline, acls: Acls, films: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    """With what is listed all goes; what may be missing is said in a line, or when a topic must be made."""
    settings = settings_of(filled)
    listed = ROLES["worker"].grants(settings)
    acls.give(listed)
    caplog.set_level("WARNING", logger="stream")
    for grant in single(listed):
        if grant.operations == ("Create",):  # see the next test
            continue
        caplog.clear()
        with acls.without([grant]):
            tell("worker", grant, line_of(start_without(grant, filled, caplog), grant))
    caplog.clear()
    start_checks(settings)
    assert caplog.text == ""
    filled.log.unlink()
    filled.start()
    filled.until_ready()
    with Feeder(filled.bootstrap, filled.topics) as feeder:
        feeder.send(films.events[:100])
    filled.until_committed()
    assert filled.stop() == 0
    assert "not allowed" not in filled.log.read_text()


def start_without(grant: Grant, filled: Pipeline, caplog: pytest.LogCaptureFixture) -> str:
    """What a start says of a grant that is missing."""
    settings = settings_of(filled)
    if grant.kind == "transactional id":  # of which no broker tells before it is used
        filled.start()
        return f"not allowed to {refused(filled).removeprefix('not allowed to ')}"
    if grant.operations == ("DescribeConfigs",):
        start_checks(settings)
        return caplog.messages[0]
    with pytest.raises(NotAllowed) as caught:
        start_checks(settings)
    return str(caught.value)


def test_a_start_names_each_topic_that_it_may_not_make(filled: Pipeline, acls: Acls) -> None:
    settings = settings_of(filled)
    names = {name: f"{getattr(settings, name)}-new" for name in ("deletion_topic", "output_topic", "dlq_topic")}
    names |= {"item_versions_topic": "grants.versions-new", "app_id": "grants-new"}
    fresh = settings.model_copy(update={**names, "event_topics": tuple(f"{t}-new" for t in settings.event_topics)})
    listed = ROLES["worker"].grants(fresh)
    acls.give(listed)
    admin = AdminClient(librdkafka_config(fresh))
    survey = survey_topics(fresh, admin, list_topics(admin, fresh), 48)
    create_topics(admin, survey.missing, fresh, 4, dry_run=True)
    creating = [grant for grant in single(listed) if grant.operations == ("Create",)]
    assert {grant.name for grant in creating} == {topic.name for topic in survey.missing}
    for grant in creating:
        with acls.without([grant]), pytest.raises(NotAllowed) as caught:
            create_topics(admin, survey.missing, fresh, 4, dry_run=True)
        tell("worker", grant, line_of(str(caught.value), grant))


def start_checks(settings: Settings) -> None:
    prepare_topics(settings, 48)
    check_group(settings)


def test_a_grant_that_goes_while_a_worker_starts(filled: Pipeline, acls: Acls) -> None:
    needs = worker(settings_of(filled))
    acls.give(needs)
    used_late = [
        f"Read topic {filled.changelog}",
        f"Read topic {filled.item_status}",
        "Read group grants",
        str(needs[-1]),
    ]
    for grant in (grant for grant in single(needs) if str(grant) in used_late):
        filled.log.unlink(missing_ok=True)
        with acls.without([grant]):
            filled.start(UNCHECKED_WORKER)
            assert refused(filled).startswith(f"not allowed to {grant}; ")


def test_topics_that_a_worker_may_not_make(filled: Pipeline, acls: Acls) -> None:
    settings = settings_of(filled).model_copy(update={"output_topic": "grants.another"})
    acls.give(worker(settings))
    with pytest.raises(NotAllowed, match=re.escape("not allowed to Create topic grants.another;")):
        prepare_topics(settings, 48)


def test_settings_that_must_be_known(filled: Pipeline, acls: Acls, caplog: pytest.LogCaptureFixture) -> None:
    """Where markers of erased users end, what an event topic keeps must be known; else a line is enough."""
    settings = settings_of(filled)
    acls.give(worker(settings))
    caplog.set_level("WARNING", logger="stream")
    prepare_topics(settings, 48)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("not allowed to DescribeConfigs topic ")
    with pytest.raises(NotAllowed, match="DescribeConfigs topic"):
        prepare_topics(settings.model_copy(update={"erasure_marker_retention": 1e9}), 48)


async def test_a_topic_that_is_hidden_for_a_moment_is_as_it_was(filled: Pipeline, acls: Acls) -> None:
    """Its partitions would be spread anew, as if it had none."""
    settings = settings_of(filled)
    acls.give(worker(settings))
    clients = Clients(settings, lambda _: None)
    clients.be_patient()
    consumer = clients.consumer()
    await consumer.start()
    try:
        consumer.assign([TopicPartition(filled.changelog, 0)])
        await consumer.end_offsets([TopicPartition(filled.changelog, 0)])
        before = consumer.partitions_for_topic(filled.changelog)
        acls.take()
        assert await consumer._client.force_metadata_update()
        assert consumer.partitions_for_topic(filled.changelog) == before == {0, 1, 2, 3}
    finally:
        await consumer.stop()


async def test_committed_offsets_that_may_not_be_seen_for_a_moment_are_not_taken_for_none(
    filled: Pipeline, acls: Acls
) -> None:
    """Brokers tell of that beside the list of offsets, which is empty; the client looks at the list alone."""
    settings, place = settings_of(filled), TopicPartition(filled.topics["view"], 0)
    needs = worker(settings)
    acls.give(needs)
    clients = Clients(settings, lambda _: None)
    clients.be_patient()
    consumer = clients.consumer(group_id=filled.app_id, enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign([place])
        before = await consumer.committed(place)
        with acls.without([grant for grant in needs if grant.kind == "group"]):
            asking = asyncio.create_task(consumer.committed(place))
            while clients.refusal is None:
                assert not asking.done()
                await asyncio.sleep(0.01)
        assert await asking == before > 0
    finally:
        await consumer.stop()


@pytest.fixture
def spoken(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What clients say; commands that ran in this process before have silenced some of them."""
    caplog.set_level("INFO", logger="stream")
    return caplog


def told(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until a client says so."""
    deadline = time.monotonic() + 60
    while text not in caplog.text:
        assert time.monotonic() < deadline, f"nobody says {text!r}"
        time.sleep(0.02)


def by_tail(settings: Settings, count: int, seen: list[str]) -> None:
    for key, _ in follow(settings, from_beginning=True, count=count):
        seen.append(key)


def by_hand(settings: Settings, count: int, seen: list[str]) -> None:
    """As `stream/retrieval/README.md` shows it."""
    topic = settings.output_topic
    config = {"group.id": "unused", "enable.auto.commit": False, "isolation.level": "read_committed"}
    consumer = Consumer({**librdkafka_config(settings), **config, "log_level": 2})
    partitions = consumer.list_topics(topic, timeout=60).topics[topic].partitions
    consumer.assign([Place(topic, number, OFFSET_BEGINNING) for number in partitions])
    while len(seen) < count:
        message = consumer.poll(0.5)
        if message is not None and message.error() is None:
            seen.append(message.key().decode())
        elif message is not None and message.error().code() == TOPIC_REFUSED:
            logging.getLogger("stream").warning("not allowed to Read topic %s; waiting", topic)
    consumer.close()


@pytest.mark.parametrize("follower", [by_tail, by_hand])
def test_followers_wait_for_a_grant_that_is_replaced(
    follower: Callable[[Settings, int, list[str]], None],
    filled: Pipeline,
    acls: Acls,
    spoken: pytest.LogCaptureFixture,
) -> None:
    settings, listed = settings_of(filled), needed("reader", settings_of(filled))
    records = filled.read(filled.output)
    last = [record for record in records if record.partition() == 0][-1]  # said again, it changes nothing
    acls.give(listed)
    brokers._reached.clear()
    seen: list[str] = []
    following = threading.Thread(target=follower, args=(settings, len(records) + 1, seen))
    following.start()
    eventually(lambda: len(seen) == len(records))
    with acls.without(listed):
        told(spoken, f"not allowed to Read topic {filled.output}; waiting")
        filled.say(filled.output, last.key(), last.value())
    following.join(60)
    assert not following.is_alive()
    assert seen[-1] == last.key().decode()
    assert "Traceback" not in spoken.text


def test_a_follower_gives_up_in_the_end(filled: Pipeline, acls: Acls) -> None:
    settings = settings_of(filled).model_copy(update={"delivery_timeout_s": 1.0})
    acls.give(needed("reader", settings))
    brokers._reached.clear()
    following = follow(settings, from_beginning=True)
    for _ in range(len(filled.read(filled.output))):
        next(following)
    acls.take()
    with pytest.raises(NotAllowed, match=f"not allowed to Read topic {filled.output};"):
        next(following)


def test_a_log_that_is_read_waits_for_its_grant(filled: Pipeline, acls: Acls, spoken: pytest.LogCaptureFixture) -> None:
    """Commands that wait for versions, and long ones as `uemb verify`, read so."""
    settings = settings_of(filled)
    acls.give(needed("release", settings))
    brokers._reached.clear()
    control = RolloutClient(settings)
    try:
        with ThreadPoolExecutor(1) as pool:
            with acls.without([Grant(("Read",), "topic", filled.item_status)]):
                looking = pool.submit(control.look)
                told(spoken, f"not allowed to Read topic {filled.item_status}; waiting")
                assert not looking.done()
            looking.result(60)
    finally:
        control.close()


def test_a_sender_waits_for_a_grant_that_is_replaced(
    filled: Pipeline, acls: Acls, films: Dataset, spoken: pytest.LogCaptureFixture
) -> None:
    """Every event arrives, and none twice."""
    settings, listed, rows = settings_of(filled), needed("sender", settings_of(filled)), films.events[:1_000]
    acls.give(listed)
    before = sum(map(filled.length, filled.topics.values()))

    def put_back() -> None:
        told(spoken, "waiting up to 30 s for the grant")
        acls.give(listed)

    back = threading.Thread(target=put_back)
    with Feeder(settings.bootstrap_servers, filled.topics, client_config=librdkafka_config(settings)) as feeder:
        feeder.send(rows[:200])

        def some() -> Iterator[EventRow]:
            for number, row in enumerate(rows[200:]):
                if number == 300:
                    feeder._producer.flush()  # both topics have taken something
                    acls.take()
                    back.start()
                yield row

        assert feeder.send(some()).sent == 800
    back.join()
    assert sum(map(filled.length, filled.topics.values())) == before + 1_000


def test_a_sender_gives_up_in_the_end(filled: Pipeline, acls: Acls, films: Dataset) -> None:
    settings = settings_of(filled)
    acls.give(needed("sender", settings))
    config = {**librdkafka_config(settings), "message.timeout.ms": 5_000}
    with Feeder(settings.bootstrap_servers, filled.topics, client_config=config) as feeder:

        def some() -> Iterator[EventRow]:
            for number, row in enumerate(films.events[:400]):
                if number == 200:
                    feeder._producer.flush()
                    acls.take()
                yield row

        with pytest.raises(NotAllowed, match="not allowed to Write topic grants"):
            feeder.send(some())


def members(pipeline: Pipeline) -> int:
    """How many workers the broker counts in the group."""
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    return len(admin.describe_consumer_groups([pipeline.app_id])[pipeline.app_id].result().members)


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["most", "each"])
def test_grants_that_are_replaced_stop_nobody(each: bool, filled: Pipeline, acls: Acls, films: Dataset) -> None:
    """No more is given than is listed; each of it is missing for a moment, then all of it for longer than a session.

    What a worker uses when it takes partitions is missing while it does, one after another where `each` is wanted.
    """
    app, needs = filled, worker(settings_of(filled))
    acls.give(needs)
    app.start()
    app.until_ready()
    starts = iter(range(500, 100_000, 300))

    def flow(feeder: Feeder) -> None:
        start = next(starts)
        feeder.send(films.events[start : start + 300])
        send_bad(app)

    def until_missed(grant: Grant, start: int) -> None:
        app.until(lambda: f"not allowed to {grant};" in app.log.read_text()[start:], f"{grant} is missed")

    *_, group, transactional_id = single(needs)
    # which a worker needs when it takes partitions
    seldom = {str(transactional_id), f"Read topic {app.changelog}"}
    seldom |= {f"Read topic {app.item_status}", f"Write topic {app.item_status}"}
    with Feeder(app.bootstrap, app.topics) as feeder:
        for grant in single(needs):
            if str(grant) not in seldom:
                start = len(app.log.read_text())
                with acls.without([grant]):
                    flow(feeder)
                    until_missed(grant, start)
                app.until_committed()
        late = [grant for grant in single(needs) if str(grant) in seldom] if each else [transactional_id]
        for missing in (*([grant] for grant in late), single(needs)):
            epochs, start = app.epochs(), len(app.log.read_text())
            with acls.without(missing):
                with acls.without([group]):
                    flow(feeder)
                    app.until(lambda: members(app) == 0, "the session is over")
                if len(missing) == 1:
                    until_missed(missing[0], start)
            app.until_epochs_rise(epochs)
            app.until_committed()
    log = app.log.read_text()
    assert "all is allowed again" in log
    assert "Traceback" not in log
    assert log.count("not allowed to DescribeConfigs") == 1
    assert app.stop() == 0
    in_order(app, acls)


def in_order(app: Pipeline, acls: Acls) -> None:
    """Nothing was lost."""
    acls.give(needed("auditor", settings_of(app)))
    report = app.verify()
    assert (report["differ"], report["busy"], report["letterless"]) == (0, 0, 0), report


@pytest.mark.slow
def test_a_grant_that_stays_away_stops_the_worker(filled: Pipeline, acls: Acls, films: Dataset) -> None:
    app, needs = filled, worker(settings_of(filled))
    acls.give(needs)
    missed = [f"Read topic {app.topics['view']}", f"Write topic {app.changelog}", f"Read group {app.app_id}"]
    for number, grant in enumerate(grant for grant in single(needs) if str(grant) in missed):
        app.log.unlink(missing_ok=True)
        app.start(UEMB_DELIVERY_TIMEOUT_S="1.5")
        app.until_ready()
        with acls.without([grant]), Feeder(app.bootstrap, app.topics) as feeder:
            feeder.send(films.events[8_000 + 300 * number :][:300])
            assert refused(app).startswith(f"not allowed to {grant}; ")
    app.start()
    app.until_committed()
    assert app.stop() == 0
    in_order(app, acls)
