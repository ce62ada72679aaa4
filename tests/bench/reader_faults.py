"""How long a reader's answers take while its store fails: a probe asks without a pause and times each answer.

On a cluster one of three servers fails. Reasons are counted apart for users whose vectors it has, and for the others.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from half_open import HalfOpenProxy
from redis_cluster import SLOTS, RedisCluster
from redis_server import RedisServer

from stream.keys import user_cache_key
from stream.kv.redis.slots import slot_of
from stream.retrieval import AsyncEmbeddingReader
from stream.retrieval.answers import UserEmbedding
from stream.retrieval.reader import EmbeddingReader

USERS = [str(100_000 + n) for n in range(100)]
USER_VERSION, ITEM_VERSION = "mix-0123abcd", "items_v1"
#: Of the cluster's servers, the one that fails.
HIT = 1
BEFORE_S, DURING_S, AFTER_S = 0.5, 3.5, 2.0
PAUSE_S = 0.0005

Fill = Callable[[str], object]


class Store(NamedTuple):
    """A store that serves, and what breaks and mends it."""

    url: str
    hit: Callable[[], object]
    mend: Callable[[], object]


@contextmanager
def paused_redis(fill: Fill) -> Iterator[Store]:
    """SIGSTOP: connections stay open, nothing is answered."""
    with RedisServer() as server:
        fill(server.url)
        yield Store(server.url, server.pause, server.resume)


@contextmanager
def killed_redis(fill: Fill) -> Iterator[Store]:
    """SIGKILL, then another one on the same port."""
    with RedisServer() as server:
        fill(server.url)

        def mend() -> None:
            server.start()
            fill(server.url)

        yield Store(server.url, server.kill, mend)


@contextmanager
def cut_off_redis(fill: Fill) -> Iterator[Store]:
    """Connections that let nothing through any more; new ones work."""
    with RedisServer() as server, HalfOpenProxy(server.port) as proxy:
        fill(server.url)
        yield Store(f"redis://127.0.0.1:{proxy.port}/0", proxy.go_half_open, lambda: None)


@contextmanager
def _embedded(fill: Fill, *, replaced: bool) -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        url = f"rocksdb://{folder}/kv"
        fill(url)

        def remove() -> None:
            shutil.rmtree(Path(folder) / "kv")

        def rebuild() -> None:
            fill(url)

        def replace() -> None:
            remove()
            rebuild()

        yield Store(url, replace if replaced else remove, (lambda: None) if replaced else rebuild)


@contextmanager
def removed_rocksdb(fill: Fill) -> Iterator[Store]:
    """The folder is gone, and comes back with a store made anew."""
    with _embedded(fill, replaced=False) as store:
        yield store


@contextmanager
def replaced_rocksdb(fill: Fill) -> Iterator[Store]:
    """The folder is removed and at once made anew."""
    with _embedded(fill, replaced=True) as store:
        yield store


@contextmanager
def paused_in_cluster(fill: Fill) -> Iterator[Store]:
    """SIGSTOP of one of three."""
    with RedisCluster() as cluster:
        fill(cluster.url)
        yield Store(cluster.url, cluster.servers[HIT].pause, cluster.servers[HIT].resume)


@contextmanager
def killed_in_cluster(fill: Fill) -> Iterator[Store]:
    """SIGKILL of one of three; later it comes back, empty, and is filled."""
    with RedisCluster() as cluster:
        fill(cluster.url)
        yield Store(cluster.url, cluster.servers[HIT].kill, lambda: _begin_anew(cluster, fill))


@contextmanager
def emptied_in_cluster(fill: Fill) -> Iterator[Store]:
    """One of three is started anew, empty; later it is filled."""
    with RedisCluster() as cluster:
        fill(cluster.url)

        def restart() -> None:
            cluster.servers[HIT].kill()
            cluster.servers[HIT].start()

        yield Store(cluster.url, restart, lambda: fill(cluster.url))


@contextmanager
def resharded_cluster(fill: Fill) -> Iterator[Store]:
    """Slots move with their keys from another server to one of three."""
    with RedisCluster() as cluster:
        fill(cluster.url)
        yield Store(cluster.url, lambda: cluster.reshard(0, HIT, 600), lambda: None)


def _begin_anew(cluster: RedisCluster, fill: Fill) -> None:
    cluster.servers[HIT].start()
    cluster.until_ok()
    fill(cluster.url)


Fault = Callable[[Fill], Any]
FAULTS: dict[str, Fault] = {
    "Redis paused": paused_redis,
    "Redis killed": killed_redis,
    "Redis connections half-open": cut_off_redis,
    "one of a cluster paused": paused_in_cluster,
    "one of a cluster killed": killed_in_cluster,
    "one of a cluster empty": emptied_in_cluster,
    "cluster resharded": resharded_cluster,
    "RocksDB removed": removed_rocksdb,
    "RocksDB replaced": replaced_rocksdb,
}


def measure_fault(fault: Fault, face: str, fill: Fill) -> dict[str, Any]:
    """Answer times, in milliseconds, from before the fault until after it, and their reasons."""
    with fault(fill) as store, _probe(face, store.url) as answers:
        assert answers.readline() == "ready\n"
        time.sleep(BEFORE_S)
        store.hit()
        time.sleep(DURING_S)
        store.mend()
        report: dict[str, Any] = json.loads(answers.readline())
    return report


@contextmanager
def _probe(face: str, url: str) -> Iterator[IO[str]]:
    """A process of its own, so that what breaks the store takes none of the probe's time; yields what it prints."""
    with subprocess.Popen([sys.executable, __file__, face, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout


def _place(user: str, *, cluster: bool) -> str:
    """What a reason is counted under: where the user's vector was when all was well."""
    if not cluster:
        return ""
    there = slot_of(user_cache_key(user, ITEM_VERSION, USER_VERSION)) * 3 // SLOTS == HIT
    return " there" if there else " elsewhere"


async def _ask(get: Callable[[str], Awaitable[UserEmbedding]], *, cluster: bool) -> tuple[list[int], Counter[str]]:
    """Nanoseconds of each answer, and the reasons."""
    times_ns, reasons = [], Counter[str]()
    places = {user: _place(user, cluster=cluster) for user in USERS}
    assert [(await get(user)).status for user in USERS] == ["ok"] * len(USERS)
    print("ready", flush=True)
    end = time.monotonic() + BEFORE_S + DURING_S + AFTER_S
    for user in cycle(USERS):
        if time.monotonic() > end:
            break
        began = time.perf_counter_ns()
        answer = await get(user)
        times_ns.append(time.perf_counter_ns() - began)
        reasons[(answer.reason or "ok") + places[user]] += 1
        await asyncio.sleep(PAUSE_S)
    return times_ns, reasons


async def _blocking(url: str) -> tuple[list[int], Counter[str]]:
    with EmbeddingReader.open(url) as reader:

        async def get(user: str) -> UserEmbedding:
            return reader.get(user)

        return await _ask(get, cluster="cluster" in url)


async def _in_loop(url: str) -> tuple[list[int], Counter[str]]:
    async with await AsyncEmbeddingReader.open(url) as reader:
        return await _ask(reader.get, cluster="cluster" in url)


def main() -> None:
    """Probe a store, and print what was seen."""
    face, url = sys.argv[1:]
    times_ns, reasons = asyncio.run(_in_loop(url) if face == "asyncio" else _blocking(url))
    times_ms = np.array(times_ns) / 1e6
    report = {
        "answers": len(times_ms),
        "p50_ms": float(np.percentile(times_ms, 50)),
        "p99_ms": float(np.percentile(times_ms, 99)),
        "max_ms": float(times_ms.max()),
        "reasons": dict(reasons.most_common()),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
