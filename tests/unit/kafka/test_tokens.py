"""Tokens: asked of a real issuer on this machine, kept while they are good, and every refusal one line."""

import asyncio
import base64
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka.errors import KafkaConnectionError
from kafka_broker import free_ports
from own_certificates import make_certificate, make_ended_certificate
from redis_server import RedisServer
from token_issuer import CLIENT_ID, CLIENT_SECRET, TokenIssuer

from stream.config import load_settings
from stream.errors import ConfigError, DeliveryError, UembError
from stream.kafka import tokens
from stream.kafka.tokens import Tokens, tokens_of


@pytest.fixture
def issuer() -> Iterator[TokenIssuer]:
    with TokenIssuer() as issuer:
        yield issuer


def asked(url: str, **settings: object) -> str:
    """A token from there, by a cache of its own."""
    tokens._cache.cache_clear()
    given = {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "OAUTHBEARER",
        "sasl_oauth_token_url": url,
        "sasl_oauth_client_id": CLIENT_ID,
        "sasl_oauth_client_secret": CLIENT_SECRET,
        **settings,
    }
    return tokens_of(load_settings(**given)).get().value


def refused(kind: type[UembError], says: str, url: str, **settings: object) -> None:
    with pytest.raises(UembError) as caught:
        asked(url, **settings)
    said = str(caught.value)
    assert type(caught.value) is kind, said
    assert says in said
    assert "\n" not in said
    assert CLIENT_SECRET not in said


# -- an issuer --------------------------------------------------------------------------------------------------------


def test_a_token_for_the_right_client(issuer: TokenIssuer, tmp_path: Path) -> None:
    issuer.scope = "kafka write"
    assert asked(issuer.url, sasl_oauth_scope="kafka write") == issuer.given[0]
    issuer.secret = "s: +/%ü"
    assert asked(issuer.url, sasl_oauth_scope="kafka write", sasl_oauth_client_secret=issuer.secret) in issuer.given
    (tmp_path / "secret").write_text(f"{issuer.secret}\n")
    by_file = {"sasl_oauth_client_secret": None, "sasl_oauth_client_secret_file": tmp_path / "secret"}
    assert asked(issuer.url, sasl_oauth_scope="kafka write", **by_file) in issuer.given


ANSWERS: dict[str, tuple[tuple[int, bytes], type[UembError], str]] = {
    "denied": ((401, b""), ConfigError, "refuses this client (401); check UEMB_SASL_OAUTH_CLIENT_ID and"),
    "unknown client": ((400, b'{"error": "invalid_client"}'), ConfigError, "UEMB_SASL_OAUTH_CLIENT_SECRET"),
    "scope": ((400, b'{"error": "invalid_scope"}'), ConfigError, "check UEMB_SASL_OAUTH_SCOPE"),
    "not found": ((404, b"<html>"), ConfigError, "gives no token (404); check UEMB_SASL_OAUTH_TOKEN_URL"),
    "odd error": ((400, b'{"error": "x\\n[evil]"}'), ConfigError, "gives no token (400); check"),
    "elsewhere": ((302, b""), ConfigError, "gives no token (302); check UEMB_SASL_OAUTH_TOKEN_URL"),
    "trouble": ((503, b""), DeliveryError, "is in trouble (503)"),
    "too many": ((429, b""), DeliveryError, "is in trouble (429)"),
    "a page": ((200, b"<html>"), ConfigError, "answers without a token"),
    "a list": ((200, b"[]"), ConfigError, "answers without a token"),
    "bytes": ((200, b"\xff\xfe"), ConfigError, "answers without a token"),
    "no end": ((200, b'{"access_token": "x"}'), ConfigError, "answers without a token and the seconds that it lasts"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_whatever_else_an_issuer_answers_is_one_line(answer: str, issuer: TokenIssuer) -> None:
    issuer.instead, kind, says = ANSWERS[answer]
    refused(kind, says, issuer.url)


def test_who_is_no_issuer(issuer: TokenIssuer) -> None:
    refused(ConfigError, "check UEMB_SASL_OAUTH_CLIENT_ID", issuer.url, sasl_oauth_client_secret="no")
    (nobody,) = free_ports(1)
    refused(DeliveryError, "can't be reached (Connection refused)", f"http://127.0.0.1:{nobody}/token")
    refused(DeliveryError, "can't be reached (", "http://nobody.invalid/token")
    refused(ConfigError, "can't be talked to in TLS", issuer.url.replace("http:", "https:"))


def test_one_that_speaks_otherwise(redis: RedisServer) -> None:
    refused(ConfigError, "does not speak HTTP", f"http://127.0.0.1:{redis.port}/token")


def test_one_that_never_answers(monkeypatch: pytest.MonkeyPatch, half_dead: int) -> None:
    monkeypatch.setattr(tokens, "ANSWER_S", 0.2)
    refused(DeliveryError, "can't be reached (no answer)", f"http://127.0.0.1:{half_dead}/token")


@pytest.fixture
def half_dead() -> Iterator[int]:
    """A port where connections are taken, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_an_issuer_is_checked_by_its_certificate(tmp_path: Path) -> None:
    sound = make_certificate(tmp_path, "sound")
    other, _ = make_certificate(tmp_path, "other")
    elsewhere = make_certificate(tmp_path, "elsewhere", address="127.0.0.9")
    ended = make_ended_certificate(tmp_path, "ended")
    with TokenIssuer(*sound) as issuer:
        assert asked(issuer.url, sasl_oauth_cafile=sound[0])
        assert asked(issuer.url, ssl_cafile=sound[0]), "the brokers' CA where it has none of its own"
        assert asked(issuer.url, ssl_cafile=other, sasl_oauth_cafile=sound[0])
        refused(ConfigError, "by no CA that this system knows", issuer.url)
        says = f"is signed not by {other} (self-signed certificate); set UEMB_SASL_OAUTH_CAFILE to its CA's"
        refused(ConfigError, says, issuer.url, sasl_oauth_cafile=other)
        refused(ConfigError, "speaks TLS; write https:// in UEMB_SASL_OAUTH_TOKEN_URL", f"http{issuer.url[5:]}")
    with TokenIssuer(*elsewhere) as issuer:
        refused(ConfigError, "is for another host; name it in UEMB_SASL", issuer.url, sasl_oauth_cafile=elsewhere[0])
    with TokenIssuer(*ended) as issuer:
        refused(ConfigError, "has expired; have whoever runs it", issuer.url, sasl_oauth_cafile=ended[0])
    (tmp_path / "none.pem").write_text("")
    refused(ConfigError, "UEMB_SASL_OAUTH_CAFILE", "https://127.0.0.1:1/", sasl_oauth_cafile=tmp_path / "none.pem")


# -- a function -------------------------------------------------------------------------------------------------------

PROVIDER = """
import time
def token(): return "of a function", time.time() + 60
def fails(): raise RuntimeError("no role\\nsecond line")
def says_nothing(): return None
def has_ended(): return "old", time.time() - 1
def in_text(): return "x", "tomorrow"
"""


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("provider_of_test:fails", DeliveryError, "gave no token (RuntimeError: no role); see what it needs"),
        ("provider_of_test:says_nothing", DeliveryError, "gave no token (TypeError"),
        ("provider_of_test:has_ended", DeliveryError, "gave a token that has ended"),
        ("provider_of_test:in_text", ConfigError, "must return a token and the Unix time in seconds"),
        ("provider_of_test:missing", ConfigError, "there is no missing in that module"),
        ("module_that_is_not:token", ConfigError, "there is no module module_that_is_not here; install it"),
    ],
)
def test_a_function_that_gives_no_token(
    name: str, kind: type[UembError], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "provider_of_test.py").write_text(PROVIDER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "provider_of_test", raising=False)
    refused(kind, says, None, sasl_token_provider=name)  # type: ignore[arg-type]
    assert asked(None, sasl_token_provider="provider_of_test:token") == "of a function"  # type: ignore[arg-type]


def test_amazons_signer_signs_for_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret-6"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    refused(ConfigError, "set AWS_REGION", None, sasl_token_provider="stream.kafka.msk:token")  # type: ignore[arg-type]
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    token = asked(None, sasl_token_provider="stream.kafka.msk:token")  # type: ignore[arg-type]
    url = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
    assert url.startswith("https://kafka.eu-central-1.amazonaws.com/?Action=kafka-cluster%3AConnect")
    assert "X-Amz-Signature=" in url
    assert "secret-6" not in url


# -- the cache --------------------------------------------------------------------------------------------------------


class Source:
    """Gives tokens of a hundred seconds by a clock that is set."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.given = 0
        self.fault: UembError | None = None

    def __call__(self) -> tuple[str, float]:
        if self.fault is not None:
            raise self.fault
        self.given += 1
        return f"token {self.given}", self.now_s + 100

    def clock(self) -> float:
        return self.now_s


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def cache(source: Source) -> Tokens:
    return Tokens(source, {}, source.clock)


def test_a_token_is_kept_for_four_fifths_of_its_life(source: Source, cache: Tokens) -> None:
    assert cache.at_hand is None
    assert cache.get() == ("token 1", 1100, 1080)
    source.now_s = 1079
    assert (cache.get().value, cache.at_hand) == ("token 1", "token 1")
    source.now_s = 1080
    assert cache.at_hand is None
    assert (cache.get().value, cache.at_hand) == ("token 2", "token 2")


@pytest.mark.parametrize(("life_s", "renewed_s"), [(3600, 2880), (40, 30), (10, 5), (1, 0.5)])
def test_a_client_that_is_being_made_has_time_to_show_it(source: Source, life_s: float, renewed_s: float) -> None:
    cache = Tokens(lambda: ("token", source.now_s + life_s), {}, source.clock)
    assert cache.get().renew_at_s - source.now_s == pytest.approx(renewed_s)


def test_one_that_is_good_outlasts_an_issuer_that_is_away(
    source: Source, cache: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    cache.get()
    source.now_s, source.fault = 1080, DeliveryError("the issuer is away")
    assert cache.get().value == "token 1"
    assert [record.getMessage() for record in caplog.records] == [
        "the token for the brokers is not renewed yet, and tried again: the issuer is away"
    ]
    source.now_s = 1100
    with pytest.raises(DeliveryError, match="the issuer is away"):
        cache.get()
    source.fault = None
    assert cache.get().value == "token 2"


def test_of_many_at_once_one_asks(source: Source) -> None:
    begun = threading.Event()

    def slow() -> tuple[str, float]:
        begun.wait(10)
        return source()

    cache = Tokens(slow, {}, source.clock)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(cache.get().value)) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.set()
    for thread in threads:
        thread.join()
    assert found == ["token 1"] * 8


def test_an_event_loop_goes_on_while_an_issuer_takes_its_time() -> None:
    answered = threading.Event()

    def slow() -> tuple[str, float]:
        assert answered.wait(10), "the loop was blocked"
        return "token", time.time() + 60

    async def ask() -> str:
        asking = asyncio.create_task(Tokens(slow, {}).for_aiokafka.token())
        await asyncio.sleep(0)
        answered.set()
        return await asking

    assert asyncio.run(ask()) == "token"


def test_no_token_is_a_connection_that_is_not_made(source: Source, cache: Tokens) -> None:
    source.fault = DeliveryError("the issuer is away")
    with pytest.raises(KafkaConnectionError, match="the issuer is away"):
        asyncio.run(cache.for_aiokafka.token())


def test_a_token_is_shown_by_no_repr(issuer: TokenIssuer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    token = asked(issuer.url)
    assert not any(token in record.getMessage() or CLIENT_SECRET in record.getMessage() for record in caplog.records)
    assert CLIENT_SECRET not in repr(tokens.Issuer("u", "c", CLIENT_SECRET, None, None, tokens.TlsFiles(None)))
