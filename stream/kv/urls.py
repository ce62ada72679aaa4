"""Key-value store URLs: where a store is."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from stream.errors import ConfigError

REDIS_PORT: Final = 6379
#: What may stand behind the question mark, each a file; all but the last are for TLS and named as in the client
#: library's own URLs, where they are known to those.
PARAMETERS: Final = {
    "ssl_ca_certs": "ca_file",
    "ssl_certfile": "certificate",
    "ssl_keyfile": "key",
    "ssl_password_file": "key_password_file",
    "password_file": "password_file",
}

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
        password_file: the same in a file, which is read at each connection.
        ca_file: CA certificates (PEM) to check the server against, None for the system's.
        certificate: the client's own (PEM), None for none.
        key: its private key (PEM), None where the certificate's file has it.
        key_password_file: holds what the key is encrypted with.
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
    certificate: Path | None = None
    key: Path | None = None
    key_password_file: Path | None = None
    password_file: Path | None = None
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
    files = _files(parts.query, tls)
    if parts.password and "password_file" in files:
        msg = "a redis KV url takes a password or a password_file, not both"
        raise ConfigError(msg)
    if parts.username and not parts.password and "password_file" not in files:
        msg = f"a redis KV url with a user needs a password: {shape}, for a password alone redis://:password@host"
        raise ConfigError(msg)
    address = RedisAddress(
        tls,
        unquote(parts.hostname),
        port,
        int(db),
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
    )
    return replace(address, **files)  # type: ignore[arg-type]  # by name


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


def _files(query: str, tls: bool) -> dict[str, Path]:
    """The files that a URL names, by the attribute of `RedisAddress`."""
    found: dict[str, Path] = {}
    for name, value in parse_qsl(query, keep_blank_values=True) if query else ():
        is_known = name in PARAMETERS and PARAMETERS[name] not in found
        if not is_known or (name.startswith("ssl_") and not tls):
            msg = (
                f"a redis KV url takes no parameters but {', '.join(PARAMETERS)}, each once, and those with ssl_ "
                "with rediss: rediss://host?ssl_ca_certs=/ca.pem"
            )
            raise ConfigError(msg)
        if not Path(value).is_absolute():
            msg = f"{name} of a redis KV url must be an absolute path"
            raise ConfigError(msg)
        found[PARAMETERS[name]] = Path(value)
    if query and not found:  # what is no name=value
        msg = f"a redis KV url takes no parameters but {', '.join(PARAMETERS)}"
        raise ConfigError(msg)
    if "certificate" not in found and {"key", "key_password_file"} & set(found):
        msg = "ssl_keyfile and ssl_password_file of a redis KV url are of its ssl_certfile; name that, too"
        raise ConfigError(msg)
    return found
