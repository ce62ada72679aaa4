"""The asyncio client, of workers and of clusters: each connection is made with the certificates that there are then."""

from collections.abc import Mapping
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Dropped


def async_client(arguments: Mapping[str, Any]) -> Any:
    """A client; `arguments` are those of `stream.kv.redis.client.connection_arguments`."""
    client = Redis(**arguments, retry=Retry(NoBackoff(), 1, (Dropped,)))
    if arguments.get("ssl"):
        client.connection_pool.connection_class = _FreshConnection
    return client


class _FreshConnection(SSLConnection):
    """The library reads certificates once a connection, also when that connects again (redis-py 8.1)."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        return super()._connection_arguments()
