"""What metrics cost: the worker scraped every so many seconds beside one that serves none, alternating, on one Kafka.

python tests/bench/bench_metrics.py [--rounds 5] [--events 300000] [--every 15] [--json]
"""

import argparse
import json
import socket
import statistics
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import broker

from stream.cli.bench.load import Load
from stream.cli.bench.process import Ends
from stream.cli.bench.throughput import Rate, Setup, measure
from stream.config import load_settings


def free_address() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{held.getsockname()[1]}"


@contextmanager
def scraped(address: str, every_s: float) -> Iterator[None]:
    """Somebody asks for the metrics as Prometheus would; nobody where there is no address."""
    done = threading.Event()

    def ask() -> None:
        while not done.wait(every_s):
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                answer.read()

    asking = threading.Thread(target=ask)
    if address:
        asking.start()
    try:
        yield
    finally:
        done.set()
        if address:
            asking.join()


def run(setup: Setup, ends: Ends, name: str, events: int, address: str, every_s: float) -> Rate:
    system, output = setup.worker(name, http=address)
    with system:
        first = system.until_count(ends, output, events // 4)
        with scraped(address, every_s):
            return measure(system, ends, output, first, events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=300_000)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two scrapes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found: list[dict[str, float]] = []
    with broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        setup = Setup(load_settings(bootstrap_servers=bootstrap), "metrics", Path(folder), Load())
        setup.prepare()
        setup.feed(args.events, 0)
        ends = Ends(setup.client, setup.partitions)
        for n in range(args.rounds):
            rates = {}
            order = ("on", "off") if n % 2 else ("off", "on")
            for way in order:
                address = free_address() if way == "on" else ""
                rates[way] = run(setup, ends, f"{way}-{n}", args.events, address, args.every)
            on, off = rates["on"], rates["off"]
            found.append(
                {
                    "cpu_on_to_off": on.cpu_us_per_event / off.cpu_us_per_event,
                    "events_on_to_off": on.events_per_s / off.events_per_s,
                }
            )
            if not args.json:
                print(f"round {n + 1}: {found[-1]}", flush=True)
        ends.close()
    medians = {name: round(statistics.median(one[name] for one in found), 4) for name in found[0]}
    print(json.dumps({"every_s": args.every, "medians": medians, "rounds": found}))


if __name__ == "__main__":
    main()
