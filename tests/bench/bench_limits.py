"""Limits by design: one hot user with half of the traffic, and many more users than fit in memory.

    python tests/bench/bench_limits.py [--users 200000] [--seconds 20] [--json]

Prints the latency of the other users beside that of even traffic in the same run, and the worker's peak memory when
200,000 users pass through a hot cache of 10,000, beside that of a worker that may keep them all.
"""

import argparse
import json
import tempfile
import uuid
from pathlib import Path

from harness import broker

from stream.cli.bench.latency import measure_latency
from stream.cli.bench.load import Load, delete_topics
from stream.cli.bench.process import Ends
from stream.cli.bench.throughput import Setup
from stream.config import load_settings
from stream.kafka.connection import librdkafka_config

RATE = 1_500.0


def latencies(setup: Setup, seconds: float) -> dict[str, object]:
    """Latency of even traffic, then of traffic of which one user causes half."""
    system, _ = setup.worker("hot-user")
    with system:
        system.until_claimed(setup.partitions)
        measure_latency(setup, setup.kv_url("hot-user"), RATE, 3)  # warm
        return {
            name: measure_latency(setup, setup.kv_url("hot-user"), RATE, seconds, hot=share)
            for name, share in (("even", 0.0), ("half_by_one_user", 0.5))
        }


def memory(setup: Setup, hot_users: int) -> dict[str, object]:
    """Peak memory of a worker after every user has had events, most of them after others have taken its place."""
    ends = Ends(setup.client, setup.partitions)
    count = ends.count(setup.events)
    system, output = setup.worker(f"hot{hot_users}", hot_users=str(hot_users))
    with system:
        system.until_count(ends, output, count)
        ends.close()
        return {"peak_memory_bytes": system.peak_bytes(), "events": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prefix = f"uemb-limits-{uuid.uuid4().hex[:8]}"
    with broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        settings = load_settings(bootstrap_servers=bootstrap)
        hot = Setup(settings, f"{prefix}.a", Path(folder) / "a", Load())
        many = Setup(settings, f"{prefix}.b", Path(folder) / "b", Load(users=args.users, length=20))
        try:
            for setup in (hot, many):
                setup.folder.mkdir()
                setup.prepare()
            found: dict[str, object] = {"rate": RATE, "latency": latencies(hot, args.seconds)}
            many.feed(2 * args.users, 0)
            found["memory"] = {f"hot_users_{n}": memory(many, n) for n in (10_000, args.users)}
        finally:
            delete_topics(librdkafka_config(settings), prefix)
    print(json.dumps({"users": args.users, **found}, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
