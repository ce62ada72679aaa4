"""Key-value store URLs: where a store is."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from stream.errors import ConfigError

REDIS_PORT: Final = 6379
CA_PARAMETER: Final = "ssl_ca_certs"

_USE: Final = "use rocksdb:///path or redis://host:port/db, for a cluster redis+cluster://host:port"
_CLUSTER: Final = "+cluster"
_MASK: Final = "**********"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RocksAddress(NamedTuple):
    """Where an embedded store is."""

    scheme: str
    path: Path


class MemoryAddress(NamedTuple):
    """Which store of this process is meant; see `stream.kv.memory.MemoryStore`."""

    name: str


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a Redis or Valkey server is, and how to log in.

    Attributes:
        tls: whether the connection is encrypted and the server's certificate checked.
        host: name or address.
        port: its TCP port.
        db: number of the database on it.
        username: None for the server's default user.
        password: None for a server without one; never shown.
        ca_file: CA certificates (PEM) to check the server against, None for the system's.
        seeds: name and port of some servers of a cluster, which tell the others; empty for a server of its own. Host
            and port above are then those of the first.
    """

    tls: bool
    host: str
    port: int = REDIS_PORT
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    seeds: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        """The URL without login, for errors and logs."""
        scheme = "rediss" if self.tls else "redis"
        if self.seeds:
            return f"{scheme}{_CLUSTER}://{','.join(_shown(host, port) for host, port in self.seeds)}"
        return f"{scheme}://{_shown(self.host, self.port)}/{self.db}"


KVAddress = RocksAddress | RedisAddress | MemoryAddress


def parse_kv_url(url: str) -> KVAddress:
    """Take a store URL apart; a URL may hold a password, so no error repeats it.

    Raises:
        ConfigError: an unknown scheme, or something in the URL that its store has no use for.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        msg = f"the KV url can't be read; {_USE}"
        raise ConfigError(msg) from None
    if parts.scheme == "rocksdb":
        return _rocksdb(parts)
    if parts.scheme in ("redis", "rediss"):
        return _redis(parts)
    if parts.scheme in (f"redis{_CLUSTER}", f"rediss{_CLUSTER}"):
        return _cluster(parts)
    if parts.scheme == "memory":
        return _memory(parts)
    msg = f"KV url scheme {parts.scheme!r} is not supported by this release; {_USE}"
    raise ConfigError(msg)


def masked_kv_url(url: str) -> str:
    """A valid store URL with its password, if any, replaced by stars.

    >>> masked_kv_url("redis://ali:secret@host:6379/0")
    'redis://ali:**********@host:6379/0'
    """
    parts = urlsplit(url)
    if parts.password is None:
        return url
    login, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{login.partition(':')[0]}:{_MASK}@{place}").geturl()


def _rocksdb(parts: SplitResult) -> RocksAddress:
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or not path.strip("/"):
        msg = "a rocksdb KV url needs an absolute path and no host: rocksdb:///path, with three slashes"
        raise ConfigError(msg)
    if parts.query or parts.fragment or "\0" in path:
        msg = "a rocksdb KV url takes a path and nothing after it: rocksdb:///path"
        raise ConfigError(msg)
    return RocksAddress(parts.scheme, Path(path))


def _memory(parts: SplitResult) -> MemoryAddress:
    if not _NAME.fullmatch(parts.netloc) or parts.path or parts.query or parts.fragment:
        msg = "a memory KV url is memory://name, the url of a MemoryStore in the same process"
        raise ConfigError(msg)
    return MemoryAddress(parts.netloc)


def _redis(parts: SplitResult) -> RedisAddress:
    tls = parts.scheme == "rediss"
    shape = f"{parts.scheme}://[user:password@]host[:port][/db]"
    try:
        port = REDIS_PORT if parts.port is None else parts.port
    except ValueError:
        port = 0
    # Also what a password leaves behind whose special characters are not percent-encoded.
    if not parts.hostname or not port or parts.fragment:
        msg = f"a redis KV url needs a host, and a port from 1 to 65535: {shape}, percent-encode the password"
        raise ConfigError(msg)
    db = parts.path.removeprefix("/") or "0"
    if not (db.isascii() and db.isdigit() and len(db) < 10):
        msg = f"a redis KV url ends in the number of a database: {shape}"
        raise ConfigError(msg)
    if parts.username and not parts.password:
        msg = f"a redis KV url with a user needs a password: {shape}, for a password alone redis://:password@host"
        raise ConfigError(msg)
    return RedisAddress(
        tls,
        unquote(parts.hostname),
        port,
        int(db),
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        _ca_file(parts.query, tls),
    )


def _cluster(parts: SplitResult) -> RedisAddress:
    """Each of the servers as in the URL of a single one; the login, and TLS, are the same for all."""
    if parts.path not in ("", "/", "/0"):
        msg = f"a cluster has no numbered databases: {parts.scheme}://[user:password@]host[:port][,host[:port]…]"
        raise ConfigError(msg)
    login, at, hosts = parts.netloc.rpartition("@")
    scheme = parts.scheme.removesuffix(_CLUSTER)
    found = [_redis(parts._replace(scheme=scheme, netloc=f"{login}{at}{host}", path="")) for host in hosts.split(",")]
    return replace(found[0], seeds=tuple((address.host, address.port) for address in found))


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ca_file(query: str, tls: bool) -> Path | None:
    """The one parameter that a URL may have, named as in the client library's own URLs."""
    if not query:
        return None
    pairs = parse_qsl(query, keep_blank_values=True)
    if not tls or len(pairs) != 1 or pairs[0][0] != CA_PARAMETER:
        msg = (
            f"a redis KV url takes no parameters but {CA_PARAMETER}, with rediss: rediss://host?{CA_PARAMETER}=/ca.pem"
        )
        raise ConfigError(msg)
    path = Path(pairs[0][1])
    if not path.is_absolute():
        msg = f"{CA_PARAMETER} of a redis KV url must be an absolute path"
        raise ConfigError(msg)
    return path
