"""Secured brokers: what a client lacks is named, with its setting, by every command; no secret is ever written."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from kafka_broker import KafkaBroker, free_ports
from pipeline import Pipeline
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
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
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


@pytest.mark.parametrize("command", ["uemb", pytest.param("faust", marks=pytest.mark.slow)])
def test_no_secret_is_ever_written(
    command: str,
    secured: SecuredBroker,
    folder: Path,
    make_redis: Callable[..., RedisServer],
    make_pipeline: Callable[..., Pipeline],
    films: Dataset,
) -> None:
    """By a worker at its most talkative, by the clients in it, and by any command."""
    redis = make_redis(requirepass="kv-secret-4")
    settings = there(folder, {**BOTH, **CLIENT})
    pipeline = make_pipeline(kv_url=redis.url, log_level="debug", **settings)
    pipeline.environment["UEMB_BOOTSTRAP_SERVERS"] = secured.at["SASLSSL"]
    by_faust = [sys.executable, "-m", "faust", "-A", "stream.app", "worker", "-l", "debug", "--without-web"]
    pipeline.start(by_faust if command == "faust" else None)
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:200])
    pipeline.until_committed()
    said = [
        pipeline.uemb(*words.split())
        for words in ("config", "config --json", "get 1", "tail --from-beginning -n 1", "items status", "verify")
    ]
    assert pipeline.stop() == 0
    said.append(pipeline.log.read_text())
    assert "DEBUG" in said[-1]
    for secret in (*PASSWORDS.values(), KEY_PASSWORD, redis.password):
        assert not any(secret in text for text in said), secret
