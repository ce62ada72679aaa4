"""Store URLs: which there are, what each may hold, and that no error repeats one."""

from pathlib import Path

import pytest

from stream.errors import ConfigError, StoreError
from stream.kv.memory import MemoryStore
from stream.kv.protocol import Meta
from stream.kv.redis.writer import RedisKV
from stream.kv.stores import check_place, open_reader, open_writer
from stream.kv.urls import MemoryAddress, RedisAddress, masked_kv_url, parse_kv_url


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("rocksdb:///var/lib/uemb/kv", "/var/lib/uemb/kv"),
        ("rocksdb:///a%20b/kv/", "/a b/kv"),
        ("ROCKSDB:///x", "/x"),
    ],
)
def test_absolute_paths(url: str, path: str) -> None:
    assert parse_kv_url(url) == ("rocksdb", Path(path))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://host", RedisAddress(False, "host", 6379, 0)),
        ("redis://host/", RedisAddress(False, "host", 6379, 0)),
        ("REDIS://Host:7000/15", RedisAddress(False, "host", 7000, 15)),
        ("rediss://host", RedisAddress(True, "host", 6379, 0)),
        ("redis://:pass@host/2", RedisAddress(False, "host", 6379, 2, None, "pass")),
        ("redis://ali:p%40ss%2F%3A%23@host:1", RedisAddress(False, "host", 1, 0, "ali", "p@ss/:#")),
        ("redis://[::1]:7000/1", RedisAddress(False, "::1", 7000, 1)),
        (
            "redis+cluster://ali:p%40s@a:7000,b,[::1]:7002",
            RedisAddress(False, "a", 7000, 0, "ali", "p@s", seeds=(("a", 7000), ("b", 6379), ("::1", 7002))),
        ),
        ("rediss+cluster://a/", RedisAddress(True, "a", seeds=(("a", 6379),))),
        ("redis://ali@h?password_file=/p", RedisAddress(False, "h", username="ali", password_file=Path("/p"))),
        ("redis://h?password_file=/p", RedisAddress(False, "h", password_file=Path("/p"))),
        (
            "rediss://h?ssl_certfile=/c&ssl_keyfile=/k&ssl_password_file=/kp&password_file=/p",
            RedisAddress(
                True,
                "h",
                certificate=Path("/c"),
                key=Path("/k"),
                key_password_file=Path("/kp"),
                password_file=Path("/p"),
            ),
        ),
        ("rediss://h/0?ssl_ca_certs=/etc/a%20b.pem", RedisAddress(True, "h", 6379, 0, ca_file=Path("/etc/a b.pem"))),
    ],
)
def test_redis_addresses(url: str, address: RedisAddress) -> None:
    assert parse_kv_url(url) == address


@pytest.mark.parametrize("name", ["films", "Films_v1.2-a", "x" * 64])
def test_names_of_stores_in_memory(name: str) -> None:
    assert parse_kv_url(f"memory://{name}") == MemoryAddress(name)


def test_an_address_shows_no_password() -> None:
    address = parse_kv_url("rediss://ali:secret@host:7000/3")
    assert str(address) == "rediss://host:7000/3"
    assert str(RedisAddress(False, "::1")) == "redis://[::1]:6379/0"
    assert "secret" not in repr(address)
    assert str(parse_kv_url("rediss+cluster://:secret@a,[::1]:7")) == "rediss+cluster://a:6379,[::1]:7"


@pytest.mark.parametrize("url", ["redis+cluster://a,b/1", "redis+cluster://a,", "redis+cluster://a:0,b"])
def test_a_cluster_without_a_host_or_with_a_database_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_kv_url(url)


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://:secret@host/0", "redis://:**********@host/0"),
        ("rediss://ali:secret@host:7/1?ssl_ca_certs=/ca", "rediss://ali:**********@host:7/1?ssl_ca_certs=/ca"),
        ("redis://host:7/1", "redis://host:7/1"),
        ("rocksdb:///a%20b/kv", "rocksdb:///a%20b/kv"),
    ],
)
def test_a_masked_url_is_the_url_without_its_password(url: str, masked: str) -> None:
    assert masked_kv_url(url) == masked


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("/var/lib", "KV url scheme '' is not supported"),
        ("", "KV url scheme '' is not supported"),
        ("leveldb://secret", "'leveldb' is not supported by this release; use rocksdb:///path or redis://"),
        ("rocksdb:relative/secret", "absolute path"),
        ("rocksdb://relative/secret", "absolute path"),
        ("rocksdb:///", "absolute path"),
        ("rocksdb:///x?secret=1", "nothing after it"),
        ("rocksdb://[secret", "can't be read"),
        ("redis://[secret", "can't be read"),
        ("redis://", "needs a host"),
        ("redis:///3", "needs a host"),
        ("redis://:secret@", "needs a host"),
        ("redis://host:secret", "port from 1 to 65535"),
        ("redis://host:0", "port from 1 to 65535"),
        ("redis://host:65536", "port from 1 to 65535"),
        ("redis://:secret/word@host", "percent-encode the password"),
        ("redis://:secret#word@host", "percent-encode the password"),
        ("redis://secret@host", "needs a password"),
        ("redis://host/secret", "number of a database"),
        ("redis://host/-1", "number of a database"),
        ("redis://host/0/1", "number of a database"),
        ("redis://host?password=secret", "no parameters"),
        ("redis://host?ssl_ca_certs=/secret", "those with ssl_ with rediss"),
        ("rediss://host?ssl_ca_certs=secret", "absolute path"),
        ("rediss://host?ssl_ca_certs=/x&ssl_ca_certs=/secret", "each once"),
        ("redis://host?secret", "no parameters but"),
        ("redis://host?ssl_certfile=/secret", "those with ssl_ with rediss"),
        ("rediss://host?ssl_certfile=secret", "ssl_certfile of a redis KV url must be an absolute path"),
        ("rediss://host?ssl_keyfile=/secret", "are of its ssl_certfile; name that, too"),
        ("rediss://host?ssl_password=secret", "no parameters but"),
        ("redis://:secret@host?password_file=/secret", "a password or a password_file, not both"),
        ("redis://host?password_file=", "password_file of a redis KV url must be an absolute path"),
        ("memory:secret", "memory://name"),
        ("memory://", "memory://name"),
        ("memory:///secret", "memory://name"),
        ("memory://x/secret", "memory://name"),
        ("memory://secret@x", "memory://name"),
        ("memory://x?secret=1", "memory://name"),
        (f"memory://{'secret' * 11}", "memory://name"),
    ],
)
def test_anything_else_is_one_line_without_the_url(url: str, says: str) -> None:
    for call in (parse_kv_url, open_writer, open_reader):
        with pytest.raises(ConfigError) as caught:
            call(url)
        assert says in str(caught.value)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_ca_file_must_be_there(tmp_path: Path) -> None:
    url = f"rediss://:secret@127.0.0.1:1?ssl_ca_certs={tmp_path}/none.pem"
    for call in (open_writer, open_reader):
        with pytest.raises(ConfigError, match=r"^ssl_ca_certs in UEMB_KV_URL \S+none\.pem can't be used: No such file"):
            call(url)


async def test_the_same_url_writes_and_reads(tmp_path: Path) -> None:
    url = f"rocksdb://{tmp_path}/kv"
    kv = open_writer(url, lock_patience_s=1)
    assert not (tmp_path / "kv").exists()
    await kv.update_meta(lambda _: Meta("app", 1))
    reader = open_reader(url)
    assert reader.meta() == Meta("app", 1)
    reader.close()
    await kv.close()


def test_a_redis_writer_is_made_without_a_server() -> None:
    assert isinstance(open_writer("redis://:secret@127.0.0.1:1"), RedisKV)


def test_a_store_in_memory_that_nobody_made() -> None:
    for call in (open_writer, open_reader):
        with pytest.raises(StoreError, match=r"^no store at memory://films: make a MemoryStore[^\n]+$"):
            call("memory://films")


def test_a_worker_refuses_a_store_in_memory() -> None:
    store = MemoryStore("i", "u", fallback=[1.0])
    with pytest.raises(ConfigError, match=r"^UEMB_KV_URL: [^\n]+ use rocksdb:///path or redis://host:port/db$"):
        check_place(store.url)
