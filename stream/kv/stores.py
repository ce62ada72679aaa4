"""Opening the key-value store that a URL names, for writing or for reading."""

import errno
import os

from stream.errors import ConfigError
from stream.kv.protocol import KVReader, KVWriter
from stream.kv.rocksdb.layout import is_of_store
from stream.kv.urls import MemoryAddress, RedisAddress, parse_kv_url
from stream.security.permissions import close_folder


def open_writer(url: str, *, lock_patience_s: float = 10.0) -> KVWriter:
    """The store at `url` for a worker; nothing is touched before its first use.

    Args:
        url: where the store is.
        lock_patience_s: how long to wait for a partition that another process still holds (RocksDB only).

    Raises:
        ConfigError: the URL is not one of a supported store.
        StoreError: no store in this process's memory has the name in the URL.
    """
    address = parse_kv_url(url)
    # Imported here: a store's library loads when it is used.
    if isinstance(address, RedisAddress) and address.seeds:
        from stream.kv.redis.cluster_writer import ClusterKV

        return ClusterKV(address)
    if isinstance(address, RedisAddress):
        from stream.kv.redis.writer import RedisKV

        return RedisKV(address)
    if isinstance(address, MemoryAddress):
        from stream.kv.memory import MemoryWriter, living_store

        return MemoryWriter(living_store(address.name))
    from stream.kv.rocksdb.writer import RocksKV

    return RocksKV(address.path, lock_patience_s=lock_patience_s)


def check_place(url: str, group: str | None = None) -> None:
    """Make the folder of a store that is one: a place that can't be written is no store that is away for a while.

    It is closed to other users, whatever it was before.

    Args:
        url: where the store is.
        group: whose members may read it, too.

    Raises:
        ConfigError: it can't be made, or not written to, or it is in memory; or there is no such group.
    """
    address = parse_kv_url(url)
    if isinstance(address, RedisAddress):
        return
    if isinstance(address, MemoryAddress):
        msg = (
            "UEMB_KV_URL: a store in a worker's memory has no readers, for no other process can open it; "
            "use rocksdb:///path or redis://host:port/db"
        )
        raise ConfigError(msg)
    try:
        close_folder(address.path, is_of_store, group)
        if not os.access(address.path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except LookupError as exc:
        msg = f"UEMB_KV_GROUP: there is no group {group} on this host; make it, or name another"
        raise ConfigError(msg) from exc
    except OSError as exc:
        msg = f"UEMB_KV_URL: {address.path} can't be used ({exc.strerror})"
        raise ConfigError(msg) from exc


def open_reader(url: str) -> KVReader:
    """The store at `url` for reading.

    Raises:
        ConfigError: the URL is not one of a supported store, or its login is wrong.
        StoreError: there is no store there yet, or it can't be reached.
    """
    address = parse_kv_url(url)
    # Imported here: a store's library loads when it is used.
    if isinstance(address, RedisAddress) and address.seeds:
        from stream.kv.redis.cluster_reader import ClusterReader

        return ClusterReader(address)
    if isinstance(address, RedisAddress):
        from stream.kv.redis.reader import RedisReader

        return RedisReader(address)
    if isinstance(address, MemoryAddress):
        from stream.kv.memory import MemoryReader, living_store

        return MemoryReader(living_store(address.name))
    from stream.kv.rocksdb.reader import RocksReader

    return RocksReader(address.path)
