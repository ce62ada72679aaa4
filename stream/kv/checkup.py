"""A store as a worker's start would find it: asked, and nothing in it changed, locked or opened for writing."""

import asyncio
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from stream.kv.redis.client import REPAIR, check_kind, connection_arguments, eviction_risk, tls_files, translated
from stream.kv.redis.router import Call, Router, checked
from stream.kv.redis.scripts import SET_IF_THERE
from stream.kv.rocksdb.layout import read_meta
from stream.kv.stores import check_place
from stream.kv.urls import MemoryAddress, RedisAddress, RocksAddress, parse_kv_url
from stream.security.certificates import end_of, own_validity, validity

#: Longest wait for one answer of a server.
TIMEOUT_S: Final = 2.0
#: A key that nobody has: to set it if it is there is what a user must be allowed to, and changes nothing.
_NOBODYS: Final = "uemb:doctor"
_WRITABLE: Final = " and may be written to"
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


def look_at_store(url: str, *, to_write: bool = True) -> StoreLook:
    """Look at the store at `url`; blocking.

    Args:
        url: where it is.
        to_write: whether its login must be one that may write, as a worker's.

    Raises:
        ConfigError: a worker can't use such a store, or its login is refused, or may do too little.
        StateError: its shared record is damaged.
        StoreError: it can't be reached.
    """
    address = parse_kv_url(url)
    if isinstance(address, RocksAddress):
        return StoreLook(read_meta(address.path), look_at_folder(address.path, "UEMB_KV_URL"))
    if isinstance(address, MemoryAddress):
        check_place(url)  # which refuses it
        return StoreLook(None, [])
    return asyncio.run(_cluster(address, to_write)) if address.seeds else _server(address, to_write)


def _server(address: RedisAddress, to_write: bool) -> StoreLook:
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
            check_kind(info, address)
            if to_write:
                client.set(_NOBODYS, "", xx=True)
                client.eval(SET_IF_THERE.text, 1, _NOBODYS)
    finally:
        client.close()
    ahead_s = seconds + micros / 1e6 - asked_s
    where = f"the store at {address}"
    found = [*_risks(info, where), *_clock(ahead_s, took_s, where), *_certificates(address, [address])]
    told = f"{where} answers{_WRITABLE if to_write else ''}, {_version(info)}"
    return StoreLook(_meta(stored, address), [ok(told), *found])


async def _cluster(address: RedisAddress, to_write: bool) -> StoreLook:
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
            calls = [Call("GET", META_KEY)]
            if to_write:
                calls += [Call("SET", _NOBODYS, ("", "XX")), Call("", _NOBODYS, script=SET_IF_THERE)]
            stored, *_ = checked(await router.run(calls))
    finally:
        await router.close()
    told = (
        f"the store at {address} answers{_WRITABLE if to_write else ''}, {len(primaries)} servers with "
        f"{', '.join(sorted(versions))}"
    )
    places = [replace(address, host=primary.place.host, port=primary.place.port) for primary in primaries]
    found += await asyncio.to_thread(lambda: list(_certificates(address, places)))
    return StoreLook(_meta(stored, address), [ok(told), *found])


def _certificates(address: RedisAddress, places: Sequence[RedisAddress]) -> Iterator[Finding]:
    """How long the client's certificate and those of the servers are valid yet."""
    if not address.tls:
        return
    files = tls_files(address)
    if files.certificate is not None:
        yield own_validity(files.certificate, "ssl_certfile in UEMB_KV_URL")
    tls = files.context()
    for place in places:
        try:
            with (
                socket.create_connection((place.host, place.port), TIMEOUT_S) as connection,
                tls.wrap_socket(connection, server_hostname=place.host) as secured,
            ):
                shown = secured.getpeercert(binary_form=True)
        except OSError:  # it has just answered
            continue
        if shown is not None:
            what = f"the certificate of {place.host}:{place.port}"
            yield validity(end_of(shown), what, "have whoever runs the store renew it")


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
