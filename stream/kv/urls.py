"""Key-value store URLs: where a store is, and opening it for writing or reading."""

from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from stream.errors import ConfigError
from stream.kv.base import KVReader, KVWriter

_USE: Final = "use rocksdb:///path"


class KVAddress(NamedTuple):
    """A store's kind and place."""

    scheme: str
    path: Path


def parse_kv_url(url: str) -> KVAddress:
    """Take a store URL apart; a URL may hold a password, so no error repeats it.

    Raises:
        ConfigError: an unknown scheme, or a path that is not absolute.
    """
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        msg = f"the KV url can't be read; {_USE}"
        raise ConfigError(msg) from exc
    if parts.scheme != "rocksdb":
        msg = f"KV url scheme {parts.scheme!r} is not supported by this release; {_USE}"
        raise ConfigError(msg)
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or not path.strip("/"):
        msg = "a rocksdb KV url needs an absolute path and no host: rocksdb:///path, with three slashes"
        raise ConfigError(msg)
    if parts.query or parts.fragment or "\0" in path:
        msg = "a rocksdb KV url takes a path and nothing after it: rocksdb:///path"
        raise ConfigError(msg)
    return KVAddress(parts.scheme, Path(path))


def open_writer(url: str, *, lock_patience_s: float = 10.0) -> KVWriter:
    """The store at `url` for a worker; nothing is touched before its first use.

    Args:
        url: where the store is.
        lock_patience_s: how long to wait for a partition that another process still holds.

    Raises:
        ConfigError: the URL is not one of a supported store.
    """
    address = parse_kv_url(url)
    from stream.kv.rocksdb import RocksKV  # here: a store's library loads when it is used

    return RocksKV(address.path, lock_patience_s=lock_patience_s)


def open_reader(url: str) -> KVReader:
    """The store at `url` for reading.

    Raises:
        ConfigError: the URL is not one of a supported store.
        StoreError: there is no store there yet.
    """
    address = parse_kv_url(url)
    from stream.kv.rocksdb_reader import RocksReader  # here: a store's library loads when it is used

    return RocksReader(address.path)
