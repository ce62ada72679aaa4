"""The networked store as retrieval reads it: one round trip per lookup, progress and versions kept fresh beside."""

import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Dropped
from redis.exceptions import TimeoutError as Silent
from redis.retry import Retry

from stream.errors import ConfigError, StateError, StoreError, UembError
from stream.keys import META_KEY, partition_of, watermark_key
from stream.kv.meta import decode_meta
from stream.kv.protocol import Meta
from stream.kv.redis.client import REPAIR, connection_arguments, translated
from stream.kv.urls import RedisAddress
from stream.logs import OncePerMinute

#: Between two refreshes; with the worker's heartbeat each second, what is shown is never 1.5 s old on a sound pipeline.
_REFRESH_S: Final = 0.4
_READ_TIMEOUT_S: Final = 1.0

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())


class _Seen:
    """The shared record and the watermarks as last seen; replaced by one thread, read by all."""

    def __init__(self, client: Any, address: RedisAddress) -> None:
        self.meta = Meta()
        self.raw: bytes | None = None
        self.watermarks: tuple[bytes | None, ...] = ()
        self._client = client
        self._address = address

    def refresh(self) -> None:
        """Look once, in one round trip (two when the number of partitions has become known).

        Raises:
            StateError: the shared record is damaged; the last one seen stays.
            StoreError: the server can't be read; what was last seen stays.
        """
        known = self.meta.partitions or 0
        raw, *watermarks = self._read(known)
        if raw is not None and raw != self.raw:  # removed, the last one stays: its vectors may still be served
            self.meta = decode_meta(raw, f"{META_KEY} of {self._address}", REPAIR)
            self.raw = raw
            if (self.meta.partitions or 0) != known:
                _, *watermarks = self._read(self.meta.partitions or 0)
        self.watermarks = tuple(watermarks)

    def _read(self, partitions: int) -> list[bytes | None]:
        with translated(self._address):
            found: list[bytes | None] = self._client.mget([META_KEY, *map(watermark_key, range(partitions))])
        return found


class RedisReader:
    """Retrieval's hold on the networked store; see `stream.kv.protocol.KVReader`. Open it after forking, not before.

    Args:
        address: the server.
        refresh_s: pause between looks at the shared record and the watermarks.

    Raises:
        ConfigError: the server refuses the login, or is part of a cluster.
        StoreError: the server can't be reached, or holds no store yet.
    """

    def __init__(self, address: RedisAddress, *, refresh_s: float = _REFRESH_S) -> None:
        self._address = address
        arguments = connection_arguments(address, _READ_TIMEOUT_S)
        # The library's own types know only the texts that it could decode, not bytes.
        self._client: Any = Redis(**arguments, retry=Retry(NoBackoff(), 1, (Dropped,)))
        self._seen = _Seen(self._client, address)
        try:
            self._seen.refresh()
        except UembError as exc:
            self._client.close()
            if isinstance(exc, StateError):
                raise StoreError(str(exc)) from exc
            raise
        if self._seen.raw is None:
            self._client.close()
            msg = f"no store at {address}: no {META_KEY} there; start a worker first"
            raise StoreError(msg)
        self._stop = threading.Event()
        # The thread doesn't know the reader, so that one which nobody closed can be collected; the thread then ends.
        self._thread = threading.Thread(
            target=_follow, args=(self._seen, self._stop, refresh_s), name="uemb-kv-reader", daemon=True
        )
        self._release = weakref.finalize(self, _let_go, self._stop, self._client)
        self._thread.start()

    def meta(self) -> Meta:
        """The shared record as last seen; cheap."""
        return self._seen.meta

    def get(self, lookups: Sequence[tuple[bytes, bytes]]) -> list[bytes | None]:
        """Entries for pairs of (canonical user id in UTF-8, key), in their order; one round trip.

        Raises:
            StoreError: the server can't be read.
        """
        if self._stop.is_set():
            msg = f"the store at {self._address} is closed"
            raise StoreError(msg)
        if not lookups:
            return []
        try:
            with translated(self._address):
                found: list[bytes | None] = self._read([key for _, key in lookups])
        except ConfigError as exc:  # a password that was changed meanwhile: a store that is down, to our callers
            raise StoreError(str(exc)) from exc
        return found

    def _read(self, keys: list[bytes]) -> list[bytes | None]:
        try:
            return self._client.mget(keys)  # type: ignore[no-any-return]
        except Silent:
            # A path that lets nothing through any more (a firewall that forgot us, a host that is gone) is that of all
            # connections: each would cost a timeout of its own, and readers a second.
            self._client.connection_pool.disconnect(inuse_connections=False)
            raise

    def watermark(self, user_id: bytes) -> bytes | None:
        """Watermark of the partition that owns `user_id`, as last seen; cheap."""
        watermarks = self._seen.watermarks
        return watermarks[partition_of(user_id, len(watermarks))] if watermarks else None

    def close(self) -> None:
        """Stop background work and disconnect."""
        self._stop.set()
        self._thread.join()
        self._release()


def _follow(seen: _Seen, stop: threading.Event, refresh_s: float) -> None:
    while not stop.wait(refresh_s):
        try:
            seen.refresh()
        except UembError as exc:
            if not stop.is_set():
                log.warning("the store can't be followed and is tried again, what was last seen stays: %s", exc)
        except Exception:  # a reader that has stopped following would serve under old versions for ever
            log.exception("following the store failed and is tried again")


def _let_go(stop: threading.Event, client: Any) -> None:
    stop.set()
    client.connection_pool.disconnect(inuse_connections=False)  # a lookup that is under way ends by itself
