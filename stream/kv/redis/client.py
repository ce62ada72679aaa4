"""What the Redis writer and reader share: how to connect, and every error of the client as one of ours."""

import logging
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import redis
from redis import exceptions

from stream.errors import ConfigError, StateError, StoreError, StoreRefused
from stream.kv.redis.grants import KEYS, KEYS_TO_READ
from stream.kv.redis.scripts import command_at
from stream.kv.tls_probe import speaks_tls
from stream.kv.urls import RedisAddress

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
_CLUSTER: Final = ("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN")
_EXPIRED: Final = 10  # X509_V_ERR_CERT_HAS_EXPIRED
_LOGIN: Final = ("WRONGPASS", "NOAUTH")
#: How servers, from 6 to 7 and Valkey, say which command a user may not run.
_COMMAND: Final = re.compile(r"permissions? to run the '([a-z|]{1,40})' command")
#: What they say of one within a script: where it is, and before 7.2 not which.
_IN_SCRIPT: Final = "The user executing the script can't"
_KEYS: Final = "keys"


def connection_arguments(address: RedisAddress, timeout_s: float) -> dict[str, Any]:
    """Arguments of a client, blocking or asyncio; `timeout_s` bounds the wait for each answer.

    Raises:
        ConfigError: there is no such CA file, it can't be read, or there is no certificate in it.
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
    if address.tls:
        if address.ca_file is not None and not address.ca_file.is_file():
            msg = f"the KV url names CA certificates in {address.ca_file}, which is no file"
            raise ConfigError(msg)
        try:
            ssl.create_default_context(cafile=address.ca_file)
        except ssl.SSLError as exc:
            msg = f"the KV url names CA certificates in {address.ca_file}, which holds none in PEM"
            raise ConfigError(msg) from exc
        except OSError as exc:
            msg = f"the KV url names CA certificates in {address.ca_file}, which can't be read: {exc.strerror}"
            raise ConfigError(msg) from exc
        arguments |= {
            "ssl": True,
            "ssl_check_hostname": True,
            "ssl_ca_certs": str(address.ca_file) if address.ca_file is not None else None,
        }
    return arguments


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
        return StoreRefused(f"{where} refused the login; check user and password in UEMB_KV_URL")
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


def _mistrusted(exc: BaseException, address: RedisAddress) -> str | None:
    """What certificates have to do with an error; None for nothing."""
    causes: list[BaseException] = []
    cause: BaseException | None = exc
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in causes:
        if isinstance(one, ssl.SSLCertVerificationError):
            if one.verify_code == _EXPIRED:
                return "has a certificate, or one of its CA, that has expired; renew it"
            ca = "by no CA that this system knows" if address.ca_file is None else f"not by {address.ca_file}"
            if "mismatch" in one.verify_message:
                return "has a certificate for another host; name it in UEMB_KV_URL as that does"
            return f"has a certificate that is signed {ca} ({one.verify_message}); set ssl_ca_certs in UEMB_KV_URL"
    hung_up = any(isinstance(one, ConnectionResetError) for one in causes)
    if not address.tls and hung_up and speaks_tls(address.host, address.port):
        return "speaks TLS; write rediss:// in UEMB_KV_URL"
    return None
