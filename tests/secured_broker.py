"""A real Kafka with listeners for each way of securing one, the standard authorizer, and certificates of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from half_open import HalfOpenProxy
from kafka_broker import PATIENT, KafkaBroker, why_unavailable
from own_certificates import make_certificate, make_ended_certificate
from token_issuer import AUDIENCE, CLIENT_ID, CLIENT_SECRET, NAME, TokenIssuer

#: Users of PLAIN and their passwords; `app` may do nothing until it is granted.
PASSWORDS: Final = {"admin": "admin-secret-1", "app": "app-secret-2"}
KEY_PASSWORD: Final = "key-secret-3"
LISTENERS: Final = {
    "SSL": "SSL",
    "MTLS": "SSL",
    "SASL": "SASL_PLAINTEXT",
    "SASLSSL": "SASL_SSL",
    "SCRAM": "SASL_PLAINTEXT",
    "SCRAMSSL": "SASL_SSL",
    "BRIEF": "SASL_SSL",
    "OAUTH": "SASL_SSL",
    "ENDED": "SSL",
    "ELSEWHERE": "SSL",
    "ASTRAY": "PLAINTEXT",
}

TLS: Final = {"security_protocol": "SSL", "ssl_cafile": "server.pem"}
LOGIN: Final = {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "admin", "sasl_password": PASSWORDS["admin"]}
BOTH: Final = {**LOGIN, **TLS, "security_protocol": "SASL_SSL"}
SCRAM: Final = {**BOTH, "sasl_mechanism": "SCRAM-SHA-512"}
OTHER: Final = {"ssl_certfile": "other.pem", "ssl_keyfile": "other-key.pem"}
CLIENT: Final = {"ssl_certfile": "client.pem", "ssl_keyfile": "client-key.pem", "ssl_key_password": KEY_PASSWORD}
#: Listener, settings, and what the one line says.
FAULTS: Final[Mapping[str, tuple[str, dict[str, str], str]]] = {
    "password": ("SASL", {**LOGIN, "sasl_password": "no"}, "UEMB_SASL_USERNAME and UEMB_SASL_PASSWORD"),
    "no password": ("SASLSSL", {**BOTH, "sasl_password": ""}, "UEMB_SASL_USERNAME and UEMB_SASL_PASSWORD"),
    "SCRAM password": ("SCRAMSSL", {**SCRAM, "sasl_password": "no"}, "UEMB_SASL_USERNAME and UEMB_SASL_PASSWORD"),
    "SCRAM mechanism": ("SCRAMSSL", BOTH, "UEMB_SASL_MECHANISM to one of: SCRAM-SHA-"),
    "token mechanism": ("OAUTH", BOTH, "UEMB_SASL_MECHANISM to one of: OAUTHBEARER"),
    "ended client certificate": (
        "MTLS",
        {**TLS, "ssl_certfile": "ended.pem", "ssl_keyfile": "ended-key.pem"},
        "refuses the certificate in UEMB_SSL_CERTFILE, which has expired",
    ),
    "two passwords": ("SASL", {**LOGIN, "sasl_password_file": "server.pem"}, "UEMB_SASL_PASSWORD_FILE are both set"),
    "missing password": (
        "SASL",
        {**LOGIN, "sasl_password": "", "sasl_password_file": "none.pem"},
        "UEMB_SASL_PASSWORD_FILE",
    ),
    "mechanism": ("SASL", {**LOGIN, "sasl_mechanism": "SCRAM-SHA-256"}, "UEMB_SASL_MECHANISM to one of: PLAIN"),
    "no login": ("SASL", {}, "demands a login; set UEMB_SECURITY_PROTOCOL to SASL_PLAINTEXT"),
    "no login in TLS": ("SASLSSL", TLS, "demands a login; set UEMB_SECURITY_PROTOCOL to SASL_SSL"),
    "needless login": ("PLAINTEXT", LOGIN, "takes no login; set UEMB_SECURITY_PROTOCOL to PLAINTEXT"),
    "needless login in TLS": ("SSL", BOTH, "takes no login; set UEMB_SECURITY_PROTOCOL to SSL"),
    "plain text": ("SSL", {}, "speaks TLS; set UEMB_SECURITY_PROTOCOL to SSL"),
    "plain text, login": ("SASLSSL", LOGIN, "speaks TLS; set UEMB_SECURITY_PROTOCOL to SASL_SSL"),
    "TLS": ("PLAINTEXT", TLS, "speaks no TLS; set UEMB_SECURITY_PROTOCOL to PLAINTEXT"),
    "TLS, login": ("SASL", BOTH, "speaks no TLS; set UEMB_SECURITY_PROTOCOL to SASL_PLAINTEXT"),
    "no CA": ("SSL", {"security_protocol": "SSL"}, "by no CA that this system knows"),
    "another CA": ("SSL", {**TLS, "ssl_cafile": "other.pem"}, "set UEMB_SSL_CAFILE to its CA's"),
    "ended": ("ENDED", {**TLS, "ssl_cafile": "ended.pem"}, "has expired; have whoever runs the brokers renew it"),
    "another host": ("ELSEWHERE", {**TLS, "ssl_cafile": "elsewhere.pem"}, "is for another host"),
    "missing CA": ("SSL", {**TLS, "ssl_cafile": "none.pem"}, "UEMB_SSL_CAFILE: there is no file"),
    "empty CA": ("SSL", {**TLS, "ssl_cafile": "empty.pem"}, "UEMB_SSL_CAFILE"),
    "no certificate": ("MTLS", TLS, "set UEMB_SSL_CERTFILE and UEMB_SSL_KEYFILE"),
    "another certificate": ("MTLS", {**TLS, **OTHER}, "refuses the certificate in UEMB_SSL_CERTFILE"),
    "missing certificate": ("MTLS", {**TLS, **CLIENT, "ssl_certfile": "none.pem"}, "UEMB_SSL_CERTFILE"),
    "missing key": ("MTLS", {**TLS, **CLIENT, "ssl_keyfile": "none.pem"}, "UEMB_SSL_KEYFILE"),
    "another key": ("MTLS", {**TLS, **CLIENT, "ssl_keyfile": "other-key.pem"}, "that belong together"),
    "key password": ("MTLS", {**TLS, **CLIENT, "ssl_key_password": "no"}, "UEMB_SSL_KEY_PASSWORD"),
    "no key password": ("MTLS", {**TLS, **CLIENT, "ssl_key_password": ""}, "UEMB_SSL_KEY_PASSWORD"),
}
#: Of a user for SCRAM, until a test gives it another.
ROTATED_PASSWORD: Final = "rotated-secret-7"
SECRETS: Final = (*PASSWORDS.values(), KEY_PASSWORD, CLIENT_SECRET)
_SUPER_USERS: Final = ("ANONYMOUS", "admin", "rotated", CLIENT_ID, "CN=client", "CN=second", "CN=third")
_OAUTH: Final = "org.apache.kafka.common.security.oauthbearer"


def there(folder: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Settings, whose files lie in a folder."""
    return {name: str(folder / value) if value.endswith(".pem") else value for name, value in settings.items()}


class SecuredBroker(KafkaBroker):
    """PLAINTEXT may do all; `at` has the addresses of SSL, MTLS (demands a client's certificate), SASL and SASLSSL.

    SCRAM and SCRAMSSL take the same users by SCRAM, and so does BRIEF, which lets a login be good for three seconds.
    OAUTH takes the tokens of `issuer`, each until its end. Clients of MTLS and BRIEF are sent to `proxies`, which pass
    them on.
    ENDED shows a certificate that has expired, ELSEWHERE one of another host; ASTRAY sends its
    clients to a port that nobody listens on. What `FAULTS` names lies in the folder.

    Attributes:
        issuer: gives tokens; its certificate is the broker's.
        ca: certificate to check the broker against.
        client: certificate that MTLS trusts; `client_key` is encrypted with `KEY_PASSWORD`.
        second: another one that it trusts; `second_key` is not encrypted.
    """

    def __init__(self, folder: Path) -> None:
        self.ca, server_key = make_certificate(folder, "server", days=90)
        self.issuer = TokenIssuer(self.ca, server_key)
        self.client, self.client_key = make_certificate(folder, "client", KEY_PASSWORD)
        self.second, self.second_key = make_certificate(folder, "second")
        make_certificate(folder, "third")
        make_certificate(folder, "other")
        (folder / "trusted.pem").write_text(self.client.read_text() + self.second.read_text())
        self.proxies = {listener: HalfOpenProxy(0) for listener in ("MTLS", "BRIEF")}
        (folder / "empty.pem").write_text("")
        keystore = _keystore(folder, "server", self.ca, server_key)
        ended = _keystore(folder, "ended", *make_ended_certificate(folder, "ended"))
        elsewhere = _keystore(folder, "elsewhere", *make_certificate(folder, "elsewhere", address="127.0.0.9"))
        users = " ".join(f'user_{name}="{password}"' for name, password in PASSWORDS.items())
        login = f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
        by_scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        by_token = (
            f'{_OAUTH}.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker" '
            f'ssl.truststore.type="PEM" ssl.truststore.location="{self.ca}";'
        )
        scram = {
            f"listener.name.{listener}.{mechanism}.sasl.jaas.config": by_scram
            for listener in ("scram", "scramssl", "brief")
            for mechanism in ("scram-sha-256", "scram-sha-512")
        }
        mechanisms = {
            f"listener.name.{listener}.sasl.enabled.mechanisms": "SCRAM-SHA-256,SCRAM-SHA-512"
            for listener in ("scram", "scramssl", "brief")
        }
        super().__init__(
            {
                **PATIENT,
                **scram,
                **mechanisms,
                "listener.name.brief.scram-sha-512.connections.max.reauth.ms": "3000",
                "listener.name.oauth.sasl.enabled.mechanisms": "OAUTHBEARER",
                "listener.name.oauth.oauthbearer.sasl.jaas.config": by_token,
                "listener.name.oauth.oauthbearer.sasl.server.callback.handler.class": (
                    f"{_OAUTH}.OAuthBearerValidatorCallbackHandler"
                ),
                # Not 0: a token's end is none of a connection's then.
                "listener.name.oauth.oauthbearer.connections.max.reauth.ms": "3600000",
                "sasl.oauthbearer.jwks.endpoint.url": self.issuer.jwks_url,
                "sasl.oauthbearer.expected.audience": AUDIENCE,
                "sasl.oauthbearer.expected.issuer": NAME,
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(keystore),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(folder / "trusted.pem"),
                "listener.name.mtls.ssl.client.auth": "required",
                "listener.name.ended.ssl.keystore.location": str(ended),
                "listener.name.elsewhere.ssl.keystore.location": str(elsewhere),
                "sasl.enabled.mechanisms": "PLAIN",
                "listener.name.sasl.plain.sasl.jaas.config": login,
                "listener.name.saslssl.plain.sasl.jaas.config": login,
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": ";".join(f"User:{name}" for name in _SUPER_USERS),
            },
            listeners=LISTENERS,
            astray={
                "ASTRAY": "127.0.0.1:1",
                **{listener: f"127.0.0.1:{proxy.port}" for listener, proxy in self.proxies.items()},
            },
            java=[f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={self.issuer.jwks_url}"],
        )
        for listener, proxy in self.proxies.items():
            proxy.target = int(self.at[listener].rpartition(":")[2])
        for user, password in {**PASSWORDS, "rotated": ROTATED_PASSWORD}.items():
            self.set_scram_password(user, password)

    @property
    def token_settings(self) -> dict[str, str]:
        """What a client of OAUTH is told; files as elsewhere here."""
        return {
            **TLS,
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "OAUTHBEARER",
            "sasl_oauth_token_url": self.issuer.url,
            "sasl_oauth_client_id": CLIENT_ID,
            "sasl_oauth_client_secret": CLIENT_SECRET,
            "sasl_oauth_cafile": "server.pem",
        }

    def set_scram_password(self, user: str, password: str) -> None:
        """Give a user another password for SCRAM; who is logged in stays so."""
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):  # no two in one request
            how = ScramCredentialInfo(mechanism, 4096)
            change = UserScramCredentialUpsertion(user, how, password.encode())
            for future in admin.alter_user_scram_credentials([change]).values():
                future.result()

    def close(self) -> None:
        """See `KafkaBroker`."""
        super().close()
        self.issuer.close()
        for proxy in self.proxies.values():
            proxy.__exit__(None, None, None)

    def trust_on_mtls(self, certificate: Path) -> None:
        """Let in who shows this certificate, and nobody else, from the next connection on."""
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        entry = ConfigEntry(
            "listener.name.mtls.ssl.truststore.location",
            str(certificate),
            incremental_operation=AlterConfigOpType.SET,
        )
        changed = ConfigResource(ConfigResource.Type.BROKER, "1", incremental_configs=[entry])
        for future in admin.incremental_alter_configs([changed]).values():
            future.result()


def _keystore(folder: Path, name: str, certificate: Path, key: Path) -> Path:
    """What a broker reads its key and certificate from."""
    file = folder / f"{name}-keystore.pem"
    file.write_text(key.read_text() + certificate.read_text())
    return file


@pytest.fixture(scope="session")
def secured_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    """A broker with a listener of each kind; tests of several files have it, in one process."""
    with running_secured_broker(tmp_path_factory.mktemp("secured")) as broker:
        yield broker


@contextmanager
def running_secured_broker(folder: Path) -> Iterator[SecuredBroker]:
    """A broker that keeps its certificates in a folder; skips the test where it can't be had."""
    if reason := why_unavailable():
        pytest.skip(reason)
    try:
        broker = SecuredBroker(folder)
    except FileNotFoundError:
        pytest.skip("no certificates: install openssl")
    with broker:
        yield broker
