"""A real Kafka with listeners for each way of securing one, the standard authorizer, and certificates of its own."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

from kafka_broker import KafkaBroker

#: Users of PLAIN and their passwords; `app` may do nothing until it is granted.
PASSWORDS: Final = {"admin": "admin-secret-1", "app": "app-secret-2"}
KEY_PASSWORD: Final = "key-secret-3"
LISTENERS: Final = {"SSL": "SSL", "MTLS": "SSL", "SASL": "SASL_PLAINTEXT", "SASLSSL": "SASL_SSL"}


class SecuredBroker(KafkaBroker):
    """PLAINTEXT may do all; `at` has the addresses of SSL, MTLS (demands a client's certificate), SASL and SASLSSL.

    Attributes:
        ca: certificate to check the broker against.
        client: certificate that MTLS trusts; `client_key` is encrypted with `KEY_PASSWORD`.
    """

    def __init__(self, folder: Path) -> None:
        self.ca, server_key = make_certificate(folder, "server")
        self.client, self.client_key = make_certificate(folder, "client", KEY_PASSWORD)
        keystore = folder / "keystore.pem"
        keystore.write_text(server_key.read_text() + self.ca.read_text())
        users = " ".join(f'user_{name}="{password}"' for name, password in PASSWORDS.items())
        login = f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
        super().__init__(
            {
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(keystore),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(self.client),
                "listener.name.mtls.ssl.client.auth": "required",
                "sasl.enabled.mechanisms": "PLAIN",
                "listener.name.sasl.plain.sasl.jaas.config": login,
                "listener.name.saslssl.plain.sasl.jaas.config": login,
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:ANONYMOUS;User:admin;User:CN=client",
            },
            listeners=LISTENERS,
        )


def make_certificate(folder: Path, name: str, password: str = "") -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that is signed by itself, and its key, encrypted if there is a password.

    Raises:
        FileNotFoundError: there is no openssl.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        raise FileNotFoundError("openssl")
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    secret = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    command = [openssl, "req", "-x509", *words, *names, *secret, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return certificate, key
