"""Running the real thing in tests: worker processes, and what they left on topics and in the store."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import warm_start
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from topic_admin import set_config

from stream.config import load_settings
from stream.core.events import EventRow
from stream.core.records import decode, kv_entry
from stream.errors import StoreError
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.keys import partition_of, user_cache_key
from stream.kv.protocol import KVReader
from stream.kv.stores import open_reader

UEMB = [sys.executable, "-c", "from stream.cli import main; main()"]
_KILLING_WORKER = Path(__file__).parent / "faults" / "killing_worker.py"
_SLICE = 250
_USER_VERSION = load_settings().versioned_encoder.version
_COMING_BACK = (
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError._UNKNOWN_PARTITION,
)


class Pipeline:
    """Topics, folders and settings of one application, and its worker process."""

    def __init__(self, bootstrap: str, unique: str, folder: Path, items: Path, **settings: object) -> None:
        self.bootstrap = bootstrap
        self.folder = folder
        self.app_id = unique
        self.topics = {kind: f"{unique}.{kind}" for kind in ("view", "like")}
        self.deletions, self.output, self.dlq = f"{unique}.deletions", f"{unique}.out", f"{unique}.dlq"
        self.changelog = f"{unique}-user-history-changelog"
        self.item_versions, self.item_status = f"{unique}.item-versions", f"{unique}-item-status"
        self.kv_path = folder / "kv"
        self.kv_url = str(settings.get("kv_url", f"rocksdb://{self.kv_path}"))
        self.state = folder / "state"
        self.partitions = 4
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("UEMB_")},
            "UEMB_BOOTSTRAP_SERVERS": bootstrap,
            "UEMB_APP_ID": unique,
            "UEMB_EVENT_TOPICS": ",".join(self.topics.values()),
            "UEMB_DELETION_TOPIC": self.deletions,
            "UEMB_OUTPUT_TOPIC": self.output,
            "UEMB_DLQ_TOPIC": self.dlq,
            "UEMB_ITEM_VERSIONS_TOPIC": self.item_versions,
            "UEMB_ITEMS": str(items),
            "UEMB_KV_URL": self.kv_url,
            "UEMB_STATE_DIR": str(self.state),
            "UEMB_SESSION_TIMEOUT_S": "2",
            "UEMB_HTTP": "",
            **{f"UEMB_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.log = folder / "worker.log"
        self._log_start = 0
        self.process: warm_start.Process | subprocess.Popen[bytes] | None = None
        self.verified: dict[str, dict[str, Any]] = {}
        self._store: KVReader | None = None
        self._group: Consumer | None = None
        self._seen: dict[Any, Any] = {}  # by the last call of `lag`

    def close(self) -> None:
        """End the worker and what watched it."""
        self.kill()
        if self._store is not None:
            self._store.close()
        if self._group is not None:
            self._group.close()

    @property
    def inputs(self) -> list[str]:
        return [*self.topics.values(), self.deletions]

    # -- the worker -----------------------------------------------------------------------------------------------

    def start(self, command: Sequence[str] | None = None, **environment: str) -> None:
        """Start a worker; `command` replaces ``uemb worker``."""
        self._log_start = len(self.log.read_text(errors="replace")) if self.log.exists() else 0
        self._before = self.epochs()  # the worker may be quicker than whoever asks for them later
        with self.log.open("ab") as log:
            command = [*UEMB, "worker"] if command is None else command
            self.process = warm_start.start(command, {**self.environment, **environment}, log)

    def stop(self, timeout_s: float = 30) -> int:
        """SIGTERM, also to one that is frozen; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.thaw()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 30) -> int:
        """Wait for the worker's own end; return its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the worker did not end:\n{self.tail()}") from None

    def freeze(self) -> None:
        """SIGSTOP: whatever it is at, it is at until it is told to go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def tail(self) -> str:
        """End of the worker's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:]) if self.log.exists() else ""

    # -- waiting --------------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 180, every_s: float = 0.05) -> None:
        """Wait for a condition, looked at `every_s`, while the worker lives."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the worker ended ({self.process.returncode}) before {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s} s: {what}\n{self.tail()}")
            time.sleep(every_s)

    def until_ready(self) -> None:
        """Wait until this run of the worker has claimed every partition."""
        self.until_epochs_rise(self._before)

    def until_epochs_rise(self, before: Sequence[int]) -> list[int]:
        """Wait until every partition has a newer claim than `before`, as after each change of the group."""
        self.until(lambda: all(n > b for n, b in zip(self.epochs(), before, strict=True)), "all are claimed anew")
        return self.epochs()

    def until_ready_again(self) -> None:
        """The same where the store may have been wiped: wait until this run's log shows a claim on every partition."""
        self.until(lambda: len(self.claims()) == self.partitions, "all partitions are claimed")
        self.until(lambda: self.epochs() == self.claims(), "all watermarks are written")

    def claims(self) -> list[int]:
        """Newest claim of each partition in the log of this run."""
        log = self.log.read_text(errors="replace")[self._log_start :]
        claims = dict(re.findall(r"partition (\d+): .*claimed epoch (\d+)", log))
        return [int(epoch) for _, epoch in sorted(claims.items())]

    def until_committed(self, timeout_s: float = 180) -> None:
        """Wait until all input is committed, which means that all it caused is durable."""
        try:
            self.until(lambda: self.lag() == 0, "all input is committed", timeout_s, every_s=0.25)
        except AssertionError as exc:
            exc.add_note(f"committed, first and end of each input partition, or why not known: {self._seen}")
            raise

    def verify(self, *args: str, code: int = 0) -> dict[str, Any]:
        """The report of `uemb verify` on the first pair, which must end with `code`; `verified` holds all."""
        ended = warm_start.run([*UEMB, "verify", "--json", *args], self.environment)
        assert ended.returncode == code, f"{ended.stdout}{ended.stderr}\n{self.tail()}"
        document: dict[str, Any] = json.loads(ended.stdout)
        assert document["ok"] is (code == 0)
        self.verified = document["pairs"]
        return next(iter(self.verified.values()))

    @property
    def verified_items(self) -> set[str]:
        """Item versions of the pairs that the last `verify` looked at."""
        return {pair.split(":")[1] for pair in self.verified}

    def check(self, users: int) -> dict[str, Any]:
        """`uemb verify` finds so many users and every one of them in order, in each item version."""
        first = self.verify()
        for report in self.verified.values():
            assert (report["users"], report["differ"], report["busy"]) == (users, 0, 0), report
        return first

    def uemb(self, *args: str, code: int = 0) -> str:
        """Run a command of the command line, which must end with `code`; return what it printed, errors too."""
        ended = warm_start.run([*UEMB, *args], self.environment)
        said = ended.stdout + ended.stderr
        assert ended.returncode == code, f"{said}\n{self.tail()}"
        assert "Traceback" not in said
        return said

    def say(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Write a record to partition 0 of a topic."""
        producer = Producer({"bootstrap.servers": self.bootstrap, "acks": "all", "log_level": 2})
        producer.produce(topic, value, key, partition=0)
        assert producer.flush(60) == 0

    def length(self, topic: str) -> int:
        """Offsets that a topic has given out, markers of transactions included; quicker than reading it."""
        places = [TopicPartition(topic, p) for p in range(self.partitions)]
        return sum(self._watched_group().get_watermark_offsets(place, timeout=60)[1] for place in places)

    def lag(self, patience_s: float = 60) -> int:
        """Records of the input topics that are not committed, as soon as the brokers tell."""
        places = [TopicPartition(topic, p) for topic in self.inputs for p in range(self.partitions)]
        deadline = time.monotonic() + patience_s
        while True:
            group = self._watched_group()
            try:
                self._seen = {  # the ends last: what arrives in between counts as not committed
                    (place.topic, place.partition): (place.offset, *group.get_watermark_offsets(place, timeout=10))
                    for place in group.committed(places, timeout=10)
                }
            except KafkaException as exc:
                self._seen = {"error": exc}
                group.close()  # one that was made while the coordinator was away may not find it for minutes
                self._group = None
                if exc.args[0].code() not in _COMING_BACK or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return sum(end - max(first, at) for at, first, end in self._seen.values())

    def committed(self, topic: str) -> list[int]:
        """Committed offset of each partition of a topic, negative without one."""
        places = [TopicPartition(topic, p) for p in range(self.partitions)]
        return [place.offset for place in self._watched_group().committed(places, timeout=10)]

    def _watched_group(self) -> Consumer:
        if self._group is None:
            config = {"bootstrap.servers": self.bootstrap, "group.id": self.app_id, "log_level": 2}
            self._group = Consumer(config)
        return self._group

    def epochs(self) -> list[int]:
        """Newest claim of each partition in the store, 0 without one."""
        if self._store is None:
            try:
                self._store = open_reader(self.kv_url)
            except StoreError:
                return [0] * self.partitions
        users = self.users_by_partition()
        entries = [self._store.watermark(users[p]) for p in range(self.partitions)]
        return [kv_entry(entry)[0] if entry else 0 for entry in entries]

    def users_by_partition(self) -> dict[int, bytes]:
        """One user id for each partition."""
        found: dict[int, bytes] = {}
        number = 0
        while len(found) < self.partitions:
            found.setdefault(partition_of(str(number).encode(), self.partitions), str(number).encode())
            number += 1
        return found

    # -- what is there --------------------------------------------------------------------------------------------

    def read(self, topic: str) -> list[Any]:
        """All records of a topic, each partition in its order."""
        config = {
            "bootstrap.servers": self.bootstrap,
            "fetch.wait.max.ms": 10,
            "group.id": f"{self.app_id}-look",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "log_level": 2,
        }
        consumer = Consumer(config)
        try:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
            records, ended = [], set()
            while len(ended) < len(partitions):
                message = consumer.poll(10)
                assert message is not None, f"{topic} can't be read"
                if message.error():
                    ended.add(message.partition())
                else:
                    records.append(message)
            return records
        finally:
            consumer.close()

    def last_output(self) -> dict[str, bytes | None]:
        """Last record of each key of the output topic."""
        return {record.key().decode(): record.value() for record in self.read(self.output)}

    def stored(self, users: Iterable[str]) -> dict[str, bytes | None]:
        """Entries of users in the first item version, as another process reads them now."""
        version = ItemSpace.load(self.environment["UEMB_ITEMS"]).version
        return self.entries({user: user_cache_key(user, version, _USER_VERSION) for user in users})

    def forget(self) -> None:
        """Look at store and group anew, which have other partitions now."""
        for opened in (self._store, self._group):
            if opened is not None:
                opened.close()
        self._store = self._group = None

    def reader(self) -> KVReader:
        """The store, as another process sees it."""
        return open_reader(self.kv_url)

    def entries(self, keys: Mapping[str, str]) -> dict[str, bytes | None]:
        """Store entries for users, given their keys."""
        reader = self.reader()
        try:
            return dict(zip(keys, reader.get([(u.encode(), k.encode()) for u, k in keys.items()]), strict=True))
        finally:
            reader.close()


def killing_worker(stage: str, users: Iterable[str], how: str = "SIGKILL") -> list[str]:
    """Command of a worker that sends itself a signal, once, when a batch with one of `users` has passed a stage."""
    return [sys.executable, str(_KILLING_WORKER), stage, ",".join(users), how]


class Feed(threading.Thread):
    """Sends events.

    Attributes:
        dry: set when all but the last events are sent: on a slow machine what was to happen meanwhile takes longer.
    """

    def __init__(self, feed: Callable[[], None]) -> None:
        super().__init__(target=feed)
        self.dry = threading.Event()


@contextmanager
def feeding(pipeline: Pipeline, events: Sequence[EventRow], rate: float) -> Iterator[Feed]:
    """Events flow at a rate while the block runs; the rest, the last of them at least, is sent when it is left."""
    hurry = threading.Event()

    def feed() -> None:
        for start in range(0, len(events), _SLICE):
            if start + _SLICE >= len(events):
                thread.dry.set()
                hurry.wait()
            feeder.send(events[start : start + _SLICE], rate=None if hurry.is_set() else rate)

    patience = {"message.timeout.ms": 120_000}  # longer than any fault that tests make
    with Feeder(pipeline.bootstrap, pipeline.topics, client_config=patience) as feeder:
        thread = Feed(feed)
        thread.start()
        try:
            yield thread
        finally:
            hurry.set()
            thread.join()


def erase(pipeline: Pipeline, rows: Iterable[EventRow]) -> None:
    """Erase the users of `rows`, each up to the time of its row."""
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random"})
    for row in rows:
        value = json.dumps({"user_id": row.user_id, "ts": row.ts_ms}).encode()
        producer.produce(pipeline.deletions, value, row.user_id.encode())
    assert producer.flush(60) == 0


def seed() -> int:
    """Seed of a random run: printed, and settable to see a failure again."""
    number = int(os.environ.get("UEMB_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"UEMB_TEST_SEED={number}")
    return number


def compact(pipeline: Pipeline) -> None:
    """Let the broker compact changelog and output as soon as their segments roll, which news in them brings about."""
    for topic in (pipeline.changelog, pipeline.output):
        settings = {"segment_ms": 100, "min_cleanable_dirty_ratio": 0.001, "max_compaction_lag_ms": 100}
        set_config(pipeline.bootstrap, topic, **settings)


def delete_topics(bootstrap: str, prefix: str) -> None:
    """Remove a test's topics, so that a long run does not collect hundreds of partitions."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    names = [name for name in admin.list_topics(timeout=60).topics if name.startswith(prefix)]
    for future in admin.delete_topics(names, operation_timeout=10).values() if names else ():
        future.exception()


def seed_mix(rows: np.ndarray) -> np.ndarray:
    """The seed's mixture in float64, written out: the yardstick of the end-to-end tests."""

    def average(decay: float) -> np.ndarray:
        t = np.arange(len(rows), dtype=np.float64)
        w = np.exp(decay * (t - (len(rows) - 1)))
        u = (rows.astype(np.float64) * (w / (w.sum() + 1e-12))[:, None]).sum(axis=0)
        return np.asarray(u / (np.linalg.norm(u) + 1e-12))

    u = 0.4 * average(0.01) + 0.6 * average(0.15)
    return np.asarray((u / (np.linalg.norm(u) + 1e-12)).astype(np.float32))


Event = tuple[str, str, str, int]  # user, item, type, ts in ms


def expected(events: Iterable[Event], space: ItemSpace, limit: int = 100) -> dict[str, dict[str, Any]]:
    """What must be published for every user after `events`, in whatever order they arrived."""
    seen: dict[str, set[tuple[int, bytes, bytes]]] = {}
    for user, item, kind, ts in events:
        seen.setdefault(user, set()).add((ts, item.encode(), kind.encode()))
    rows = {item: row for row, item in enumerate(space.ids)}
    out = {}
    for user, interactions in seen.items():
        history = sorted(interactions)[-limit:]
        known = [rows[item] for _, item, _ in history if item in rows]
        reason = "no_known_items" if not known else "too_short_history" if len(known) == 1 else ""
        out[user] = {
            "status": "fallback" if reason else "ok",
            "reason": reason,
            "history_len": len(history),
            "unknown_items": len(history) - len(known),
            "as_of": history[-1][0],
            "vector": space.fallback if reason else seed_mix(space.history_vectors[known]),
        }
    return out


def check_end_state(
    pipeline: Pipeline,
    want: Mapping[str, Mapping[str, Any]],
    space: ItemSpace,
    user_version: str,
    output: Mapping[str, bytes | None] | None = None,
) -> None:
    """Every user: KV body equals the last output record byte for byte, and that record equals the reference."""
    output = pipeline.last_output() if output is None else output
    keys = {user: f"uemb:{user_version}:{space.version}:{user}" for user in want}
    assert set(output) == set(keys.values()), "users on the output topic"
    entries = pipeline.entries(keys)
    for user, fields in want.items():
        body = output[keys[user]]
        entry = entries[user]
        assert entry is not None, f"{user} is not in the store"
        assert body is not None, f"{user} is gone from the topic"
        epoch, revision, stored = kv_entry(entry)
        assert stored == body, f"store and topic differ for {user}"
        record = decode(body)
        assert (epoch, revision) == (record.epoch, record.revision)
        got = {name: getattr(record, name) for name in ("status", "reason", "history_len", "unknown_items", "as_of")}
        assert got == {name: fields[name] for name in got}, user
        assert record.user_id == user
        assert (record.user_embedding_version, record.item_embedding_version) == (user_version, space.version)
        np.testing.assert_allclose(record.vector, fields["vector"], rtol=0, atol=1e-6, err_msg=user)
        assert abs(record.norm - float(np.linalg.norm(fields["vector"].astype(np.float64)))) <= 1e-6
        assert body[-4 * space.dim :] == record.vector.astype("<f4").tobytes()


def event_json(user: object, item: object, kind: str, ts: int) -> bytes:
    """An event's value."""
    return json.dumps({"user_id": user, "item_id": item, "type": kind, "ts": ts}).encode()
