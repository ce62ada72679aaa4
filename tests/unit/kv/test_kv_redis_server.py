"""Servers as they are: their settings, logins and certificates, and what a worker says of them."""

import asyncio
import logging
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from half_open import HalfOpenProxy
from kafka_broker import free_ports
from kv_entries import entry
from own_certificates import make_certificate, make_ended_certificate
from redis_server import RedisServer
from redis_writers import CLAIM, at, claim, watermark

from stream.core.records import kv_prefix
from stream.errors import ConfigError, StoreError, StoreLost
from stream.kv.protocol import Meta
from stream.kv.redis import client as redis_client
from stream.kv.redis.grants import writer
from stream.kv.redis.reader import RedisReader
from stream.kv.redis.writer import RedisKV
from stream.kv.stores import open_reader, open_writer
from stream.kv.urls import RedisAddress, parse_kv_url


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
        address = parse_kv_url(f"redis://{login}@127.0.0.1:{server.port}")
        assert isinstance(address, RedisAddress)
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "ali", "on", ">p%w", *writer(address).rules.split())
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


class TestTls:
    """rediss://"""

    def test_certificates_that_cant_be_read_are_named(self, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(**_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(ssl, "create_default_context", denied)
        with pytest.raises(ConfigError, match=f"{re.escape(str(certificate))} can't be used: Permission denied"):
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
            (f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={key}", "no certificate in PEM is in it"),
        ):
            with pytest.raises(ConfigError, match=why):
                await open_writer(wrong).update_meta(lambda meta: meta)
            with pytest.raises(ConfigError, match=why):
                open_reader(wrong)

    async def test_a_certificate_that_ended_is_called_so(
        self, make_redis: Callable[..., RedisServer], tmp_path: Path
    ) -> None:
        (port,) = free_ports(1)
        try:
            ended, key = make_ended_certificate(tmp_path, "ended")
        except FileNotFoundError:
            pytest.skip("no certificates: install openssl")
        make_redis(tls_port=str(port), tls_cert_file=str(ended), tls_key_file=str(key), tls_auth_clients="no")
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={ended}"
        with pytest.raises(ConfigError, match="certificate, or one of its CA, that has expired; renew it"):
            await open_writer(url).update_meta(lambda meta: meta)
        with pytest.raises(ConfigError, match="expired"):
            open_reader(url)


def _run_until_killed(server: RedisServer) -> None:
    from redis.exceptions import ResponseError

    with server.client() as client, pytest.raises(ResponseError):
        client.eval("while true do end", 0)
