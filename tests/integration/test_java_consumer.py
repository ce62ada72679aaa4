"""Proof from another language: a Java program that follows the topic ends with the rows that `UserMatrix` has.

It knows what `schemas/README.md` says and nothing of `stream`; what it is shown is a worker's own topic, with all that
the rules there are for.
"""

import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from confluent_kafka import Producer
from documents import ROOT
from kafka_broker import MIN_JAVA
from pipeline import Event, Pipeline, compact, event_json

from stream.config import load_settings
from stream.core.records import decode, encode
from stream.items.space import ItemSpace
from stream.retrieval.user_matrix import UserMatrix

USER_VERSION: Final = load_settings().versioned_encoder.version
NOW_MS: Final = time.time_ns() // 1_000_000
HOUR_MS: Final = 3_600_000
ERASURE_MS: Final = NOW_MS - HOUR_MS
USERS: Final = [*(str(n) for n in range(40)), "anna", "a:b", "Zoë:1 東京", "9223372036854775807"]
ERASED: Final = ("7", "a:b")
BACK: Final = "8"  # erased, and seen again
FALLBACK: Final = "one"  # has a single event
QUIET: Final = USERS[20:30]  # nothing follows on the records of a former owner
_PROJECT: Final = ROOT / "tests" / "consumers" / "java"
_SCHEMAS: Final = sorted((ROOT / "schemas").glob("*.avsc"))
_BUILD_TIMEOUT_S: Final = 300.0
_RUN_TIMEOUT_S: Final = 120.0


def why_no_compiler() -> str | None:
    """The reason why the program can't be built on this machine, or None."""
    if shutil.which("javac") and shutil.which("java") and shutil.which("mvn"):
        return None
    return f"no Java consumer: install a JDK of Java {MIN_JAVA} or newer (javac) and Maven (mvn)"


@pytest.fixture(scope="module")
def program() -> list[str]:
    """The command of the program, which Maven builds on first use."""
    if reason := why_no_compiler():
        pytest.skip(reason)
    sources = sorted(path for path in _PROJECT.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    root = Path(os.environ.get("UEMB_TEST_CACHE") or "~/.cache/user-embedding-stream").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    home = root / f"java-consumer-{digest}"
    with (root / "java-consumer.lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(_PROJECT, home)
            goals = ["compile", "dependency:copy-dependencies", "-DoutputDirectory=target/libs"]
            built = subprocess.run(
                ["mvn", "-q", "-B", "-ntp", *goals], cwd=home, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S
            )
            assert built.returncode == 0, built.stdout
            (home / "complete").touch()
    target = home / "target"
    return ["java", "-XX:TieredStopAtLevel=1", "-cp", f"{target}/classes:{target}/libs/*", "FollowVectors"]


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two item versions, of fifty items each: what is tested here needs no real ones."""
    folder, rng = tmp_path_factory.mktemp("spaces"), np.random.default_rng(3)
    for version, dim in (("items_v1", 8), ("items_v2", 12)):
        ItemSpace.save(folder / version, version, range(50), rng.normal(size=(50, dim)))
    return folder


@pytest.fixture(scope="module")
def item_folder(spaces: Path) -> Path:
    """What the worker serves at first."""
    return spaces / "items_v1"


class Follower:
    """The program on one pair of versions, with a state file of its own."""

    def __init__(self, program: Sequence[str], pipeline: Pipeline, item_version: str, folder: Path) -> None:
        self.state = folder / "state"
        self.out = folder / "out"
        folder.mkdir()
        options = {
            "bootstrap": pipeline.bootstrap,
            "topic": pipeline.output,
            "user-version": USER_VERSION,
            "item-version": item_version,
            "schemas": ",".join(map(str, _SCHEMAS)),
            "state": self.state,
            "save-every": "50",
        }
        self.command = [*program, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]

    def until_end(self, *more: str) -> tuple[dict[str, bytes], str]:
        """Rows by user where the topic ends now, and what the program said."""
        command = [*self.command, "--until-end", str(self.out), *more]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_RUN_TIMEOUT_S)
        assert ended.returncode == 0, ended.stderr
        ids = (self.out / "ids.txt").read_text().splitlines()
        vectors = (self.out / "vectors.f32").read_bytes()
        size = len(vectors) // max(1, len(ids))
        return {user: vectors[n * size : (n + 1) * size] for n, user in enumerate(ids)}, ended.stdout

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """The program as a service has it; killed when the block is left."""
        with subprocess.Popen(self.command, stdout=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                process.kill()


def rows_of(pipeline: Pipeline, space: ItemSpace) -> dict[str, bytes]:
    """What `UserMatrix` makes of the topic."""
    users = UserMatrix(space.dim, space.version, USER_VERSION, partitions=pipeline.partitions)
    for message in pipeline.read(pipeline.output):
        users.apply(message.key(), message.value(), message.partition())
    return {user: users.vectors[row].astype("<f4").tobytes() for row, user in enumerate(users.ids) if user is not None}


def some_events(rng: random.Random, users: Sequence[str], count: int) -> list[Event]:
    """Events of the hour before the erasures, some with items that nobody knows."""
    return [
        (rng.choice(users), str(rng.randrange(60)), rng.choice(["view", "like"]), ERASURE_MS - rng.randrange(HOUR_MS))
        for _ in range(count)
    ]


def send(pipeline: Pipeline, events: Sequence[Event], erasures: Sequence[str] = ()) -> None:
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random", "log_level": 2})
    for user, item, kind, ts in events:
        producer.produce(pipeline.topics[kind], event_json(user, item, kind, ts), user)
    for user in erasures:
        producer.produce(pipeline.deletions, json.dumps({"user_id": user, "ts": ERASURE_MS}), user)
    assert producer.flush(60) == 0


Record = tuple[int, bytes, bytes | None]  # partition, key and value


def write(pipeline: Pipeline, records: Sequence[Record], *, and_abort: bool = False) -> None:
    """Records on the output topic that are not the worker's."""
    config: dict[str, Any] = {"bootstrap.servers": pipeline.bootstrap, "log_level": 2}
    producer = Producer(config | ({"transactional.id": f"{pipeline.app_id}.test"} if and_abort else {}))
    if and_abort:
        producer.init_transactions(60)
        producer.begin_transaction()
    for partition, key, value in records:
        producer.produce(pipeline.output, value, key, partition=partition)
    assert producer.flush(60) == 0
    if and_abort:
        producer.abort_transaction(60)


def by_another_owner(value: bytes, epochs: int) -> bytes:
    """The state that an owner of so many epochs later, or earlier, might have made of many events more."""
    record = decode(value)
    later = replace(record, epoch=record.epoch + epochs, revision=record.revision + 1_000, vector=-record.vector)
    return encode(later)


@pytest.mark.slow
def test_it_ends_with_the_rows_of_the_user_matrix(
    program: list[str], spaces: Path, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    rng = random.Random(3)
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    live = Follower(program, pipeline, "items_v1", tmp_path / "live")
    with live.running():
        send(pipeline, [*some_events(rng, USERS, 400), (FALLBACK, "1", "view", ERASURE_MS)])
        pipeline.until(live.state.exists, "the follower has saved something")
        send(pipeline, some_events(rng, USERS, 400))
    pipeline.until_committed()

    sent: list[Record] = [(m.partition(), m.key(), m.value()) for m in pipeline.read(pipeline.output)]
    newest = {key: (place, key, value) for place, key, value in sent}
    write(pipeline, list(newest.values()))  # the newest states once more
    write(pipeline, rng.sample(sent, 200))  # and older ones, as a former owner of the partition may send them
    write(pipeline, [(place, key, by_another_owner(value or b"", -1)) for place, key, value in newest.values()])
    ahead: list[Record] = [(place, key, by_another_owner(value or b"", 9)) for place, key, value in newest.values()]
    write(pipeline, ahead, and_abort=True)
    moved = [key for place, key, _ in newest.values() if place != 0]
    write(pipeline, [(0, key, None) for key in moved])  # taken away where they were before the topic grew

    send(pipeline, [], erasures=[*ERASED, BACK])
    pipeline.until_committed()
    assert pipeline.stop() == 0
    pipeline.start()  # with higher epochs
    pipeline.until_ready()
    pipeline.uemb("items", "publish", str(spaces / "items_v2"), "--wait")
    send(pipeline, some_events(rng, [user for user in USERS if user not in (*ERASED, *QUIET)], 200))
    send(pipeline, [(BACK, item, "like", NOW_MS) for item in "123"])
    pipeline.until_committed()
    assert pipeline.stop() == 0

    want = rows_of(pipeline, ItemSpace.load(spaces / "items_v1"))
    assert set(want) == {*USERS} - {*ERASED}
    rows, said = live.until_end()
    assert "goes on with" in said
    assert rows == want
    rows, said = live.until_end("--delete-retention-ms", "0")  # what it has is too old, so it begins anew
    assert "goes on with" not in said
    assert rows == want
    other = rows_of(pipeline, ItemSpace.load(spaces / "items_v2"))
    assert set(other) == set(want)
    assert Follower(program, pipeline, "items_v2", tmp_path / "other").until_end()[0] == other


@pytest.mark.slow
def test_it_reads_what_compaction_left_and_begins_anew_when_the_topic_has_grown(
    program: list[str], spaces: Path, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    rng, space = random.Random(4), ItemSpace.load(spaces / "items_v1")
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, some_events(rng, USERS, 1_000))
    pipeline.until_committed()
    length = len(pipeline.read(pipeline.output))
    compact(pipeline)
    for _ in range(2):  # segments roll, and are compacted, when there is news
        send(pipeline, some_events(rng, USERS, 100))
        pipeline.until_committed()
    pipeline.until(lambda: len(pipeline.read(pipeline.output)) < length, "the output is compacted")
    assert pipeline.stop() == 0
    follower = Follower(program, pipeline, "items_v1", tmp_path / "follower")
    want = rows_of(pipeline, space)
    assert set(want) == {*USERS}
    assert follower.until_end()[0] == want

    with follower.running() as process:
        assert process.stdout is not None
        assert b"goes on with" in process.stdout.readline()  # with as many partitions as there were
        pipeline.uemb("repartition", "--partitions", "6")
        assert process.wait(_RUN_TIMEOUT_S) == 1, "it goes on, without the users that have moved"
    pipeline.partitions = 6
    pipeline.forget()
    pipeline.start()
    pipeline.until_ready()
    send(pipeline, some_events(rng, USERS, 100))
    pipeline.until_committed()
    assert pipeline.stop() == 0
    want = rows_of(pipeline, space)
    assert set(want) == {*USERS}
    rows, said = follower.until_end()
    assert "goes on with" not in said
    assert rows == want
