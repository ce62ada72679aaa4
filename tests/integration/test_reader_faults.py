"""Both faces of the reader before a real Redis that is paused, killed, or reached by connections that died silently."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from half_open import HalfOpenProxy
from kv_entries import eventually
from reader_store import ITEMS, META, USER, key, record, stored
from redis_server import RedisServer

from stream.core.records import kv_prefix
from stream.errors import StoreError
from stream.keys import watermark_key
from stream.kv.protocol import Serving
from stream.kv.redis.reader import RedisReader
from stream.kv.redis.writer import RedisKV
from stream.kv.urls import RedisAddress
from stream.retrieval import AsyncEmbeddingReader
from stream.retrieval.answers import UserEmbedding
from stream.retrieval.reader import EmbeddingReader

PARTITIONS = 1
Ask = Callable[[], UserEmbedding]


async def fill(port: int) -> None:
    """One user, and a watermark whose heartbeat lasts."""
    kv = RedisKV(RedisAddress(tls=False, host="127.0.0.1", port=port))
    await kv.update_meta(lambda _: replace(META, partitions=PARTITIONS, current=Serving(USER, ITEMS, -1)))
    await kv.open_partition(0)
    heartbeat_ms = time.time_ns() // 1_000_000 + 3_600_000
    progress = b'{"lag_ms": 0, "heartbeat_ms": %d}' % heartbeat_ms
    await kv.put(0, {key("7"): stored(record("7")), watermark_key(0).encode(): kv_prefix(3, 17) + progress})
    await kv.close()


def _faces(url: str, kind: str, timeout_s: float) -> Iterator[tuple[Ask, Callable[[], list[str]]]]:
    if kind == "blocking":
        with EmbeddingReader.open(url, timeout_s=timeout_s) as reader:
            yield lambda: reader.get(7), lambda: [a.reason for a in reader.get_many([7, 8])[1]]
        return
    with asyncio.Runner() as runner:

        def run(call: Awaitable[Any]) -> Any:
            async def wait() -> Any:
                return await call

            return runner.run(wait())

        other = run(AsyncEmbeddingReader.open(url, timeout_s=timeout_s))
        yield lambda: run(other.get(7)), lambda: [a.reason for a in run(other.get_many([7, 8]))[1]]
        run(other.close())


@pytest.fixture(params=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Callable[[str], tuple[Ask, Callable[[], list[str]]]]]:
    """Opens a reader at a URL; gives what asks for user 7, and for users 7 and 8."""
    opened: list[Iterator[tuple[Ask, Callable[[], list[str]]]]] = []

    def start(url: str, timeout_s: float = 0.1) -> tuple[Ask, Callable[[], list[str]]]:
        opened.append(_faces(url, request.param, timeout_s))
        return next(opened[-1])

    yield start
    for reader in opened:
        assert next(reader, None) is None


Face = Callable[[str], tuple[Ask, Callable[[], list[str]]]]


def test_a_server_that_is_paused_killed_and_started_again(redis: RedisServer, face: Face) -> None:
    asyncio.run(fill(redis.port))
    get, get_many = face(redis.url)
    eventually(lambda: get().status == "ok")
    redis.pause()
    assert get().reason == "timeout"
    answer = get()
    assert (answer.status, answer.reason) == ("fallback", "store_down")
    assert not answer.stale, "the pipeline's state is another question"
    assert get_many() == ["store_down"] * 2
    redis.resume()
    eventually(lambda: get().status == "ok")
    redis.kill()
    eventually(lambda: get().reason == "store_down")
    assert get_many() == ["store_down"] * 2
    redis.start()
    asyncio.run(fill(redis.port))
    eventually(lambda: get().status == "ok")
    eventually(lambda: get_many() == ["", "missing"])


def test_connections_that_died_silently_are_replaced(redis: RedisServer, face: Face) -> None:
    asyncio.run(fill(redis.port))
    with HalfOpenProxy(redis.port) as proxy:
        get, _ = face(f"redis://127.0.0.1:{proxy.port}/0")
        eventually(lambda: get().status == "ok")
        before = proxy.accepted
        proxy.go_half_open()
        assert get().reason == "timeout"
        eventually(lambda: get().status == "ok")
        assert proxy.accepted > before


def test_one_connection_that_died_is_enough_to_replace_them_all(redis: RedisServer) -> None:
    asyncio.run(fill(redis.port))
    lookup = [(b"7", key("7"))]

    def together(pool: ThreadPoolExecutor, reader: RedisReader) -> list[list[bytes | None]]:
        """Four lookups at a time, each on a connection of its own."""
        redis.pause()
        calls = [pool.submit(reader.get, lookup) for _ in range(4)]
        time.sleep(0.1)
        redis.resume()
        return [call.result() for call in calls]

    with HalfOpenProxy(redis.port) as proxy, ThreadPoolExecutor(4) as pool:
        reader = RedisReader(RedisAddress(tls=False, host="127.0.0.1", port=proxy.port), refresh_s=60)
        found = [[stored(record("7"))]] * 4
        assert together(pool, reader) == found
        proxy.go_half_open()
        with pytest.raises(StoreError, match="did not answer in time"):
            reader.get(lookup)
        assert together(pool, reader) == found
        reader.close()
