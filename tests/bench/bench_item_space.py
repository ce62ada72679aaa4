"""Loading a large item space: seconds, private memory, and the price of looking an id up.

    python tests/bench/bench_item_space.py [--items 10000000] [--dim 16] [--json]

A .npy of vectors and a text of ids are imported, and the space that this makes is loaded, each in a process of its own
whose anonymous memory (RssAnon: what it holds beside mapped files) is read all the while. The peer is a dictionary of
up to a million ids.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from stream.items.importer import import_items
from stream.items.space import ItemSpace

PIECE = 100_000
PEER_ITEMS = 1_000_000


def memory() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


class Watch:
    """Seconds and private memory of a block: its peak, read every 5 ms, and what stays."""

    def __enter__(self) -> "Watch":
        self._before = self._peak = memory()
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._started = time.perf_counter()
        return self

    def _read(self) -> None:
        while not self._ended.wait(0.005):
            self._peak = max(self._peak, memory())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._ended.set()
        self._reader.join()
        self.held, self.peak = memory() - self._before, self._peak - self._before


def name(n: int) -> str:
    return f"sku-{n:09d}"


def timed_ns(look, keys) -> float:
    started = time.perf_counter()
    for key in keys:
        look(key, -1)
    return 1e9 * (time.perf_counter() - started) / len(keys)


def bring_in(folder: str) -> None:
    with Watch() as watch:
        import_items(Path(folder) / "v.npy", Path(folder) / "v1", "v1", ids=Path(folder) / "ids.txt")
    print(json.dumps({"import_s": watch.seconds, "import_peak_private_bytes": watch.peak}))


def load(folder: str) -> None:
    with Watch() as watch:
        space = ItemSpace.load(Path(folder) / "v1")
    rng = np.random.default_rng(1)
    keys = [name(n).encode() for n in rng.integers(len(space), size=20_000).tolist()]
    assert [int(space.ids[space.row(key, -1)] == key) for key in keys[:1000]] == [1] * 1000
    found = {
        "items": len(space),
        "load_s": watch.seconds,
        "load_peak_private_bytes": watch.peak,
        "private_bytes": watch.held,
        "private_bytes_per_item": watch.held / len(space),
        "lookup_first_ns": timed_ns(space.row, keys[1000:]),
        "lookup_again_ns": timed_ns(space.row, keys[1000:]),
        "lookup_unknown_ns": timed_ns(space.row, [key + b"x" for key in keys]),
    }
    count = min(PEER_ITEMS, len(space))
    with Watch() as watch:
        rows = {name(n).encode(): n for n in range(count)}
    keys = [name(n).encode() for n in rng.integers(count, size=20_000).tolist()]
    found["dict"] = {
        "items": count,
        "build_s": watch.seconds,
        "private_bytes_per_item": watch.held / count,
        "lookup_first_ns": timed_ns(rows.get, keys),
        "lookup_again_ns": timed_ns(rows.get, keys),
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--in", dest="folder", help=argparse.SUPPRESS)
    parser.add_argument("--do", choices=["import", "load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        {"import": bring_in, "load": load}[args.do](args.folder)
        return
    found = {"dim": args.dim}
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        shape = (args.items, args.dim)
        vectors = np.lib.format.open_memmap(Path(folder) / "v.npy", mode="w+", dtype=np.float32, shape=shape)
        with (Path(folder) / "ids.txt").open("w") as ids:
            for start in range(0, args.items, PIECE):
                count = min(PIECE, args.items - start)
                vectors[start : start + count] = rng.normal(size=(count, args.dim))
                ids.writelines(f"{name(n)}\n" for n in range(start, start + count))
        vectors.flush()
        for step in ("import", "load"):
            command = [sys.executable, __file__, "--do", step, "--in", folder]
            found |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(found, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
