"""Learning item vectors: seconds and peak memory of both methods, for more items than the dense part of two tables has.

    python tests/bench/bench_learning.py [--items 15000] [--events 1000000] [--json]

Each method learns from the same synthetic events in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

from stream.feed.synthetic import synthetic
from stream.learning.build import learn
from stream.learning.two_tables import HEAD_ITEMS


def run(method: str, items: int, events: int) -> None:
    rows = synthetic(users=20_000, items=items, events=events).events
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    made = learn(rows, method)  # type: ignore[arg-type]
    after = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "items": len(made.ids),
        "seconds": time.perf_counter() - started,
        "cpu_s": after.ru_utime - before.ru_utime,
        "peak_bytes": 1024 * after.ru_maxrss,
        "peak_before_bytes": 1024 * before.ru_maxrss,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=15_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        run(args.method, args.items, args.events)
        return
    found = {"items": args.items, "events": args.events, "head_items": HEAD_ITEMS}
    for method in ("ppmi", "two-tables"):
        command = [sys.executable, __file__, "--method", method, "--items", str(args.items), "--events"]
        ran = subprocess.run([*command, str(args.events)], stdout=subprocess.PIPE, text=True, check=True)
        found[method] = json.loads(ran.stdout)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{args.events:,} events, {args.items:,} items, of which two tables learn {HEAD_ITEMS:,} together")
    for method in ("ppmi", "two-tables"):
        figures = found[method]
        time_s = f"{figures['seconds']:.0f} s ({figures['cpu_s']:.0f} s of CPU)"
        memory = f"{figures['peak_bytes'] / 1e9:.1f} GB ({figures['peak_before_bytes'] / 1e9:.1f} for the events alone)"
        print(f"{method}: {figures['items']:,} items in {time_s}, peak memory {memory}")


if __name__ == "__main__":
    main()
