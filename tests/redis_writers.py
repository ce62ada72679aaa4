"""Writers on a Redis of the test's own, and what they write."""

import json
from collections.abc import AsyncIterator, Callable

import pytest
from redis_server import RedisServer

from stream.core.records import kv_prefix
from stream.keys import epoch_key, watermark_key
from stream.kv.protocol import Meta
from stream.kv.redis.writer import RedisKV
from stream.kv.urls import RedisAddress, parse_kv_url

CLAIM = epoch_key(0).encode()
WATERMARK = watermark_key(0).encode()
MAX = 2**64 - 1


def at(server: RedisServer) -> RedisAddress:
    address = parse_kv_url(server.url)
    assert isinstance(address, RedisAddress)
    return address


@pytest.fixture
async def make_kv() -> AsyncIterator[Callable[..., RedisKV]]:
    """Makes writers, which are closed after the test."""
    made: list[RedisKV] = []

    def make(server: RedisServer, **options: float) -> RedisKV:
        made.append(RedisKV(at(server), **options))
        return made[-1]

    yield make
    for kv in made:
        await kv.close()


@pytest.fixture
async def kv(redis: RedisServer, make_kv: Callable[..., RedisKV]) -> RedisKV:
    """A writer that has claimed partition 0 under epoch 5."""
    kv = make_kv(redis)
    await kv.update_meta(lambda _: Meta("app", 1))
    await claim(kv, 5)
    return kv


async def claim(kv: RedisKV, epoch: int) -> None:
    await kv.open_partition(0)
    assert await kv.put(0, {CLAIM: kv_prefix(epoch, 0)}) == 0


def watermark(epoch: int, sequence: int, heartbeat_s: float = 0.0) -> dict[bytes, bytes]:
    body = {"offsets": {}, "kafka_time_ms": None, "lag_ms": 0, "heartbeat_ms": int(heartbeat_s * 1000)}
    return {WATERMARK: kv_prefix(epoch, sequence) + json.dumps(body).encode()}
