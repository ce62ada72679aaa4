"""The networked store on a real cluster: what holds beside the contract of every store, and what counts as a loss."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from kv_entries import entry, eventually
from redis_cluster import RedisCluster
from redis_server import RedisServer

from stream.errors import ConfigError, Fenced, StoreError, StoreLost, StorePartlyDown
from stream.keys import epoch_key, watermark_key
from stream.kv.base import Meta, Serving
from stream.kv.redis_cluster import ClusterKV
from stream.kv.redis_cluster_reader import ClusterReader
from stream.kv.redis_slots import SENTINELS, sentinel_tags, slot_of
from stream.kv.urls import RedisAddress, parse_kv_url
from stream.records import kv_prefix

CLAIM = epoch_key(0).encode()
WATERMARK = watermark_key(0).encode()
KEYS = [b"k%d" % n for n in range(300)]  # on every server, by far


def at(cluster: RedisCluster) -> RedisAddress:
    address = parse_kv_url(cluster.url)
    assert isinstance(address, RedisAddress)
    return address


@pytest.fixture
async def make_kv() -> AsyncIterator[Callable[[RedisCluster], ClusterKV]]:
    """Makes writers, which are closed after the test."""
    made: list[ClusterKV] = []

    def make(cluster: RedisCluster) -> ClusterKV:
        made.append(ClusterKV(at(cluster), timeout_s=1.0))
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
    for _ in range(200):
        try:
            await put(kv, epoch, revision)
        except StoreLost:
            raise
        except StoreError:
            await asyncio.sleep(0.05)
        else:
            return
    raise AssertionError("the store stayed away")


def test_sentinels_lie_one_in_each_band_of_slots() -> None:
    tags = sentinel_tags()
    assert [slot // 64 for slot, _ in tags] == list(range(SENTINELS))
    assert all(slot_of(f"uemb:sentinel:{{{tag}}}:7") == slot for slot, tag in tags)


class TestWriting:
    """What a worker writes to a cluster, and what it is told."""

    async def test_a_newer_claim_fences_the_whole_batch(
        self, cluster: RedisCluster, make_kv: Callable[..., ClusterKV]
    ) -> None:
        old, new = await claimed(make_kv(cluster), 7), await claimed(make_kv(cluster), 8, whole=False)
        with pytest.raises(Fenced, match="epoch 8, ours is 7"):
            await put(old, 7, 2)
        assert await new.get(0, [*KEYS, WATERMARK]) == [entry(7, 1)] * (len(KEYS) + 1)

    async def test_scripts_that_every_server_forgot_are_sent_again(
        self, cluster: RedisCluster, make_kv: Callable[..., ClusterKV]
    ) -> None:
        kv = await claimed(make_kv(cluster), 5)
        for number in range(3):
            cluster.call(number, "SCRIPT", "FLUSH")
        assert await put(kv, 5, 2) == 0
        assert await kv.get(0, KEYS) == [entry(5, 2)] * len(KEYS)

    async def test_public_keys_follow_the_shared_record_and_are_repaired(
        self, cluster: RedisCluster, make_kv: Callable[..., ClusterKV]
    ) -> None:
        full = Meta("app", 1, Serving("u", "i", 3), {"uemb:fallback:u:i": b"f"}, {"uemb:encoder:u": "ab"})
        await make_kv(cluster).update_meta(lambda _: full)
        shown = {key: value for key, value in cluster.everything().items() if key != b"uemb:meta"}
        assert json.loads(shown.pop(b"uemb:current")) == {"user_version": "u", "item_version": "i", "offset": 3}
        assert shown == {b"uemb:app": b"app", b"uemb:fallback:u:i": b"f", b"uemb:encoder:u": b"ab"}
        await make_kv(cluster).update_meta(lambda meta: replace(meta, fallbacks={}))
        assert b"uemb:fallback:u:i" not in cluster.everything()
        kv = make_kv(cluster)
        await kv._command("DEL", "uemb:app")
        await kv.update_meta(lambda meta: meta)
        assert cluster.everything()[b"uemb:app"] == b"app"

    async def test_public_keys_that_were_lost_come_back_with_the_next_claim(
        self, cluster: RedisCluster, make_kv: Callable[..., ClusterKV]
    ) -> None:
        kv = await claimed(make_kv(cluster), 5)
        for number in range(3):  # as an operator would, by mistake; one of them has the shared record, another the key
            cluster.call(number, "FLUSHALL")
            with pytest.raises(StoreLost):
                await put(kv, 5, 2)
            await kv.update_meta(lambda _: Meta("app", 1))
            await kv.put(0, {CLAIM: kv_prefix(5, 0)})
            await put(kv, 5, 2)
            assert cluster.everything()[b"uemb:app"] == b"app"

    async def test_a_server_of_its_own_is_refused(self, redis: RedisServer) -> None:
        kv = ClusterKV(replace(parse_kv_url(redis.url), seeds=(("127.0.0.1", redis.port),)))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="not part of a cluster: write redis://"):
            await kv.update_meta(lambda meta: meta)
        await kv.close()

    async def test_no_key_expires(self, cluster: RedisCluster, make_kv: Callable[..., ClusterKV]) -> None:
        await claimed(make_kv(cluster), 5)
        assert len(cluster.everything()) > SENTINELS + len(KEYS)
        for server in cluster.servers:
            with server.client() as client:
                assert {client.pttl(key) for key in client.keys("*")} == {-1}


class TestLosses:
    """What makes a partition's owner rebuild it, once, and what does not."""

    async def test_a_server_that_lost_its_data_is_noticed_once_and_whole_again_with_the_next_watermark(
        self, cluster: RedisCluster, make_kv: Callable[..., ClusterKV]
    ) -> None:
        kv = await claimed(make_kv(cluster), 5)
        for number in range(3):
            cluster.call(number, "FLUSHALL")
            with pytest.raises(StoreLost, match="partition 0"):
                await put(kv, 5, 2)
            await kv.put(0, {CLAIM: kv_prefix(5, 0)})
            await kv.put(0, {key: entry(5, 2) for key in KEYS})
            await put(kv, 5, 2)
            await put(kv, 5, 2)

    @pytest.mark.parametrize("number", range(3))
    async def test_a_loss_while_the_partition_is_rebuilt_is_noticed_too(
        self, cluster: RedisCluster, make_kv: Callable[..., ClusterKV], number: int
    ) -> None:
        kv = await claimed(make_kv(cluster), 5)
        for lost in ((number + 1) % 3, number):
            cluster.call(lost, "FLUSHALL")
            with pytest.raises(StoreLost):
                await kv.put(0, {key: entry(5, 2) for key in KEYS[150:]})
            await kv.put(0, {CLAIM: kv_prefix(5, 0)})
            await kv.put(0, {key: entry(5, 2) for key in KEYS[:150]})
        await put(kv, 5, 2)
        await kv.close()
        await claimed(make_kv(cluster), 6)

    @pytest.mark.parametrize("number", range(3))
    async def test_a_loss_while_no_worker_ran_is_noticed_at_the_next_claim(
        self, cluster: RedisCluster, make_kv: Callable[..., ClusterKV], number: int
    ) -> None:
        await (await claimed(make_kv(cluster), 5)).close()
        cluster.call(number, "FLUSHALL")
        other = await claimed(make_kv(cluster), 6, whole=False)
        with pytest.raises(StoreLost):
            await put(other, 6, 1)
        await other.close()  # before it rebuilt anything: the next one must know as well
        third = await claimed(make_kv(cluster), 7, whole=False)
        with pytest.raises(StoreLost):
            await put(third, 7, 1)
        await third.put(0, {CLAIM: kv_prefix(7, 0)})
        await put(third, 7, 1)
        await third.close()
        await claimed(make_kv(cluster), 8)

    async def test_slots_that_move_are_no_loss_and_no_key_is_missed_on_the_way(
        self, make_cluster: Callable[..., RedisCluster], make_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster()
        new = cluster.add()
        cluster.meet(new)
        kv = await claimed(make_kv(cluster), 5)
        moving = asyncio.create_task(asyncio.to_thread(cluster.reshard, 0, new, 600))
        revision = 1
        while not moving.done():
            revision += 1
            assert await put(kv, 5, revision) == 0
            assert await kv.get(0, KEYS) == [entry(5, revision)] * len(KEYS)
        await moving
        assert revision > 10
        await asyncio.to_thread(cluster.reshard, new, 1, 600)  # the new one has none again
        await put(kv, 5, revision + 1)
        await asyncio.sleep(1.1)
        await put(kv, 5, revision + 2)
        await claimed(make_kv(cluster), 6)

    async def test_a_slot_that_stays_halfway_is_served_by_both(
        self, make_cluster: Callable[..., RedisCluster], make_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster()
        kv = await claimed(make_kv(cluster), 5)
        slots = {slot_of(key): key for key in KEYS}
        slot = next(slot for slot in slots if slot < 5000)
        here = [key for key in KEYS if slot_of(key) == slot]
        cluster.call(1, "CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.node(0))
        cluster.call(0, "CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.node(1))
        cluster.call(0, "MIGRATE", "127.0.0.1", cluster.servers[1].port, here[0].decode(), 0, 1000)
        # Several at once, so that more than one connection to either server is there to be mistaken.
        await asyncio.gather(*(put(kv, 5, 2) for _ in range(8)))
        assert await kv.get(0, KEYS) == [entry(5, 2)] * len(KEYS)

    async def test_a_replica_that_takes_over_counts_as_a_loss_once(
        self, make_cluster: Callable[..., RedisCluster], make_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster(3, 1)
        kv = await claimed(make_kv(cluster), 5)
        cluster.servers[0].kill()
        with pytest.raises(StoreLost):
            await insist(kv, 5, 2)
        await kv.put(0, {CLAIM: kv_prefix(5, 0)})
        await put(kv, 5, 2)
        await asyncio.sleep(1.1)
        await put(kv, 5, 3)


class TestReading:
    """What retrieval reads of a cluster."""

    async def test_users_of_servers_that_live_keep_their_vectors(
        self, make_cluster: Callable[..., RedisCluster], make_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster()
        await claimed(make_kv(cluster), 5)
        reader = ClusterReader(at(cluster), refresh_s=0.1)
        lookups = [(b"u", key) for key in KEYS]
        assert reader.get(lookups) == [entry(5, 1)] * len(KEYS)
        cluster.servers[1].kill()
        with pytest.raises(StorePartlyDown) as caught:
            reader.get(lookups)
        share = [slot * 3 // 16_384 for slot in map(slot_of, KEYS)]
        assert caught.value.unread == {n for n, third in enumerate(share) if third == 1}
        assert caught.value.found == [None if third == 1 else entry(5, 1) for third in share]
        only = next(key for key, third in zip(KEYS, share, strict=True) if third == 1)
        with pytest.raises(StoreError):
            reader.get([(b"u", only)])
        cluster.servers[1].start()

        def well() -> bool:
            try:
                return None in reader.get(lookups)
            except StoreError:
                return False

        eventually(well)
        reader.close()

    async def test_a_lookup_that_is_under_way_when_the_reader_closes_is_told_so(
        self, make_cluster: Callable[..., RedisCluster], make_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster()
        await claimed(make_kv(cluster), 5, whole=False)
        reader = ClusterReader(at(cluster))
        cluster.servers[1].pause()
        lookup = asyncio.create_task(asyncio.to_thread(reader.get, [(b"u", key) for key in KEYS]))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(reader.close)
        with pytest.raises(StoreError, match="is closed"):
            await lookup
        cluster.servers[1].resume()
