"""A broker with an access list: what is missing is one line, the listed grants suffice, replacing them stops nobody."""

import asyncio
import re
import sys
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

import pytest
from acl_admin import Acls, single
from aiokafka.structs import TopicPartition
from click.testing import CliRunner
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from doctor import diagnose
from kafka_broker import KafkaBroker
from odd_records import Sender
from pipeline import Pipeline, erase
from secured_broker import PASSWORDS, SecuredBroker, running_secured_broker

from stream.cli.dlq.replay import Replayer
from stream.cli.root import cli
from stream.config import Settings
from stream.errors import NotAllowed, UembError
from stream.feed.dataset import Dataset
from stream.feed.send_run import Outgoing
from stream.feed.sender import Feeder
from stream.kafka import brokers
from stream.kafka.clients import Clients
from stream.kafka.connection import librdkafka_config
from stream.kafka.grants import NEEDS, Grant, worker, worker_extras
from stream.kafka.group import check_group
from stream.kafka.topics import prepare_topics

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
    acls.give([*worker(settings_of(app)), *worker_extras(settings_of(app))])
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


#: By who needs them, commands that each fail without any of the grants, and succeed with them.
COMMANDS = {
    "send": ["send {events}"],
    "delete": ["delete 1"],
    "tail": ["tail --from-beginning -n 1"],
    "items": ["items status", "items publish {items}"],
    "dlq": ["dlq list", "dlq replay"],
    "verify": ["verify --patience 0"],
}


@pytest.mark.parametrize("who", COMMANDS)
def test_each_command_names_what_is_missing_and_needs_no_more_than_is_listed(
    who: str,
    filled: Pipeline,
    acls: Acls,
    run: Callable[..., tuple[int, str]],
    item_folder: Path,
    tmp_path: Path,
) -> None:
    events = tmp_path / "events.csv"
    events.write_text("user_id,item_id,type,ts\n1,2,view,1700000000000\n1,2,like,1700000000000\n")
    lines = [command.format(events=events, items=item_folder).split() for command in COMMANDS[who]]
    needs = NEEDS[who](settings_of(filled))
    for line in lines:
        code, said = run(filled, *line)
        assert (code, said.count("\n")) == (2, 0), said
        assert said.startswith("not allowed to "), said
    acls.give(needs)
    for grant in sorted(single(needs), key=attrgetter("operations"), reverse=True):  # without Write nothing changes
        with acls.without([grant]):
            answers = [run(filled, *line) for line in lines]
        found = [said for code, said in answers if code]
        assert found, f"{who} does without {grant}"
        assert all(said.startswith("not allowed to ") for said in found), found
        assert all(f" {grant.kind} {grant.name}; " in said for said in found), found
    for line in lines:
        code, said = run(filled, *line)
        assert code == 0, said


def test_a_client_that_has_given_up_says_why(filled: Pipeline, acls: Acls, capfd: pytest.CaptureFixture[str]) -> None:
    """One that numbers its records needs leave for that first, and is told no before or after it has some to send."""
    settings = settings_of(filled)
    acls.give(NEEDS["tail"](settings))
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
    for line in ("bench --quick", "dlq show 0:0", "items activate films_v1", "tail", "repartition --partitions 6"):
        code, said = run(filled, *line.split())
        assert (code, said.count("\n")) == (2, 0), said
        assert said.startswith("not allowed to "), said


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
    needs = NEEDS["repartition"](settings_of(pipeline))
    acls.give(needs)
    alter = [grant for grant in single(needs) if grant.operations == ("Alter",)]
    # a run raises what it may, and what has grown needs it no more
    for missing in (alter, *([grant] for grant in single(needs) if grant not in alter)):
        with acls.without(missing):
            code, said = run(pipeline, "repartition", "--partitions", "6")
        assert code == 2, f"it does without {missing}"
        assert "not allowed to " in said, said
    code, said = run(pipeline, "repartition", "--partitions", "6")
    assert code == 0, said


def test_the_doctor_names_each_grant_that_is_missing(filled: Pipeline, acls: Acls) -> None:
    settings = settings_of(filled)
    needs = worker(settings)
    acls.give([*needs, *worker_extras(settings)])
    found = diagnose(filled.environment)
    assert (found.code, found.wrong) == (0, [])
    assert [line for line in found.of("skipped") if str(needs[-1]) in line]
    for grant in single(needs):
        if grant.kind != "transactional id":  # of which no broker tells before it is used
            with acls.without([grant]):
                found = diagnose(filled.environment)
            assert found.code == 1, f"it does not miss {grant}"
            assert [line for line in found.of("failed") if f"not allowed to {grant};" in line], found.wrong
    with acls.without([grant for grant in worker_extras(settings) if grant.name == filled.output]):
        found = diagnose(filled.environment)
    (line,) = found.wrong
    assert f"not allowed to DescribeConfigs topic {filled.output}: these settings are not checked" in line
    another = {**filled.environment, "UEMB_OUTPUT_TOPIC": "grants.another"}
    acls.give([Grant(("Read", "Write"), "topic", "grants.another")])
    found = diagnose(another)
    assert [line for line in found.of("failed") if "not allowed to Create topic grants.another" in line], found.wrong


def test_the_doctor_needs_no_more_than_is_listed(filled: Pipeline, acls: Acls) -> None:
    """With that it can tell all that the worker lacks, and looks at all the rest."""
    settings = settings_of(filled)
    needs = NEEDS["doctor"](settings)
    acls.give(needs)
    found = diagnose(filled.environment)
    lacks = {f"{grant.kind} {grant.name}" for grant in worker(settings) if grant.kind != "transactional id"}
    readable = {f"topic {settings.item_versions_topic}"}
    told = " ".join(found.of("failed"))
    assert {thing for thing in lacks if thing not in told} == readable, told
    looked = {check: found.statuses[check] for check in ("topics", "topics' owner", "clock", "changelog", "versions")}
    assert looked == dict.fromkeys(looked, "ok")
    for grant in single(needs):
        with acls.without([grant]):
            assert diagnose(filled.environment).lines != found.lines, f"it does without {grant}"


def test_the_list_is_printed(filled: Pipeline, run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(filled, "acl")
    assert code == 0
    needed, _, extras = said.partition("#")
    assert len(needed.splitlines()) == len(worker(settings_of(filled)))
    assert f"--allow-principal User:app --operation Read --operation Write --topic {filled.changelog}\n" in needed
    assert "--operation Write --transactional-id grants- --resource-pattern-type prefixed\n" in needed
    assert "--operation Create --operation DescribeConfigs --topic" in extras
    code, said = run(filled, "acl", "tail")
    assert said.endswith(f" --operation Read --topic {filled.output}\n")
    assert said.count("\n") == 1


def test_a_start_names_what_is_missing(filled: Pipeline, acls: Acls) -> None:
    settings = settings_of(filled)
    needs = worker(settings)
    filled.start()
    line = refused(filled)
    assert all(grant.kind != "topic" or str(grant) in line for grant in needs), line
    acls.give(needs)
    for grant in single(needs):
        if grant.kind != "transactional id":  # of which no broker tells before it is used
            with acls.without([grant]), pytest.raises(NotAllowed, match=re.escape(f"not allowed to {grant};")):
                start_checks(settings)
    start_checks(settings)


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


def members(pipeline: Pipeline) -> int:
    """How many workers the broker counts in the group."""
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    return len(admin.describe_consumer_groups([pipeline.app_id])[pipeline.app_id].result().members)


def test_grants_that_are_replaced_stop_nobody(filled: Pipeline, acls: Acls, films: Dataset) -> None:
    """No more is given than is listed; each of it is missing for a moment, then all of it for longer than a session."""
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
        for missing in ([transactional_id], single(needs)):
            epochs, start = app.epochs(), len(app.log.read_text())
            with acls.without(missing):
                with acls.without([group]):
                    flow(feeder)
                    app.until(lambda: members(app) == 0, "the session is over")
                if missing == [transactional_id]:
                    until_missed(transactional_id, start)
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
    acls.give(NEEDS["verify"](settings_of(app)))
    report = app.verify()
    assert (report["differ"], report["busy"], report["letterless"]) == (0, 0, 0), report


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
