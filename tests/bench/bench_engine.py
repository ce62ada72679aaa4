"""The batch step alone, no broker and no disk: users whose running sums are in memory, and users who come back.

    python tests/bench/bench_engine.py [--users 20000] [--batch 500] [--growth] [--json]

CPU microseconds per event, median of five rounds over users with 100 interactions each, by kind of ids, for one and for
two live item versions. Beside them the seed's formula, one user at a time, with the rows of items known already: what
the embedding alone would cost if it were computed from the history on each event. With integer ids, each encoder alone,
and all of them side by side.

With --growth, nothing but how the cost grows with the length of histories, dimensions and items, against 100, 48 and
20,000. Ten million items take 4 GB of disk and some minutes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from stream.cli.bench.load import IDS, START_MS, Load
from stream.config import load_settings
from stream.core.counters import Counter
from stream.core.encoders import AvgEncoder, Encoder, MadeFor, MixEncoder, TimeMixEncoder, VersionedEncoder
from stream.core.engine import Engine
from stream.core.formulas import user_embed_mix
from stream.core.space_engine import Pair
from stream.encoders.folder import save_encoder
from stream.items.space import ItemSpace
from stream.learning.heads import Head

ROUNDS = 5
TOPIC = "user-events.view"
NOW_MS = START_MS + 86_400_000


def cpu_us(work: Callable[[], object], events: int) -> float:
    at = time.process_time()
    work()
    return 1e6 * (time.process_time() - at) / events


def space(load: Load, folder: Path, version: str) -> ItemSpace:
    rows = np.random.default_rng(len(version)).normal(size=(load.items, load.dim))
    return ItemSpace.save(folder / version, version, [load.item_id(n) for n in range(load.items)], rows)


class Steps:
    """An engine, what it has stored, and events that go on."""

    def __init__(self, load: Load, pairs: Sequence[Pair], hot_users: int) -> None:
        settings = load_settings(history_limit=pairs[0].encoder.history_limit)
        self.engine = Engine(pairs, settings.rules, partitions=1, hot_users=hot_users)
        self.engine.claim(0, 1)
        self.states: dict[bytes, bytes | None] = dict(load.states(settings))
        self._load = load
        self._runs = count()

    def over_all(self, batch: int) -> float:
        """One event of every user on average, in batches; CPU microseconds of each."""
        load = self._load
        events = list(load.events(load.users, next(self._runs) * load.users))
        records = [SimpleNamespace(key=user, value=value, timestamp=NOW_MS) for user, value in events]

        applied = 0

        def work() -> None:
            nonlocal applied
            for start in range(0, len(records), batch):
                decoded = self.engine.decode_events(TOPIC, 0, records[start : start + batch])
                missing = self.engine.missing([decoded]).get(0, [])
                result = self.engine.apply([decoded], {0: {user: self.states.get(user) for user in missing}})
                self.states.update(result.of(0).states)
                applied += decoded.counts[Counter.APPLIED]

        took_us = cpu_us(work, len(records))
        assert applied == len(records), "not what events cost"
        return took_us


def measure(load: Load, folder: Path, batch: int) -> dict[str, Any]:
    spaces = [space(load, folder, "first"), space(load, folder, "second")]
    found: dict[str, Any] = {}
    for live in (1, 2):
        pairs = [Pair(VersionedEncoder(), one) for one in spaces[:live]]
        found |= {f"{name}_{live}": cost for name, cost in hot_and_cold(load, pairs, batch).items()}
    formula = formula_cpu_us(load, spaces[0])
    return {**found, "formula": round(formula, 1), "cold_to_formula": round(found["cold_1"] / formula, 2)}


def formula_cpu_us(load: Load, one: ItemSpace) -> float:
    vectors = np.asarray(one.vectors)
    items = [np.array([item for _, item, _ in history]) for _, history in load.histories()]
    return median(cpu_us(lambda: [user_embed_mix(i, vectors) for i in items], len(items)) for _ in range(ROUNDS))


def hot_and_cold(load: Load, pairs: Sequence[Pair], batch: int) -> dict[str, float]:
    found = {}
    for name, hot_users in (("hot", load.users), ("cold", 1)):
        steps = Steps(load, pairs, hot_users)
        steps.over_all(batch)  # memos and, of hot users, sums are made
        found[name] = round(median(steps.over_all(batch) for _ in range(ROUNDS)), 1)
    return found


def measure_encoders(load: Load, folder: Path, batch: int) -> dict[str, dict[str, float]]:
    one = space(load, folder, "only")
    made_for = MadeFor(one.version, one.sha256, one.dim)
    rng = np.random.default_rng(0)
    ridge = Head(((rng.normal(size=(3 * one.dim, one.dim)), np.zeros(one.dim)),))
    hidden = 128
    network = Head(
        (
            (rng.normal(size=(3 * one.dim, hidden)), np.zeros(hidden)),
            (rng.normal(size=(hidden, one.dim)), np.zeros(one.dim)),
        )
    )
    encoders: dict[str, Encoder] = {
        "mix": MixEncoder(),
        "avg": AvgEncoder(),
        "mix_time": TimeMixEncoder(),
        "learned, ridge": save_encoder(folder / "ridge", ridge.onnx(), made_for),
        "learned, network": save_encoder(folder / "network", network.onnx(), made_for),
    }
    pairs = {name: Pair(VersionedEncoder(encoder), one) for name, encoder in encoders.items()}
    found = {name: hot_and_cold(load, [pair], batch) for name, pair in pairs.items()}
    return {**found, "all side by side": hot_and_cold(load, list(pairs.values()), batch)}


#: What grows, one at a time.
GROWN = {
    "100 interactions, 48 dimensions, 20,000 items": Load(),
    "1,000 interactions": Load(length=1_000),
    "256 dimensions": Load(dim=256),
    "1 million items": Load(items=1_000_000),
    "10 million items": Load(items=10_000_000),
}


def measure_growth(users: int, batch: int) -> dict[str, dict[str, float]]:
    """CPU microseconds per event, and how often that of the first of `GROWN`."""
    found: dict[str, dict[str, float]] = {}
    for what, load in GROWN.items():
        load = replace(load, users=users)
        with tempfile.TemporaryDirectory() as folder:
            encoder = VersionedEncoder(MixEncoder(), load.length)
            cost = hot_and_cold(load, [Pair(encoder, load.space(Path(folder) / "items"))], batch)
        first = next(iter(found.values()), cost)
        found[what] = {**cost, **{f"{name}_ratio": round(us / first[name], 2) for name, us in cost.items()}}
        print(what, found[what], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.growth:
        measure_growth(args.users, args.batch)
        return
    found = {}
    for kind, make in IDS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = measure(Load(users=args.users, user_id=make, item_id=make), Path(folder), args.batch)
    with tempfile.TemporaryDirectory() as folder:
        encoders = measure_encoders(Load(users=args.users), Path(folder), args.batch)
    document = {"users": args.users, "batch": args.batch, "cpu_us": found, "cpu_us_by_encoder": encoders}
    print(json.dumps(document, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
