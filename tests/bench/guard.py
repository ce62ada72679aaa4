"""Whether the worker costs what it should: exit 1 if it lost a factor of 1.5 against what was measured beside it.

    python tests/bench/guard.py

CPU per event of the whole worker against a plain Faust agent's, and of the batch step against the formula, one user at
a time; each in units of its peer in the same run, so that machines may differ. The best of three rounds counts: others
on the machine cost caches, never less than nothing.
"""

import sys
import tempfile
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from bench_engine import formula_cpu_us, hot_and_cold, space
from harness import broker
from run import PEERS, Setup, throughput

from stream.cli.bench.load import Load
from stream.config import load_settings
from stream.core.encoders import VersionedEncoder
from stream.core.space_engine import Pair

ROUNDS: Final = 3
LOSS: Final = 1.5
#: What was measured of each, in units of its peer: bests of three rounds.
USUAL: Final = {
    "the step, users in memory, against the formula": 0.33,
    "the step, users from disk, against the formula": 0.58,
    "the worker, against a plain Faust agent": 0.017,
}
COUNTS: Final = {"worker": 150_000, "plain Faust": 6_000}


def measure() -> dict[str, float]:
    """The best of the rounds, by name as in `USUAL`."""
    load = Load(users=5_000)
    in_memory, on_disk, against_faust = USUAL
    found: dict[str, list[float]] = {name: [] for name in USUAL}
    with tempfile.TemporaryDirectory() as folder:
        one = space(load, Path(folder), "only")
        for _ in range(ROUNDS):
            formula = formula_cpu_us(load, one)
            cost = hot_and_cold(load, [Pair(VersionedEncoder(), one)], 500)
            found[in_memory].append(cost["hot"] / formula)
            found[on_disk].append(cost["cold"] / formula)
    peers = {name: PEERS[name] for name in COUNTS}
    with broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        setup = Setup(load_settings(bootstrap_servers=bootstrap), "guard", Path(folder), Load())
        rates = throughput(setup, peers, COUNTS, ROUNDS)
        worker, faust = (min(rates[name]["cpu_us_per_event_rounds"]) for name in COUNTS)
        found[against_faust].append(worker / faust)
    return {name: min(values) for name, values in found.items()}


def main() -> int:
    """Print what was found, and judge it."""
    lost = False
    for name, ratio in measure().items():
        most = LOSS * USUAL[name]
        lost |= ratio > most
        print(f"{name}: {ratio:.3f}, at most {most:.3f}{'  LOST' if ratio > most else ''}")
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
