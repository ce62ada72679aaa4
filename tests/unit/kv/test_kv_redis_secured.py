"""Redis with client certificates, access lists and passwords in files: by workers, readers and `uemb doctor` alike."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster_writers import at as at_cluster
from kafka_broker import free_ports
from kv_entries import entry, eventually
from own_certificates import make_certificate, make_ended_certificate
from redis_cluster import RedisCluster
from redis_server import RedisServer
from secured_broker import KEY_PASSWORD

from stream.errors import ConfigError, StoreError
from stream.findings import Status
from stream.kv.checkup import look_at_store
from stream.kv.protocol import Meta
from stream.kv.redis import grants
from stream.kv.redis.cluster_reader import ClusterReader
from stream.kv.redis.cluster_writer import ClusterKV
from stream.kv.stores import open_reader, open_writer
from stream.kv.urls import RedisAddress, parse_kv_url

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a server and of its clients."""
    folder = tmp_path_factory.mktemp("redis-secured")
    make_certificate(folder, "server", days=90)
    make_certificate(folder, "client", KEY_PASSWORD)
    make_certificate(folder, "second")
    make_certificate(folder, "other")
    make_ended_certificate(folder, "ended")
    (folder / "trusted.pem").write_text(
        "".join((folder / f"{n}.pem").read_text() for n in ("client", "second", "ended"))
    )
    (folder / "key-password").write_text(f"{KEY_PASSWORD}\n")
    return folder


@pytest.fixture
def port(make_redis: Callable[..., RedisServer], folder: Path) -> int:
    """Of a server that demands a certificate of its clients."""
    (port,) = free_ports(1)
    make_redis(
        tls_port=str(port),
        tls_cert_file=str(folder / "server.pem"),
        tls_key_file=str(folder / "server-key.pem"),
        tls_ca_cert_file=str(folder / "trusted.pem"),
        tls_auth_clients="yes",
    )
    return port


def url(folder: Path, port: int, **files: str) -> str:
    query = "&".join(f"{name}={folder / file}" for name, file in {"ssl_ca_certs": "server.pem", **files}.items())
    return f"rediss://127.0.0.1:{port}/0?{query}"


CLIENT = {"ssl_certfile": "client.pem", "ssl_keyfile": "client-key.pem", "ssl_password_file": "key-password"}
FAULTS = {
    "no certificate": ({}, "demands a client's certificate; set ssl_certfile and ssl_keyfile in UEMB_KV_URL"),
    "another certificate": (
        {"ssl_certfile": "other.pem", "ssl_keyfile": "other-key.pem"},
        "refuses the certificate in ssl_certfile of UEMB_KV_URL",
    ),
    "an ended certificate": (
        {"ssl_certfile": "ended.pem", "ssl_keyfile": "ended-key.pem"},
        "refuses the certificate in ssl_certfile of UEMB_KV_URL, which has expired; renew it",
    ),
    "another key": ({**CLIENT, "ssl_keyfile": "other-key.pem"}, "ssl_certfile in UEMB_KV_URL"),
    "another key password": (
        {**CLIENT, "ssl_password_file": "server.pem"},
        "or ssl_password_file in UEMB_KV_URL is wrong",
    ),
    "no such key": ({**CLIENT, "ssl_keyfile": "none.pem"}, "ssl_keyfile in UEMB_KV_URL"),
    "no such password": ({**CLIENT, "ssl_password_file": "none"}, "ssl_password_file in UEMB_KV_URL"),
    "another CA": ({**CLIENT, "ssl_ca_certs": "other.pem"}, "set ssl_ca_certs in UEMB_KV_URL"),
}


async def test_the_certificate_of_a_client(folder: Path, port: int) -> None:
    where = url(folder, port, **CLIENT)
    await written(open_writer(where))
    reader = open_reader(where)
    assert reader.get([(b"u", b"uemb:u:i:u")]) == [entry(1, 1)]
    reader.close()
    found = look_at_store(where).findings
    assert [(f.status, "more day" in f.detail) for f in found] == [
        (Status.OK, False),
        (Status.WARNING, True),  # the client's, made for two days
        (Status.OK, True),
    ], found
    assert found[1].detail.startswith(f"ssl_certfile in UEMB_KV_URL {folder}/client.pem is valid for 1 more day, until")


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_of_certificates_names_the_parameter(fault: str, folder: Path, port: int) -> None:
    files, says = FAULTS[fault]
    where = url(folder, port, **files)

    async def write() -> None:
        kv = open_writer(where)
        try:
            await kv.update_meta(lambda _: Meta("app", 1))
        finally:
            await kv.close()

    for call in (lambda: open_reader(where), lambda: look_at_store(where)):
        with pytest.raises(ConfigError) as caught:
            call()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        await write()
    assert says in str(caught.value)


async def test_a_certificate_that_is_replaced_is_shown_by_the_next_connection(
    make_redis: Callable[..., RedisServer], folder: Path, tmp_path: Path
) -> None:
    """Both clients; the server trusts the second alone by then."""
    (port,) = free_ports(1)
    trusted = tmp_path / "trusted.pem"
    for name, file in (("client", "client"), ("key", "client-key")):
        replace_file(tmp_path / f"{name}.pem", folder / f"{file}.pem")
    replace_file(trusted, folder / "client.pem")
    server = make_redis(
        tls_port=str(port),
        tls_cert_file=str(folder / "server.pem"),
        tls_key_file=str(folder / "server-key.pem"),
        tls_ca_cert_file=str(trusted),
        tls_auth_clients="yes",
    )
    files = {"ssl_certfile": tmp_path / "client.pem", "ssl_keyfile": tmp_path / "key.pem"}
    where = url(folder, port, ssl_password_file="key-password") + "".join(f"&{n}={f}" for n, f in files.items())
    kv = open_writer(where)
    await kv.update_meta(lambda _: Meta("app", 1))
    reader = open_reader(where)
    for name, file in (("client", "second"), ("key", "second-key")):
        replace_file(tmp_path / f"{name}.pem", folder / f"{file}.pem")
    replace_file(trusted, folder / "second.pem")
    with server.client() as client:
        client.config_set("tls-ca-cert-file", str(trusted))
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await kv.update_meta(lambda meta: replace(meta, partitions=2))
    eventually(lambda: reader.meta().partitions == 2)
    reader.close()
    await kv.close()


@pytest.mark.parametrize("user", ["ali", ""])
async def test_a_password_in_a_file_is_read_at_each_login(
    user: str, make_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    server = make_redis(requirepass="first-6")
    file = tmp_path / "password"
    file.write_text("first-6\n")
    name = user or "default"
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", name, "on", ">first-6", *(writer_rules(server.url) if user else ()))
    where = f"redis://{user + '@' if user else ''}127.0.0.1:{server.port}/0?password_file={file}"
    kv = open_writer(where)
    await kv.update_meta(lambda _: Meta("app", 1))
    reader = open_reader(where)
    assert look_at_store(where).findings[0].status is Status.OK
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", name, ">second-6", "<first-6")
        file.write_text("second-6\n")
        server.password = server.password if user else "second-6"
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await kv.update_meta(lambda meta: replace(meta, partitions=2))
    eventually(lambda: reader.meta().partitions == 2)
    file.unlink()
    with server.client() as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    with pytest.raises(StoreError, match="password_file in UEMB_KV_URL"):  # which a worker waits for
        await kv.update_meta(lambda meta: replace(meta, partitions=3))
    reader.close()
    await kv.close()


async def test_a_wrong_or_missing_password_file_is_named(
    make_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    server = make_redis(requirepass="right-6")
    file = tmp_path / "password"
    where = f"redis://127.0.0.1:{server.port}/0?password_file={file}"
    for content, says in (
        (None, rf"^password_file in UEMB_KV_URL: {file} can't be read"),
        ("", rf"^password_file in UEMB_KV_URL: {file} is empty"),
        ("wrong-6", "refused the login; check user and password_file in UEMB_KV_URL"),
    ):
        if content is not None:
            file.write_text(content)
        for call in (lambda: open_reader(where), lambda: look_at_store(where)):
            with pytest.raises(ConfigError, match=says) as caught:
                call()
            assert "wrong-6" not in str(caught.value)


async def test_a_cluster_with_a_password_file(cluster: RedisCluster, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("pw-6\n")
    for number in range(3):
        cluster.call(number, "ACL", "SETUSER", "ali", "on", ">pw-6", *writer_rules(cluster.url), "+ping")
    address = at_cluster(cluster, "ali@", f"?password_file={file}")
    kv = ClusterKV(address)
    await written(kv)
    reader = ClusterReader(address)
    assert reader.get([(b"u", b"uemb:u:i:u")]) == [entry(1, 1)]
    reader.close()
    where = cluster.url.replace("://", "://ali@") + f"?password_file={file}"
    assert "may be written to" in (await asyncio.to_thread(look_at_store, where)).findings[0].detail


# -- what doctor says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["set", "eval"])
def test_doctor_tells_of_a_user_who_may_not_write(missing: str, redis: RedisServer) -> None:
    with redis.client() as client:
        client.execute_command("ACL", "SETUSER", "ali", "on", ">pw", *writer_rules(redis.url), f"-{missing}")
        client.set("uemb:other", "x")
    where = f"redis://ali:pw@127.0.0.1:{redis.port}/0"
    with pytest.raises(ConfigError, match=rf"does not let its user run {missing}; grant \+{missing} "):
        look_at_store(where)
    assert "written" not in look_at_store(where, to_write=False).findings[0].detail
    with redis.client() as client:
        assert client.keys() == [b"uemb:other"]


def writer_rules(url: str) -> list[str]:
    address = parse_kv_url(url)
    assert isinstance(address, RedisAddress)
    return grants.writer(address).rules.split()


async def written(kv: Any) -> None:
    await kv.update_meta(lambda _: Meta("app", 1))
    await kv.open_partition(0)
    assert await kv.put(0, {b"uemb:u:i:u": entry(1, 1)}) == 0
    await kv.close()


def replace_file(file: Path, by: Path) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(by.read_bytes())
    os.replace(new, file)
