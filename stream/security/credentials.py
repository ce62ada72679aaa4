"""Secrets in files, and certificates: read anew when they are replaced, named by their setting when they can't be."""

import logging
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from stream.errors import ConfigError
from stream.logs import OncePerMinute

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())

_EXPIRED: Final = 10  # X509_V_ERR_CERT_HAS_EXPIRED
_OTHER_HOST: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
#: What servers say of the client's certificate, after the client has shaken hands (RFC 8446, 6.2).
_ABOUT_CLIENTS: Final = (
    "alert certificate required",
    "alert unknown ca",
    "alert certificate unknown",
    "alert bad certificate",
    "alert certificate expired",
    "alert decrypt error",
)


def read_secret(path: Path, setting: str) -> str:
    """The secret in a file, without the end of its line.

    Raises:
        ConfigError: there is none, or it can't be read.
    """
    try:
        secret = path.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as exc:
        msg = f"{setting}: {path} can't be read ({exc.strerror}); name a file with the secret that this user may read"
        raise ConfigError(msg) from exc
    except UnicodeDecodeError as exc:
        msg = f"{setting}: {path} is no text in UTF-8"
        raise ConfigError(msg) from exc
    if not secret:
        msg = f"{setting}: {path} is empty; write the secret into it"
        raise ConfigError(msg)
    return secret


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What one side of a connection checks the other against, and shows of itself.

    Attributes:
        ca: CA certificates (PEM); None for those of the system.
        certificate: the client's own (PEM); None for none.
        key: its private key (PEM); None: it is in the same file.
        key_password: what the key is encrypted with.
        key_password_file: the same in a file.
        settings: how errors name each of these.
    """

    ca: Path | None
    certificate: Path | None = None
    key: Path | None = None
    key_password: str | None = field(default=None, repr=False)
    key_password_file: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def context(self) -> ssl.SSLContext:
        """Read them.

        Raises:
            ConfigError: one of them can't be used.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as exc:  # ssl.SSLError too
            what = "no certificate in PEM is in it"
            raise self._unusable(exc, what, ca=self.ca) from exc
        if self.certificate is None:
            return context
        password = self.key_password or ""
        if self.key_password_file is not None:
            password = read_secret(self.key_password_file, self.settings["key_password_file"])
        try:
            context.load_cert_chain(self.certificate, self.key, lambda: password)
        except ssl.SSLError as exc:
            wrong = self.settings["key_password_file" if self.key_password_file is not None else "key_password"]
            what = f"no certificate and key in PEM that belong together, or {wrong} is wrong"
            raise self._unusable(exc, what, certificate=self.certificate) from exc
        except OSError as exc:
            there = self.key is None or self.key.is_file()
            raise self._unusable(exc, **({"certificate": self.certificate} if there else {"key": self.key})) from exc
        return context

    def marks(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes when one of the files is replaced."""
        paths = (self.ca, self.certificate, self.key, self.key_password_file)
        return tuple(None if path is None else _mark(path) for path in paths)

    def _unusable(self, exc: OSError, what: str = "", **file: Path | None) -> ConfigError:
        ((name, path),) = file.items()
        why = what if isinstance(exc, ssl.SSLError) else exc.strerror
        return ConfigError(f"{self.settings[name]} {path} can't be used: {why}")


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class FreshContext(ssl.SSLContext):
    """A client's context that reads its files again, before a connection, when they were replaced.

    Those that can't be used, as when the certificate is new and the key is not yet, leave it as it was.

    Attributes:
        files: what it reads.

    Raises:
        ConfigError: a file can't be used at the first time.
    """

    def __new__(cls, files: TlsFiles) -> "FreshContext":  # noqa: D102 - the class says it
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._marks = files.marks()
        self._context = files.context()
        self._lock = threading.Lock()

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        """As of any context."""
        return self._fresh().wrap_socket(*args, **options)

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """As of any context."""
        return self._fresh().wrap_bio(*args, **options)

    def _fresh(self) -> ssl.SSLContext:
        with self._lock:
            if (marks := self.files.marks()) != self._marks:
                try:
                    self._context, self._marks = self.files.context(), marks
                except ConfigError as exc:
                    log.warning("certificates were replaced, and those read before stay: %s", exc)
            return self._context


def server_fault(exc: ssl.SSLCertVerificationError, ca: Path | None) -> str:
    """What is wrong with a server's certificate: ``expired``, ``host``, or by whom it is not signed."""
    if exc.verify_code == _EXPIRED:
        return "expired"
    if exc.verify_code in _OTHER_HOST:
        return "host"
    return "by no CA that this system knows" if ca is None else f"not by {ca}"


def client_fault(exc: ssl.SSLError) -> str | None:
    """What a server has against the client's certificate, in its words; None where it is about something else."""
    words = (exc.reason or "").lower().replace("_", " ")
    return words if any(alert in words for alert in _ABOUT_CLIENTS) else None
