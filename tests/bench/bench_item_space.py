"""Loading a large item space: seconds, private memory, and the price of looking an id up.

    python tests/bench/bench_item_space.py [--items 10000000] [--dim 16] [--json]

A space is written piece by piece to a temporary folder and loaded in a process of its own, whose anonymous memory
(RssAnon: what it holds beside mapped files) is read before and after. The peer is a dictionary of a million ids.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stream.item_writer import SpaceWriter
from stream.items import ItemSpace

PIECE = 100_000
PEER_ITEMS = 1_000_000


def memory(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def name(n: int) -> str:
    return f"sku-{n:09d}"


def timed_ns(look, keys) -> float:
    started = time.perf_counter()
    for key in keys:
        look(key, -1)
    return 1e9 * (time.perf_counter() - started) / len(keys)


def load(folder: str) -> None:
    before, started = memory("RssAnon"), time.perf_counter()
    space = ItemSpace.load(folder)
    seconds = time.perf_counter() - started
    held = memory("RssAnon") - before
    rng = np.random.default_rng(1)
    keys = [name(n).encode() for n in rng.integers(len(space), size=20_000).tolist()]
    assert [int(space.ids[space.row(key, -1)] == key) for key in keys[:1000]] == [1] * 1000
    found = {
        "items": len(space),
        "load_s": seconds,
        "private_bytes": held,
        "private_bytes_per_item": held / len(space),
        "lookup_first_ns": timed_ns(space.row, keys[1000:]),
        "lookup_again_ns": timed_ns(space.row, keys[1000:]),
        "lookup_unknown_ns": timed_ns(space.row, [key + b"x" for key in keys]),
    }
    count = min(PEER_ITEMS, len(space))
    before, started = memory("RssAnon"), time.perf_counter()
    rows = {name(n).encode(): n for n in range(count)}
    found["dict"] = {
        "items": count,
        "build_s": time.perf_counter() - started,
        "private_bytes_per_item": (memory("RssAnon") - before) / count,
        "lookup_ns": timed_ns(rows.get, [name(n).encode() for n in rng.integers(count, size=20_000).tolist()]),
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        rng = np.random.default_rng(0)
        with SpaceWriter(Path(folder) / "v1", "v1") as writer:
            for start in range(0, args.items, PIECE):
                count = min(PIECE, args.items - start)
                writer.append([name(n) for n in range(start, start + count)], rng.normal(size=(count, args.dim)))
        written_s = time.perf_counter() - started
        ended = subprocess.run(
            [sys.executable, __file__, "--load", str(writer._folder)], check=True, stdout=subprocess.PIPE
        )
    found = {"written_s": written_s, "dim": args.dim, **json.loads(ended.stdout)}
    print(json.dumps(found, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
