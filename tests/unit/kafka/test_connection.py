"""What both client libraries are told of a connection: the same, whatever setting it comes from."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from own_certificates import make_certificate
from token_issuer import CLIENT_ID, TokenIssuer

from stream.config import Settings, load_settings
from stream.errors import ConfigError
from stream.kafka.connection import aiokafka_config, librdkafka_config
from stream.security.credentials import FreshContext

LOGIN = {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "ali", "sasl_password": "one"}
TOKEN = {
    "security_protocol": "SASL_PLAINTEXT",
    "sasl_mechanism": "OAUTHBEARER",
    "sasl_oauth_token_url": "{issuer}",
    "sasl_oauth_client_id": CLIENT_ID,
    "sasl_oauth_client_secret": "one",
}
TLS = {"security_protocol": "SSL", "ssl_cafile": "{folder}/a.pem"}
CERTIFICATE = {**TLS, "ssl_certfile": "{folder}/a.pem", "ssl_keyfile": "{folder}/a-key.pem"}
#: For each setting of a connection, settings with which it matters, and another value for it.
CHANGES: dict[str, tuple[dict[str, str], object]] = {
    "bootstrap_servers": ({}, "elsewhere:9092"),
    "security_protocol": (LOGIN, "SASL_SSL"),
    "sasl_mechanism": (LOGIN, "SCRAM-SHA-256"),
    "sasl_username": (LOGIN, "bea"),
    "sasl_password": (LOGIN, "two"),
    "sasl_password_file": ({**LOGIN, "sasl_password": ""}, "{folder}/two"),
    "sasl_oauth_token_url": (TOKEN, "{issuer}?two"),
    "sasl_oauth_client_id": (TOKEN, "bea"),
    "sasl_oauth_client_secret": (TOKEN, "two"),
    "sasl_oauth_client_secret_file": ({**TOKEN, "sasl_oauth_client_secret": ""}, "{folder}/two"),
    "sasl_oauth_scope": (TOKEN, "kafka"),
    "sasl_oauth_extensions": (TOKEN, {"logicalCluster": "lkc-1"}),
    "sasl_oauth_cafile": (TOKEN, "{folder}/a.pem"),
    "sasl_token_provider": ({**TOKEN, "sasl_oauth_token_url": ""}, "test_connection:token"),
    "ssl_cafile": (TLS, "{folder}/b.pem"),
    "ssl_certfile": ({**TLS, "ssl_certfile": "{folder}/a-both.pem"}, "{folder}/b-both.pem"),
    "ssl_keyfile": ({**TLS, "ssl_certfile": "{folder}/a-both.pem"}, "{folder}/a-key.pem"),
    "ssl_key_password": (CERTIFICATE, "two"),
    "ssl_key_password_file": (CERTIFICATE, "{folder}/two"),
}
BEFORE = {
    "sasl_password_file": "{folder}/one",
    "sasl_oauth_client_secret_file": "{folder}/one",
    "sasl_token_provider": "test_connection:other_token",
}


def token() -> tuple[str, float]:
    return "a token", 4e9


def other_token() -> tuple[str, float]:
    return "another token", 4e9


@pytest.fixture
def issuer() -> Iterator[TokenIssuer]:
    """One that gives a token to anybody."""
    with TokenIssuer() as issuer:
        issuer.instead = (200, b'{"access_token": "a token", "expires_in": 3600}')
        yield issuer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("connection")
    for name in ("one", "two"):
        (folder / name).write_text(f"{name}\n")
    for name in ("a", "b"):
        certificate, key = make_certificate(folder, name)
        (folder / f"{name}-both.pem").write_text(certificate.read_text() + key.read_text())
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_no_setting_is_honoured_by_one_client_and_ignored_by_the_other(
    name: str, issuer: TokenIssuer, folder: Path
) -> None:
    def filled(value: object) -> object:
        return value.format(issuer=issuer.url, folder=folder) if isinstance(value, str) else value

    base, value = CHANGES[name]
    before = {key: filled(text) for key, text in {**base, **({name: BEFORE[name]} if name in BEFORE else {})}.items()}
    first, second = (load_settings(**settings) for settings in (before, {**before, name: filled(value)}))
    for made in (aiokafka_config, librdkafka_config):
        assert told(made(first)) != told(made(second)), made
        assert told(made(first)) == told(made(first)), made


def told(config: dict[str, Any]) -> dict[str, Any]:
    """What a client is told, in what can be compared; clients of the same settings share one cache of tokens."""
    out = dict(config)
    if isinstance(context := out.get("ssl_context"), FreshContext):
        out["ssl_context"] = context.files
    for name in ("sasl_oauth_token_provider", "oauth_cb"):
        if (given := out.pop(name, None)) is not None:
            out["tokens"] = given._tokens if name != "oauth_cb" else given.__self__
    return out


def test_all_settings_of_a_connection_are_compared() -> None:
    settings = {name for name in Settings.model_fields if name.startswith(("sasl_", "ssl_"))}
    assert {*settings, "bootstrap_servers", "security_protocol"} == set(CHANGES)


def test_both_clients_show_the_token_of_one_cache(issuer: TokenIssuer) -> None:
    issuer.instead = None
    settings = load_settings(
        **{**TOKEN, "sasl_oauth_token_url": issuer.url, "sasl_oauth_client_secret": issuer.secret},
        sasl_oauth_extensions={"logicalCluster": "lkc-1"},
    )
    provider = aiokafka_config(settings)["sasl_oauth_token_provider"]
    value, ends_at_s, _, extensions = librdkafka_config(settings)["oauth_cb"]("")
    assert [value] == issuer.given == [asyncio.run(provider.token())]
    assert extensions == provider.extensions() == {"logicalCluster": "lkc-1"}
    assert ends_at_s > 0


def test_a_password_of_a_file_is_that_of_the_moment(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("one\r\n")
    settings = load_settings(**{**LOGIN, "sasl_password": ""}, sasl_password_file=file)
    assert aiokafka_config(settings)["sasl_plain_password"] == librdkafka_config(settings)["sasl.password"] == "one"
    file.write_text(" two ")
    assert aiokafka_config(settings)["sasl_plain_password"] == librdkafka_config(settings)["sasl.password"] == " two "
    file.unlink()
    with pytest.raises(ConfigError, match=r"^UEMB_SASL_PASSWORD_FILE: \S+ can't be read \(No such file"):
        aiokafka_config(settings)


@pytest.mark.parametrize("made", [aiokafka_config, librdkafka_config])
def test_a_key_that_cant_be_used_is_named_before_a_client_is_made(made: Callable[..., object], tmp_path: Path) -> None:
    make_certificate(tmp_path, "a", "right")
    files = {name: value.format(folder=tmp_path) for name, value in CERTIFICATE.items()}
    with pytest.raises(ConfigError, match="UEMB_SSL_KEY_PASSWORD is wrong"):
        made(load_settings(**files, ssl_key_password="wrong"))
