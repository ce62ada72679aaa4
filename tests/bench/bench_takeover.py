"""How long partitions are without an owner after ``kill -9``, with and without a standby.

    python tests/bench/bench_takeover.py [--users 100000] [--json]

Two workers share four partitions of users with 100 interactions each; one is killed. Measured is the time from the kill
to the survivor's last claim, of which the session timeout (3 s here) is the group's, and the time that it spent on
restoring; without a standby it reads its share of the changelog from the beginning.
"""

import argparse
import json
import re
import tempfile
import time
import uuid
from pathlib import Path

from harness import broker

from stream.cli.bench.load import Load, delete_topics
from stream.cli.bench.process import BenchError
from stream.cli.bench.throughput import Setup
from stream.config import load_settings
from stream.kafka.connection import librdkafka_config

SESSION_S = 3.0
CLAIM = re.compile(r"partition (\d+): restored (\d+) records, claimed epoch (\d+) \((\d+\.\d+) s\)")


def take_over(setup: Setup, standbys: int) -> dict[str, float]:
    """Kill one of two workers; return seconds to the survivor's last claim, and what it restored."""
    name = f"standbys{standbys}"
    more = {"standbys": str(standbys), "session_timeout_s": str(SESSION_S)}
    first, _ = setup.worker(name, **more)
    with first:
        first.until_claimed(setup.partitions)
        second = setup.join(name, "1", **more)
        log = setup.folder / name / "log-1"
        with second:
            wait(lambda: len(CLAIM.findall(log.read_text())) >= 2, "the second worker owns its share")
            if standbys:
                wait(lambda: "is current" in log.read_text(), "the copy is current")
            before = len(CLAIM.findall(log.read_text()))
            killed_at = time.perf_counter()
            first.kill()
            wait(lambda: len(CLAIM.findall(log.read_text())) >= before + setup.partitions, "the survivor owns all")
            took_s = time.perf_counter() - killed_at
            claims = CLAIM.findall(log.read_text())[before:]
    return {
        "seconds_to_last_claim": took_s,
        "restore_seconds": max(float(seconds) for *_, seconds in claims),
        "records_restored": sum(int(records) for _, records, _, _ in claims),
    }


def wait(condition, what: str, timeout_s: float = 120.0) -> None:
    deadline = time.perf_counter() + timeout_s
    while not condition():
        if time.perf_counter() > deadline:
            raise BenchError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prefix = f"uemb-takeover-{uuid.uuid4().hex[:8]}"
    with broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        settings = load_settings(bootstrap_servers=bootstrap)
        setup = Setup(settings, prefix, Path(folder), Load(users=args.users))
        try:
            setup.prepare()
            found = {f"standbys_{n}": take_over(setup, n) for n in (0, 1)}
        finally:
            delete_topics(librdkafka_config(settings), prefix)
    print(json.dumps({"users": args.users, "session_timeout_s": SESSION_S, **found}, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
