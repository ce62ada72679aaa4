"""Re-embedding every user for a new item version: how fast, and what events feel of it.

    python tests/bench/bench_rollout.py [--users 200000] [--rate 3000] [--dim 64] [--hot-users 10000] [--json]

One worker with users of 100 interactions each. A version is published while events flow, paced; the latency of events
(open loop, read by another process) is measured before, meanwhile, and afterwards, when events are embedded in both
versions. Then another is published with no events.
"""

import argparse
import json
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from harness import broker

from stream.cli.bench.latency import measure_latency
from stream.cli.bench.load import Load, delete_topics
from stream.cli.bench.throughput import Setup
from stream.config import load_settings
from stream.items.space import ItemSpace
from stream.kafka.connection import librdkafka_config
from stream.rollout.client import RolloutClient


def save(setup: Setup, version: str, dim: int) -> Path:
    """A version of the same items with other vectors."""
    load, folder = setup.load, setup.folder / version
    rows = np.random.default_rng(sum(version.encode())).normal(size=(load.items, dim))
    ItemSpace.save(folder, version, [load.item_id(n) for n in range(load.items)], rows)
    return folder


def covered(control: RolloutClient, user_version: str, version: str, partitions: int) -> bool:
    control.look()
    return control.coverage.covered(user_version, version, partitions)


def done(control: RolloutClient, version: str) -> int:
    return sum(status.done for status in control.coverage.statuses.values() if status.item_version == version)


def measure(setup: Setup, rate: float, dim: int, hot_users: int) -> dict[str, Any]:
    name = "rollout"
    system, _ = setup.worker(name, hot_users=str(hot_users))

    def events(seconds: float) -> dict[str, Any]:
        at = system.mark()
        found = measure_latency(setup, setup.kv_url(name), rate, seconds)
        now = system.mark()
        return {**found, "worker_cores": round((now.cpu_s - at.cpu_s) / (now.at_s - at.at_s), 2)}

    with system:
        system.until_claimed(setup.partitions)
        settings = load_settings(
            bootstrap_servers=setup.settings.bootstrap_servers,
            app_id=f"{setup.prefix}-{name}",
            item_versions_topic=f"{setup.prefix}.{name}.item-versions",
        )
        user_version = settings.versioned_encoder.version
        control = RolloutClient(settings)
        events(5)  # warm
        before = events(20)
        control.say(control.record_of(save(setup, "second", dim), "prepare"))
        at = time.perf_counter()
        meanwhile = events(20)
        whole = not covered(control, user_version, "second", setup.partitions)
        paced = done(control, "second") / (time.perf_counter() - at)
        while not covered(control, user_version, "second", setup.partitions):
            time.sleep(0.1)
        after = events(20)
        control.say(control.record_of(save(setup, "third", dim), "prepare"))
        at, cpu = time.perf_counter(), system.mark().cpu_s
        while not covered(control, user_version, "third", setup.partitions):
            time.sleep(0.1)
        took_s = time.perf_counter() - at
        cpu_s = system.mark().cpu_s - cpu
        control.close()
    users = setup.load.users
    return {
        "latency_before": before,
        "latency_meanwhile": meanwhile,
        "latency_with_both_versions_live": after,
        "p99_ratio": round(meanwhile["p99_ms"] / before["p99_ms"], 2),
        "backfill_lasted_all_the_while": whole,
        "users_per_s_beside_events": round(paced),
        "users_per_s_idle": round(users / took_s),
        "cpu_us_per_user": round(1e6 * cpu_s / users, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--rate", type=float, default=3_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--hot-users", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prefix = f"uemb-rollout-{uuid.uuid4().hex[:8]}"
    with broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        settings = load_settings(bootstrap_servers=bootstrap)
        setup = Setup(settings, prefix, Path(folder), Load(users=args.users))
        try:
            setup.prepare()
            found = measure(setup, args.rate, args.dim, args.hot_users)
        finally:
            delete_topics(librdkafka_config(settings), prefix)
    print(json.dumps({"users": args.users, "dim": args.dim, **found}, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
