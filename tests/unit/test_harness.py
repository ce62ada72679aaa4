"""The test harness itself: a real Kafka takes batches, gives them back, and can be frozen and killed."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import kafka_broker
import pytest
import warm_start
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from kafka_broker import BrokerError, KafkaBroker, why_unavailable

RECORDS = [(f"user-{i}".encode(), f"value-{i}".encode(), 1_700_000_000_000 + i) for i in range(200)]


@pytest.fixture(scope="module")
def kafka(own_kafka: KafkaBroker) -> KafkaBroker:
    """One that may be paused and killed."""
    return own_kafka


async def create_topic(bootstrap: str, topic: str, partitions: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, partitions, 1)])
    finally:
        await admin.close()


async def send_one_batch(bootstrap: str, topic: str, partition: int) -> int:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        batch = producer.create_batch()
        for key, value, ts_ms in RECORDS:
            assert batch.append(key=key, value=value, timestamp=ts_ms) is not None
        sent = await (await producer.send_batch(batch, topic, partition=partition))
    finally:
        await producer.stop()
    return sent.offset


async def read_all(bootstrap: str, topic: str, partition: int) -> list[tuple[int, bytes, bytes, int]]:
    tp = TopicPartition(topic, partition)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([tp])
        end = (await consumer.end_offsets([tp]))[tp]
        out: list[tuple[int, bytes, bytes, int]] = []
        while await consumer.position(tp) < end:
            for records in (await consumer.getmany(tp, timeout_ms=1000)).values():
                out += [(r.offset, r.key, r.value, r.timestamp) for r in records]
        return out
    finally:
        await consumer.stop()


def answers(broker: KafkaBroker, timeout_s: float) -> bool:
    """Asks over a connection of its own; an overloaded machine may need several tries."""
    admin = AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0})
    with contextlib.suppress(KafkaException):
        return bool(admin.list_topics(timeout=timeout_s).brokers)
    return False


async def test_a_batch_comes_back_as_it_was_sent(kafka: KafkaBroker, unique: str) -> None:
    await create_topic(kafka.bootstrap, unique, 2)
    assert await send_one_batch(kafka.bootstrap, unique, 1) == 0
    assert await read_all(kafka.bootstrap, unique, 1) == [(i, *record) for i, record in enumerate(RECORDS)]
    assert await read_all(kafka.bootstrap, unique, 0) == []


def test_a_paused_broker_is_silent_and_a_resumed_one_answers(kafka: KafkaBroker) -> None:
    if kafka.external:
        pytest.skip("the broker at KAFKA_BOOTSTRAP_SERVERS is not ours to pause")
    kafka.pause()
    assert not answers(kafka, 1.0)
    kafka.resume()
    assert answers(kafka, 30.0)


@pytest.mark.faults
async def test_acknowledged_records_outlive_a_kill(kafka: KafkaBroker, unique: str) -> None:
    if kafka.external:
        pytest.skip("the broker at KAFKA_BOOTSTRAP_SERVERS is not ours to kill")
    before = kafka.bootstrap
    await create_topic(kafka.bootstrap, unique, 1)
    await send_one_batch(kafka.bootstrap, unique, 0)
    kafka.kill()
    assert not answers(kafka, 0.5)
    kafka.restart()
    assert kafka.bootstrap == before
    assert len(await read_all(kafka.bootstrap, unique, 0)) == len(RECORDS)


@pytest.fixture
def no_kafka(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with neither jars nor programs; its program folder."""
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    monkeypatch.setenv("UEMB_TEST_CACHE", str(tmp_path / "cache"))
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", f"{bin_dir}:/bin")
    monkeypatch.setattr(kafka_broker.shutil, "which", lambda name: str(p) if (p := bin_dir / name).exists() else None)
    return bin_dir


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_reason_to_skip_names_what_is_missing(no_kafka: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Java" in (why_unavailable() or "")
    program(no_kafka / "java", """echo 'openjdk version "11.0.2"' >&2""")
    assert "java is version 11" in (why_unavailable() or "")
    program(no_kafka / "java", """echo 'openjdk version "21" 2023-09-19' >&2""")
    assert "Maven" in (why_unavailable() or "")
    program(no_kafka / "mvn", "exit 1")
    assert why_unavailable() is None
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka.example:9092")
    (no_kafka / "java").unlink()
    assert why_unavailable() is None


FAKE_MAVEN = f"""
for arg; do case $arg in -DoutputDirectory=*) out=${{arg#*=}};; esac; done
mkdir -p "$out"; touch "$out/kafka_2.13-{kafka_broker.KAFKA_VERSION}.jar" "$out/other.jar"; echo run >> "$0.runs"
"""


def test_jars_are_fetched_once_and_again_when_one_is_lost(no_kafka: Path, tmp_path: Path) -> None:
    program(no_kafka / "mvn", FAKE_MAVEN)
    runs = no_kafka / "mvn.runs"
    libs = kafka_broker.kafka_jars()
    assert kafka_broker.kafka_jars() == libs
    assert len(runs.read_text().split()) == 1
    (libs / "other.jar").unlink()
    assert (kafka_broker.kafka_jars() / "other.jar").exists()
    assert len(runs.read_text().split()) == 2
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [libs.parent.name]  # nothing half done stays behind


def test_a_failed_fetch_says_what_maven_said(no_kafka: Path) -> None:
    program(no_kafka / "mvn", "echo 'no route to host'; exit 1")
    with pytest.raises(BrokerError, match="mvn ended with 1:\nno route to host"):
        kafka_broker.kafka_jars()


SOME_TESTS = """
import pytest, unittest

@pytest.fixture
def missing(): pytest.skip("no such broker")

def test_passes(): pass
def test_skips(): pytest.skip("no such server")
def test_skips_in_a_fixture(missing): pass
@pytest.mark.skipif(True, reason="no such chip")
def test_skips_by_mark(): pass
class TestOld(unittest.TestCase):
    @unittest.skip("no such law")
    def test_skips_by_unittest(self): pass
@pytest.mark.xfail(strict=True)
def test_fails_as_expected(): assert False
@pytest.mark.xfail(run=False)
def test_is_not_run(): assert False
@pytest.mark.slow
def test_is_slow(): assert False
@pytest.mark.bench
@pytest.mark.slow
def test_measures_slowly(): assert False
"""
SKIPPING_MODULE = "import pytest; pytest.importorskip('no_such_module')"


def run_pytest(folder: Path, *arguments: str, **env: str) -> str:
    """The output of a run over the files in a folder, under this suite's conftest."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow: s\n  bench: b\n  kafka: k\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:asyncio",
        "-ra",
        *arguments,
    ]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "UEMB_TEST"))}
    where = {"PYTHONPATH": str(Path(kafka_broker.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, cwd=folder, env=kept | where | env, capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def test_a_run_that_must_be_whole_fails_what_skips(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    (tmp_path / "test_module.py").write_text(SKIPPING_MODULE)
    lenient = run_pytest(tmp_path)
    assert "1 passed, 5 skipped, 2 deselected, 2 xfailed" in lenient
    assert "left out: 2 marked 'slow'; run them with -m slow" in lenient
    strict = run_pytest(tmp_path, "--continue-on-collection-errors", UEMB_TEST_REQUIRE="all")
    assert "2 failed, 1 passed, 2 deselected, 2 xfailed, 3 errors" in strict
    for reason in ("server", "broker", "chip", "law"):
        assert f"UEMB_TEST_REQUIRE=all: no such {reason}" in strict
    assert "UEMB_TEST_REQUIRE=all: could not import 'no_such_module'" in strict


@pytest.mark.slow
def test_slow_tests_run_when_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    assert "2 failed, 7 deselected" in run_pytest(tmp_path, "-m", "slow")
    assert "1 failed, 8 deselected" in run_pytest(tmp_path, "-m", "bench")
    assert "1 passed, 4 skipped, 2 deselected" in run_pytest(tmp_path, "-m", "not bench")


#: Says what a process was given, and whether it was imported for it.
ABOUT_ITSELF = """
import os, sys
print([*sys.argv, os.environ["UEMB_APP_ID"], input(), __name__, os.getcwd(), os.getsid(0) == os.getpid()])
print("stream.worker.app" in sys.modules, file=sys.stderr)
sys.exit(int(sys.argv[-1]))
"""


@pytest.mark.parametrize("copied", [True, False])
def test_a_copied_process_is_as_one_that_was_started(
    copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(ABOUT_ITSELF)
    given = {**os.environ, "UEMB_APP_ID": "one", **({} if copied else {"LD_PRELOAD": ""})}
    for command in (["-c", ABOUT_ITSELF], [str(script)]):
        ended = warm_start.run([sys.executable, *command, "a b", "3"], given, text="line\n")
        assert ended.stdout == f"{[command[0], 'a b', '3', 'one', 'line', '__main__', str(tmp_path), True]}\n"
        assert (ended.returncode, ended.stderr) == (3, f"{copied}\n")


def test_the_end_of_a_copied_process_is_told() -> None:
    endless = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(1000)"]
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        warm_start.run(endless, os.environ, 1.0)
    assert caught.value.output in ("", "begun\n")  # a busy machine may not have come so far
    with tempfile.TemporaryFile() as out:
        process = warm_start.start(endless, os.environ, out)
        assert process.poll() is None
        process.terminate()
        assert (process.wait(60), process.poll()) == (-signal.SIGTERM, -signal.SIGTERM)
    failed = warm_start.run([sys.executable, "-c", "1 / 0"], os.environ)
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
