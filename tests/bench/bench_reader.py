"""What retrieval pays: the reader's two faces on all stores, and the longest waits while a store fails.

    python tests/bench/bench_reader.py [--json] [--users 1000] [--dim 48] [--seconds 2] [--faults [cluster]]

Every figure is the best of many runs, CPU and wall time apart; answers are checked before timing. One peer, `fastavro`,
decodes the same entries in the same run and does nothing else; the other, `redis.asyncio`, only fetches the bytes. So
ratios hold where absolutes drift. `--faults` measures instead how long answers take while a store is paused, killed,
cut off, removed or replaced; `default` is the deadline of 20 ms.
"""

import argparse
import asyncio
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import redis.asyncio

sys.path.insert(0, str(Path(__file__).parents[1]))

from reader_faults import FAULTS, ITEM_VERSION, USER_VERSION, measure_fault
from redis_cluster import RedisCluster
from redis_server import RedisServer, why_no_redis

from stream.core.records import EmbeddingRecord, decode, encode, kv_prefix
from stream.keys import encoder_key, fallback_key, partition_of, user_cache_key, watermark_key
from stream.kv.protocol import Meta, Serving
from stream.kv.stores import open_writer
from stream.retrieval import AsyncEmbeddingReader
from stream.retrieval.reader import EmbeddingReader

SEED = 20
PARTITIONS = 4
HEADER_BYTES = 10
TOGETHER = 100


def make_records(users: int, dim: int) -> list[EmbeddingRecord]:
    """Seeded records as a worker writes them."""
    random = np.random.default_rng(SEED)
    rows = random.normal(size=(users, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return [
        EmbeddingRecord(
            user_id=str(100_000 + n),
            epoch=3,
            revision=17 + n,
            status="ok",
            reason="",
            history_len=100,
            unknown_items=n % 5,
            as_of=1_700_000_000_000 + n,
            user_embedding_version=USER_VERSION,
            item_embedding_version=ITEM_VERSION,
            vector=row,
            norm=1.0,
        )
        for n, row in enumerate(rows.astype(np.float32))
    ]


async def fill(url: str, records: list[EmbeddingRecord]) -> None:
    """Write the store as its workers would."""
    kv = open_writer(url)
    fallback = encode(records[0])
    meta = Meta(
        "bench",
        PARTITIONS,
        Serving(USER_VERSION, ITEM_VERSION, -1),
        {fallback_key(ITEM_VERSION, USER_VERSION): fallback},
        {encoder_key(USER_VERSION): "0" * 64},
    )
    await kv.update_meta(lambda _: meta)
    for partition in range(PARTITIONS):
        await kv.open_partition(partition)
        progress = {"offsets": {}, "kafka_ms": 0, "lag_ms": 0, "heartbeat_ms": time.time_ns() // 1_000_000 + 3_600_000}
        entries = {watermark_key(partition).encode(): kv_prefix(1, 1) + json.dumps(progress).encode()}
        for record in records:
            if partition_of(record.user_id.encode(), PARTITIONS) == partition:
                key = user_cache_key(record.user_id, ITEM_VERSION, USER_VERSION).encode()
                entries[key] = kv_prefix(record.epoch, record.revision) + encode(record)
        await kv.put(partition, entries)
    await kv.close()


def measure(step: Callable[[], object], seconds: float, calls: int) -> dict[str, float]:
    """Best wall and CPU microseconds of one of the `calls` that a step stands for."""
    wall, cpu = [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(wall) < 3:
        began, used = time.perf_counter_ns(), time.process_time_ns()
        step()
        cpu.append(time.process_time_ns() - used)
        wall.append(time.perf_counter_ns() - began)
    return {"wall_us": min(wall) / 1000 / calls, "cpu_us": min(cpu) / 1000 / calls, "runs": len(wall)}


async def measure_async(step: Callable[[], Awaitable[object]], seconds: float, calls: int) -> dict[str, float]:
    """The same in an event loop."""
    wall, cpu = [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(wall) < 3:
        began, used = time.perf_counter_ns(), time.process_time_ns()
        await step()
        cpu.append(time.process_time_ns() - used)
        wall.append(time.perf_counter_ns() - began)
    return {"wall_us": min(wall) / 1000 / calls, "cpu_us": min(cpu) / 1000 / calls, "runs": len(wall)}


def faces(url: str, records: list[EmbeddingRecord], seconds: float) -> dict[str, Any]:
    """Both faces of the reader on one store, microseconds a record; `single` asks for one user at a time."""
    names = [record.user_id for record in records]
    expected = np.stack([record.vector for record in records])

    def check(vectors: Any, answers: Any) -> None:
        assert [a.user_id for a in answers if a.status == "ok" and not a.stale] == names
        assert np.array_equal(vectors, expected)

    with EmbeddingReader.open(url, timeout_s=5.0) as reader:
        check(*reader.get_many(names))
        figures = {
            "get_many": measure(lambda: reader.get_many(names), seconds, len(names)),
            "single": measure(lambda: [reader.get(name) for name in names], seconds, len(names)),
        }

    async def asyncio_face() -> None:
        async with await AsyncEmbeddingReader.open(url, timeout_s=5.0) as reader:
            check(*await reader.get_many(names))

            async def one_by_one() -> None:
                for name in names:
                    await reader.get(name)

            async def together() -> None:
                for start in range(0, len(names), TOGETHER):
                    await asyncio.gather(*map(reader.get, names[start : start + TOGETHER]))

            figures["asyncio get_many"] = await measure_async(lambda: reader.get_many(names), seconds, len(names))
            figures["asyncio single"] = await measure_async(one_by_one, seconds, len(names))
            figures[f"asyncio single, {TOGETHER} at once"] = await measure_async(together, seconds, len(names))

    asyncio.run(asyncio_face())
    return figures


async def plain_redis(url: str, records: list[EmbeddingRecord], seconds: float) -> dict[str, Any]:
    """What `redis.asyncio` takes for the bytes alone: no deadline, no record, no freshness."""
    keys = [user_cache_key(record.user_id, ITEM_VERSION, USER_VERSION) for record in records]
    client = redis.asyncio.Redis.from_url(url, protocol=2)

    async def one_by_one() -> None:
        for key in keys:
            await client.get(key)

    async def together() -> None:
        for start in range(0, len(keys), TOGETHER):
            await asyncio.gather(*map(client.get, keys[start : start + TOGETHER]))

    assert None not in await client.mget(keys)
    figures = {
        "redis.asyncio GET": await measure_async(one_by_one, seconds, len(keys)),
        f"redis.asyncio GET, {TOGETHER} at once": await measure_async(together, seconds, len(keys)),
    }
    await client.aclose()
    return figures


def decoding(records: list[EmbeddingRecord], seconds: float) -> dict[str, Any]:
    """Decoding alone, and the peer."""
    bodies = [encode(record) for record in records]
    schema = fastavro.parse_schema(json.loads(files("schemas").joinpath("user_embedding.v1.avsc").read_text()))

    def peer() -> list[Any]:
        return [fastavro.schemaless_reader(io.BytesIO(body[HEADER_BYTES:]), schema, schema) for body in bodies]

    assert [raw["user_embedding"]["vector"] for raw in peer()] == [r.vector.astype("<f4").tobytes() for r in records]
    return {
        "fastavro": measure(peer, seconds, len(records)),
        "decode": measure(lambda: [decode(body) for body in bodies], seconds, len(records)),
    }


def run(users: int, dim: int, seconds: float) -> dict[str, Any]:
    """All figures, microseconds per record."""
    records = make_records(users, dim)
    figures = decoding(records, seconds)
    with tempfile.TemporaryDirectory() as folder:
        url = f"rocksdb://{folder}/kv"
        asyncio.run(fill(url, records))
        figures |= {f"rocksdb {name}": figure for name, figure in faces(url, records, seconds).items()}
    if reason := why_no_redis():
        print(reason, file=sys.stderr)
    else:
        with RedisServer() as server:
            asyncio.run(fill(server.url, records))
            figures |= {f"redis {name}": figure for name, figure in faces(server.url, records, seconds).items()}
            figures |= asyncio.run(plain_redis(server.url, records, seconds))
        with RedisCluster() as cluster:
            asyncio.run(fill(cluster.url, records))
            figures |= {f"cluster {name}": figure for name, figure in faces(cluster.url, records, seconds).items()}
    peer_us = figures["fastavro"]["wall_us"]
    return {
        "workload": {"users": users, "dim": dim, "partitions": PARTITIONS, "seed": SEED},
        "figures": figures,
        "ratio_to_fastavro": {name: figure["wall_us"] / peer_us for name, figure in figures.items()},
        **about(),
    }


def run_faults(dim: int, only: str) -> dict[str, Any]:
    """How long answers take under each fault with `only` in its name, in milliseconds."""
    records = make_records(100, dim)
    faults = {
        f"{name}, {face}": measure_fault(fault, face, lambda url: asyncio.run(fill(url, records)))
        for name, fault in FAULTS.items()
        if only in name
        for face in ("blocking", "asyncio")
    }
    return {"faults": faults, **about()}


def about() -> dict[str, Any]:
    """Machine and versions."""
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "cpu": platform.machine()},
        "versions": {name: version(name) for name in ("fastavro", "numpy", "redis", "rocksdict")},
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--users", type=int, default=1000, help="records in the store and in a batch")
    parser.add_argument("--dim", type=int, default=48, help="dimension of the vectors")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each figure")
    parser.add_argument(
        "--faults", metavar="NAME", nargs="?", const="", help="measure waits while a store fails: all, or those of NAME"
    )
    args = parser.parse_args()
    report = run_faults(args.dim, args.faults) if args.faults is not None else run(args.users, args.dim, args.seconds)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    for name, figure in report.get("figures", {}).items():
        ratio = report["ratio_to_fastavro"][name]
        print(f"{name:34} {figure['wall_us']:7.2f} us a record ({figure['cpu_us']:.2f} us CPU), {ratio:.2f} x fastavro")
    for name, figure in report.get("faults", {}).items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in figure["reasons"].items())
        print(
            f"{name:34} p50 {figure['p50_ms']:.3f} ms, p99 {figure['p99_ms']:.2f} ms, "
            f"max {figure['max_ms']:.2f} ms of {figure['answers']} answers: {reasons}"
        )
    print(report["machine"], report["versions"])


if __name__ == "__main__":
    main()
