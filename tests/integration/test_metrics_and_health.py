"""What a worker says of itself, on a real Kafka: how many records, how far behind, what it owns, whether it is well."""

import json
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import pytest
import warm_start
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from kafka_broker import KafkaBroker, free_ports
from pipeline import UEMB, Pipeline, erase
from redis_server import RedisServer
from scraping import ANY_PORT, Scraped

from stream.core.events import EventRow
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder

pytestmark = pytest.mark.kafka

STUCK_WORKER = Path(__file__).resolve().parents[1] / "faults" / "stuck_worker.py"
Lags = dict[tuple[str, ...], float]


def send(pipeline: Pipeline, rows: list[EventRow]) -> None:
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(rows)


def ends(pipeline: Pipeline) -> dict[tuple[str, str], int]:
    """End of each input partition, as the brokers tell an admin; by partition and topic."""
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    places = [TopicPartition(topic, p) for topic in pipeline.inputs for p in range(pipeline.partitions)]
    asked = admin.list_offsets(dict.fromkeys(places, OffsetSpec.latest()), request_timeout=30)
    return {(str(place.partition), place.topic): found.result().offset for place, found in asked.items()}


def brokers_lag(pipeline: Pipeline) -> Lags:
    """End less committed offset of each input partition, by partition and topic, as the brokers have them."""
    at = {topic: pipeline.committed(topic) for topic in pipeline.inputs}
    return {(p, topic): end - max(0, at[topic][int(p)]) for (p, topic), end in ends(pipeline).items()}


def test_what_is_counted_is_what_happened(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline(http=ANY_PORT)
    pipeline.start()
    worker = Scraped(pipeline)
    worker.until_ready()
    rows = films.events[:3_000]
    send(pipeline, rows)
    send(pipeline, rows[:50])
    pipeline.say(pipeline.topics["like"], b"7", b"not JSON")
    pipeline.say(pipeline.topics["like"], b"7", None)
    pipeline.until_committed()
    erase(pipeline, rows[:1])
    pipeline.until_committed()
    records, rejected, vectors = worker.samples("uemb_records_total", "uemb_rejected_total", "uemb_vectors_total")
    by_outcome: dict[str, float] = {}
    for (outcome, topic), n in records.items():
        if topic in pipeline.topics.values():
            by_outcome[outcome] = by_outcome.get(outcome, 0) + n
    assert sum(by_outcome.values()) == 3_052
    assert by_outcome["rejected"] == 2
    assert by_outcome["applied"] + by_outcome.get("too_old", 0) + by_outcome["duplicate"] == 3_050
    assert {key: n for key, n in records.items() if key[1] == pipeline.deletions} == {
        ("erasures", pipeline.deletions): 1
    }
    assert rejected == {("not_json", pipeline.topics["like"]): 1, ("null_value", pipeline.topics["like"]): 1}
    assert worker.value("uemb_dead_letters_total") == len(pipeline.read(pipeline.dlq)) == 2
    assert worker.value("uemb_erasures_total") == 1
    output = [record.value() for record in pipeline.read(pipeline.output)]
    assert sum(vectors.values()) == sum(value is not None for value in output)
    assert {labels[2] for labels, n in vectors.items() if n} == {"ok", "fallback"}
    durable, batches, stages = worker.samples(
        "uemb_event_durable_seconds_count", "uemb_batch_records_count", "uemb_stage_seconds_count"
    )
    assert durable == {(): 3_053}
    assert stages["apply",] == batches[()] <= worker.value("uemb_event_age_seconds_count")
    assert worker.value("uemb_epoch_claims_total") == pipeline.partitions
    assert worker.value("uemb_rebalances_total") >= 1
    (covered,) = worker.samples("uemb_rollout_covered_partitions")
    assert list(covered.values()) == [pipeline.partitions]
    assert pipeline.stop() == 0


def test_cosines_are_seen_once_vectors_change(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline(http=ANY_PORT)
    pipeline.start()
    worker = Scraped(pipeline)
    worker.until_ready()
    rows = iter(films.events)

    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:

        def compared() -> bool:
            feeder.send(list(islice(rows, 200)))
            return worker.value("uemb_vector_cosine_count") > 20

        pipeline.until(compared, "vectors are compared")
    buckets, count = worker.samples("uemb_vector_cosine_bucket", "uemb_vector_cosine_count")
    assert buckets["1",] == buckets["+Inf",] == count[()], "none is larger"
    assert buckets["0.25",] < buckets["1",], "nobody is turned round by an event or two"
    assert pipeline.stop() == 0


def test_two_workers_of_which_one_is_killed(films: Dataset, make_workers: Callable[..., list[Pipeline]]) -> None:
    first, second = make_workers(2, http=ANY_PORT)
    seen: list[tuple[int, list[str]]] = []
    first.start()
    one = Scraped(first)
    first.until(lambda: seen.append(one.verdict("/readyz")) or seen[-1][0] == 200, "it is ready")  # type: ignore[func-returns-value]
    assert seen[0][0] == 503
    assert "waiting for partitions" in seen[0][1][0]
    second.start()
    other = Scraped(second)
    other.until_ready()
    one.until_ready()
    owned = [scraped.samples("uemb_partition_owned")[0] for scraped in (one, other)]
    assert sorted([*owned[0], *owned[1]]) == [(str(p),) for p in range(4)], "each partition is owned once"
    assert all(owned)
    for scraped, mine in zip((one, other), owned, strict=True):
        lag, epochs = scraped.samples("uemb_lag_records", "uemb_partition_epoch")
        assert {(p,) for p, _ in lag} == set(epochs) == set(mine)
    send(first, films.events[:3_000])
    first.kill()
    second.until(lambda: len(other.samples("uemb_partition_owned")[0]) == 4, "the other takes over")
    other.until_ready()
    second.until_committed()
    (lag,) = other.samples("uemb_lag_records")
    assert lag == brokers_lag(second) == dict.fromkeys(lag, 0)
    assert len(lag) == 12
    first.start()
    one.until_ready()
    second.until(lambda: len(other.samples("uemb_partition_owned")[0]) < 4, "it gives some up")
    mine, theirs = (scraped.samples("uemb_lag_records", "uemb_partition_owned") for scraped in (one, other))
    for here, there in zip(mine, theirs, strict=True):
        assert not here.keys() & there.keys(), "a partition has series in two processes"
    for worker in (first, second):
        assert worker.stop() == 0


def test_a_worker_for_which_no_partition_is_left_is_ready(make_workers: Callable[..., list[Pipeline]]) -> None:
    workers = make_workers(2, http=ANY_PORT, partitions=1)
    for worker in workers:
        worker.partitions = 1
        worker.start()
    scraped = [Scraped(worker) for worker in workers]
    workers[0].until(
        lambda: sorted(len(s.samples("uemb_partition_owned")[0]) for s in scraped) == [0, 1], "one has it all"
    )
    for one in scraped:
        one.until_ready()
    (idle,) = [s for s in scraped if not s.samples("uemb_partition_owned")[0]]
    assert idle.samples("uemb_lag_records", "uemb_partition_epoch") == [{}, {}]
    for worker in workers:
        assert worker.stop() == 0


def test_a_store_that_is_away_is_no_death_and_lag_is_the_brokers(
    films: Dataset, redis: RedisServer, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline(http=ANY_PORT, kv_url=redis.url)
    pipeline.start()
    worker = Scraped(pipeline)
    worker.until_ready()
    send(pipeline, films.events[:1_000])
    pipeline.until_committed()
    redis.kill()
    for rows in (films.events[1_000:30_000], films.events[30_000:31_000]):
        send(pipeline, rows)
        pipeline.until(
            lambda: worker.samples("uemb_lag_records")[0] == brokers_lag(pipeline), "the lag is the brokers'"
        )
    lag = brokers_lag(pipeline)
    assert sum(lag.values()) == 30_000
    assert worker.samples("uemb_lag_records")[0] == lag
    status, reasons = worker.verdict("/readyz")
    assert (status, reasons[0]) == (503, "the store does not answer")
    assert worker.verdict("/healthz") == (200, [])
    (errors,) = worker.samples("uemb_kv_errors_total")
    assert errors["failed",] > 0
    (seconds,) = worker.samples("uemb_lag_seconds")
    assert seconds.keys() == set(lag)
    assert all((seconds[place] > 0) == (n > 0) for place, n in lag.items())
    pipeline.until(lambda: worker.value("uemb_commit_age_seconds") > 3, "commits are missed")
    redis.start()
    pipeline.until_committed()
    worker.until_ready()
    assert worker.value("uemb_commit_age_seconds") == 0
    assert pipeline.stop() == 0


def test_brokers_that_are_away_are_no_death(
    films: Dataset, own_kafka: KafkaBroker, unique: str, tmp_path: Path, item_folder: Path
) -> None:
    pipeline = Pipeline(own_kafka.bootstrap, unique, tmp_path, item_folder, http=ANY_PORT, session_timeout_s="20")
    with ExitStack() as ending:
        ending.callback(pipeline.close)
        pipeline.start()
        worker = Scraped(pipeline)
        worker.until_ready()
        own_kafka.pause()
        pipeline.until(lambda: not worker.is_ready(), "it notices")
        status, reasons = worker.verdict("/readyz")
        assert status == 503
        assert re.fullmatch(r"the brokers do not answer for \d+ s", reasons[0])
        assert worker.verdict("/healthz") == (200, [])
        own_kafka.resume()
        worker.until_ready()
        send(pipeline, films.events[:500])
        pipeline.until_committed()
        assert pipeline.stop() == 0


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("loop", r"the event loop is stuck for \d+ s"),
        pytest.param("agent", r"the agent is stuck for \d+ s", marks=pytest.mark.slow),
        pytest.param("lane", r"the lane is stuck for \d+ s", marks=pytest.mark.slow),
    ],
)
def test_a_stuck_part_is_told_while_it_is_stuck(
    part: str, reason: str, films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline(http=ANY_PORT)
    pipeline.start([sys.executable, str(STUCK_WORKER), part])
    worker = Scraped(pipeline)
    worker.until_ready()
    assert worker.verdict("/healthz") == (200, [])
    send(pipeline, films.events[:10])
    pipeline.until(lambda: worker.verdict("/healthz")[0] == 503, "it is told")
    status, reasons = worker.verdict("/healthz")
    assert status == 503
    assert any(re.fullmatch(reason, one) for one in reasons), reasons
    assert re.fullmatch(r"not alive: .* is stuck for \d+ s\n", ask_health(worker, code=1))
    assert not worker.is_ready()
    assert worker.get("/metrics")[0] == 200
    pipeline.kill()


def ask_health(worker: Scraped, *args: str, code: int) -> str:
    return worker.pipeline.uemb("health", "--address", worker.address, *args, code=code)


def test_silent_clients_hold_up_neither_scrapes_nor_the_worker(
    films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline(http=ANY_PORT)
    pipeline.start()
    worker = Scraped(pipeline)
    worker.until_ready()
    assert ask_health(worker, "--ready", code=0) == "ready\n"
    assert pipeline.process is not None
    threads = Path(f"/proc/{pipeline.process.pid}/task")
    before = len(list(threads.iterdir()))
    host, _, port = worker.address.rpartition(":")
    with ExitStack() as clients:
        for _ in range(50):
            clients.enter_context(socket.create_connection((host, int(port)), timeout=30))
        assert worker.is_ready()
        assert worker.get("/metrics")[0] == 200
        send(pipeline, films.events[:2_000])
        pipeline.until_committed()
        assert len(list(threads.iterdir())) <= before + 5, "a thread for each"  # the pools of others may have grown
    assert pipeline.stop() == 0


def test_an_address_that_is_taken_is_one_line(make_pipeline: Callable[..., Pipeline]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        pipeline = make_pipeline(http=address)
        said = pipeline.uemb("worker", code=2)
    why = "can't listen there (Address already in use); choose another, or leave it empty"
    assert said == f"uemb: UEMB_HTTP={address}: {why}\n"


@pytest.mark.slow
def test_processes_of_a_host_listen_on_one_port_after_another(make_pipeline: Callable[..., Pipeline]) -> None:
    port = two_free_ports()
    pipeline = make_pipeline(http=f"127.0.0.1:{port}")
    pipeline.start([*UEMB, "worker", "--processes", "2"])

    def ready(at: int) -> bool:
        asked = [*UEMB, "health", "--ready", "--json", "--address", f"127.0.0.1:{at}"]
        return bool(json.loads(warm_start.run(asked, pipeline.environment).stdout)["ok"])

    for at in (port, port + 1):
        pipeline.until(lambda at=at: ready(at), f"port {at} says that it is ready")  # type: ignore[misc]
    assert pipeline.stop() == 0


def two_free_ports() -> int:
    """The first of two that follow each other."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        (port,) = free_ports(1)
        try:
            with socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue
    raise AssertionError("no two ports in a row are free")
