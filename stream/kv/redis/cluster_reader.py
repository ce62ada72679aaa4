"""A cluster as retrieval reads it: one round trip per server, those that are down are left out and said to be."""

import asyncio
import logging
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Final

from redis.exceptions import NoPermissionError, RedisError

from stream.errors import ConfigError, StateError, StoreError, StorePartlyDown, UembError
from stream.keys import META_KEY, partition_of, watermark_key
from stream.kv.meta import decode_meta
from stream.kv.protocol import Meta
from stream.kv.redis.client import REPAIR, translated
from stream.kv.redis.router import Call, Router
from stream.kv.redis.slots import Address
from stream.kv.urls import RedisAddress
from stream.logs import OncePerMinute

_REFRESH_S: Final = 0.4
#: Shorter than with a single server: until it is over nobody knows that one of several hangs.
_READ_TIMEOUT_S: Final = 0.3
#: Far longer than any lookup takes: what has no answer by then was asked of a thread that had ended.
_ANSWER_S: Final = 10.0
_CLOSE_S: Final = 5.0

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())


class _Seen:
    """What the reader's thread keeps fresh, and the connections, which are that thread's; read by all."""

    def __init__(self, address: RedisAddress) -> None:
        self.address = address
        self.meta = Meta()
        self.raw: bytes | None = None
        self.watermarks: tuple[bytes | None, ...] = ()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.router: Router | None = None
        self.stop: asyncio.Event | None = None
        self.closed = threading.Event()
        self.opened = threading.Event()
        self.failed: UembError | None = None

    async def refresh(self, router: Router) -> None:
        """Look once at the shared record, the watermarks, and every server, also those that were down.

        Raises:
            ConfigError: the login is refused.
            StateError: the shared record is damaged; the last one seen stays.
            StoreError: the shared record can't be read; what can't be stays as it was last seen.
        """
        with translated(self.address):
            pinged = await asyncio.gather(*(_ping(router, primary.place) for primary in await router.primaries()))
            keys = [META_KEY, *map(watermark_key, range(self.meta.partitions or 0))]
            raw, *watermarks = await router.run([Call("GET", key) for key in keys], hasty=True)
            if isinstance(raw, bytes) and raw != self.raw:  # removed, the last one stays: its vectors may be served yet
                self.meta = decode_meta(raw, f"{META_KEY} of {self.address}", REPAIR)
                self.raw = raw
                if (self.meta.partitions or 0) != len(watermarks):
                    calls = [Call("GET", watermark_key(n)) for n in range(self.meta.partitions or 0)]
                    watermarks = await router.run(calls, hasty=True)
            before = self.watermarks + (None,) * len(watermarks)
            self.watermarks = tuple(
                before[n] if isinstance(watermark, Exception) else watermark for n, watermark in enumerate(watermarks)
            )
            for error in (raw, *pinged):  # a server that may not be asked how it is would stay down when it is back
                if isinstance(error, Exception):
                    raise error


class ClusterReader:
    """Retrieval's hold on a cluster; see `stream.kv.protocol.KVReader`. Open it after forking, not before.

    Args:
        address: the cluster.
        refresh_s: pause between looks at the shared record and the watermarks.

    Raises:
        ConfigError: the login is refused, or the address is of no cluster.
        StoreError: the cluster can't be reached, or holds no store yet.
    """

    def __init__(self, address: RedisAddress, *, refresh_s: float = _REFRESH_S) -> None:
        self._seen = _Seen(address)
        # The thread doesn't know the reader, so that one which nobody closed can be collected; the thread then ends.
        self._thread = threading.Thread(target=_serve, args=(self._seen, refresh_s), name="uemb-kv-reader", daemon=True)
        self._thread.start()
        self._seen.opened.wait()
        self._release = weakref.finalize(self, _let_go, self._seen)
        if self._seen.failed is not None:
            self.close()
            raise self._seen.failed

    def meta(self) -> Meta:
        """The shared record as last seen; cheap."""
        return self._seen.meta

    def get(self, lookups: Sequence[tuple[bytes, bytes]]) -> list[bytes | None]:
        """Entries for pairs of (canonical user id in UTF-8, key), in their order; one round trip per server.

        A server that failed is left alone until the background has found it well again.

        Raises:
            StorePartlyDown: servers can't be read, of some or all of the entries; it has what the others gave. Servers
                are no partitions: that none of these entries was read says nothing about others.
            StoreError: the reader is closed, or its login is not good any more.
        """
        seen, loop, router = self._seen, self._seen.loop, self._seen.router
        if seen.closed.is_set() or loop is None or router is None:
            raise _closed(seen)
        if not lookups:
            return []
        calls = [Call("GET", key) for _, key in lookups]
        try:
            asked = asyncio.run_coroutine_threadsafe(_found(router, calls, seen.address), loop)
        except RuntimeError as exc:  # closed meanwhile
            raise _closed(seen) from exc
        try:
            found: list[bytes | Exception | None] = asked.result(_ANSWER_S)
        except (CancelledError, TimeoutError) as exc:  # closed while it was under way, or just before
            raise _closed(seen) from exc
        except ConfigError as exc:  # a password that was changed meanwhile: a store that is down, to our callers
            raise StoreError(str(exc)) from exc
        entries = [None if isinstance(entry, Exception) else entry for entry in found]
        unread = {n: entry for n, entry in enumerate(found) if isinstance(entry, Exception)}
        if not unread:
            return entries
        try:
            with translated(seen.address):
                raise next(iter(unread.values()))
        except UembError as exc:
            raise StorePartlyDown(str(exc), entries, frozenset(unread)) from exc

    def watermark(self, user_id: bytes) -> bytes | None:
        """Watermark of the partition that owns `user_id`, as last seen; cheap."""
        watermarks = self._seen.watermarks
        return watermarks[partition_of(user_id, len(watermarks))] if watermarks else None

    def close(self) -> None:
        """Stop background work and disconnect."""
        self._release()
        self._thread.join(_CLOSE_S)


async def _found(router: Router, calls: Sequence[Call], address: RedisAddress) -> list[bytes | Exception | None]:
    with translated(address):
        return await router.run(calls, hasty=True)


async def _ping(router: Router, place: Address) -> NoPermissionError | None:
    """Find out whether a server is well; the router remembers."""
    try:
        await router.ask(place, ("PING",))
    except NoPermissionError as exc:
        return exc
    except (RedisError, OSError):
        pass
    return None


def _serve(seen: _Seen, refresh_s: float) -> None:
    try:
        asyncio.run(_follow(seen, refresh_s))
    except Exception:
        log.exception("following the store ended")
    finally:
        seen.closed.set()
        seen.opened.set()


async def _follow(seen: _Seen, refresh_s: float) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    router = None
    try:
        router = Router(seen.address, _READ_TIMEOUT_S)
        await seen.refresh(router)
        if seen.raw is None:
            msg = f"no store at {seen.address}: no {META_KEY} there; start a worker first"
            raise StoreError(msg)
    except UembError as exc:
        seen.failed = StoreError(str(exc)) if isinstance(exc, StateError) else exc
        if router is not None:
            await router.close()
        return
    seen.loop, seen.router, seen.stop = loop, router, stop
    seen.opened.set()
    while not seen.closed.is_set():
        try:
            await asyncio.wait_for(stop.wait(), refresh_s)
        except TimeoutError:
            try:
                await seen.refresh(router)
            except UembError as exc:
                log.warning("the store can't be followed and is tried again, what was last seen stays: %s", exc)
            except Exception:  # a reader that has stopped following would serve under old versions for ever
                log.exception("following the store failed and is tried again")
    await router.close()


def _let_go(seen: _Seen) -> None:
    seen.closed.set()
    if seen.loop is not None and seen.stop is not None and not seen.loop.is_closed():
        seen.loop.call_soon_threadsafe(seen.stop.set)


def _closed(seen: _Seen) -> StoreError:
    return StoreError(f"the store at {seen.address} is closed")
