"""What a batch lookup costs: `EmbeddingReader.get_many` beside fastavro reading the same records.

    python tests/bench/bench_reader.py [--json] [--users 1000] [--dim 48] [--seconds 2]

Every figure is the best of many runs on one thread, CPU and wall time apart; answers are checked before timing. The
peer, `fastavro`, decodes the same entries in the same run and does nothing else: ratios hold where absolutes drift.
"""

import argparse
import asyncio
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastavro
import numpy as np

from stream.keys import encoder_key, fallback_key, partition_of, user_cache_key, watermark_key
from stream.kv.base import Meta, Serving
from stream.kv.rocksdb import RocksKV
from stream.records import EmbeddingRecord, decode, encode, kv_prefix
from stream.retrieval import EmbeddingReader

SEED = 20
USER_VERSION, ITEM_VERSION = "mix-0123abcd", "items_v1"
PARTITIONS = 4
HEADER_BYTES = 10


def make_records(users: int, dim: int) -> list[EmbeddingRecord]:
    """Seeded records as a worker writes them."""
    random = np.random.default_rng(SEED)
    rows = random.normal(size=(users, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return [
        EmbeddingRecord(
            str(100_000 + n),
            3,
            17 + n,
            "ok",
            "",
            100,
            n % 5,
            1_700_000_000_000 + n,
            USER_VERSION,
            ITEM_VERSION,
            row,
            1.0,
        )
        for n, row in enumerate(rows.astype(np.float32))
    ]


async def fill(path: Path, records: list[EmbeddingRecord]) -> None:
    """Write the store as its workers would."""
    kv = RocksKV(path)
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


def run(users: int, dim: int, seconds: float) -> dict[str, Any]:
    """All figures, microseconds per record; ``single`` per call of `get`."""
    records = make_records(users, dim)
    bodies = [encode(record) for record in records]
    names = [record.user_id for record in records]
    schema = fastavro.parse_schema(json.loads(files("schemas").joinpath("user_embedding.v1.avsc").read_text()))

    def peer() -> list[Any]:
        return [fastavro.schemaless_reader(io.BytesIO(body[HEADER_BYTES:]), schema, schema) for body in bodies]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kv"
        asyncio.run(fill(path, records))
        with EmbeddingReader.open(f"rocksdb://{path}", timeout_s=5.0) as reader:
            vectors, answers = reader.get_many(names)
            assert [a.user_id for a in answers if a.status == "ok" and not a.stale] == names
            assert np.array_equal(vectors, np.stack([record.vector for record in records]))
            assert [raw["user_embedding"]["vector"] for raw in peer()] == [v.astype("<f4").tobytes() for v in vectors]
            figures = {
                "fastavro": measure(peer, seconds, users),
                "decode": measure(lambda: [decode(body) for body in bodies], seconds, users),
                "get_many": measure(lambda: reader.get_many(names), seconds, users),
                "single": measure(lambda: [reader.get(name) for name in names], seconds, users),
            }
    peer_us = figures["fastavro"]["wall_us"]
    return {
        "workload": {"users": users, "dim": dim, "partitions": PARTITIONS, "seed": SEED},
        "figures": figures,
        "ratio_to_fastavro": {name: figure["wall_us"] / peer_us for name, figure in figures.items()},
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "cpu": platform.machine()},
        "versions": {name: version(name) for name in ("fastavro", "numpy", "rocksdict")},
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--users", type=int, default=1000, help="records in the store and in a batch")
    parser.add_argument("--dim", type=int, default=48, help="dimension of the vectors")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each figure")
    args = parser.parse_args()
    report = run(args.users, args.dim, args.seconds)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    for name, figure in report["figures"].items():
        ratio = report["ratio_to_fastavro"][name]
        print(f"{name:10} {figure['wall_us']:7.2f} us a record ({figure['cpu_us']:.2f} us CPU), {ratio:.2f} x fastavro")
    print(
        f"get_many({args.users}) {report['figures']['get_many']['wall_us'] * args.users / 1000:.2f} ms",
        report["machine"],
    )


if __name__ == "__main__":
    main()
