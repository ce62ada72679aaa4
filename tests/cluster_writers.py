"""Writers on a real cluster as a worker uses them, and what they write."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest
from kv_entries import entry
from redis_cluster import RedisCluster

from stream.core.records import kv_prefix
from stream.errors import StoreError, StoreLost
from stream.keys import epoch_key, watermark_key
from stream.kv.protocol import Meta
from stream.kv.redis.cluster_writer import ClusterKV
from stream.kv.urls import RedisAddress, parse_kv_url

_Answer = TypeVar("_Answer")

CLAIM = epoch_key(0).encode()
WATERMARK = watermark_key(0).encode()
KEYS = [b"uemb:u:i:%d" % n for n in range(300)]  # on every server, by far


def at(cluster: RedisCluster, login: str = "", query: str = "") -> RedisAddress:
    address = parse_kv_url(cluster.url.replace("://", f"://{login}") + query)
    assert isinstance(address, RedisAddress)
    return address


@pytest.fixture
async def make_cluster_kv() -> AsyncIterator[Callable[..., ClusterKV]]:
    """Makes writers, which are closed after the test; arguments are those of `at`."""
    made: list[ClusterKV] = []

    def make(cluster: RedisCluster, login: str = "", query: str = "") -> ClusterKV:
        made.append(ClusterKV(at(cluster, login, query)))
        return made[-1]

    yield make
    for kv in made:
        await kv.close()


async def claimed(kv: ClusterKV, epoch: int, *, whole: bool = True) -> ClusterKV:
    """A claim, and with `whole` what follows it: a watermark and all keys."""
    await kv.update_meta(lambda _: Meta("app", 1))
    await kv.open_partition(0)
    await kv.put(0, {CLAIM: kv_prefix(epoch, 0)})
    if whole:
        await put(kv, epoch, 1)
    return kv


async def put(kv: ClusterKV, epoch: int, revision: int) -> int:
    return await kv.put(0, {**{key: entry(epoch, revision) for key in KEYS}, WATERMARK: entry(epoch, revision)})


async def insist(kv: ClusterKV, epoch: int, revision: int) -> None:
    """Write as a worker does, which waits for a store that is away."""
    await _patiently(lambda: put(kv, epoch, revision))


async def entries(kv: ClusterKV) -> list[bytes | None]:
    """Entries of all keys, read as patiently."""
    return await _patiently(lambda: kv.get(0, KEYS))


async def _patiently(call: Callable[[], Awaitable[_Answer]]) -> _Answer:
    for _ in range(200):
        try:
            return await call()
        except StoreLost:
            raise
        except StoreError:
            await asyncio.sleep(0.05)
    raise AssertionError("the store stayed away")
