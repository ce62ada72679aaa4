"""Quiet and busy traffic: what a running worker costs at a rate, and how long an event takes to be readable.

    python tests/bench/bench_rates.py [--rates 0,50,500,2000] [--seconds 20] [--json]

On a Kafka of its own, 4 partitions, users with 100 interactions. The rate is kept whatever becomes of the events (open
loop); latency is from the send to the moment at which another process reads the vector.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import broker

from stream.cli.bench.latency import measure_latency
from stream.cli.bench.load import Load
from stream.cli.bench.process import System
from stream.cli.bench.throughput import Setup
from stream.config import load_settings

_SETTLE_S = 3.0


def measure(setup: Setup, system: System, kv_url: str, rate: float, seconds: float) -> dict[str, Any]:
    time.sleep(_SETTLE_S)
    before = system.mark()
    if rate:
        found = measure_latency(setup, kv_url, rate, seconds)
    else:
        time.sleep(seconds)
        found = {}
    after = system.mark()
    cpu_s = after.cpu_s - before.cpu_s
    events = rate * seconds
    return {
        "rate": rate,
        "cpu_percent": round(100 * cpu_s / (after.at_s - before.at_s), 1),
        "cpu_us_per_event": round(1e6 * cpu_s / events) if events else None,
        **{name: round(value, 1) for name, value in found.items() if name.endswith("_ms")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="0,50,500,2000")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = []
    with broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        settings = load_settings(bootstrap_servers=bootstrap)
        setup = Setup(settings, "rates", Path(folder), Load())
        setup.prepare()
        system, _ = setup.worker("rates")
        with system:
            system.until_claimed(setup.partitions)
            kv_url = setup.kv_url("rates")
            measure(setup, system, kv_url, 500, 3)  # readers and writers are warm
            for rate in map(float, args.rates.split(",")):
                found.append(measure(setup, system, kv_url, rate, args.seconds))
                if not args.json:
                    print(found[-1], flush=True)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
