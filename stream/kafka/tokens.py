"""Tokens for SASL OAUTHBEARER: from an issuer, or a function of the operator's; one cache for both client libraries.

An issuer is asked by OAuth's client credentials grant (RFC 6749, 4.4). A token is renewed when a fifth of its life is
left, and used to its end where no new one can be had.
"""

import asyncio
import base64
import http.client
import importlib
import json
import logging
import re
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaConnectionError

from stream.config import OAUTHBEARER, Settings
from stream.errors import ConfigError, DeliveryError, UembError
from stream.logs import OncePerMinute
from stream.security.credentials import FreshContext, TlsFiles, read_secret, server_fault
from stream.security.tls_probe import speaks_tls

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())

#: Longest wait for an issuer's answer; less than what a check, or a first contact, may take.
ANSWER_S: Final = 4.0
#: What is left of a token's life when it is renewed: this share of it and, so that a client that is being made can
#: still show it, these seconds, but never more than half of it.
_LEFT: Final = 0.2
_LEFT_S: Final = 10.0
#: After a failure the source is left alone for so long while the token is still good.
_PAUSE_S: Final = 1.0
_LARGEST_ANSWER: Final = 1 << 20
_PREFIX: Final = "UEMB_SASL_OAUTH"
_URL: Final = f"{_PREFIX}_TOKEN_URL"
#: RFC 6749, 5.2, of what is used there.
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,60}")
#: Answers of an issuer that may be another one later.
_LATER: Final = frozenset({408, 425, 429})

#: Blocking; a token, and the Unix time in seconds when it ends.
TokenSource = Callable[[], tuple[str, float]]


class Token(NamedTuple):
    """What a client shows to brokers.

    Attributes:
        value: the token; never shown to anybody else.
        ends_at_s: Unix time.
        renew_at_s: when to ask for the next, on the same clock.
    """

    value: str
    ends_at_s: float
    renew_at_s: float


class Tokens:
    """One cache of a source's tokens; may be used by any number of threads and event loops.

    Args:
        source: see `TokenSource`.
        extensions: SASL extensions (RFC 7628) to send with them.
        clock: Unix seconds.
    """

    def __init__(
        self, source: TokenSource, extensions: Mapping[str, str], clock: Callable[[], float] = time.time
    ) -> None:
        self.extensions: Final = dict(extensions)
        self.for_aiokafka: Final = _AiokafkaProvider(self)
        self._source = source
        self._clock = clock
        self._token: Token | None = None
        self._lock = threading.Lock()

    @property
    def at_hand(self) -> str | None:
        """A token for which nobody must be asked; never blocks."""
        token = self._token
        return token.value if token is not None and self._clock() < token.renew_at_s else None

    def get(self) -> Token:
        """A token that is good; blocking, while the source is asked.

        Raises:
            ConfigError: the source is set up wrongly.
            DeliveryError: it can't be reached, or failed.
        """
        with self._lock:
            token, now_s = self._token, self._clock()
            if token is not None and now_s < token.renew_at_s:
                return token
            try:
                value, ends_at_s = self._source()
            except UembError as exc:
                if token is None or token.ends_at_s <= self._clock():
                    raise
                log.warning("the token for the brokers is not renewed yet, and tried again: %s", exc)
                self._token = token._replace(renew_at_s=min(self._clock() + _PAUSE_S, token.ends_at_s))
                return self._token
            life_s = max(0.0, ends_at_s - self._clock())
            self._token = Token(value, ends_at_s, ends_at_s - min(max(_LEFT * life_s, _LEFT_S), life_s / 2))
            return self._token

    def for_librdkafka(self, _: str) -> tuple[str, float, str, dict[str, str]]:
        """What its clients call: token, end, name of who logs in (the brokers take that from the token), extensions."""
        token = self.get()
        return token.value, token.ends_at_s, "", self.extensions


class _AiokafkaProvider(AbstractTokenProvider):  # type: ignore[misc]
    """The same for aiokafka, which asks before each connection, in its event loop."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def token(self) -> str:
        """A token; the source is asked in a thread.

        Raises:
            KafkaConnectionError: there is none now: a connection that can't be made, which the client tries again.
        """
        if (value := self._tokens.at_hand) is not None:
            return value
        try:
            return (await asyncio.to_thread(self._tokens.get)).value
        except UembError as exc:
            log.warning("no connection to the brokers without a token: %s", exc)
            raise KafkaConnectionError(str(exc)) from exc

    def extensions(self) -> dict[str, str]:
        """Sent with each token."""
        return self._tokens.extensions


@dataclass(frozen=True, slots=True)
class Issuer:
    """Where tokens are asked for, and as whom.

    Attributes:
        url: the token endpoint.
        client_id: who asks.
        secret: the client's; None where it is in `secret_file`, which is read at each request.
        secret_file: see there.
        scope: what to ask for, None for the issuer's default.
        tls: what its certificate is checked with.
    """

    url: str
    client_id: str
    secret: str | None = field(repr=False)
    secret_file: Path | None
    scope: str | None
    tls: TlsFiles

    def ask(self, context: ssl.SSLContext | None) -> tuple[str, float]:
        """One token; see `TokenSource`.

        Raises:
            ConfigError: the issuer refuses this client, is not trusted, or is none.
            DeliveryError: it can't be reached, or is in trouble.
        """
        secret = self.secret or ""
        if self.secret_file is not None:
            secret = read_secret(self.secret_file, f"{_PREFIX}_CLIENT_SECRET_FILE")
        form = {"grant_type": "client_credentials"} | ({"scope": self.scope} if self.scope else {})
        login = ":".join(urllib.parse.quote(part, safe="") for part in (self.client_id, secret))
        request = urllib.request.Request(  # noqa: S310 - http and https only, see `Settings`
            self.url,
            urllib.parse.urlencode(form).encode(),
            {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}", "Accept": "application/json"},
        )
        opener = urllib.request.build_opener(_StaysThere, urllib.request.HTTPSHandler(context=context))
        asked_at_s = time.time()
        try:
            with opener.open(request, timeout=ANSWER_S) as answer:
                return _token_in(answer.read(_LARGEST_ANSWER), self.url, asked_at_s)
        except urllib.error.HTTPError as exc:
            raise self._refusal(exc) from exc
        except (OSError, http.client.HTTPException) as exc:
            raise self._silence(exc) from exc

    def _refusal(self, exc: urllib.error.HTTPError) -> UembError:
        with exc:
            error = _error_in(exc.read(_LARGEST_ANSWER))
        said = f"{exc.code} {error}".strip()
        if exc.code >= 500 or exc.code in _LATER:
            return DeliveryError(f"the issuer at {self.url} is in trouble ({said}); see its log, or {_URL}")
        if exc.code == 401 or error in ("invalid_client", "unauthorized_client"):
            return ConfigError(
                f"the issuer at {self.url} refuses this client ({said}); check {_PREFIX}_CLIENT_ID and "
                f"{_PREFIX}_CLIENT_SECRET"
            )
        if error == "invalid_scope":
            return ConfigError(f"the issuer at {self.url} refuses the scope; check {_PREFIX}_SCOPE")
        return ConfigError(f"the issuer at {self.url} gives no token ({said}); check {_URL}")

    def _silence(self, exc: OSError | http.client.HTTPException) -> UembError:
        cause = exc.reason if isinstance(exc, urllib.error.URLError) else exc
        if isinstance(cause, ssl.SSLCertVerificationError):
            fault = server_fault(cause, self.tls.ca)
            if fault == "expired":
                return ConfigError(
                    f"the certificate of the issuer at {self.url}, or of its CA, has expired; have whoever runs it "
                    f"renew it, or check {_URL}"
                )
            if fault == "host":
                return ConfigError(
                    f"the certificate of the issuer at {self.url} is for another host; name it in {_URL} as that does"
                )
            return ConfigError(
                f"the certificate of the issuer at {self.url} is signed {fault} ({cause.verify_message}); "
                f"set {_PREFIX}_CAFILE to its CA's"
            )
        place = urllib.parse.urlsplit(self.url)
        if place.scheme == "http" and speaks_tls(place.hostname or "", place.port or http.client.HTTP_PORT):
            return ConfigError(f"{self.url} speaks TLS; write https:// in {_URL}")
        if isinstance(cause, http.client.HTTPException):
            return ConfigError(f"{self.url} does not speak HTTP; check {_URL}")
        if isinstance(cause, ssl.SSLError):
            return ConfigError(f"{self.url} can't be talked to in TLS ({cause.reason}); check {_URL}")
        why = "no answer" if isinstance(cause, TimeoutError) else getattr(cause, "strerror", None) or str(cause)
        return DeliveryError(f"the issuer at {self.url} can't be reached ({why}); check {_URL}")


class _StaysThere(urllib.request.HTTPRedirectHandler):
    """The client's secret goes to nobody but the issuer that was named."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nobody."""


def _token_in(answer: bytes, url: str, asked_at_s: float) -> tuple[str, float]:
    try:
        said = json.loads(answer)
        token, lasts_s = str(said["access_token"]), float(said["expires_in"])
    except (ValueError, KeyError, TypeError) as exc:  # what is no UTF-8, and no JSON, too
        msg = f"{url} answers without a token and the seconds that it lasts, in JSON; check {_URL}"
        raise ConfigError(msg) from exc
    return token, asked_at_s + lasts_s


def _error_in(answer: bytes) -> str:
    """The code of an error (RFC 6749, 5.2); what is none, and what is meant for people, is left out."""
    try:
        error = json.loads(answer)["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    return error if isinstance(error, str) and _CODE.fullmatch(error) else ""


def function_of(name: str) -> TokenSource:
    """The function that `UEMB_SASL_TOKEN_PROVIDER` names, its failures as errors of ours.

    Raises:
        ConfigError: there is none.
    """
    where = f"UEMB_SASL_TOKEN_PROVIDER {name}"
    module, _, function = name.partition(":")
    try:
        give = getattr(importlib.import_module(module), function)
    except ImportError as exc:
        missing = exc.name or module
        msg = f"{where}: there is no module {missing} here; install it, or put its folder into PYTHONPATH"
        raise ConfigError(msg) from exc
    except AttributeError as exc:
        msg = f"{where}: there is no {function} in that module"
        raise ConfigError(msg) from exc

    def source() -> tuple[str, float]:
        try:
            token, ends_at_s = give()
        except UembError:
            raise
        except Exception as exc:
            said = (str(exc).splitlines() or [""])[0][:160]
            msg = f"{where} gave no token ({type(exc).__name__}: {said}); see what it needs"
            raise DeliveryError(msg) from exc
        if not (isinstance(token, str) and token and isinstance(ends_at_s, int | float)):
            msg = f"{where} must return a token and the Unix time in seconds when it ends"
            raise ConfigError(msg)
        if ends_at_s <= time.time():
            msg = f"{where} gave a token that has ended; correct it, or this host's clock"
            raise DeliveryError(msg)
        return token, float(ends_at_s)

    return source


def uses_tokens(settings: Settings) -> bool:
    """Whether the brokers are shown a token."""
    return settings.uses_sasl and settings.sasl_mechanism == OAUTHBEARER


def tokens_of(settings: Settings) -> Tokens:
    """The cache that all clients of these settings have in this process.

    Raises:
        ConfigError: there is no such function, or a file of certificates can't be used.
    """
    extensions = tuple(sorted(settings.sasl_oauth_extensions.items()))
    if settings.sasl_token_provider is not None:
        return _cache(settings.sasl_token_provider, extensions)
    secret = settings.sasl_oauth_client_secret
    issuer = Issuer(
        settings.sasl_oauth_token_url or "",
        settings.sasl_oauth_client_id or "",
        secret.get_secret_value() if secret else None,
        settings.sasl_oauth_client_secret_file,
        settings.sasl_oauth_scope,
        TlsFiles(
            settings.sasl_oauth_cafile or settings.ssl_cafile,
            settings={"ca": f"{_PREFIX}_CAFILE" if settings.sasl_oauth_cafile else "UEMB_SSL_CAFILE"},
        ),
    )
    return _cache(issuer, extensions)


@lru_cache(maxsize=8)
def _cache(origin: str | Issuer, extensions: tuple[tuple[str, str], ...]) -> Tokens:
    if isinstance(origin, str):
        return Tokens(function_of(origin), dict(extensions))
    context = FreshContext(origin.tls) if origin.url.startswith("https:") else None
    return Tokens(lambda: origin.ask(context), dict(extensions))
