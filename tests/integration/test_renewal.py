"""Tokens end, passwords and certificates are replaced: under a worker that runs, without a rebalance."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka_broker import KafkaBroker
from pipeline import Pipeline, feeding
from secured_broker import ROTATED_PASSWORD, SECRETS, SecuredBroker, there

from stream.feed.dataset import Dataset

pytestmark = [pytest.mark.kafka, pytest.mark.faults]


@pytest.fixture(scope="module")
def kafka(secured_kafka: SecuredBroker) -> KafkaBroker:
    """For pipelines, which look at it over PLAINTEXT."""
    return secured_kafka


@pytest.fixture
def flowing(
    secured_kafka: SecuredBroker, make_pipeline: Callable[..., Pipeline], films: Dataset
) -> Callable[..., Pipeline]:
    """Runs `act` while a worker at a listener is sent events; looks whether its partitions stayed where they were."""

    def flowing(listener: str, act: Callable[[Pipeline], None], **settings: object) -> Pipeline:
        pipeline = make_pipeline(**{"ssl_cafile": secured_kafka.ca, **settings})
        pipeline.environment["UEMB_BOOTSTRAP_SERVERS"] = secured_kafka.at[listener]
        pipeline.start()
        pipeline.until_ready()
        before = pipeline.epochs()
        events = films.events[:5_000]
        with feeding(pipeline, events, rate=100):
            act(pipeline)
        pipeline.until_committed()
        assert pipeline.epochs() == before
        assert pipeline.stop() == 0
        # What looks at the outcome is to see it in peace.
        pipeline.environment |= {"UEMB_SECURITY_PROTOCOL": "PLAINTEXT", "UEMB_BOOTSTRAP_SERVERS": pipeline.bootstrap}
        pipeline.check(len({event.user_id for event in events}))
        print(f"{listener}: {_resent(pipeline)}")
        return pipeline

    return flowing


def _resent(pipeline: Pipeline) -> str:
    log = pipeline.log.read_text()
    return ", ".join(f"{log.count(level)} lines of {level.strip()}" for level in (" WARNING ", " ERROR ", " CRITICAL "))


def until_it_goes_on(pipeline: Pipeline) -> None:
    """Wait until what was not committed when this was called is."""

    def committed() -> int:
        return sum(sum(pipeline.committed(topic)) for topic in pipeline.topics.values())

    before = committed()
    pipeline.until(lambda: committed() > before, "commits go on")


def until_more(pipeline: Pipeline, count: Callable[[], int], more: int, what: str) -> None:
    """Wait until a count has risen, and commits go on."""
    before = count()
    pipeline.until(lambda: count() >= before + more, what)
    until_it_goes_on(pipeline)


def oauth(secured: SecuredBroker) -> dict[str, str]:
    return there(secured.ca.parent, secured.token_settings)


@pytest.mark.slow
def test_tokens_that_end_are_renewed(secured_kafka: SecuredBroker, flowing: Callable[..., Pipeline]) -> None:
    """The broker closes each connection at the end of its token, which no log ever shows."""
    issuer = secured_kafka.issuer
    issuer.lifetime_s = 8.0  # a start takes some seconds, and each of its clients one

    def act(pipeline: Pipeline) -> None:
        issuer.lifetime_s = 4.0
        until_more(pipeline, lambda: len(issuer.given), 2, "two tokens more")

    try:
        pipeline = flowing(
            "OAUTH",
            act,
            session_timeout_s=6,
            log_level="debug",
            **oauth(secured_kafka),
        )
    finally:
        issuer.lifetime_s = 3600.0
    log = pipeline.log.read_text()
    assert " DEBUG " in log
    assert not any(secret in log for secret in (*issuer.given, *SECRETS))


def has_no_coordinator(pipeline: Pipeline) -> bool:
    """Whether a heartbeat, or a commit, whichever came first, has found no connection."""
    log = pipeline.log.read_text()
    return "Will retry" in log or "Marking the coordinator dead" in log


@pytest.mark.slow
def test_an_issuer_that_is_away_stops_nobody(secured_kafka: SecuredBroker, flowing: Callable[..., Pipeline]) -> None:
    issuer = secured_kafka.issuer
    issuer.lifetime_s = 10.0

    def act(pipeline: Pipeline) -> None:
        issuer.stop()
        pipeline.until(lambda: "no connection to the brokers without a token" in pipeline.log.read_text(), "no token")
        pipeline.until(lambda: has_no_coordinator(pipeline), "the group is out of reach")
        issuer.start()
        until_more(pipeline, lambda: len(issuer.given), 2, "tokens again")

    try:
        pipeline = flowing("OAUTH", act, session_timeout_s=30, **oauth(secured_kafka))
    finally:
        issuer.start()
        issuer.lifetime_s = 3600.0
    log = pipeline.log.read_text()
    assert f"the issuer at {issuer.url} can't be reached (Connection refused)" in log
    assert not any(token in log for token in issuer.given)


@pytest.mark.slow
def test_a_password_is_replaced(secured_kafka: SecuredBroker, flowing: Callable[..., Pipeline], tmp_path: Path) -> None:
    """A login is good for three seconds there; the broker has the new password before the file does."""
    file = tmp_path / "password"
    file.write_text(f"{ROTATED_PASSWORD}\n")

    def act(pipeline: Pipeline) -> None:
        secured_kafka.set_scram_password("rotated", "another-secret-8")
        pipeline.until(lambda: "invalid credentials" in pipeline.log.read_text(), "the broker refuses the old one")
        replace(file, b"another-secret-8\n")
        until_more(pipeline, lambda: secured_kafka.proxies["BRIEF"].accepted, 6, "all connections are made anew")

    try:
        pipeline = flowing(
            "BRIEF",
            act,
            security_protocol="SASL_SSL",
            sasl_mechanism="SCRAM-SHA-512",
            sasl_username="rotated",
            sasl_password_file=file,
            session_timeout_s=10,
        )
    finally:
        secured_kafka.set_scram_password("rotated", ROTATED_PASSWORD)
    assert "another-secret-8" not in pipeline.log.read_text()


def test_a_certificate_is_replaced(
    secured_kafka: SecuredBroker, flowing: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """The broker trusts the new one alone by then; connections break, as they do at each restart of a broker."""
    shown, key = tmp_path / "shown.pem", tmp_path / "shown-key.pem"
    folder = secured_kafka.ca.parent
    replace(shown, secured_kafka.second.read_bytes())
    replace(key, secured_kafka.second_key.read_bytes())

    def act(pipeline: Pipeline) -> None:
        replace(shown, (folder / "third.pem").read_bytes())
        secured_kafka.trust_on_mtls(folder / "third.pem")
        secured_kafka.proxies["MTLS"].drop()
        replace(key, (folder / "third-key.pem").read_bytes())
        until_more(pipeline, lambda: secured_kafka.proxies["MTLS"].accepted, 1, "connections again")

    try:
        flowing("MTLS", act, security_protocol="SSL", ssl_certfile=shown, ssl_keyfile=key, session_timeout_s=10)
    finally:
        secured_kafka.trust_on_mtls(folder / "trusted.pem")


def replace(file: Path, content: bytes) -> None:
    """As those do who replace files under programs that run."""
    new = file.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, file)
