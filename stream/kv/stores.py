"""Opening the key-value store that a URL names, for writing or for reading."""

from stream.kv.base import KVReader, KVWriter
from stream.kv.urls import RedisAddress, parse_kv_url


def open_writer(url: str, *, lock_patience_s: float = 10.0) -> KVWriter:
    """The store at `url` for a worker; nothing is touched before its first use.

    Args:
        url: where the store is.
        lock_patience_s: how long to wait for a partition that another process still holds (RocksDB only).

    Raises:
        ConfigError: the URL is not one of a supported store.
    """
    address = parse_kv_url(url)
    # Imported here: a store's library loads when it is used.
    if isinstance(address, RedisAddress) and address.seeds:
        from stream.kv.redis_cluster import ClusterKV

        return ClusterKV(address)
    if isinstance(address, RedisAddress):
        from stream.kv.redis import RedisKV

        return RedisKV(address)
    from stream.kv.rocksdb import RocksKV

    return RocksKV(address.path, lock_patience_s=lock_patience_s)


def open_reader(url: str) -> KVReader:
    """The store at `url` for reading.

    Raises:
        ConfigError: the URL is not one of a supported store, or its login is wrong.
        StoreError: there is no store there yet, or it can't be reached.
    """
    address = parse_kv_url(url)
    # Imported here: a store's library loads when it is used.
    if isinstance(address, RedisAddress) and address.seeds:
        from stream.kv.redis_cluster_reader import ClusterReader

        return ClusterReader(address)
    if isinstance(address, RedisAddress):
        from stream.kv.redis_reader import RedisReader

        return RedisReader(address)
    from stream.kv.rocksdb_reader import RocksReader

    return RocksReader(address.path)
