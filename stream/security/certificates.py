"""When certificates end, as their DER (X.509, RFC 5280) has it: Python's ssl tells that of verified peers alone."""

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from stream.errors import ConfigError
from stream.findings import Finding, failed, ok, warning

#: A certificate that ends sooner is worth a warning.
RENEW_DAYS: Final = 21
_UTC_TIME: Final = 0x17
_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_END: Final = "-----END CERTIFICATE-----"


def end_of(certificate: bytes) -> datetime:
    """The last moment at which a certificate (DER) is valid.

    Raises:
        ValueError: it is none.
    """
    try:
        _, fields, _ = _element(_element(certificate)[1])
        while fields:
            tag, value, fields = _element(fields)
            if tag == _VERSION:
                continue
            # serial number, algorithm, issuer, and then both ends of the validity: the first sequence of two times
            if tag == _SEQUENCE and value and value[0] in (_UTC_TIME, _UTC_TIME + 1):
                kind, text, _ = _element(_element(value)[2])
                form = "%y%m%d%H%M%SZ" if kind == _UTC_TIME else "%Y%m%d%H%M%SZ"
                return datetime.strptime(text.decode(), form).replace(tzinfo=UTC)
    except IndexError:
        pass
    msg = "no certificate"
    raise ValueError(msg)


def end_of_file(path: Path) -> datetime:
    """The same of the first certificate in a file (PEM), which is the one that is shown.

    Raises:
        ValueError: there is none in it.
        OSError: it can't be read.
    """
    _, begin, rest = path.read_text(errors="replace").partition(_BEGIN)
    return end_of(ssl.PEM_cert_to_DER_cert(f"{begin}{rest.partition(_END)[0]}{_END}"))


def own_validity(path: Path, setting: str) -> Finding:
    """How long the certificate that a client shows is valid yet.

    Raises:
        ConfigError: there is none in the file.
        OSError: it can't be read.
    """
    try:
        end = end_of_file(path)
    except ValueError as exc:
        msg = f"no certificate in PEM is in {setting} {path}; name a file with one"
        raise ConfigError(msg) from exc
    return validity(end, f"{setting} {path}", "have it renewed")


def validity(end: datetime, what: str, todo: str, about: str = "") -> Finding:
    """How long a certificate is valid yet."""
    days = (end - datetime.now(UTC)).days
    if days < 0:
        return failed(f"{what} ended on {end:%Y-%m-%d}", todo, about)
    detail = f"{what} is valid for {days} more day{'s'[: days != 1]}, until {end:%Y-%m-%d}"
    return ok(detail, about) if days >= RENEW_DAYS else warning(detail, todo, about)


def has_ended(path: Path) -> bool:
    """Whether the certificate that is shown from a file has expired; not known is no."""
    try:
        return end_of_file(path) < datetime.now(UTC)
    except (OSError, ValueError):
        return False


def _element(data: bytes) -> tuple[int, bytes, bytes]:
    """Tag and content of the first element of `data`, and what follows it; ``IndexError`` for nothing."""
    size, start = data[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(data[2:start])
    return data[0], data[start : start + size], data[start + size :]
