"""The worker beside Kafka Streams, Quix Streams, a raw loop without guarantees and a plain Faust agent, on one Kafka.

    python tests/bench/peers/run.py [--quick] [--only PART] [--cold-users 1000000] [--json FILE] [--plot FILE]
    python tests/bench/peers/run.py --profile

All do the same job on the same events: JSON in, a history of 100 interactions for each user, the mixed embedding out.
Histories are full from the start (Quix begins with none, which spares it work), and what each publishes last of some
users is compared with the formula. Rates and CPU are those of the last three quarters of the events, so that each is
warm; rounds alternate, medians count. Cold: more users than anything holds in memory, each event of any of them. The
same in 256 dimensions, beside Kafka Streams. Then what the worker is asked for by itself (`alone.py`).

With --profile, nothing but where the worker's own time goes, hot and cold: functions of ours and what they call, by
py-spy.

Needs Java with Maven (Kafka Streams is built, and the broker run, from Maven Central's jars) and a network for Quix.
"""

import argparse
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from alone import footprint, many_users, processes, reader_us, summary
from bench_engine import measure_growth
from bench_rates import measure as measure_rate
from harness import broker

from stream.cli.bench import process
from stream.cli.bench.latency import send
from stream.cli.bench.load import Load, Writer, make_topics
from stream.cli.bench.process import BenchError, Ends, System
from stream.cli.bench.throughput import Setup, measure, read_all
from stream.config import load_settings
from stream.core.formulas import ALPHA_SHORT, DECAY_LONG, DECAY_SHORT, user_embed_mix
from stream.core.records import decode

HERE: Final = Path(__file__).parent
CACHE: Final = Path.home() / ".cache" / "user-embedding-stream" / "peers"
QUIX: Final = "quixstreams==3.28.0"
LIMIT: Final = 100
WARM: Final = 0.25
SAMPLE: Final = 200
TOLERANCE: Final = 2e-5  # most peers compute in float32
COMPACT: Final = {"cleanup.policy": "compact"}
FEW_HOT: Final = "200"
#: Enough that what the worker has computed and not yet written at the first mark, up to 38,000 events, and what the JVM
#: still compiles, weigh little.
COUNTS: Final = {
    "worker": 600_000,
    "Kafka Streams": 600_000,
    "raw loop": 600_000,
    "Quix Streams": 200_000,
    "plain Faust": 24_000,
}
COLD_COUNT: Final = 400_000
WIDE: Final = 256
#: Events a second at which the worker's latency is measured last: at half of its highest rate, some 35,000, the process
#: that sends does not keep up where it shares two cores with broker, worker and the process that looks.
BUSY: Final = 6_000
#: A worker that spares CPU where it may be late.
GATHERING: Final = "worker, gathering for 100 ms"
#: A frame of ours as py-spy has it: function and file.
_FRAME: Final = re.compile(r"(\S+) \((stream/\S+?):")
process.START_PATIENCE_S = 600.0  # type: ignore[misc]  # a million histories are restored first

#: Name, target ("at least"), whether more is better.
TARGETS: Final = {
    "events/s against Kafka Streams, hot": (1.2, True),
    "events/s against Kafka Streams, cold": (0.8, True),
    "CPU per event against Kafka Streams, hot": (0.4, False),
    "CPU per event against Kafka Streams, cold": (0.6, False),
    "events/s against the raw loop, hot": (0.8, True),
    "events/s against Quix Streams, hot": (6.0, True),
    "events/s against a plain Faust agent": (40.0, True),
    "CPU at 500/s against Kafka Streams": (0.5, False),
    "CPU at 2000/s against Kafka Streams": (0.4, False),
    "the same, gathering for 100 ms, at 500/s": (0.5, False),
    "the same, gathering for 100 ms, at 2000/s": (0.4, False),
    "idle CPU, percent of a core": (2.0, False),
    "p99 at 500/s against that at 50/s": (2.0, False),
    "p99 at 2000/s against that at 50/s": (2.0, False),
    f"p99 at {BUSY}/s against that at 50/s": (2.0, False),
    "p50 at 50/s, ms": (3.0, False),
    "p99 at 50/s, ms": (6.0, False),
    "events/s against Kafka Streams, hot, 256 dimensions": (1.2, True),
    "events/s against Kafka Streams, cold, 256 dimensions": (0.8, True),
    "CPU per event against Kafka Streams, hot, 256 dimensions": (0.4, False),
    "CPU per event against Kafka Streams, cold, 256 dimensions": (0.6, False),
    "the step at 1,000 interactions against 100, hot": (1.3, False),
    "the step at 1,000 interactions against 100, cold": (1.3, False),
    "the step at 10 million items against 20,000, hot": (1.3, False),
    "the step at 10 million items against 20,000, cold": (1.3, False),
    "get_many(1000) of 1 million users, us each": (5.0, False),
    "restore of 1 million users, s": (30.0, False),
    "memory with 1 million users, MB": (600.0, False),
    "bytes of a user, changelog": (1_000.0, False),
    "bytes of a user, local disk": (1_000.0, False),
    "one of 2 processes against one alone": (0.85, True),
    "one of 4 processes against one alone": (0.85, True),
}


@dataclass(frozen=True)
class Peer:
    """A system under test: how it is started, and how its records are read."""

    start: Callable[[Setup, str], tuple[System, str]]
    vector: Callable[[bytes], np.ndarray]
    begins_full: bool = True


def kafka_streams(setup: Setup, name: str) -> tuple[System, str]:
    folder = setup.folder / name
    folder.mkdir()
    app, output = f"{setup.prefix}-{name}", f"{setup.prefix}.{name}.out"
    changelog = f"{app}-history-changelog"
    make_topics(setup.client, {changelog: COMPACT, output: {}}, setup.partitions)
    states = (
        (changelog, str(user).encode(), str(user).encode(), np.array([i for _, i, _ in history], "<i4").tobytes())
        for user, history in setup.load.histories()
    )
    Writer(setup.client, setup.partitions).write(states)
    rows = setup.folder / "rows.bin"
    rows.write_bytes(np.load(setup.folder / "items" / "vectors.npy", allow_pickle=False).astype("<f4").tobytes())
    target = CACHE / "kafka_streams" / "target"
    of = {
        "bootstrap": setup.settings.bootstrap_servers,
        "app": app,
        "events": setup.events,
        "output": output,
        "rows": rows,
        "state": folder / "state",
        "dim": setup.load.dim,
        "limit": LIMIT,
        "alpha_short": ALPHA_SHORT,
        "decay_long": DECAY_LONG,
        "decay_short": DECAY_SHORT,
    }
    command = ["java", "-cp", f"{target}/classes:{target}/libs/*", "Job", *(f"{key}={of[key]}" for key in of)]
    return System(command, {}, folder / "log", app), output


def python_job(setup: Setup, name: str, python: str, script: str, **more: object) -> tuple[System, str]:
    folder = setup.folder / name
    folder.mkdir()
    app, output = f"{setup.prefix}-{name}", f"{setup.prefix}.{name}.out"
    make_topics(setup.client, {output: {}, f"{app}-changelog": COMPACT}, setup.partitions)
    spec = {
        "bootstrap": setup.settings.bootstrap_servers,
        "app": app,
        "events": setup.events,
        "output": output,
        "changelog": f"{app}-changelog",
        "vectors": str(setup.folder / "items" / "vectors.npy"),
        "folder": str(folder),
        **more,
    }
    return System([python, str(HERE / script), json.dumps(spec)], {}, folder / "log", app), output


def raw_loop(setup: Setup, name: str) -> tuple[System, str]:
    return python_job(setup, name, sys.executable, "raw_loop.py", users=setup.load.users, dim=setup.load.dim)


def quix(setup: Setup, name: str) -> tuple[System, str]:
    python = str(CACHE / "quix" / "bin" / "python")
    return python_job(setup, name, python, "quix_job.py", decays=(DECAY_LONG, DECAY_SHORT), alpha_short=ALPHA_SHORT)


def float32(value: bytes) -> np.ndarray:
    return np.frombuffer(value, "<f4")


PEERS: Final = {
    "worker": Peer(lambda setup, name: setup.worker(name), lambda value: decode(value).vector),
    "Kafka Streams": Peer(kafka_streams, float32),
    "raw loop": Peer(raw_loop, float32),
    "Quix Streams": Peer(quix, lambda value: np.array(json.loads(value)), begins_full=False),
    "plain Faust": Peer(
        lambda setup, name: setup.peer(name, {"producer_linger_ms": 20, "broker_commit_interval": 10.0}),
        lambda value: np.array(json.loads(value)["user_embedding"]["vector"]),
    ),
}
COLD: Final = {
    "worker": Peer(lambda setup, name: setup.worker(name, hot_users=FEW_HOT), PEERS["worker"].vector),
    "Kafka Streams": PEERS["Kafka Streams"],
}


def build_peers(names: Sequence[str]) -> None:
    if "Kafka Streams" in names:
        shutil.copytree(HERE / "kafka_streams", CACHE / "kafka_streams", dirs_exist_ok=True)
        command = [
            "mvn",
            "-q",
            "-B",
            "-ntp",
            "package",
            "dependency:copy-dependencies",
            "-DoutputDirectory=target/libs",
        ]
        subprocess.run(command, cwd=CACHE / "kafka_streams", check=True)
    if "Quix Streams" in names and not (CACHE / "quix" / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", CACHE / "quix"], check=True)
        subprocess.run([CACHE / "quix" / "bin" / "pip", "install", "-q", QUIX, "numpy"], check=True)


def check(setup: Setup, peer: Peer, output: str, events: int) -> int:
    """Compare what was published last of some users with the formula; return how many these are."""
    wanted: dict[str, list[int]] = {}
    for key, value in setup.load.events(events, 0):
        user = key.decode()
        if user in wanted or len(wanted) < SAMPLE:
            wanted.setdefault(user, []).append(json.loads(value)["item_id"])
    before: dict[str, list[int]] = {}
    if peer.begins_full:
        before = {str(u): [i for _, i, _ in h] for u, h in setup.load.histories() if str(u) in wanted}
    vectors = np.load(setup.folder / "items" / "vectors.npy", allow_pickle=False)
    found = {key.rpartition(":")[2]: last.value for key, last in read_all(setup, output).items()}
    for user, items in wanted.items():
        history = [*before.get(user, []), *items][-LIMIT:]
        error = np.abs(peer.vector(found[user]) - user_embed_mix(np.array(history), vectors)).max()
        if error > TOLERANCE:
            msg = f"the vector of user {user} is off by {error:g}"
            raise BenchError(msg)
    return len(wanted)


def throughput(
    setup: Setup, peers: Mapping[str, Peer], counts: Mapping[str, int], rounds: int
) -> dict[str, dict[str, Any]]:
    """Events per second and CPU of each, rounds alternating; correctness first."""
    setup.prepare()
    setup.feed(max(counts.values()), 0)
    ends = Ends(setup.client, setup.partitions)
    found: dict[str, list[Any]] = {name: [] for name in peers}
    for number in range(rounds):
        for at, (name, peer) in enumerate(peers.items()):
            system, output = peer.start(setup, f"s{number}-{at}")
            count = counts[name]
            with system:
                if name == "worker":
                    system.until_claimed(setup.partitions)  # it marks its partitions' ends before it restores them
                first = system.until_count(ends, output, int(WARM * count))
                found[name].append(measure(system, ends, output, first, count))
            checked = 0
            if number == 0 and count == max(counts.values()):
                checked = check(setup, peer, output, count)
            rate = found[name][-1]
            said = f", {checked} users' vectors are right" if checked else ""
            print(
                f"round {number + 1}, {name}: {rate.events_per_s:,.0f} events/s, {rate.cpu_us_per_event:.1f} us{said}",
                flush=True,
            )
    ends.close()
    return {
        name: {
            "events_per_s": statistics.median(rate.events_per_s for rate in rates),
            "cpu_us_per_event": statistics.median(rate.cpu_us_per_event for rate in rates),
            "cpu_us_per_event_rounds": [rate.cpu_us_per_event for rate in rates],
            "spread": [min(rate.events_per_s for rate in rates), max(rate.events_per_s for rate in rates)],
        }
        for name, rates in found.items()
    }


def quiet(setup: Setup, seconds: float) -> dict[str, Any]:
    """CPU of the worker and of Kafka Streams at fixed rates, and the worker's latency."""
    setup.prepare()
    found: dict[str, Any] = {}
    for name, more, rates in (
        ("worker", {}, {"warm": 500, "0": 0, "50": 50, "500": 500, "2000": 2000, "busy": BUSY}),
        (GATHERING, {"gather_ms": "100"}, {"warm": 500, "500": 500, "2000": 2000}),
    ):
        app = name.replace(",", "").replace(" ", "-")
        system, _ = setup.worker(app, **more)
        with system:
            system.until_claimed(setup.partitions)
            for at, rate in rates.items():
                found[f"{name} {at}"] = measure_rate(setup, system, setup.kv_url(app), rate, seconds)
                print(name, found[f"{name} {at}"], flush=True)
    system, output = kafka_streams(setup, "quiet-streams")
    with system:
        ends = Ends(setup.client, setup.partitions)
        system.until_count(ends, output, int(2500 * seconds))
        ends.close()
        for rate in (500, 2000, 500, 0, 2000):  # the first rounds have it compiled
            before = system.mark()
            if rate:
                send(setup, rate, seconds, 0.0, lambda _: None)
            else:
                time.sleep(seconds)
            after = system.mark()
            percent = 100 * (after.cpu_s - before.cpu_s) / (after.at_s - before.at_s)
            found[f"Kafka Streams {rate}"] = {"cpu_percent": round(percent, 1)}
            print("Kafka Streams", rate, found[f"Kafka Streams {rate}"], flush=True)
    return found


def alone(setup: Callable[[str, Load], Setup], users: int) -> dict[str, float]:
    """What is asked of the worker without a peer, by the names of the targets."""
    found: dict[str, Any] = {
        "processes": processes(replace(setup("processes", Load()), partitions=8), COUNTS["worker"]),
        "footprint": footprint(setup("footprint", Load())),
        "many": many_users(setup("many", Load(users=users)), COLD_COUNT),
    }
    with tempfile.TemporaryDirectory() as folder:
        found["reader_us"] = reader_us(Path(folder), 1_000_000)
    found["growth"] = measure_growth(20_000, 500)
    said = summary(found)
    print(said, flush=True)
    return said


def ratios(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What was reached of each of `TARGETS`."""
    hot, rates = found["hot"], found["quiet"]
    ours = hot["worker"]
    reached = {
        "events/s against the raw loop, hot": ours["events_per_s"] / hot["raw loop"]["events_per_s"],
        "events/s against a plain Faust agent": ours["events_per_s"] / hot["plain Faust"]["events_per_s"],
        "events/s against Quix Streams, hot": ours["events_per_s"] / hot["Quix Streams"]["events_per_s"],
        "idle CPU, percent of a core": rates["worker 0"]["cpu_percent"],
        "p50 at 50/s, ms": rates["worker 50"]["p50_ms"],
        "p99 at 50/s, ms": rates["worker 50"]["p99_ms"],
        **found["alone"],
    }
    for part in ("hot", "cold", f"hot, {WIDE} dimensions", f"cold, {WIDE} dimensions"):
        ours, streams = found[part]["worker"], found[part]["Kafka Streams"]
        reached[f"events/s against Kafka Streams, {part}"] = ours["events_per_s"] / streams["events_per_s"]
        reached[f"CPU per event against Kafka Streams, {part}"] = ours["cpu_us_per_event"] / streams["cpu_us_per_event"]
    for rate in (500, 2000):
        ours, sparing, streams = (
            rates[f"{name} {rate}"]["cpu_percent"] for name in ("worker", GATHERING, "Kafka Streams")
        )
        reached[f"CPU at {rate}/s against Kafka Streams"] = ours / streams
        reached[f"the same, gathering for 100 ms, at {rate}/s"] = sparing / streams
    few_ms = rates["worker 50"]["p99_ms"]
    for name, at in (("500/s", "500"), ("2000/s", "2000"), (f"{BUSY}/s", "busy")):
        reached[f"p99 at {name} against that at 50/s"] = rates[f"worker {at}"]["p99_ms"] / few_ms
    return reached


def profile(setup: Setup, peer: Peer, count: int) -> list[tuple[str, float]]:
    """Our own functions on the worker's main thread, and the share of its time in each with what it calls."""
    setup.prepare()
    setup.feed(count, 0)
    ends = Ends(setup.client, setup.partitions)
    system, output = peer.start(setup, "profiled")
    samples = setup.folder / "samples"
    with system:
        system.until_count(ends, output, int(WARM * count))
        how = ["--duration", "600", "--rate", "200", "--threads", "--format", "raw", "--output", samples]
        spy = subprocess.Popen(
            [Path(sys.executable).with_name("py-spy"), "record", "--pid", str(system.pid), *how],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        system.until_count(ends, output, count)
        spy.send_signal(signal.SIGINT)  # it writes what it has
        spy.wait(60)
    ends.close()
    total, times = 0, Counter[str]()
    for line in samples.read_text().splitlines():
        stack, _, number = line.rpartition(" ")
        frames = stack.split(";")
        if "MainThread" in frames[0]:
            total += int(number)
            ours = {f"{where[1]} ({where[2]})" for frame in frames if (where := _FRAME.match(frame))}
            times.update(dict.fromkeys(ours, int(number)))
    return [(name, number / total) for name, number in times.most_common(30)]


def plot(reached: Mapping[str, float], path: Path) -> None:
    """What was reached of each target, 1 being all of it."""
    from matplotlib import pyplot

    share = {what: reached[what] / t if more else t / reached[what] for what, (t, more) in TARGETS.items()}
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    axes.barh(list(share), list(share.values()), color=["tab:green" if x >= 1 else "tab:red" for x in share.values()])
    axes.axvline(1, color="black")
    axes.invert_yaxis()
    axes.set_xlabel("of the target")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, and 8 s at each rate")
    parser.add_argument("--cold-users", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("hot", "quiet", "cold", "wide", "alone"), help="one part, and no table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="with the table: a picture of it")
    parser.add_argument("--profile", action="store_true", help="only where the worker's time goes, hot and cold")
    args = parser.parse_args()
    build_peers(list(PEERS) if args.only in (None, "hot") else list(COLD))
    with broker() as bootstrap, tempfile.TemporaryDirectory() as name:
        settings = load_settings(bootstrap_servers=bootstrap)

        def setup(part: str, load: Load) -> Setup:
            (folder := Path(name) / part).mkdir()
            return Setup(settings, f"peers-{part}", folder, load)

        if args.profile:
            for part, peers, users in (("hot", PEERS, Load().users), ("cold", COLD, args.cold_users)):
                print(f"{part}: share of the main thread's time, with what is called")
                for where, share in profile(setup(part, Load(users=users)), peers["worker"], COLD_COUNT):
                    print(f"{100 * share:6.1f} %  {where}")
            return
        rounds, seconds = (1, 8.0) if args.quick else (3, 20.0)
        found: dict[str, dict[str, Any]] = {}
        if args.only in (None, "hot"):
            found["hot"] = throughput(setup("hot", Load()), PEERS, COUNTS, rounds)
        if args.only in (None, "quiet"):
            found["quiet"] = quiet(setup("quiet", Load()), seconds)
        beside = {name: PEERS[name] for name in COLD}
        if args.only in (None, "cold"):
            load = Load(users=args.cold_users)
            found["cold"] = throughput(setup("cold", load), COLD, dict.fromkeys(COLD, COLD_COUNT), rounds)
        if args.only in (None, "wide"):
            for part, peers, load in (
                ("hot", beside, Load(dim=WIDE)),
                ("cold", COLD, Load(dim=WIDE, users=args.cold_users)),
            ):
                where, counts = setup(f"wide-{part}", load), dict.fromkeys(COLD, COLD_COUNT)
                found[f"{part}, {WIDE} dimensions"] = throughput(where, peers, counts, rounds)
        if args.only in (None, "alone"):
            found["alone"] = alone(setup, args.cold_users)
    reached = {} if args.only else ratios(found)
    if args.json:
        args.json.write_text(json.dumps({**found, "reached": reached}, indent=1))
    if args.only:
        return
    print(f"\n{'':60}{'target':>8}{'reached':>9}")
    for what, (target, more) in TARGETS.items():
        met = reached[what] >= target if more else reached[what] <= target
        print(f"{what:60}{'>=' if more else '<='}{target:6g}{reached[what]:9.2f}{'' if met else '  missed'}")

    if args.plot:
        plot(reached, args.plot)


if __name__ == "__main__":
    main()
