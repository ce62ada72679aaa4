"""Access lists of real servers: what `uemb acl` lists suffices, each of it is needed, and what is missing is named."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace

import pytest
from cluster_writers import at as at_cluster
from cluster_writers import claimed, put
from kv_entries import entry
from redis_cluster import RedisCluster
from redis_server import RedisServer
from redis_writers import at, claim, watermark

from stream.errors import StoreRefused, UembError
from stream.kv.checkup import look_at_store
from stream.kv.protocol import KVReader, Meta
from stream.kv.redis.cluster_writer import ClusterKV
from stream.kv.redis.grants import KEYS, Access, looker, reader, writer
from stream.kv.redis.writer import RedisKV
from stream.kv.stores import open_reader, open_writer
from stream.kv.urls import RedisAddress

#: Needed where a slot is being moved, and nowhere else: see `test_a_slot_that_stays_halfway_is_served_by_both`.
RARE = {"asking"}
READERS = {"reader": reader, "auditor": looker}
USER = b"42", b"uemb:u:i:42"
Grant = Callable[[str], None]


def lists(access: Access) -> Iterator[tuple[str, str, str]]:
    """Each list that lacks one thing: that, the list, and what the error says of it."""
    for command in access.commands:
        rest = [f"+{other}" for other in access.commands if other != command]
        yield command, " ".join([access.keys, "-@all", *rest]), f"run {command}; grant +{command} (see `uemb acl"
    yield access.keys, access.rules.replace("uemb", "other"), f"use our keys; grant {KEYS}"


async def check_each(
    who: str, access: Access, grant: Grant, use: Callable[[], Awaitable[None]], without: Iterable[str] = RARE
) -> None:
    """With all of a list it goes; without one thing of it, that is named in one line."""
    grant(access.rules)
    await use()
    for missing, rules, said in lists(access):
        if missing not in without:
            grant(rules)
            with pytest.raises(UembError) as caught:
                await use()
            line = str(caught.value)
            print(f"| {who} | {missing} | {line} |")
            assert said in line
            assert "\n" not in line
            assert "ali" not in line
            assert "p%w" not in line


def read(url: str) -> None:
    """What every reader does."""
    store: KVReader = open_reader(url)
    try:
        store.get([USER])
    finally:
        store.close()


def look(url: str) -> None:
    """What an auditor does."""
    read(url)
    look_at_store(url, to_write=False)


class TestOneServer:
    """A database that is not the first, so that it must be selected."""

    @pytest.fixture
    def url(self, redis: RedisServer) -> str:
        return f"redis://ali:p%25w@127.0.0.1:{redis.port}/3"

    @pytest.fixture
    def grant(self, redis: RedisServer) -> Grant:
        def grant(rules: str) -> None:
            with redis.client() as client:
                client.execute_command("ACL", "SETUSER", "ali", "reset", "on", ">p%w", *rules.split())
                client.script_flush()

        return grant

    async def write(self, url: str) -> None:
        kv = open_writer(url)
        assert isinstance(kv, RedisKV)
        try:
            epoch = time.time_ns()
            await kv.update_meta(lambda _: Meta("app", 1))
            await claim(kv, epoch)
            await kv.put(0, {USER[1]: entry(epoch, 1), **watermark(epoch, 1, time.time())})
            assert await kv.get(0, [USER[1]]) == [entry(epoch, 1)]
            assert await kv.is_owned(0)
            await kv.remove(0, [USER[1]], epoch)
            await kv.ask_rebuild(0)
            await kv.rebuild_done(0, await kv.rebuild_request(0) or b"")
        finally:
            await kv.close()

    async def test_a_worker(self, url: str, redis: RedisServer, grant: Grant, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="stream")
        access = writer(replace(at(redis), db=3))

        async def use() -> None:
            with redis.client() as client:
                client.flushall()
            await self.write(url)

        grant(access.rules)
        await use()
        assert not [record for record in caplog.records if record.name.startswith("stream")], "something was refused"
        # a server by itself is used without INFO, and that is said
        await check_each("worker", access, grant, use, {"info"})
        grant(access.rules.replace(" +info", ""))
        await use()
        assert "+info is not granted" in caplog.text

    @pytest.mark.parametrize("who", READERS)
    async def test_who_reads(self, who: str, url: str, redis: RedisServer, grant: Grant) -> None:
        await self.write(redis.url.replace("/0", "/3"))
        use = {"reader": read, "auditor": look}[who]
        await check_each(
            who, READERS[who](replace(at(redis), db=3)), grant, lambda: asyncio.to_thread(use, url), {"info"}
        )

    async def test_who_reads_may_not_write(self, url: str, redis: RedisServer, grant: Grant) -> None:
        grant(looker(replace(at(redis), db=3)).rules)
        with pytest.raises(StoreRefused, match="grant "):
            await self.write(url)


class TestCluster:
    @pytest.fixture
    def address(self, cluster: RedisCluster) -> RedisAddress:
        return at_cluster(cluster, "ali:p%25w@")

    @pytest.fixture
    def url(self, cluster: RedisCluster) -> str:
        return cluster.url.replace("://", "://ali:p%25w@")

    @pytest.fixture
    def grant(self, cluster: RedisCluster) -> Iterator[Grant]:
        def grant(rules: str) -> None:
            for number in range(3):
                cluster.call(number, "ACL", "SETUSER", "ali", "reset", "on", ">p%w", *rules.split())
                cluster.call(number, "SCRIPT", "FLUSH")

        yield grant
        for number in range(3):
            cluster.call(number, "ACL", "DELUSER", "ali")

    async def write(self, address: RedisAddress) -> None:
        kv = ClusterKV(address)
        try:
            epoch = time.time_ns()
            await claimed(kv, epoch)
            await put(kv, epoch, 2)
            await kv.remove(0, [USER[1]], epoch)
            await kv.is_owned(0)
            await kv.ask_rebuild(0)
            await kv.rebuild_done(0, await kv.rebuild_request(0) or b"")
        finally:
            await kv.close()

    async def test_a_worker(self, address: RedisAddress, cluster: RedisCluster, grant: Grant) -> None:
        async def use() -> None:
            cluster.empty()
            await self.write(address)

        await check_each("worker, cluster", writer(address), grant, use)

    @pytest.mark.parametrize("who", READERS)
    async def test_who_reads(
        self, who: str, address: RedisAddress, url: str, cluster: RedisCluster, grant: Grant
    ) -> None:
        await self.write(at_cluster(cluster))
        use = {"reader": read, "auditor": look}[who]
        await check_each(f"{who}, cluster", READERS[who](address), grant, lambda: asyncio.to_thread(use, url))
