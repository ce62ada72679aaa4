"""Whether a port speaks TLS: what servers that do hang up on, those that don't never answer."""

import socket
import ssl
from typing import Final

_PROBE_S: Final = 1.0


def speaks_tls(host: str, port: int) -> bool:
    """Shake hands with whoever it is, and hang up; nothing else is sent."""
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), _PROBE_S) as connection:
            anyone.wrap_socket(connection).close()
    except OSError:
        return False
    return True
