"""The networked store's writer on a real server: what holds beside every store's contract, and what goes wrong."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from kv_entries import entry
from redis_server import RedisServer
from redis_writers import CLAIM, MAX, WATERMARK, at, claim, watermark

from stream.core.records import kv_prefix
from stream.errors import Fenced, StateError, StoreError, StoreLost
from stream.kv.protocol import Meta, Serving
from stream.kv.redis.reader import RedisReader
from stream.kv.redis.scripts import PUT
from stream.kv.redis.writer import CHUNK, RedisKV


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
