"""When certificates end, as their DER (X.509, RFC 5280) has it: Python's ssl tells that of verified peers alone."""

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

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
