"""Secured brokers: what a client lacks is named, with its setting, by every command; no secret is ever written."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from kafka_broker import KafkaBroker, free_ports
from pipeline import Pipeline
from planted import ITEM, PAYLOAD, USER, Planted
from redis_server import RedisServer
from secured_broker import (
    BOTH,
    CLIENT,
    FAULTS,
    KEY_PASSWORD,
    LOGIN,
    PASSWORDS,
    SCRAM,
    SECRETS,
    TLS,
    SecuredBroker,
    there,
)

from stream.cli.root import cli
from stream.errors import UembError
from stream.kafka import brokers


@pytest.fixture(scope="module")
def secured(secured_kafka: SecuredBroker) -> SecuredBroker:
    """A broker with a listener of each kind."""
    return secured_kafka


@pytest.fixture(scope="module")
def kafka(secured: SecuredBroker) -> KafkaBroker:
    """For pipelines, which look at it over PLAINTEXT."""
    return secured


@pytest.fixture
def folder(secured: SecuredBroker) -> Path:
    return secured.ca.parent


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs a command under settings; returns its exit code and all that it says."""

    def run(words: str, **settings: str) -> tuple[int, str]:
        for name, value in settings.items():
            monkeypatch.setenv(f"UEMB_{name.upper()}", value)
        monkeypatch.setenv("UEMB_STATE_DIR", str(tmp_path / "state"))
        monkeypatch.setenv("UEMB_KV_URL", f"rocksdb://{tmp_path / 'kv'}")
        brokers._reached.clear()
        result = CliRunner().invoke(cli, words.split())
        if isinstance(result.exception, UembError):
            return result.exception.exit_code, str(result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_connection_names_its_cause(
    fault: str, secured: SecuredBroker, folder: Path, run: Callable[..., tuple[int, str]]
) -> None:
    listener, settings, cause = FAULTS[fault]
    begun = time.monotonic()
    code, said = run("items status", bootstrap_servers=secured.at[listener], **there(folder, settings))
    print(f"{time.monotonic() - begun:.2f} s: {said}")
    assert code == 2
    assert cause in said
    assert "\n" not in said
    assert not any(secret in said for secret in SECRETS)


def test_a_lasting_fault_is_named_beside_a_broker_that_is_away(
    secured: SecuredBroker, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "PATIENCE_S", 2.0)
    (away,) = free_ports(1)
    code, said = run("items status", bootstrap_servers=f"127.0.0.1:{away},{secured.at['SASL']}")
    assert code == 2
    assert "set UEMB_SECURITY_PROTOCOL to SASL_PLAINTEXT" in said


@pytest.mark.parametrize(
    "listener", ["PLAINTEXT", "SSL", "MTLS", "SASL", "SASLSSL", "SCRAM", "SCRAMSSL", "BRIEF", "OAUTH"]
)
def test_a_sound_connection_of_each_kind(
    listener: str, secured: SecuredBroker, folder: Path, run: Callable[..., tuple[int, str]]
) -> None:
    settings = {
        "PLAINTEXT": {},
        "SSL": TLS,
        "MTLS": {**TLS, **CLIENT},
        "SASL": LOGIN,
        "SASLSSL": BOTH,
        "SCRAM": {**LOGIN, "sasl_mechanism": "SCRAM-SHA-256"},
        "SCRAMSSL": SCRAM,
        "BRIEF": SCRAM,
        "OAUTH": secured.token_settings,
    }[listener]
    code, said = run("items status", bootstrap_servers=secured.at[listener], **there(folder, settings))
    assert (code, said) == (2, "there is no topic item-versions; start a worker first, it makes its topics")


COMMANDS = [
    "bench --quick",
    "kv rebuild",
    "dlq list",
    "dlq replay",
    "tail",
    "items status",
    "items activate v1",
    "verify",
    "delete 1",
    "send {events}",
]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_names_the_cause(
    words: str, secured: SecuredBroker, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    events = tmp_path / "events.csv"
    events.write_text("user_id,item_id,type,ts\n1,2,view,1700000000000\n")
    wrong = {**LOGIN, "sasl_password": "no"}
    code, said = run(words.format(events=events), bootstrap_servers=secured.at["SASL"], **wrong)
    assert code == 2
    assert "UEMB_SASL_PASSWORD" in said
    assert "\n" not in said


def test_a_worker_that_is_refused_says_one_line(secured: SecuredBroker, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline(**{**LOGIN, "sasl_password": "no"})
    pipeline.start(UEMB_BOOTSTRAP_SERVERS=secured.at["SASL"])
    assert pipeline.wait() == 2
    *before, last = pipeline.log.read_text().splitlines()
    assert last == f"uemb: {secured.at['SASL']} refuses the login; check UEMB_SASL_USERNAME and UEMB_SASL_PASSWORD"
    assert all("CRITICAL stream.worker.app: stopping" in line for line in before), before


#: Who starts the worker, how talkative it is, in which form, and whether all commands are run.
LOGS = [
    ("uemb", "debug", "text", False),
    *(
        pytest.param(*log, True, marks=pytest.mark.slow)
        for log in (
            ("uemb", "debug", "text"),
            ("uemb", "debug", "json"),
            ("uemb", "info", "text"),
            ("uemb", "warning", "json"),
            ("uemb", "error", "text"),
            ("faust", "debug", "text"),
            ("faust", "debug", "json"),
        )
    ),
]
#: Commands that show no user and no payload, and those that are there to do so.
SHOW_NONE = [
    "config",
    "config --json",
    "acl",
    "acl --format redis-acl",
    "acl --format json",
    "items status",
    "items status --json",
    "encoder status",
    "verify",
    "verify --json",
    "doctor",
    "doctor --json",
    "dlq list",
    "dlq list --records --json",
    "dlq replay --dry-run",
    f"delete {USER}",
]
SHOW_USERS = [f"get {USER}", f"get {USER} --json", "tail --from-beginning -n 1", "dlq show {letter}"]
FEW = ["config", "items status", "doctor", "dlq list --records --json", f"delete {USER}"]
FAIL = ["items status", "verify", "dlq list", "delete 1", "tail", "items activate v9", "worker"]


@pytest.mark.parametrize(("command", "level", "form", "all_commands"), LOGS)
def test_no_secret_is_ever_written(
    command: str,
    level: str,
    form: str,
    all_commands: bool,
    secured: SecuredBroker,
    folder: Path,
    make_redis: Callable[..., RedisServer],
    make_pipeline: Callable[..., Pipeline],
    tmp_path: Path,
) -> None:
    """Nor what is of users: by a worker, by the clients in it, by any command, whether all goes well or it fails."""
    redis = make_redis(requirepass="kv-secret-4")
    settings = there(folder, {**BOTH, **CLIENT})
    (port,) = free_ports(1)
    pipeline = make_pipeline(kv_url=redis.url, log_level=level, log_format=form, http=f"127.0.0.1:{port}", **settings)
    pipeline.environment["UEMB_BOOTSTRAP_SERVERS"] = secured.at["SASLSSL"]
    planted = Planted({**{f"password of {name}": secret for name, secret in PASSWORDS.items()}, "key": KEY_PASSWORD})
    planted.secrets["password of the store"] = redis.password
    for setting in ("SASL_OAUTH_CLIENT_SECRET", "SCHEMA_REGISTRY_TOKEN"):  # which this connection needs not
        planted.secrets[setting] = pipeline.environment[f"UEMB_{setting}"] = f"{setting.lower()}-9"
    by_faust = [sys.executable, "-m", "faust", "-A", "stream.app", "worker", "-l", level.replace("warning", "warn")]
    pipeline.start([*by_faust, "--without-web"] if command == "faust" else None)
    pipeline.until_ready()
    # what goes well
    events, bad = tmp_path / "events.csv", tmp_path / "bad.csv"
    events.write_text(f"user_id,item_id,type,ts\n{USER},50,view,1700000000000\n{USER},{ITEM},like,1700000000001\n")
    bad.write_text(f"user_id,item_id,type,ts\n{USER},{ITEM},view,{PAYLOAD}\n")
    planted.add_commands(pipeline, [f"send {events}"])
    for topic in pipeline.inputs:
        pipeline.say(topic, USER.encode(), f'{{"user_id": "{USER}", "{PAYLOAD}'.encode())
    pipeline.until_committed()
    (letter, *_) = pipeline.read(pipeline.dlq)
    *reading, deleting = SHOW_NONE if all_commands else FEW
    planted.add_commands(pipeline, reading)
    shown = [line.format(letter=f"{letter.partition()}:{letter.offset()}") for line in SHOW_USERS]
    planted.add_commands(pipeline, shown if all_commands else shown[-1:], marks=True)
    planted.add_commands(pipeline, [deleting])
    pipeline.until_committed()
    planted.add_pages(f"127.0.0.1:{port}")
    for topic in (pipeline.item_status, pipeline.item_versions):
        planted.add_topic(pipeline, topic)
    # what fails: a row, a password, a store, a setting
    pipeline.environment["UEMB_HTTP"] = ""
    planted.add_commands(pipeline, [f"send {bad}"], 2)
    wrong = {"UEMB_SASL_PASSWORD": "wrong-secret-5", "UEMB_KV_URL": redis.url.replace("kv-secret-4", "wrong-secret-6")}
    malformed = {
        "UEMB_BOOTSTRAP_SERVERS": "ann:wrong-secret-7@127.0.0.1:9092",
        "UEMB_KV_URL": "redis://ann:wrong-secret-8/x@h:port",
        "UEMB_SCHEMA_REGISTRY_URL": "https://ann:wrong-secret-10@h:8081",
    }
    planted.secrets |= {f"wrong secret {n}": f"wrong-secret-{n}" for n in (5, 6, 7, 8, 10)}
    before = dict(pipeline.environment)
    for name, value in (*wrong.items(), *malformed.items()):
        pipeline.environment[name] = value
        needs_store = name == "UEMB_KV_URL" and value in wrong.values()
        planted.add_commands(pipeline, ["worker"] if needs_store or not all_commands else FAIL, 2)
        if all_commands:
            planted.add_commands(pipeline, ["doctor"], 1 if value == wrong.get(name) else 2)
        pipeline.environment = dict(before)
    # a fault of the worker; then what it has kept
    with redis.client() as client:
        for key in client.keys("uemb:watermark:*"):
            client.delete(key)
            client.lpush(key, PAYLOAD)
    assert pipeline.wait(60) == 1
    planted.add(f"log, {level}, {form}", pipeline.log.read_bytes())
    assert level != "debug" or b"DEBUG" in pipeline.log.read_bytes() or b'"debug"' in pipeline.log.read_bytes().lower()
    planted.add_folder(pipeline.state)
    assert list(planted.found()) == []
