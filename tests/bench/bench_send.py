"""Rows per second of `uemb send`'s path, by file format: reading and encoding alone, then sent and acknowledged.

    python tests/bench/bench_send.py [--rows N] [--bootstrap HOST:PORT] [--json]

Without ``--bootstrap`` the embedded broker takes the records. Before anything is timed, each format must give the same
records. Rows are seeded: 5,000 users, 20,000 items, two types.
"""

import argparse
import json
import platform
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stream.config import load_settings
from stream.feed.event_files import EventFile
from stream.feed.event_writer import EventWriter
from stream.feed.send_plan import SendPlan
from stream.feed.sender import Feeder
from stream.kafka.embedded_broker import DevBroker

SETTINGS = load_settings()


def write_files(folder: Path, count: int) -> list[Path]:
    """The same rows in every format."""
    rng = random.Random(1)
    rows = [
        (rng.randrange(5000), rng.randrange(20_000), rng.choice(["view", "like"]), 1_700_000_000_000 + n)
        for n in range(count)
    ]
    names = ("user_id", "item_id", "type", "ts")
    (folder / "csv").write_text(",".join(names) + "\n" + "".join(f"{u},{i},{k},{t}\n" for u, i, k, t in rows))
    lines = (json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    (folder / "jsonl").write_text("".join(lines))
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), folder / "parquet")
    return [folder / name for name in ("csv", "jsonl", "parquet")]


def plan(file: Path) -> SendPlan:
    """What the command sends of a file."""
    writer = EventWriter(SETTINGS.rules, SETTINGS.topic_of)
    return SendPlan([EventFile(file)], writer, skip_bad=False, stop=threading.Event())


@contextmanager
def broker(bootstrap: str | None) -> Iterator[str]:
    """The address of the broker to send to."""
    if bootstrap is not None:
        yield bootstrap
        return
    with DevBroker() as embedded:
        yield embedded.bootstrap


def measure(file: Path, count: int, bootstrap: str | None) -> dict[str, object]:
    """Rows per second and CPU microseconds per row."""
    began = time.perf_counter()
    assert sum(1 for _ in plan(file).records()) == count
    read_s = time.perf_counter() - began
    with broker(bootstrap) as address, Feeder(address) as feeder:
        cpu = time.process_time()
        report = feeder.send_records(plan(file).records(), on_acknowledged=lambda _: None)
        cpu = time.process_time() - cpu
    assert report.sent == count
    return {
        "format": file.name,
        "read_and_encode_rows_per_s": round(count / read_s),
        "sent_rows_per_s": round(count / report.seconds),
        "cpu_us_per_row": round(cpu / count * 1e6, 2),
    }


def main() -> None:
    """Measure every format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--bootstrap")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), options.rows)
        first = [[record.value for record in plan(file).records()][:1000] for file in files]
        assert first[0] == first[1] == first[2]
        results = [measure(file, options.rows, options.bootstrap) for file in files]
    facts = {"python": platform.python_version(), "machine": platform.machine(), "rows": options.rows}
    if options.json:
        print(json.dumps({**facts, "broker": options.bootstrap or "embedded", "results": results}))
        return
    print(facts)
    for result in results:
        print(result)


if __name__ == "__main__":
    main()
