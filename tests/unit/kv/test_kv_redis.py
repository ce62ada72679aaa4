"""The networked store on a real server: what holds beside the contract of every store, and what goes wrong how."""

import asyncio
import gc
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from half_open import HalfOpenProxy
from kafka_broker import free_ports
from kv_entries import entry, eventually
from redis_server import RedisServer
from secured_broker import make_certificate

from stream.core.records import EmbeddingRecord, encode, kv_prefix
from stream.errors import ConfigError, Fenced, StateError, StoreError, StoreLost
from stream.keys import epoch_key, partition_of, watermark_key
from stream.kv.protocol import Meta, Serving
from stream.kv.redis import client as redis_client
from stream.kv.redis.client import GRANTS
from stream.kv.redis.reader import RedisReader
from stream.kv.redis.scripts import PUT
from stream.kv.redis.writer import CHUNK, RedisKV
from stream.kv.stores import open_reader, open_writer
from stream.kv.urls import RedisAddress, parse_kv_url
from stream.retrieval.reader import EmbeddingReader

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


class TestKeys:
    """What other clients find on the server."""

    async def test_keys_and_values_are_those_of_the_contract(self, redis: RedisServer, kv: RedisKV) -> None:
        vector, mark = entry(5, 1, b"\x00\xff"), watermark(5, 1)
        await kv.put(0, {b"uemb:u:i:42": vector, **mark})
        await kv.ask_rebuild(0)
        await kv.update_meta(
            lambda meta: replace(
                meta,
                current=Serving("u", "i", 7),
                fallbacks={"uemb:fallback:u:i": b"\xc3\x01"},
                encoders={"uemb:encoder:u": "ab"},
            )
        )
        with redis.client() as client:
            assert client.get("uemb:u:i:42") == vector
            assert client.get("uemb:epoch:0") == kv_prefix(5, 0)
            assert client.get("uemb:watermark:0") == mark[WATERMARK]
            assert client.get("uemb:app") == b"app"
            assert json.loads(client.get("uemb:current")) == {"user_version": "u", "item_version": "i", "offset": 7}
            assert client.get("uemb:fallback:u:i") == b"\xc3\x01"
            assert client.get("uemb:encoder:u") == b"ab"
            assert json.loads(client.get("uemb:meta"))["partitions"] == 1
            assert len(client.get("uemb:rebuild:0")) == 16
            assert client.dbsize() == 9

    async def test_public_keys_go_with_what_they_show(self, redis: RedisServer, kv: RedisKV) -> None:
        await kv.update_meta(lambda meta: replace(meta, current=Serving("u", "i", 7), encoders={"uemb:encoder:u": "a"}))
        await kv.update_meta(lambda meta: replace(meta, current=None, encoders={"uemb:encoder:v": "b"}))
        with redis.client() as client:
            assert client.exists("uemb:current", "uemb:encoder:u") == 0
            assert client.get("uemb:encoder:v") == b"b"
            assert client.get("uemb:app") == b"app"

    async def test_nothing_ever_expires(self, redis: RedisServer, kv: RedisKV) -> None:
        for revision in range(3):
            await kv.put(0, {b"k%d" % i: entry(5, revision) for i in range(20)} | watermark(5, revision))
        await kv.put(0, {b"k0": kv_prefix(5, 9)})
        for _ in range(2):
            await kv.ask_rebuild(0)
        await kv.rebuild_done(0, b"another")
        await kv.update_meta(lambda meta: replace(meta, current=Serving("u", "i", 7), encoders={"uemb:encoder:u": "a"}))
        await kv.close_partition(0)
        with redis.client() as client:
            keys = list(client.scan_iter(count=1000))
            assert len(keys) == 20 + 2 + 1 + 4, "claim, watermark; request; shared record and what it shows"
            assert {client.pttl(key) for key in keys} == {-1}
            assert client.info("stats")["expired_keys"] == 0

    async def test_partitions_share_the_keys_of_users(self, kv: RedisKV) -> None:
        await kv.open_partition(1)
        await kv.put(0, {b"uemb:u:i:42": entry(5, 1)})
        assert await kv.get(1, [b"uemb:u:i:42"]) == [entry(5, 1)]

    async def test_databases_of_a_server_are_apart(self, redis: RedisServer, kv: RedisKV) -> None:
        other = RedisKV(replace(at(redis), db=3))
        await other.open_partition(0)
        assert await other.get(0, [CLAIM]) == [None]
        await other.close()


class TestScripts:
    """Compare and set on the server."""

    async def test_a_server_may_forget_the_script_at_any_time(self, redis: RedisServer, kv: RedisKV) -> None:
        with redis.client() as client:
            for revision in range(1, 4):
                client.script_flush()
                assert client.script_exists(PUT.sha) == [False]
                assert await kv.put(0, {b"k": entry(5, revision)}) == 0
                assert client.script_exists(PUT.sha) == [True], "the hash is not the server's"
                assert await kv.put(0, {b"k": entry(5, revision)}) == 0
            client.script_flush()
            await kv.update_meta(lambda meta: replace(meta, app="other"))
            client.script_flush()
            await kv.ask_rebuild(0)
            await kv.rebuild_done(0, await kv.rebuild_request(0) or b"")
        assert await kv.get(0, [b"k"]) == [entry(5, 3)]
        assert await kv.rebuild_request(0) is None

    async def test_the_script_is_sent_once(self, redis: RedisServer, kv: RedisKV) -> None:
        for revision in range(5):
            await kv.put(0, {b"k": entry(5, revision)})
        with redis.client() as client:
            calls = client.info("commandstats")
        assert calls["cmdstat_eval"]["calls"] == 2, "the shared record's and this one"
        assert calls["cmdstat_evalsha"]["calls"] == 7

    async def test_the_claim_alone_fences(
        self, redis: RedisServer, kv: RedisKV, make_kv: Callable[..., RedisKV]
    ) -> None:
        await kv.put(0, {b"k": entry(5, 1)})
        other = make_kv(redis)
        await claim(other, 6)
        with pytest.raises(Fenced, match="epoch 6, ours is 5"):
            await kv.put(0, {b"new": entry(5, 1)})
        assert await kv.get(0, [b"k", b"new"]) == [entry(5, 1), None]
        with pytest.raises(Fenced, match="epoch 6, ours is 5"):
            await kv.put(0, {CLAIM: kv_prefix(5, 0)})
        assert await other.put(0, {b"k": entry(6, 1)}) == 0

    @pytest.mark.parametrize(
        ("higher", "lower"), [(2**53 + 1, 2**53), (MAX, MAX - 1), (0x80, 0x7F), (0x8000, 0x7FFF), (2**63, 2**63 - 1)]
    )
    async def test_claims_compare_as_unsigned_bytes(
        self, redis: RedisServer, make_kv: Callable[..., RedisKV], higher: int, lower: int
    ) -> None:
        old, new = make_kv(redis), make_kv(redis)
        await claim(old, lower)
        assert await old.put(0, {b"k": entry(lower, MAX)}) == 0
        await claim(new, higher)
        with pytest.raises(Fenced, match=f"epoch {higher}, ours is {lower}"):
            await old.put(0, {b"k2": entry(lower, MAX)})
        assert await new.put(0, {b"k": entry(higher, 0)}) == 0

    async def test_a_fenced_chunk_is_not_written_at_all(self, redis: RedisServer, kv: RedisKV) -> None:
        with redis.client() as client:
            client.set("k999", entry(6, 0))
        batch = {b"k%d" % i: entry(5, 1) for i in range(CHUNK)}
        with pytest.raises(Fenced, match="epoch 6, ours is 5"):
            await kv.put(0, batch)
        assert set(await kv.get(0, list(batch)[:-1])) == {None}

    async def test_a_claim_within_a_large_batch_comes_first(self, redis: RedisServer, kv: RedisKV) -> None:
        with redis.client() as client:
            client.flushall()
        batch = {b"k%d" % i: entry(6, 1) for i in range(2 * CHUNK)}
        assert await kv.put(0, {**batch, **watermark(6, 1), CLAIM: kv_prefix(6, 0)}) == 0
        assert await kv.get(0, [CLAIM, b"k1999"]) == [kv_prefix(6, 0), entry(6, 1)]

    @pytest.mark.parametrize("foreign", [b"", b"\xff", b"\xff" * 15])
    async def test_what_no_worker_wrote_does_not_stand_in_the_way(
        self, redis: RedisServer, kv: RedisKV, foreign: bytes
    ) -> None:
        with redis.client() as client:
            client.set("k", foreign)
        assert await kv.put(0, {b"k": entry(5, 1)}) == 0
        assert await kv.get(0, [b"k"]) == [entry(5, 1)]

    async def test_another_kind_of_value_under_a_key_of_ours_is_an_error(self, redis: RedisServer, kv: RedisKV) -> None:
        with redis.client() as client:
            client.rpush("secret-user", "x")
        with pytest.raises(StateError, match="no string under a key of ours") as caught:
            await kv.put(0, {b"a": entry(5, 1), b"secret-user": entry(5, 1)})
        assert "secret" not in str(caught.value)
        assert await kv.get(0, [b"a"]) == [None]

    async def test_two_writers_change_the_shared_record_at_once(
        self, redis: RedisServer, kv: RedisKV, make_kv: Callable[..., RedisKV]
    ) -> None:
        other, seen = make_kv(redis), []

        def slowly(meta: Meta) -> Meta:
            seen.append(meta.app)
            if len(seen) == 1:
                with redis.client() as client:  # another writer comes in between
                    client.set("uemb:meta", client.get("uemb:meta").replace(b'"app"', b'"app" ', 1))
            return replace(meta, encoders={**meta.encoders, "uemb:encoder:a": "1"})

        await kv.update_meta(slowly)
        assert len(seen) == 2, "the change was made on an old record"
        await asyncio.gather(
            *(
                writer.update_meta(
                    lambda meta, n=n: replace(meta, encoders={**meta.encoders, f"uemb:encoder:{n}": "x"})
                )
                for n, writer in enumerate([kv, other] * 10)
            )
        )
        assert len((await kv.update_meta(lambda meta: meta)).encoders) == 21
        with redis.client() as client:
            assert len(client.keys("uemb:encoder:*")) == 21

    @pytest.mark.parametrize("data", [b"{", b"[]", b"", b"\xff\xfe", b'{"format": 2}'])
    async def test_a_shared_record_that_is_not_ours_is_one_line(
        self, redis: RedisServer, kv: RedisKV, data: bytes
    ) -> None:
        with redis.client() as client:
            client.set("uemb:meta", data)
        with pytest.raises(StateError, match=r"^uemb:meta of redis://[^\n]+$"):
            await kv.update_meta(lambda meta: meta)
        with pytest.raises(StoreError):
            RedisReader(at(redis))


class TestLoss:
    """A store that no longer holds what this writer wrote."""

    async def test_a_wiped_store_is_not_filled_anew(
        self, redis: RedisServer, kv: RedisKV, make_kv: Callable[..., RedisKV]
    ) -> None:
        await kv.put(0, {b"k": entry(5, 1), **watermark(5, 1)})
        with redis.client() as client:
            client.flushall()
            for _ in range(2):
                with pytest.raises(StoreLost, match="lost what was written to partition 0") as caught:
                    await kv.put(0, {b"k": entry(5, 2)})
                assert not caught.value.retriable
                assert client.dbsize() == 0
        await kv.close_partition(0)
        await claim(kv, 6)
        assert await kv.put(0, {b"k": entry(6, 2), **watermark(6, 1)}) == 0

    async def test_a_claim_in_place_takes_a_wiped_store(self, redis: RedisServer, kv: RedisKV) -> None:
        await kv.put(0, {b"k": entry(5, 1), **watermark(5, 1)})
        with redis.client() as client:
            client.flushall()
        await claim(kv, 6)
        assert await kv.put(0, {b"k": entry(6, 1)}) == 0

    @pytest.mark.parametrize(
        "older",
        [
            {CLAIM: kv_prefix(4, 0)},
            {CLAIM: b"short"},
            {WATERMARK: watermark(5, 2)[WATERMARK]},
            {WATERMARK: watermark(4, 9)[WATERMARK]},
            {WATERMARK: b""},
        ],
    )
    async def test_a_store_that_was_set_back_to_an_older_copy(
        self, redis: RedisServer, kv: RedisKV, older: dict[bytes, bytes]
    ) -> None:
        for sequence in range(1, 4):
            await kv.put(0, watermark(5, sequence))
        with redis.client() as client:
            client.mset(older)
        with pytest.raises(StoreLost):
            await kv.put(0, {b"k": entry(5, 1)})
        assert await kv.get(0, [b"k"]) == [None]

    async def test_a_refused_watermark_is_no_loss(self, redis: RedisServer, kv: RedisKV) -> None:
        assert await kv.put(0, watermark(5, 7)) == 0
        assert await kv.put(0, watermark(5, 3)) == 1
        assert await kv.put(0, {b"k": entry(5, 1)}) == 0
        with redis.client() as client:
            client.mset(watermark(5, 5))
        with pytest.raises(StoreLost):
            await kv.put(0, {b"k": entry(5, 1)})

    async def test_a_partition_that_others_claimed_meanwhile_is_no_loss(
        self, redis: RedisServer, kv: RedisKV, make_kv: Callable[..., RedisKV]
    ) -> None:
        await kv.put(0, watermark(5, 7))
        other = make_kv(redis)
        await claim(other, 6)
        await other.put(0, watermark(6, 1))
        await kv.close_partition(0)
        await claim(kv, 7)
        assert await kv.put(0, {b"k": entry(7, 1)}) == 0
        assert await kv.put(0, watermark(7, 1)) == 0


class TestServer:
    """What servers do to their clients."""

    async def test_nobody_there(self, redis: RedisServer, kv: RedisKV) -> None:
        redis.kill()
        with pytest.raises(StoreError, match=r"^the store at redis://127\.0\.0\.1:\d+/0 can't be reached") as caught:
            await kv.put(0, {b"k": entry(5, 1)})
        assert caught.value.retriable
        assert "\n" not in str(caught.value)
        with pytest.raises(StoreError, match="can't be reached"):
            RedisReader(at(redis))

    async def test_a_restarted_server_is_found_again(self, make_redis: Callable[..., RedisServer]) -> None:
        server = make_redis(appendonly="yes", appendfsync="always")
        kv = RedisKV(at(server))
        await claim(kv, 5)
        await kv.put(0, {b"k": entry(5, 1)})
        for down in (True, False):
            server.kill()
            if down:
                with pytest.raises(StoreError, match="can't be reached"):
                    await kv.put(0, {b"k": entry(5, 2)})
            server.start()
            assert await kv.put(0, {b"k": entry(5, 2)}) == 0, "a dropped connection is made anew without an error"
            assert await kv.get(0, [b"k"]) == [entry(5, 2)]
        await kv.close()

    async def test_a_server_that_came_back_empty_has_lost_the_partition(self, redis: RedisServer, kv: RedisKV) -> None:
        redis.kill()
        redis.start()
        with pytest.raises(StoreLost):
            await kv.put(0, {b"k": entry(5, 2)})

    async def test_out_of_memory_passes(self, redis: RedisServer, kv: RedisKV) -> None:
        await kv.put(0, {b"k": entry(5, 1)})
        with redis.client() as client:
            client.config_set("maxmemory", "1")
            with pytest.raises(StoreError, match="out of memory: raise its maxmemory") as caught:
                await kv.put(0, {b"k": entry(5, 2), b"l": entry(5, 1)})
            assert caught.value.retriable
            assert await kv.get(0, [b"k", b"l"]) == [entry(5, 1), None]
            client.config_set("maxmemory", "0")
        assert await kv.put(0, {b"k": entry(5, 2), b"l": entry(5, 1)}) == 0

    async def test_a_slow_server_is_given_up_in_time(self, redis: RedisServer, make_kv: Callable[..., RedisKV]) -> None:
        kv = make_kv(redis, timeout_s=0.2)
        await claim(kv, 5)
        redis.pause()
        with pytest.raises(StoreError, match="did not answer in time") as caught:
            await kv.put(0, {b"k": entry(5, 1)})
        assert caught.value.retriable
        redis.resume()
        assert await kv.put(0, {b"k": entry(5, 1)}) == 0, "an answer that came too late was taken for this one's"
        assert await kv.get(0, [CLAIM]) == [kv_prefix(5, 0)]

    async def test_a_put_that_was_cancelled_leaves_nothing_behind(self, redis: RedisServer, kv: RedisKV) -> None:
        redis.pause()
        put = asyncio.create_task(kv.put(0, {b"k": entry(5, 1)}))
        await asyncio.sleep(0.05)
        put.cancel()
        with pytest.raises(asyncio.CancelledError):
            await put
        redis.resume()
        assert await kv.get(0, [CLAIM]) == [kv_prefix(5, 0)]

    async def test_an_answer_that_was_lost_changes_nothing(
        self, redis: RedisServer, make_kv: Callable[..., RedisKV]
    ) -> None:
        with HalfOpenProxy(redis.port) as proxy:
            kv, changes = RedisKV(replace(at(redis), port=proxy.port)), []
            await claim(kv, 5)
            proxy.lose_answer_to(b"EVAL")
            assert await kv.put(0, {b"k": entry(5, 1, b"first"), **watermark(5, 1)}) == 0
            assert proxy.lost == 1, "the fault did not fire"
            assert await kv.put(0, {b"k": entry(5, 2)}) == 0

            def add(meta: Meta) -> Meta:
                changes.append(meta)
                return replace(meta, partitions=(meta.partitions or 0) + 1)

            await kv.update_meta(add)
            proxy.lose_answer_to(b"EVAL")
            assert (await kv.update_meta(add)).partitions == 2
            assert proxy.lost == 2, "the fault did not fire"
            assert len(changes) == 2, "a change that was made was made again"
            await kv.close()

    async def test_a_name_that_stands_for_another_server_after_a_failover(
        self, redis: RedisServer, make_redis: Callable[..., RedisServer]
    ) -> None:
        other = make_redis()
        with HalfOpenProxy(redis.port) as proxy:
            kv = RedisKV(replace(at(redis), port=proxy.port))
            await claim(kv, 5)
            with redis.client() as client:
                client.replicaof("127.0.0.1", other.port)
            proxy.target = other.port
            with pytest.raises(StoreError, match="read-only replica") as caught:
                await kv.put(0, {b"k": entry(5, 1)})
            assert caught.value.retriable
            with pytest.raises(StoreLost):  # the other was no replica of it
                await kv.put(0, {b"k": entry(5, 1)})
            await claim(kv, 6)
            assert await kv.put(0, {b"k": entry(6, 1)}) == 0
            await kv.close()
        with other.client() as client:
            assert client.get("k") == entry(6, 1)

    async def test_a_busy_script_passes(self, redis: RedisServer, kv: RedisKV) -> None:
        with redis.client() as client:
            client.config_set("busy-reply-threshold", "10")
            loop = asyncio.create_task(asyncio.to_thread(_run_until_killed, redis))
            await asyncio.sleep(0.2)
            with pytest.raises(StoreError, match="busy with another client's script") as caught:
                await kv.put(0, {b"k": entry(5, 1)})
            assert caught.value.retriable
            client.script_kill()
            await loop
        assert await kv.put(0, {b"k": entry(5, 1)}) == 0

    async def test_a_replica_is_refused_by_name(
        self, redis: RedisServer, make_redis: Callable[..., RedisServer], make_kv: Callable[..., RedisKV]
    ) -> None:
        replica = make_redis(replicaof=f"127.0.0.1 {redis.port}")
        kv = make_kv(replica)
        with pytest.raises(StoreError, match=r"redis://127\.0\.0\.1:\d+/0 is a read-only replica: name its primary"):
            await kv.update_meta(lambda meta: meta)
        await kv.open_partition(0)
        with pytest.raises(StoreError, match="read-only replica"):
            await kv.put(0, {b"k": entry(5, 1)})

    async def test_a_cluster_is_refused(
        self, make_redis: Callable[..., RedisServer], make_kv: Callable[..., RedisKV]
    ) -> None:
        kv = make_kv(make_redis(cluster_enabled="yes"))
        with pytest.raises(ConfigError, match=r"part of a cluster: write redis\+cluster://host:port"):
            await kv.update_meta(lambda meta: meta)
        await kv.open_partition(0)
        with pytest.raises(ConfigError, match="part of a cluster"):
            await kv.put(0, {b"k": entry(5, 1)})

    async def test_a_database_that_is_not_there(self, redis: RedisServer) -> None:
        kv = RedisKV(replace(at(redis), db=99))
        with pytest.raises(ConfigError, match="has no database 99"):
            await kv.update_meta(lambda meta: meta)
        await kv.close()

    @pytest.mark.parametrize(
        ("policy", "warned"), [("noeviction", False), ("allkeys-lru", True), ("volatile-ttl", True)]
    )
    async def test_a_server_that_may_evict_is_warned_of(
        self,
        make_redis: Callable[..., RedisServer],
        make_kv: Callable[..., RedisKV],
        caplog: pytest.LogCaptureFixture,
        policy: str,
        warned: bool,
    ) -> None:
        # Managed services forbid CONFIG.
        kv = make_kv(make_redis(maxmemory_policy=policy, maxmemory="100mb", rename_command="CONFIG ''"))
        for _ in range(2):
            await kv.update_meta(lambda meta: replace(meta, app="app"))
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == warned
        for warning in warnings:
            assert f"maxmemory-policy {policy}" in warning
            assert "set maxmemory-policy noeviction" in warning
            assert "100" in warning

    async def test_a_server_that_keeps_its_settings_to_itself(
        self, make_redis: Callable[..., RedisServer], make_kv: Callable[..., RedisKV], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        kv = make_kv(make_redis(rename_command="INFO ''"))
        await kv.update_meta(lambda meta: replace(meta, app="app"))
        (record,) = [r for r in caplog.records if r.name.startswith("stream")]
        assert record.levelno == logging.INFO
        assert "noeviction" in record.getMessage()


class TestLogin:
    """Users and passwords."""

    @pytest.mark.parametrize("login", ["", ":wrong-secret@", "ali:wrong-secret@"])
    async def test_a_refused_login_names_the_setting_and_no_secret(
        self, make_redis: Callable[..., RedisServer], login: str
    ) -> None:
        server = make_redis(requirepass="right-secret")
        address = parse_kv_url(f"redis://{login}127.0.0.1:{server.port}")
        assert isinstance(address, RedisAddress)
        kv = RedisKV(address)
        await kv.open_partition(0)
        calls = [lambda: kv.update_meta(lambda meta: meta), lambda: kv.put(0, {b"k": entry(1, 1)})]
        for call in calls:
            with pytest.raises(
                ConfigError, match="refused the login; check user and password in UEMB_KV_URL"
            ) as caught:
                await call()
            assert "secret" not in str(caught.value)
        with pytest.raises(ConfigError, match="refused the login") as caught:
            RedisReader(address)
        assert "secret" not in str(caught.value)
        await kv.close()

    async def test_a_password_that_the_server_has_none_for(self, redis: RedisServer) -> None:
        kv = RedisKV(replace(at(redis), password="secret"))
        with pytest.raises(ConfigError, match="refused the login") as caught:
            await kv.update_meta(lambda meta: meta)
        assert "secret" not in str(caught.value)
        await kv.close()

    @pytest.mark.parametrize("login", [":p%40ss%2F%3A%23", "ali:p%25w"])
    async def test_the_right_password_and_no_more_rights_than_are_asked_for(
        self, make_redis: Callable[..., RedisServer], caplog: pytest.LogCaptureFixture, login: str
    ) -> None:
        caplog.set_level(logging.INFO)
        server = make_redis(requirepass="p@ss/:#")
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "ali", "on", ">p%w", *GRANTS.split())
        address = parse_kv_url(f"redis://{login}@127.0.0.1:{server.port}")
        assert isinstance(address, RedisAddress)
        kv = RedisKV(address)
        await kv.update_meta(lambda meta: replace(meta, app="app", partitions=1))
        await claim(kv, 5)
        await kv.put(0, {b"uemb:u:i:42": entry(5, 1), **watermark(5, 1, time.time())})
        assert await kv.is_owned(0)
        await kv.ask_rebuild(0)
        await kv.rebuild_done(0, await kv.rebuild_request(0) or b"")
        reader = RedisReader(address)
        assert reader.get([(b"42", b"uemb:u:i:42")]) == [entry(5, 1)]
        assert reader.meta() == Meta("app", 1)
        reader.close()
        await kv.close()
        assert not [record for record in caplog.records if record.name.startswith("stream")], "something was refused"

    async def test_a_user_that_may_do_too_little(self, redis: RedisServer) -> None:
        with redis.client() as client:
            client.acl_setuser("ali", enabled=True, passwords=["+pw"], categories=["+@read"], keys=["uemb:*"])
        kv = RedisKV(replace(at(redis), username="ali", password="pw"))
        await kv.open_partition(0)
        with pytest.raises(ConfigError, match="lets its user do too little; grant "):
            await kv.put(0, {CLAIM: kv_prefix(1, 0)})
        await kv.close()


class TestTls:
    """rediss://"""

    def test_certificates_that_cant_be_read_are_named(self, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(**_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(redis_client.ssl, "create_default_context", denied)
        with pytest.raises(ConfigError, match=f"{re.escape(str(certificate))}, which can't be read: Permission denied"):
            redis_client.connection_arguments(parse_kv_url(f"rediss://h/0?ssl_ca_certs={certificate}"), 1.0)

    async def test_a_server_is_talked_to_only_with_a_certificate_of_a_known_ca(
        self, make_redis: Callable[..., RedisServer], certificate: Path
    ) -> None:
        (port,) = free_ports(1)
        key = str(certificate.with_name("key.pem"))
        make_redis(tls_port=str(port), tls_cert_file=str(certificate), tls_key_file=key, tls_auth_clients="no")
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        kv = open_writer(url)
        await kv.update_meta(lambda _: Meta("app", 1))
        await kv.open_partition(0)
        await kv.put(0, {b"k": entry(1, 1)})
        reader = open_reader(url)
        assert reader.get([(b"u", b"k")]) == [entry(1, 1)]
        reader.close()
        await kv.close()
        other, _ = make_certificate(certificate.parent, "other")
        for wrong, why in (  # no patience mends that
            (f"rediss://127.0.0.1:{port}/0", "signed by no CA that this system knows"),
            (f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={other}", r"signed not by .*other\.pem .*set ssl_ca_certs"),
            (f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}", "a certificate for another host"),
            (f"redis://127.0.0.1:{port}/0", "speaks TLS; write rediss://"),
            (f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={key}", "holds none in PEM"),
        ):
            with pytest.raises(ConfigError, match=why):
                await open_writer(wrong).update_meta(lambda meta: meta)
            with pytest.raises(ConfigError, match=why):
                open_reader(wrong)


class TestOwner:
    """Whether a worker is there."""

    @pytest.mark.parametrize(
        ("age_s", "owned"), [(0, True), (1, True), (3, True), (30, False), (-3, True), (-3600, False)]
    )
    async def test_a_young_heartbeat_means_an_owner(
        self, redis: RedisServer, kv: RedisKV, make_kv: Callable[..., RedisKV], age_s: float, owned: bool
    ) -> None:
        other = make_kv(redis)
        assert not await other.is_owned(0)
        await kv.put(0, watermark(5, 1, time.time() - age_s))
        assert await other.is_owned(0) == owned
        assert not await other.is_owned(1)

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"heartbeat_ms": null}', b"\xff"])
    async def test_a_watermark_that_says_nothing(self, kv: RedisKV, body: bytes) -> None:
        await kv.put(0, {WATERMARK: entry(5, 1, body)})
        assert not await kv.is_owned(0)

    def test_a_writer_that_was_closed_works_again_in_another_loop(self, redis: RedisServer) -> None:
        kv = RedisKV(at(redis))

        async def ask() -> None:
            await kv.ask_rebuild(0)
            await kv.close()

        for _ in range(2):
            asyncio.run(ask())


class TestReader:
    """Retrieval's side."""

    async def test_many_users_are_one_round_trip(self, redis: RedisServer, kv: RedisKV) -> None:
        entries = {b"uemb:u:i:%d" % n: entry(5, n) for n in range(5000)}
        await kv.put(0, entries)
        reader = RedisReader(at(redis), refresh_s=60)
        lookups = [(b"%d" % n, b"uemb:u:i:%d" % n) for n in range(5001)]
        with redis.client() as client:
            client.config_resetstat()
            assert reader.get(lookups) == [*entries.values(), None]
            assert reader.get([]) == []
            calls = {name: stat["calls"] for name, stat in client.info("commandstats").items()}
        assert calls.pop("cmdstat_mget") == 1
        assert set(calls) <= {"cmdstat_config|resetstat", "cmdstat_info"}
        reader.close()

    async def test_looking_at_the_shared_record_and_progress_asks_nobody(self, redis: RedisServer, kv: RedisKV) -> None:
        await kv.put(0, watermark(5, 1))
        reader = RedisReader(at(redis), refresh_s=60)
        redis.kill()
        assert reader.meta() == Meta("app", 1)
        assert reader.meta() is reader.meta()
        assert reader.watermark(b"u") == watermark(5, 1)[WATERMARK]
        reader.close()

    async def test_the_shared_record_stays_the_same_object_while_it_says_the_same(
        self, redis: RedisServer, kv: RedisKV
    ) -> None:
        reader = RedisReader(at(redis), refresh_s=0.01)
        before = reader.meta()
        await kv.put(0, watermark(5, 2))
        eventually(lambda: reader.watermark(b"u") == watermark(5, 2)[WATERMARK])
        assert reader.meta() is before
        reader.close()

    async def test_a_server_that_goes_away_and_comes_back(
        self, make_redis: Callable[..., RedisServer], caplog: pytest.LogCaptureFixture
    ) -> None:
        server = make_redis(appendonly="yes", appendfsync="always")
        kv = RedisKV(at(server))
        await kv.update_meta(lambda _: Meta("app", 1))
        await claim(kv, 5)
        await kv.put(0, {b"k": entry(5, 1), **watermark(5, 1)})
        reader = RedisReader(at(server), refresh_s=0.02)
        server.kill()
        with pytest.raises(StoreError, match="can't be reached"):
            reader.get([(b"u", b"k")])
        eventually(lambda: "what was last seen stays" in caplog.text)
        assert reader.meta() == Meta("app", 1)
        assert reader.watermark(b"u") == watermark(5, 1)[WATERMARK]
        server.start()
        assert reader.get([(b"u", b"k")]) == [entry(5, 1)]
        await kv.put(0, watermark(5, 2))
        eventually(lambda: reader.watermark(b"u") == watermark(5, 2)[WATERMARK])
        reader.close()
        await kv.close()

    async def test_a_wiped_store_keeps_its_versions_and_loses_its_progress(
        self, redis: RedisServer, kv: RedisKV
    ) -> None:
        await kv.put(0, {b"k": entry(5, 1), **watermark(5, 1)})
        reader = RedisReader(at(redis), refresh_s=0.02)
        with redis.client() as client:
            client.flushall()
        eventually(lambda: reader.watermark(b"u") is None)
        assert reader.meta() == Meta("app", 1)
        assert reader.get([(b"u", b"k")]) == [None]
        reader.close()

    async def test_a_number_of_partitions_that_changes(self, redis: RedisServer, kv: RedisKV) -> None:
        await kv.update_meta(lambda meta: replace(meta, partitions=None))
        reader = RedisReader(at(redis), refresh_s=0.02)
        assert reader.watermark(b"u") is None
        marks = {watermark_key(p).encode(): entry(5, p) for p in range(3)}
        with redis.client() as client:
            client.mset(marks)
        await kv.update_meta(lambda meta: replace(meta, partitions=3))
        users = [b"%d" % n for n in range(20)]
        eventually(lambda: [reader.watermark(u) for u in users] == [entry(5, partition_of(u, 3)) for u in users])
        reader.close()

    async def test_a_record_that_gets_damaged_leaves_the_last_one(
        self, redis: RedisServer, kv: RedisKV, caplog: pytest.LogCaptureFixture
    ) -> None:
        reader = RedisReader(at(redis), refresh_s=0.02)
        with redis.client() as client:
            client.set("uemb:meta", b"{")
        eventually(lambda: "is damaged" in caplog.text)
        assert reader.meta() == Meta("app", 1)
        reader.close()

    async def test_a_password_that_changes_is_a_store_that_is_down(self, redis: RedisServer, kv: RedisKV) -> None:
        reader = RedisReader(at(redis), refresh_s=60)
        with redis.client() as client:
            client.config_set("requirepass", "secret")
            client.client_kill_filter(_type="normal", skipme=True)
            with pytest.raises(StoreError, match="refused the login"):
                reader.get([(b"u", b"k")])
        reader.close()

    def test_a_server_without_a_store(self, redis: RedisServer) -> None:
        with pytest.raises(
            StoreError, match=r"no store at redis://127\.0\.0\.1:\d+/0: no uemb:meta there; start a worker"
        ):
            open_reader(redis.url)

    async def test_a_reader_that_nobody_closed_ends_with_its_last_user(self, redis: RedisServer, kv: RedisKV) -> None:
        reader = RedisReader(at(redis), refresh_s=0.02)
        thread = reader._thread
        assert reader.get([(b"u", CLAIM)]) == [kv_prefix(5, 0)]
        del reader
        gc.collect()
        eventually(lambda: not thread.is_alive())

    async def test_a_slow_server_is_given_up(self, redis: RedisServer, kv: RedisKV) -> None:
        reader = RedisReader(at(redis), refresh_s=60)
        redis.pause()
        with pytest.raises(StoreError, match="did not answer in time"):
            reader.get([(b"u", b"k")])
        redis.resume()
        assert reader.get([(b"u", CLAIM)]) == [kv_prefix(5, 0)]
        reader.close()


class TestRetrieval:
    """`EmbeddingReader` on this store."""

    async def test_a_store_that_is_slow_or_away_costs_no_more_than_the_deadline(
        self, redis: RedisServer, kv: RedisKV
    ) -> None:
        vector = np.float32([0.6, 0.8])
        record = EmbeddingRecord(
            user_id="42",
            epoch=5,
            revision=1,
            status="ok",
            reason="",
            history_len=2,
            unknown_items=0,
            as_of=1,
            user_embedding_version="u",
            item_embedding_version="i",
            vector=vector,
            norm=1.0,
        )
        await kv.update_meta(lambda meta: replace(meta, current=Serving("u", "i", -1)))
        await kv.put(0, {b"uemb:u:i:42": kv_prefix(5, 1) + encode(record), **watermark(5, 1, time.time() + 3600)})
        with EmbeddingReader.open(redis.url, fallback=[1.0, 0.0], timeout_s=0.2) as reader:
            answer = reader.get(42)
            assert (answer.status, answer.stale, answer.vector.tolist()) == ("ok", False, vector.tolist())
            assert reader.get(7).reason == "missing"
            redis.pause()
            assert [reader.get(42).reason for _ in range(3)] == ["timeout", "store_down", "store_down"]
            redis.resume()
            eventually(lambda: reader.get(42).status == "ok")
            redis.kill()
            eventually(lambda: reader.get(42).reason == "store_down")
            _, answers = reader.get_many([42, 7])
            assert [answer.reason for answer in answers] == ["store_down"] * 2
            assert answers[0].vector.tolist() == [1.0, 0.0]


def _run_until_killed(server: RedisServer) -> None:
    from redis.exceptions import ResponseError

    with server.client() as client, pytest.raises(ResponseError):
        client.eval("while true do end", 0)
