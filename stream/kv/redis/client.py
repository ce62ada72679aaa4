"""What the Redis writer and reader share: how to connect, and every error of the client as one of ours."""

import logging
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis
from redis import CredentialProvider, exceptions

from stream.errors import ConfigError, StateError, StoreError, StoreRefused
from stream.kv.redis.grants import KEYS, KEYS_TO_READ
from stream.kv.redis.scripts import command_at
from stream.kv.urls import RedisAddress
from stream.security.certificates import has_ended
from stream.security.credentials import TlsFiles, client_fault, read_secret, server_fault
from stream.security.tls_probe import speaks_tls

log = logging.getLogger(__name__)

#: What to do about a damaged shared record.
REPAIR: Final = "stop the workers, remove the keys uemb:* and start them again, they rebuild the store"
CONNECT_TIMEOUT_S: Final = 1.0
#: A client that doesn't tell its name, which servers before 7.2 don't want to know; in redis-py before 7.2 and since.
_UNNAMED: Final[Mapping[str, None]] = (
    {"driver_info": None} if hasattr(redis, "DriverInfo") else {"lib_name": None, "lib_version": None}
)

READ_ONLY: Final = "is a read-only replica: name its primary in UEMB_KV_URL"
IN_CLUSTER: Final = "is part of a cluster: write redis+cluster://host:port in UEMB_KV_URL"
NO_CLUSTER: Final = "is not part of a cluster: write redis://host:port/db in UEMB_KV_URL"

#: What a server means by the first word of an error that passes by itself, or once somebody has acted.
_AWAY: Final = {
    "OOM": "is out of memory: raise its maxmemory, or give it more",
    "LOADING": "is still loading its data",
    "BUSY": "is busy with another client's script",
    "READONLY": READ_ONLY,
    "MASTERDOWN": "is a replica that has lost its primary",
    "MISCONF": "takes no writes because it can't save them to disk: see its log",
    "NOREPLICAS": "takes no writes while too few replicas follow it",
    "CLUSTERDOWN": "has slots that no server serves: see CLUSTER INFO",
    "MOVED": "is moving slots faster than they can be followed",
    "ASK": "is moving slots faster than they can be followed",
    "TRYAGAIN": "is moving slots faster than they can be followed",
}
#: First words of errors that the client takes away, for it has a class for them.
_CODES: Final[Mapping[type[Exception], str]] = {
    exceptions.OutOfMemoryError: "OOM",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.ClusterCrossSlotError: "CROSSSLOT",
    exceptions.MasterDownError: "MASTERDOWN",
}
_FILE: Final = "password_file in UEMB_KV_URL"
_TLS_SETTINGS: Final = {
    "ca": "ssl_ca_certs in UEMB_KV_URL",
    "certificate": "ssl_certfile in UEMB_KV_URL",
    "key": "ssl_keyfile in UEMB_KV_URL",
    "key_password": "its ssl_password_file",
    "key_password_file": "ssl_password_file in UEMB_KV_URL",
}
_CLUSTER: Final = ("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN")
_LOGIN: Final = ("WRONGPASS", "NOAUTH")
#: How servers, from 6 to 7 and Valkey, say which command a user may not run.
_COMMAND: Final = re.compile(r"permissions? to run the '([a-z|]{1,40})' command")
#: What they say of one within a script: where it is, and before 7.2 not which.
_IN_SCRIPT: Final = "The user executing the script can't"
_KEYS: Final = "keys"


def connection_arguments(address: RedisAddress, timeout_s: float) -> dict[str, Any]:
    """Arguments of a client, blocking or asyncio; `timeout_s` bounds the wait for each answer.

    Raises:
        ConfigError: a file that the address names can't be used.
    """
    arguments: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "db": address.db,
        "username": address.username,
        "password": address.password,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": max(CONNECT_TIMEOUT_S, timeout_s),  # who waits for answers can wait for that as well
        "protocol": 2,  # all that is needed, and no more handshake than every server and proxy answers
        **_UNNAMED,
        "decode_responses": False,
    }
    if address.password_file is not None:
        read_secret(address.password_file, _FILE)
        del arguments["username"], arguments["password"]
        arguments["credential_provider"] = _PasswordInFile(address.username, address.password_file)
    if address.tls:
        files = tls_files(address)
        files.context()
        arguments |= {
            "ssl": True,
            "ssl_check_hostname": True,
            "ssl_ca_certs": _text(files.ca),
            "ssl_certfile": _text(files.certificate),
            "ssl_keyfile": _text(files.key),
        }
        if files.key_password_file is not None:
            arguments["ssl_password"] = read_secret(files.key_password_file, files.settings["key_password_file"])
    return arguments


def tls_files(address: RedisAddress) -> TlsFiles:
    """What a connection in TLS checks the server against, and shows it."""
    own = (address.certificate, address.key, None, address.key_password_file)
    return TlsFiles(address.ca_file, *own, settings=_TLS_SETTINGS)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


class _PasswordInFile(CredentialProvider):
    """The client library asks it before each login."""

    def __init__(self, username: str | None, file: Path) -> None:
        self._username = username
        self._file = file

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Login as the library takes it.

        Raises:
            ConnectionError: the library's; the file that was there can't be read: somebody is about to replace it.
        """
        try:
            password = read_secret(self._file, _FILE)
        except ConfigError as exc:
            raise exceptions.ConnectionError(str(exc)) from exc
        return (password,) if self._username is None else (self._username, password)


def warn_of_eviction(info: Mapping[str, Any], where: str) -> None:
    """Warn of a server that may drop keys when memory is short; `info` is what it tells of itself."""
    if (risk := eviction_risk(info, where)) is not None:
        log.log(logging.INFO if _policy(info) is None else logging.WARNING, "%s", risk)


def eviction_risk(info: Mapping[str, Any], where: str) -> str | None:
    """Why a server may drop keys when memory is short, and what to do; None where it won't."""
    policy = _policy(info)
    if policy is None:
        why = "(+info is not granted, or it is hidden)"
        return f"{where} doesn't tell its maxmemory-policy {why}; make sure that it is noeviction"
    if policy == "noeviction":
        return None
    return (
        f"{where} has maxmemory-policy {policy} and may drop vectors and claims when memory (maxmemory "
        f"{info.get('maxmemory_human', 'unknown')}) is short; set maxmemory-policy noeviction"
    )


def _policy(info: Mapping[str, Any]) -> Any:
    return info.get("maxmemory_policy")


def check_kind(info: Mapping[str, Any], address: RedisAddress) -> None:
    """Refuse a server on which a store of this address can't be.

    Raises:
        StoreError: it is a replica.
        ConfigError: it is part of a cluster.
    """
    if info.get("role") in ("slave", "replica"):
        msg = f"the store at {address} {READ_ONLY}"
        raise StoreError(msg)
    if info.get("redis_mode") == "cluster":
        msg = f"the store at {address} {IN_CLUSTER}"
        raise ConfigError(msg)


@contextmanager
def translated(address: RedisAddress) -> Iterator[None]:
    """Turn what the client raises into our errors, without login and payload."""
    try:
        yield
    except exceptions.RedisError as exc:
        raise _ours(exc, address) from exc
    except OSError as exc:
        msg = f"the store at {address} can't be reached: {exc.strerror or type(exc).__name__}"
        raise StoreError(msg) from exc


def _ours(exc: exceptions.RedisError, address: RedisAddress) -> ConfigError | StateError | StoreError:
    where = f"the store at {address}"
    # Servers before 7 wrap what fails within a script: "Error running script (…): -OOM command not allowed …".
    text = (str(exc).splitlines() or [""])[0]
    words = {_CODES.get(type(exc)), *(word.lstrip("-") for word in text.split())}
    if isinstance(exc, exceptions.TimeoutError):
        return StoreError(f"{where} did not answer in time")
    if isinstance(exc, exceptions.AuthenticationError | exceptions.AuthenticationWrongNumberOfArgsError) or (
        words.intersection(_LOGIN)
    ):
        return StoreRefused(f"{where} refused the login; check user and {_password(address)} in UEMB_KV_URL")
    if "NOPERM" in words or _IN_SCRIPT in text:
        return _not_allowed(text, where)
    if "cluster support disabled" in text:
        return ConfigError(f"{where} {NO_CLUSTER}")
    if not address.seeds and words.intersection(_CLUSTER):
        return ConfigError(f"{where} {IN_CLUSTER}")
    if "DB index is out of range" in text:
        return ConfigError(f"{where} has no database {address.db}; correct the number in UEMB_KV_URL")
    if "WRONGTYPE" in words:
        return StateError(f"{where} holds something that is no string under a key of ours; remove or move it")
    for word, meaning in _AWAY.items():
        if word in words:
            return StoreError(f"{where} {meaning}")
    if cause := _mistrusted(exc, address):
        return ConfigError(f"{where} {cause}")
    if isinstance(exc, exceptions.ConnectionError):
        return StoreError(f"{where} can't be reached: {text.rstrip('.')}")
    # The server repeats arguments of a command that it doesn't know.
    return StoreError(f"{where} answered with an error: {text.partition(', with args')[0][:160]}")


def _not_allowed(text: str, where: str) -> StoreRefused:
    """What an access list lacks."""
    if (named := _COMMAND.search(text)) is not None:
        command: str | None = named[1]
    else:
        command = None if _KEYS in text else command_at(text)
    if command is None:
        what, missing = "use our keys", f"{KEYS}, to who only reads {KEYS_TO_READ}"
    else:
        what, missing = f"run {command}", f"+{command}"
    return StoreRefused(f"{where} does not let its user {what}; grant {missing} (see `uemb acl --format redis-acl`)")


def _password(address: RedisAddress) -> str:
    return "password" if address.password_file is None else "password_file"


def _mistrusted(exc: BaseException, address: RedisAddress) -> str | None:
    """What certificates have to do with an error; None for nothing."""
    causes: list[BaseException] = []
    cause: BaseException | None = exc
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in causes:
        if isinstance(one, ssl.SSLCertVerificationError):
            fault = server_fault(one, address.ca_file)
            if fault == "expired":
                return "has a certificate, or one of its CA, that has expired; renew it"
            if fault == "host":
                return "has a certificate for another host; name it in UEMB_KV_URL as that does"
            return f"has a certificate that is signed {fault} ({one.verify_message}); set ssl_ca_certs in UEMB_KV_URL"
        if isinstance(one, ssl.SSLError) and (wrong := client_fault(one)) is not None:
            return _refused_certificate(address, wrong)
    if not any(isinstance(one, ConnectionResetError | BrokenPipeError | ssl.SSLEOFError) for one in causes):
        return None
    if address.tls:  # what was sent crossed what the server said
        wrong = _last_words(address)
        return None if wrong is None else _refused_certificate(address, wrong)
    return "speaks TLS; write rediss:// in UEMB_KV_URL" if speaks_tls(address.host, address.port) else None


def _refused_certificate(address: RedisAddress, said: str) -> str:
    if address.certificate is None:
        return "demands a client's certificate; set ssl_certfile and ssl_keyfile in UEMB_KV_URL"
    if has_ended(address.certificate):
        return "refuses the certificate in ssl_certfile of UEMB_KV_URL, which has expired; renew it"
    return f"refuses the certificate in ssl_certfile of UEMB_KV_URL ({said}); set one that is signed by its CA"


def _last_words(address: RedisAddress) -> str | None:
    """What a server has against the client's certificate, asked anew, with nothing sent to it."""
    try:
        with (
            socket.create_connection((address.host, address.port), CONNECT_TIMEOUT_S) as connection,
            tls_files(address).context().wrap_socket(connection, server_hostname=address.host) as secured,
        ):
            secured.recv(1)
    except ssl.SSLError as exc:
        return client_fault(exc)
    except (OSError, ConfigError):
        return None
    return None
