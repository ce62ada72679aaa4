"""Events per second and CPU per event: this worker beside a plain Faust agent, alternating, on the same events.

Both start with the same histories, restored from their changelogs, and work off the same backlog on the same broker.
Starting up costs neither anything: the worker is measured from its last claim, users yet to be read from disk, the
agent from its first record.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from confluent_kafka import Consumer, TopicPartition

from stream.cli.bench.load import ITEM_VERSION, Load, Writer, make_topics
from stream.cli.bench.peer import PEER
from stream.cli.bench.process import START_PATIENCE_S, BenchError, Ends, Mark, System
from stream.config import ENV_PREFIX, Settings
from stream.core.records import decode
from stream.kafka.connection import librdkafka_config
from stream.rollout.records import Status

CHECKED_EVENTS: Final = 1_000
TOLERANCE: Final = 1e-5  # the peer computes in float32
MAX_LOST: Final = 100
_PROBE_S: Final = 0.5
_COMPACT: Final = {"cleanup.policy": "compact"}
Note = Callable[[str], None]

#: Settings of Faust's own that a plain agent can be tuned by; each is tried, the best is the peer.
SWEEP: Final[Mapping[str, Mapping[str, Any]]] = {
    "defaults": {},
    "linger 20 ms": {"producer_linger_ms": 20},
    "linger 20 ms, batches of 256 KiB, lz4": {
        "producer_linger_ms": 20,
        "producer_max_batch_size": 262_144,
        "producer_compression_type": "lz4",
    },
    "stream buffer of 64,000, polls of 4,000": {"stream_buffer_maxsize": 64_000, "broker_max_poll_records": 4_000},
    "all of these, commits every 10 s": {
        "producer_linger_ms": 20,
        "producer_max_batch_size": 262_144,
        "stream_buffer_maxsize": 64_000,
        "broker_max_poll_records": 4_000,
        "broker_commit_interval": 10.0,
    },
}


class Rate(NamedTuple):
    """What a system did between two marks."""

    events_per_s: float
    cpu_us_per_event: float


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 3
    worker_events: int = 200_000
    peer_events: int = 8_000
    sweep_events: int = 3_000


@dataclass(frozen=True)
class Setup:
    """Where a comparison runs: broker, topics, folder and workload."""

    settings: Settings
    prefix: str
    folder: Path
    load: Load
    partitions: int = 4

    @property
    def client(self) -> dict[str, Any]:
        """Connection settings for librdkafka."""
        return librdkafka_config(self.settings)

    @property
    def events(self) -> str:
        """The event topic."""
        return f"{self.prefix}.events"

    def prepare(self) -> None:
        """Make the item space and the input topics."""
        self.load.space(self.folder / "items")
        make_topics(self.client, {self.events: {}, self.deletions: _COMPACT}, self.partitions)

    @property
    def deletions(self) -> str:
        """Deletion topic."""
        return f"{self.prefix}.deletions"

    def feed(self, count: int, start: int) -> None:
        """Write `count` events of the workload from number `start` on."""
        events = self.load.events(count, start)
        Writer(self.client, self.partitions).write((self.events, user, user, value) for user, value in events)

    def awaken(self, system: System, ends: "Ends", output: str) -> int:
        """Write one event after another until a system publishes something; return how many that took."""
        probes, due_at = 0, 0.0
        end_at = time.perf_counter() + START_PATIENCE_S
        while not ends.count(output):
            system.check()
            if time.perf_counter() >= end_at:
                msg = f"it published nothing in {START_PATIENCE_S:g} s:\n{system.tail()}"
                raise BenchError(msg)
            if time.perf_counter() >= due_at:
                self.feed(1, probes)
                probes, due_at = probes + 1, time.perf_counter() + _PROBE_S
            time.sleep(0.05)
        return probes

    def worker(self, name: str, *, processes: int = 1, **more: str) -> tuple[System, str]:
        """Start a worker, of so many processes, with full histories; return it and its output topic."""
        app, output = f"{self.prefix}-{name}", f"{self.prefix}.{name}.out"
        (self.folder / name).mkdir()
        changelog = f"{app}-user-history-changelog"
        make_topics(self.client, {changelog: _COMPACT, output: _COMPACT}, self.partitions)
        states = self.load.states(self.settings)
        Writer(self.client, self.partitions).write((changelog, user, user, state) for user, state in states)
        self._say_covered(app)
        return self.join(name, "0", processes=processes, **more), output

    def _say_covered(self, app: str) -> None:
        """Have the worker take it that all users have a vector, as after a restart; it would write them otherwise."""
        topic, version = f"{app}-item-status", self.settings.versioned_encoder.version
        make_topics(self.client, {topic: _COMPACT}, 1)
        statuses = [Status(version, ITEM_VERSION, p, 0, "covered").encode() for p in range(self.partitions)]
        Writer(self.client, 1).write((topic, key, key, value) for key, value in statuses)

    def join(self, name: str, number: str, *, processes: int = 1, **more: str) -> System:
        """Start one more worker of an application, with a state folder of its own."""
        app, folder = f"{self.prefix}-{name}", self.folder / name
        own = {
            "bootstrap_servers": self.settings.bootstrap_servers,
            "app_id": app,
            "event_topics": self.events,
            "deletion_topic": self.deletions,
            "output_topic": f"{self.prefix}.{name}.out",
            "dlq_topic": f"{self.prefix}.{name}.dlq",
            "item_versions_topic": f"{self.prefix}.{name}.item-versions",
            "items": str(self.folder / "items"),
            "kv_url": self.kv_url(name),
            "state_dir": str(folder / f"state-{number}"),
            "log_level": "info",
            "log_format": "text",
            "group_instance_id": "",  # one of the environment's would be that of all
            "http": "127.0.0.1:0",
            **more,
        }
        environment = {ENV_PREFIX + key.upper(): value for key, value in own.items()}
        command = [sys.executable, "-c", "from stream.cli import main; main()", "worker"]
        if processes > 1:
            command += ["--processes", str(processes)]
        return System(command, environment, folder / f"log-{number}", app)

    def kv_url(self, name: str) -> str:
        """Store of an application."""
        return f"rocksdb://{self.folder}/{name}/kv"

    def until_read(self, system: System) -> None:
        """Wait until a worker has caught up with the event topic."""
        ends = Ends(self.client, self.partitions, system.group)
        while ends.committed([self.events]) < ends.count(self.events):
            system.check()
            time.sleep(0.1)
        ends.close()

    def peer(self, name: str, settings: Mapping[str, Any]) -> tuple[System, str]:
        """Start the plain Faust agent with full histories; return it and its output topic."""
        app, output = f"{self.prefix}-{name}", f"{self.prefix}.{name}.out"
        folder = self.folder / name
        folder.mkdir()
        changelog = f"{app}-history-changelog"
        make_topics(self.client, {changelog: _COMPACT, output: {}}, self.partitions)
        tables = self.load.tables()
        Writer(self.client, self.partitions).write((changelog, user, key, value) for user, key, value in tables)
        spec = {
            "app_id": app,
            "bootstrap": self.settings.bootstrap_servers,
            "topic": self.events,
            "output": output,
            "partitions": self.partitions,
            "vectors": str(self.folder / "items" / "vectors.npy"),
            "data": str(folder / "data"),
            "settings": dict(settings),
        }
        command = [
            sys.executable,
            "-m",
            "faust",
            "-A",
            "stream.cli.bench.peer",
            "-l",
            "warn",
            "worker",
            "--without-web",
        ]
        return System(command, {PEER: json.dumps(spec)}, folder / "log"), output


def measure(system: System, ends: Ends, output: str, first: Mark, target: int) -> Rate:
    """Rate of a running system from `first` until its output topic has `target` records.

    The first mark must precede all work: a system may hold much that is computed and not yet written.
    """
    last = system.until_count(ends, output, target)
    count = last.records - first.records
    return Rate(count / (last.at_s - first.at_s), 1e6 * (last.cpu_s - first.cpu_s) / count)


def check_equal(setup: Setup, ends: Ends, note: Note) -> tuple[int, int]:
    """Run both systems over the same few events and compare every user's last vector.

    Plain Faust loses records around its start: so it is awake before those come that are compared. The worker reads
    all of them. Users of whom one of the two saw less can't be compared.

    Returns:
        how many users were compared, and how many events are on the topic now.

    Raises:
        BenchError: they differ, or one of them did not do its job.
    """
    system, output = setup.peer("equal-peer", {})
    with system:
        probes = setup.awaken(system, ends, output)
        awake = ends.count(output)
        setup.feed(CHECKED_EVENTS, probes)
        published = system.until_quiet(ends, output, awake + CHECKED_EVENTS) - awake
    theirs = read_all(setup, output)
    if published < CHECKED_EVENTS:
        note(f"plain Faust published {published} of {CHECKED_EVENTS} events")
    fed = probes + CHECKED_EVENTS
    system, output = setup.worker("equal-worker")
    with system:
        system.until_count(ends, output, fed)
    ours = {key.rsplit(":", 1)[1]: found for key, found in read_all(setup, output).items()}
    if sum(found.records for found in ours.values()) != fed or published < CHECKED_EVENTS - MAX_LOST:
        msg = f"of {CHECKED_EVENTS} events plain Faust published {published}"
        raise BenchError(msg)
    return compare_users(ours, theirs), fed


def compare_users(ours: "Mapping[str, LastRecord]", theirs: "Mapping[str, LastRecord]") -> int:
    """Compare the last vectors of users of whom both systems published as many; return how many these are.

    Raises:
        BenchError: vectors differ.
    """
    comparable = [user for user, found in theirs.items() if found.records == ours[user].records]
    for user in comparable:
        vector = json.loads(theirs[user].value)["user_embedding"]["vector"]
        if np.abs(np.asarray(vector) - decode(ours[user].value).vector).max() > TOLERANCE:
            msg = "worker and plain Faust publish different vectors"
            raise BenchError(msg)
    return len(comparable)


class LastRecord(NamedTuple):
    """Records of a key, and the last one's value."""

    records: int
    value: bytes


def read_all(setup: Setup, topic: str) -> dict[str, LastRecord]:
    """What a topic holds, by key."""
    consumer = Consumer(
        {**setup.client, "group.id": "bench-read", "enable.partition.eof": True, "auto.offset.reset": "earliest"}
    )
    consumer.assign([TopicPartition(topic, p, 0) for p in range(setup.partitions)])
    found: dict[str, LastRecord] = {}
    ended: set[int] = set()
    while len(ended) < setup.partitions:
        for message in consumer.consume(1000, timeout=1.0):
            if message.error():
                ended.add(message.partition())
            else:
                key = message.key().decode()
                found[key] = LastRecord(found[key].records + 1 if key in found else 1, message.value())
    consumer.close()
    return found


def compare(setup: Setup, sizes: Sizes, note: Note) -> dict[str, Any]:
    """Check, sweep and measure; return what `uemb bench --json` prints of it."""
    setup.prepare()
    ends = Ends(setup.client, setup.partitions)
    compared, fed = check_equal(setup, ends, note)
    note(f"vectors of {compared} users are equal to {TOLERANCE:g}")
    setup.feed(sizes.worker_events, fed)
    sweep: dict[str, Rate] = {}
    for number, (name, settings) in enumerate(SWEEP.items()):
        sweep[name] = _peer_rate(setup, ends, f"sweep{number}", settings, sizes.sweep_events)
        note(f"plain Faust, {name}: {_shown(sweep[name])}")
    best = max(sweep, key=lambda name: sweep[name].events_per_s)
    note(f"plain Faust is measured with: {best}")
    ours: list[Rate] = []
    theirs: list[Rate] = []
    peaks: list[int] = []
    for number in range(sizes.rounds):
        system, output = setup.worker(f"worker{number}")
        with system:
            system.until_claimed(setup.partitions)
            ours.append(measure(system, ends, output, system.mark(), sizes.worker_events))
            peaks.append(system.peak_bytes())
        theirs.append(_peer_rate(setup, ends, f"peer{number}", SWEEP[best], sizes.peer_events))
        note(f"round {number + 1}: worker {_shown(ours[-1])}; plain Faust {_shown(theirs[-1])}")
    ends.close()
    return {
        "ratio_to_plain_faust": _median(ours, 0) / _median(theirs, 0),
        "cpu_ratio_to_plain_faust": _median(theirs, 1) / _median(ours, 1),
        "events_per_s": _median(ours, 0),
        "events_per_s_spread": _spread(ours, 0),
        "cpu_us_per_event": _median(ours, 1),
        "plain_faust": {
            "settings": best,
            "events_per_s": _median(theirs, 0),
            "events_per_s_spread": _spread(theirs, 0),
            "cpu_us_per_event": _median(theirs, 1),
            "sweep_events_per_s": {name: rate.events_per_s for name, rate in sweep.items()},
        },
        "users_checked_equal": compared,
        "peak_memory_bytes": max(peaks),
    }


def _peer_rate(setup: Setup, ends: Ends, name: str, settings: Mapping[str, Any], events: int) -> Rate:
    system, output = setup.peer(name, settings)
    with system:
        first = system.until_count(ends, output, 1)
        return measure(system, ends, output, first, events)


def _median(rates: Sequence[Rate], field: int) -> float:
    return statistics.median(rate[field] for rate in rates)


def _spread(rates: Sequence[Rate], field: int) -> list[float]:
    values = [rate[field] for rate in rates]
    return [min(values), max(values)]


def _shown(rate: Rate) -> str:
    return f"{rate.events_per_s:,.0f} events/s, {rate.cpu_us_per_event:,.1f} µs CPU each"
