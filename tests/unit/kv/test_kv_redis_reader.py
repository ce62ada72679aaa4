"""Retrieval's side of the networked store, on a real server."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from kv_entries import entry, eventually
from redis_server import RedisServer
from redis_writers import CLAIM, WATERMARK, at, claim, watermark

from stream.core.records import EmbeddingRecord, encode, kv_prefix
from stream.errors import StoreError
from stream.keys import partition_of, watermark_key
from stream.kv.protocol import Meta, Serving
from stream.kv.redis.reader import RedisReader
from stream.kv.redis.writer import RedisKV
from stream.kv.stores import open_reader
from stream.retrieval.reader import EmbeddingReader


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
