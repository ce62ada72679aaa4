"""What the key-value stores cost: `put` and a reader's `get`, all stores in one run.

    python tests/bench/bench_kv.py [--json] [--seconds 2]

Entries of 300 bytes in batches of 1, 100 and 1,000; microseconds of wall time and of this process's CPU per entry, best
of many runs. Every put replaces what is stored, with a watermark beside, as a worker's does; every answer is checked
before timing. Redis, and the three servers of the cluster, are on this machine, so real ones add the network's round
trip to each batch: one to a server of its own, three to a cluster.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from kv_entries import entry, eventually
from redis_cluster import RedisCluster
from redis_server import RedisServer, why_no_redis

from stream.core.records import PREFIX_BYTES, kv_prefix
from stream.keys import epoch_key, watermark_key
from stream.kv.protocol import KVReader, KVWriter, Meta
from stream.kv.stores import open_reader, open_writer

BATCHES = (1, 100, 1000)
ENTRY_BYTES = 300
BODY = os.urandom(ENTRY_BYTES - PREFIX_BYTES)
WATERMARK = watermark_key(0).encode()


async def measure(step: Callable[[int], Awaitable[object]], seconds: float, entries: int) -> dict[str, float]:
    """Best wall and CPU microseconds per entry of a step, which is given the number of its run."""
    wall, cpu, end = [], [], time.monotonic() + seconds
    while time.monotonic() < end or len(wall) < 3:
        began, used = time.perf_counter_ns(), time.process_time_ns()
        await step(len(wall))
        cpu.append(time.process_time_ns() - used)
        wall.append(time.perf_counter_ns() - began)
    return {"wall_us": min(wall) / 1000 / entries, "cpu_us": min(cpu) / 1000 / entries, "runs": len(wall)}


async def bench(kv: KVWriter, connect: Callable[[], KVReader], seconds: float) -> dict[str, Any]:
    """Figures of one store."""
    await kv.update_meta(lambda _: Meta("bench", 1))
    await kv.open_partition(0)
    await kv.put(0, {epoch_key(0).encode(): kv_prefix(1, 0)})
    reader, revision = connect(), 0
    figures: dict[str, Any] = {}
    for size in BATCHES:
        keys = [b"uemb:mix-0123abcd:items_v1:%d" % n for n in range(size)]

        async def put(_: int, keys: list[bytes] = keys) -> None:
            nonlocal revision
            revision += 1
            refused = await kv.put(
                0, {**{key: entry(1, revision, BODY) for key in keys}, WATERMARK: entry(1, revision)}
            )
            assert refused == 0

        lookups = [(b"user", key) for key in keys]

        async def get(_: int, lookups: list[tuple[bytes, bytes]] = lookups) -> None:
            reader.get(lookups)

        figures[f"put_{size}"] = await measure(put, seconds, size)
        newest = [entry(1, revision, BODY)] * size
        eventually(lambda lookups=lookups, newest=newest: reader.get(lookups) == newest)
        figures[f"get_{size}"] = await measure(get, seconds, size)
    reader.close()
    await kv.close()
    return figures


def run(seconds: float) -> dict[str, Any]:
    """All figures, by store."""
    with tempfile.TemporaryDirectory() as folder, RedisServer() as server, RedisCluster() as cluster:
        urls = {"rocksdb": f"rocksdb://{folder}/kv", "redis": server.url, "cluster": cluster.url}
        with server.client() as client:
            server_version = client.info("server")["redis_version"]
        figures = {
            name: asyncio.run(bench(open_writer(url), lambda url=url: open_reader(url), seconds))
            for name, url in urls.items()
        }
    return {
        "figures": figures,
        "entry_bytes": ENTRY_BYTES,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "cpu": platform.machine()},
        "versions": {"redis-server": server_version, **{name: version(name) for name in ("redis", "rocksdict")}},
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each figure")
    args = parser.parse_args()
    if reason := why_no_redis():
        sys.exit(reason)
    report = run(args.seconds)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    for name in next(iter(report["figures"].values())):
        cells = [
            f"{store} {f[name]['wall_us']:8.2f} us ({f[name]['cpu_us']:.2f} CPU)"
            for store, f in report["figures"].items()
        ]
        print(f"{name:9} per entry: {', '.join(cells)}")
    print(report["machine"], report["versions"])


if __name__ == "__main__":
    main()
