"""The networked store on a real cluster: what holds beside the contract of every store."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster_writers import CLAIM, KEYS, WATERMARK, at, claimed, put
from kv_entries import entry, eventually
from redis_cluster import RedisCluster
from redis_server import RedisServer

from stream.core.records import kv_prefix
from stream.errors import ConfigError, Fenced, StoreError, StoreLost, StorePartlyDown
from stream.keys import META_KEY, watermark_key
from stream.kv.lookups import STORE_DOWN, BoundedLookups
from stream.kv.protocol import Meta, Serving
from stream.kv.redis.cluster_reader import ClusterReader
from stream.kv.redis.cluster_writer import ClusterKV
from stream.kv.redis.grants import writer
from stream.kv.redis.slots import SENTINELS, SLOTS, Address, sentinel_tags, slot_of
from stream.kv.urls import parse_kv_url


def test_sentinels_lie_one_in_each_band_of_slots() -> None:
    tags = sentinel_tags()
    assert [slot // 64 for slot, _ in tags] == list(range(SENTINELS))
    assert all(slot_of(f"uemb:sentinel:{{{tag}}}:7") == slot for slot, tag in tags)


class TestWriting:
    """What a worker writes to a cluster, and what it is told."""

    async def test_a_newer_claim_fences_the_whole_batch(
        self, cluster: RedisCluster, make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        old, new = await claimed(make_cluster_kv(cluster), 7), await claimed(make_cluster_kv(cluster), 8, whole=False)
        with pytest.raises(Fenced, match="epoch 8, ours is 7"):
            await put(old, 7, 2)
        assert await new.get(0, [*KEYS, WATERMARK]) == [entry(7, 1)] * (len(KEYS) + 1)

    async def test_scripts_that_every_server_forgot_are_sent_again(
        self, cluster: RedisCluster, make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        kv = await claimed(make_cluster_kv(cluster), 5)
        for number in range(3):
            cluster.call(number, "SCRIPT", "FLUSH")
        assert await put(kv, 5, 2) == 0
        assert await kv.get(0, KEYS) == [entry(5, 2)] * len(KEYS)

    async def test_public_keys_follow_the_shared_record_and_are_repaired(
        self, cluster: RedisCluster, make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        full = Meta("app", 1, Serving("u", "i", 3), {"uemb:fallback:u:i": b"f"}, {"uemb:encoder:u": "ab"})
        await make_cluster_kv(cluster).update_meta(lambda _: full)
        shown = {key: value for key, value in cluster.everything().items() if key != b"uemb:meta"}
        assert json.loads(shown.pop(b"uemb:current")) == {"user_version": "u", "item_version": "i", "offset": 3}
        assert shown == {b"uemb:app": b"app", b"uemb:fallback:u:i": b"f", b"uemb:encoder:u": b"ab"}
        await make_cluster_kv(cluster).update_meta(lambda meta: replace(meta, fallbacks={}))
        assert b"uemb:fallback:u:i" not in cluster.everything()
        kv = make_cluster_kv(cluster)
        await kv._command("DEL", "uemb:app")
        await kv.update_meta(lambda meta: meta)
        assert cluster.everything()[b"uemb:app"] == b"app"

    async def test_public_keys_that_were_lost_come_back_with_the_next_claim(
        self, cluster: RedisCluster, make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        kv = await claimed(make_cluster_kv(cluster), 5)
        for number in range(3):  # as an operator would, by mistake; one of them has the shared record, another the key
            cluster.call(number, "FLUSHALL")
            with pytest.raises(StoreLost):
                await put(kv, 5, 2)
            await kv.update_meta(lambda _: Meta("app", 1))
            await kv.put(0, {CLAIM: kv_prefix(5, 0)})
            await put(kv, 5, 2)
            assert cluster.everything()[b"uemb:app"] == b"app"

    def test_a_writer_may_go_on_in_another_event_loop(self, cluster: RedisCluster) -> None:
        kv = ClusterKV(at(cluster))

        async def use() -> None:
            await asyncio.gather(*(kv.rebuild_request(n) for n in range(4)))
            await kv.close()

        asyncio.run(use())
        asyncio.run(use())

    async def test_a_server_of_its_own_is_refused(self, redis: RedisServer) -> None:
        kv = ClusterKV(replace(parse_kv_url(redis.url), seeds=(("127.0.0.1", redis.port),)))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="not part of a cluster: write redis://"):
            await kv.update_meta(lambda meta: meta)
        await kv.close()

    async def test_no_key_expires(self, cluster: RedisCluster, make_cluster_kv: Callable[..., ClusterKV]) -> None:
        await claimed(make_cluster_kv(cluster), 5)
        assert len(cluster.everything()) > SENTINELS + len(KEYS)
        for server in cluster.servers:
            with server.client() as client:
                assert {client.pttl(key) for key in client.keys("*")} == {-1}


class TestAccess:
    """Logins, rights, TLS."""

    @pytest.fixture
    def grant(self, cluster: RedisCluster) -> Iterator[Callable[[str], None]]:
        """Lets the user ``ali``, password ``p%w``, do something on every server."""

        def grant(rights: str) -> None:
            for number in range(3):
                cluster.call(number, "ACL", "SETUSER", "ali", "reset", "on", ">p%w", *rights.split())

        yield grant
        for number in range(3):
            cluster.call(number, "ACL", "DELUSER", "ali")

    async def test_no_more_rights_are_needed_than_are_asked_for(
        self,
        cluster: RedisCluster,
        grant: Callable[[str], None],
        make_cluster_kv: Callable[..., ClusterKV],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO)
        grant(f"{writer(at(cluster)).rules} +ping")  # to one who reads, too
        kv = await claimed(make_cluster_kv(cluster, "ali:p%25w@"), 5)
        await kv.remove(0, KEYS[:10], 5)
        assert not await kv.is_owned(0)
        await kv.ask_rebuild(0)
        await kv.rebuild_done(0, await kv.rebuild_request(0) or b"")
        reader = ClusterReader(at(cluster, "ali:p%25w@"), refresh_s=0.05)
        assert reader.get([(b"u", key) for key in KEYS]) == [None] * 10 + [entry(5, 1)] * 290
        await put(kv, 5, 2)
        eventually(lambda: reader.watermark(b"u") == entry(5, 2))
        reader.close()
        assert not [record for record in caplog.records if record.name.startswith("stream")], "something was refused"

    async def test_a_wrong_password_is_refused(
        self, cluster: RedisCluster, grant: Callable[[str], None], make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        grant(writer(at(cluster)).rules)
        with pytest.raises(ConfigError, match="refused the login"):
            await claimed(make_cluster_kv(cluster, "ali:no@"), 5)
        with pytest.raises(ConfigError, match="refused the login"):
            ClusterReader(at(cluster, "ali:no@"))

    async def test_servers_that_do_not_tell_who_they_are_are_warned_of(
        self,
        cluster: RedisCluster,
        make_cluster_kv: Callable[..., ClusterKV],
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        kv = make_cluster_kv(cluster)
        ask = kv._router.ask

        async def discreet(place: Address, *commands: tuple[str, ...]) -> list[Any]:
            answers = await ask(place, *commands)
            return [each if command[0] != "INFO" else {} for command, each in zip(commands, answers, strict=True)]

        monkeypatch.setattr(kv._router, "ask", discreet)
        await claimed(kv, 5)
        warnings = [record.getMessage() for record in caplog.records if "run_id" in record.getMessage()]
        assert len(warnings) == 3
        assert "uemb kv rebuild" in warnings[0]
        cluster.call(1, "FLUSHALL")
        with pytest.raises(StoreLost):
            await put(kv, 5, 2)

    async def test_servers_are_talked_to_only_with_a_certificate_of_a_known_ca(
        self, make_cluster: Callable[..., RedisCluster], make_cluster_kv: Callable[..., ClusterKV], certificate: Path
    ) -> None:
        files = {"tls_cert_file": certificate, "tls_ca_cert_file": certificate}
        files["tls_key_file"] = certificate.with_name("key.pem")
        settings = {name: str(file) for name, file in files.items()}
        cluster = make_cluster(tls_cluster="yes", tls_auth_clients="no", **settings)
        ca = f"?ssl_ca_certs={certificate}"
        kv = await claimed(make_cluster_kv(cluster, query=ca), 5)
        reader = ClusterReader(at(cluster, query=ca))
        assert reader.get([(b"u", key) for key in KEYS]) == [entry(5, 1)] * len(KEYS)
        reader.close()
        await put(kv, 5, 2)
        with pytest.raises(ConfigError, match="signed by no CA"):
            await claimed(make_cluster_kv(cluster), 6)
        with pytest.raises(ConfigError, match="signed by no CA"):
            ClusterReader(at(cluster))


class TestReading:
    """What retrieval reads of a cluster."""

    async def test_users_of_servers_that_live_keep_their_vectors(
        self, make_cluster: Callable[..., RedisCluster], make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster()
        await claimed(make_cluster_kv(cluster), 5)
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
        living = next(key for key, third in zip(KEYS, share, strict=True) if third != 1)
        lookups_in_time = BoundedLookups(5.0)
        for _ in range(2):  # a server is no partition: of this one some users are well
            assert lookups_in_time.find(reader, [(b"u", only)], 1) == [STORE_DOWN]
            assert lookups_in_time.find(reader, [(b"u", living)], 1) == [entry(5, 1)]
        lookups_in_time.close()
        cluster.servers[1].start()

        def well() -> bool:
            try:
                return None in reader.get(lookups)
            except StoreError:
                return False

        eventually(well)
        reader.close()

    async def test_progress_is_followed_on_the_servers_that_answer(
        self, cluster: RedisCluster, make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        kv = make_cluster_kv(cluster)
        await kv.update_meta(lambda _: Meta("app", 4))
        await kv.open_partition(3)
        reader = ClusterReader(at(cluster), refresh_s=0.05)
        assert (slot_of(META_KEY) * 3 // SLOTS, slot_of(watermark_key(3)) * 3 // SLOTS) == (2, 0)
        cluster.servers[2].pause()
        try:
            with cluster.servers[0].client() as client:
                client.set(watermark_key(3), entry(5, 1))
            eventually(lambda: entry(5, 1) in reader._seen.watermarks)
        finally:
            cluster.servers[2].resume()
        reader.close()

    async def test_a_lookup_that_is_under_way_when_the_reader_closes_is_told_so(
        self, make_cluster: Callable[..., RedisCluster], make_cluster_kv: Callable[..., ClusterKV]
    ) -> None:
        cluster = make_cluster()
        await claimed(make_cluster_kv(cluster), 5, whole=False)
        reader = ClusterReader(at(cluster))
        cluster.servers[1].pause()
        lookup = asyncio.create_task(asyncio.to_thread(reader.get, [(b"u", key) for key in KEYS]))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(reader.close)
        with pytest.raises(StoreError, match="is closed"):
            await lookup
        cluster.servers[1].resume()
