"""What makes the owner of a cluster's partition rebuild it, once, and what does not; on real servers."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from cluster_writers import CLAIM, KEYS, WATERMARK, at, claimed, entries, insist, put
from kv_entries import entry, eventually
from redis.exceptions import ResponseError
from redis_cluster import RedisCluster

from stream.core.records import kv_prefix
from stream.errors import StoreLost
from stream.kv.redis.cluster_writer import ClusterKV
from stream.kv.redis.grants import writer
from stream.kv.redis.slots import slot_of


def started_again(cluster: RedisCluster, number: int) -> None:
    cluster.servers[number].kill()
    cluster.servers[number].start()
    cluster.until_ok()


class TestLosses:
    """What makes a partition's owner rebuild it, once, and what does not."""

    async def test_a_server_that_lost_its_data_is_noticed_once_and_whole_again_with_the_next_watermark(
        self, cluster: RedisCluster, make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        kv = await claimed(make_cluster_kv(cluster), 5)
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
        self, cluster: RedisCluster, make_cluster_kv: Callable[..., ClusterKV], number: int
    ) -> None:
        kv = await claimed(make_cluster_kv(cluster), 5)
        for lost in ((number + 1) % 3, number):
            cluster.call(lost, "FLUSHALL")
            with pytest.raises(StoreLost):
                await kv.put(0, {key: entry(5, 2) for key in KEYS[150:]})
            await kv.put(0, {CLAIM: kv_prefix(5, 0)})
            await kv.put(0, {key: entry(5, 2) for key in KEYS[:150]})
        await put(kv, 5, 2)
        await kv.close()
        await claimed(make_cluster_kv(cluster), 6)

    @pytest.mark.parametrize("number", range(3))
    async def test_a_loss_while_no_worker_ran_is_noticed_at_the_next_claim(
        self, cluster: RedisCluster, make_cluster_kv: Callable[..., ClusterKV], number: int
    ) -> None:
        await (await claimed(make_cluster_kv(cluster), 5)).close()
        cluster.call(number, "FLUSHALL")
        other = await claimed(make_cluster_kv(cluster), 6, whole=False)
        with pytest.raises(StoreLost):
            await put(other, 6, 1)
        await other.close()  # before it rebuilt anything: the next one must know as well
        third = await claimed(make_cluster_kv(cluster), 7, whole=False)
        with pytest.raises(StoreLost):
            await put(third, 7, 1)
        await third.put(0, {CLAIM: kv_prefix(7, 0)})
        await put(third, 7, 1)
        await third.close()
        await claimed(make_cluster_kv(cluster), 8)

    async def test_slots_that_move_are_no_loss_and_no_key_is_missed_on_the_way(
        self, make_cluster: Callable[..., RedisCluster], make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster()
        new = cluster.add()
        cluster.meet(new)
        kv = await claimed(make_cluster_kv(cluster), 5)
        revision = 1
        with cluster.resharding(0, new, 600) as moving:
            while moving.poll() is None:
                moving.send_signal(signal.SIGSTOP)  # wherever it is now, for as long as this takes
                revision += 1
                await insist(kv, 5, revision)
                assert await entries(kv) == [entry(5, revision)] * len(KEYS)
                moving.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.01)
        assert revision > 10
        await asyncio.to_thread(cluster.reshard, new, 1, 600)  # the new one has none again
        await put(kv, 5, revision + 1)
        await asyncio.sleep(1.1)
        await put(kv, 5, revision + 2)
        await claimed(make_cluster_kv(cluster), 6)

    async def test_a_slot_that_stays_halfway_is_served_by_both(
        self, make_cluster: Callable[..., RedisCluster], make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster()
        for number in range(3):  # so that what a redirection needs is granted too
            cluster.call(number, "ACL", "SETUSER", "ali", "on", ">p", *writer(at(cluster)).rules.split())
        kv = await claimed(make_cluster_kv(cluster, "ali:p@"), 5)
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
        self, make_cluster: Callable[..., RedisCluster], make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster(3, 1)
        kv = await claimed(make_cluster_kv(cluster), 5)
        cluster.servers[0].kill()
        with pytest.raises(StoreLost):
            await insist(kv, 5, 2)
        await kv.put(0, {CLAIM: kv_prefix(5, 0)})
        await put(kv, 5, 2)
        await asyncio.sleep(1.1)
        await put(kv, 5, 3)

    async def test_a_server_started_again_from_its_disk_counts_as_a_loss_until_the_next_claim(
        self, make_cluster: Callable[..., RedisCluster], make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster(appendonly="yes")
        kv = await claimed(make_cluster_kv(cluster), 5)
        started_again(cluster, 1)
        told = await asyncio.gather(insist(kv, 5, 2), insist(kv, 5, 2), return_exceptions=True)
        assert [type(each) for each in told] == [StoreLost, StoreLost]
        assert await kv.get(0, KEYS) == [entry(5, 1)] * len(KEYS), "nothing was lost that was acknowledged long ago"
        with pytest.raises(StoreLost):
            await put(kv, 5, 2)
        await kv.put(0, {CLAIM: kv_prefix(5, 0)})
        await put(kv, 5, 2)
        new = cluster.add(appendonly="yes")
        cluster.meet(new)
        await asyncio.to_thread(cluster.reshard, 0, new, 200)
        await asyncio.sleep(1.1)
        await put(kv, 5, 3)  # sees the new server, which no claim was written under
        await kv.close()
        started_again(cluster, new)
        other = await claimed(make_cluster_kv(cluster), 6, whole=False)
        with pytest.raises(StoreLost):
            await put(other, 6, 1)

    async def test_slots_that_a_server_got_without_their_keys_are_a_loss(
        self, make_cluster: Callable[..., RedisCluster], make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster()
        kv = await claimed(make_cluster_kv(cluster), 5)
        first, last = 8_000, 10_000
        assert not {slot_of(key) for key in (CLAIM, WATERMARK)}.intersection(range(first, last + 1))

        def given_to_the_first() -> bool:
            """Servers that have not forgotten the slots' owner yet may remind the first one of it."""
            for number in range(3):
                with suppress(ResponseError):  # it has forgotten
                    cluster.call(number, "CLUSTER", "DELSLOTSRANGE", first, last)
            with suppress(ResponseError):  # it was reminded
                cluster.call(0, "CLUSTER", "ADDSLOTSRANGE", first, last)
                return True
            return False

        eventually(given_to_the_first)
        cluster.until_ok()
        await asyncio.sleep(1.1)
        with pytest.raises(StoreLost):
            await put(kv, 5, 2)
        await kv.put(0, {CLAIM: kv_prefix(5, 0)})
        await put(kv, 5, 2)
        await put(kv, 5, 3)

    @pytest.mark.parametrize("rebuilt", [False, True])
    async def test_a_loss_just_before_the_sentinels_are_written_is_not_covered_up_by_them(
        self,
        cluster: RedisCluster,
        make_cluster_kv: Callable[..., ClusterKV],
        monkeypatch: pytest.MonkeyPatch,
        rebuilt: bool,
    ) -> None:
        kv = await claimed(make_cluster_kv(cluster), 5)
        if rebuilt:
            cluster.call(1, "FLUSHALL")
            with pytest.raises(StoreLost):
                await put(kv, 5, 2)
            await kv.put(0, {CLAIM: kv_prefix(5, 0)})
        write_sentinels = kv._write_sentinels

        async def flushed(*args: Any, **options: Any) -> None:
            monkeypatch.undo()
            cluster.call(0, "FLUSHALL")  # it has neither claim nor watermark
            await write_sentinels(*args, **options)

        monkeypatch.setattr(kv, "_write_sentinels", flushed)
        if not rebuilt:
            await kv.put(0, {CLAIM: kv_prefix(6, 0)})
        with pytest.raises(StoreLost):
            await put(kv, 6, 2)
        await kv.close()
        other = await claimed(make_cluster_kv(cluster), 7, whole=False)
        with pytest.raises(StoreLost):
            await put(other, 7, 1)
