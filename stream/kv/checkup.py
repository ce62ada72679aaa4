"""A store as a worker's start would find it: asked, and nothing in it changed, locked or opened for writing."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.retry import Retry

from stream.findings import Finding, ok, warning
from stream.keys import META_KEY
from stream.kv.folders import look_at_folder
from stream.kv.meta import decode_meta
from stream.kv.protocol import Meta
from stream.kv.redis.client import REPAIR, check_kind, connection_arguments, eviction_risk, translated
from stream.kv.redis.router import Call, Router, checked
from stream.kv.rocksdb.layout import read_meta
from stream.kv.stores import check_place
from stream.kv.urls import MemoryAddress, RedisAddress, RocksAddress, parse_kv_url

#: Longest wait for one answer of a server.
TIMEOUT_S: Final = 2.0
#: Clocks further apart make readers call sound vectors stale.
CLOCK_S: Final = 2.0


class StoreLook(NamedTuple):
    """What was found.

    Attributes:
        meta: the shared record; None where there is none yet.
        findings: how the store stands by itself, whosever it is.
    """

    meta: Meta | None
    findings: list[Finding]


def look_at_store(url: str) -> StoreLook:
    """Look at the store at `url`; blocking.

    Raises:
        ConfigError: a worker can't use such a store, or its login is refused.
        StateError: its shared record is damaged.
        StoreError: it can't be reached.
    """
    address = parse_kv_url(url)
    if isinstance(address, RocksAddress):
        return StoreLook(read_meta(address.path), look_at_folder(address.path, "UEMB_KV_URL"))
    if isinstance(address, MemoryAddress):
        check_place(url)  # which refuses it
        return StoreLook(None, [])
    return asyncio.run(_cluster(address)) if address.seeds else _server(address)


def _server(address: RedisAddress) -> StoreLook:
    client = Redis(**connection_arguments(address, TIMEOUT_S), retry=Retry(NoBackoff(), 0))
    try:
        with translated(address):
            asked_s = time.time()
            seconds, micros = client.time()
            took_s = time.time() - asked_s
            try:
                info: Mapping[str, Any] = client.info()
            except ResponseError:  # access lists may forbid it
                info = {}
            stored: Any = client.get(META_KEY)
    finally:
        client.close()
    check_kind(info, address)
    ahead_s = seconds + micros / 1e6 - asked_s
    where = f"the store at {address}"
    found = [*_risks(info, where), *_clock(ahead_s, took_s, where)]
    return StoreLook(_meta(stored, address), [ok(f"{where} answers, {_version(info)}"), *found])


async def _cluster(address: RedisAddress) -> StoreLook:
    router = Router(address, TIMEOUT_S)
    found: list[Finding] = []
    versions = set()
    try:
        with translated(address):
            primaries = await router.primaries()
            for primary in primaries:
                memory, server = await router.ask(primary.place, ("INFO", "memory"), ("INFO", "server"))
                host, port = primary.place
                found += _risks({**server, **memory}, f"the server {host}:{port} of the store at {address}")
                versions.add(_version(server))
            (stored,) = checked(await router.run([Call("GET", META_KEY)]))
    finally:
        await router.close()
    told = f"the store at {address} answers, {len(primaries)} servers with {', '.join(sorted(versions))}"
    return StoreLook(_meta(stored, address), [ok(told), *found])


def _meta(stored: bytes | None, address: RedisAddress) -> Meta | None:
    return None if stored is None else decode_meta(stored, f"{META_KEY} of {address}", REPAIR)


def _risks(info: Mapping[str, Any], where: str) -> Iterator[Finding]:
    if (risk := eviction_risk(info, where)) is not None:
        detail, _, todo = risk.partition("; ")
        yield warning(detail, todo)


def _clock(ahead_s: float, took_s: float, where: str) -> Iterator[Finding]:
    if not -CLOCK_S <= ahead_s <= CLOCK_S + took_s:
        yield warning(
            f"the clock of {where} is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this host's",
            "set both by NTP: readers compare heartbeats with their own time",
        )


def _version(info: Mapping[str, Any]) -> str:
    name = "Valkey" if info.get("server_name") == "valkey" else "Redis"
    return f"{name} {info.get('valkey_version') or info.get('redis_version') or 'of unknown version'}"
