"""How long a reader's answers take while its store fails: a probe asks without a pause and times each answer."""

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
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from half_open import HalfOpenProxy
from redis_server import RedisServer

from stream.retrieval import AsyncEmbeddingReader, EmbeddingReader, UserEmbedding

USER = "100000"
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


Fault = Callable[[Fill], Any]
FAULTS: dict[str, Fault] = {
    "Redis paused": paused_redis,
    "Redis killed": killed_redis,
    "Redis connections half-open": cut_off_redis,
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


async def _ask(get: Callable[[], Awaitable[UserEmbedding]]) -> tuple[list[int], Counter[str]]:
    """Nanoseconds of each answer, and the reasons."""
    times_ns, reasons = [], Counter[str]()
    assert (await get()).status == "ok"
    print("ready", flush=True)
    end = time.monotonic() + BEFORE_S + DURING_S + AFTER_S
    while time.monotonic() < end:
        began = time.perf_counter_ns()
        answer = await get()
        times_ns.append(time.perf_counter_ns() - began)
        reasons[answer.reason] += 1
        await asyncio.sleep(PAUSE_S)
    return times_ns, reasons


async def _blocking(url: str) -> tuple[list[int], Counter[str]]:
    with EmbeddingReader.open(url) as reader:

        async def get() -> UserEmbedding:
            return reader.get(USER)

        return await _ask(get)


async def _in_loop(url: str) -> tuple[list[int], Counter[str]]:
    async with await AsyncEmbeddingReader.open(url) as reader:
        return await _ask(lambda: reader.get(USER))


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
