"""A networked store that is away, slow, full, forgetful, or comes back empty: nothing is lost, nobody is rebalanced."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from half_open import HalfOpenProxy
from pipeline import Pipeline, feeding
from prober import RedisProber
from redis_server import RedisServer

from stream.feed.dataset import Dataset

EVENTS = 15_000


@contextmanager
def away(redis: RedisServer) -> Iterator[None]:
    redis.pause()
    time.sleep(8)
    yield
    redis.resume()


@contextmanager
def away_for_long(redis: RedisServer) -> Iterator[None]:
    redis.pause()
    yield
    time.sleep(30)
    redis.resume()


@contextmanager
def slow(redis: RedisServer) -> Iterator[None]:
    with redis.client() as client:
        before = puts(client)
        for _ in range(20):  # one right after another: what is done in between has waited for the one before
            client.execute_command("DEBUG", "SLEEP", "0.2")
        assert puts(client) > before, "no put waited"
    yield


def puts(client: Any) -> int:
    """Writes of the worker that the server has carried out."""
    return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


@contextmanager
def out_of_memory(redis: RedisServer) -> Iterator[None]:
    with redis.client() as client:
        client.config_set("maxmemory", "1mb")
        time.sleep(4)
        yield
        client.config_set("maxmemory", "0")


@contextmanager
def scripts_forgotten(redis: RedisServer) -> Iterator[None]:
    with redis.client() as client:
        for _ in range(20):
            client.script_flush()
            time.sleep(0.05)
        assert client.info("errorstats")["errorstat_NOSCRIPT"]["count"] > 0, "the fault did not fire"
    yield


@contextmanager
def restarted_empty(redis: RedisServer) -> Iterator[None]:
    redis.kill()
    time.sleep(1)
    redis.start()
    yield


@contextmanager
def flushed(redis: RedisServer) -> Iterator[None]:
    with redis.client() as client:
        client.flushall()
    yield


def committed(pipeline: Pipeline) -> int:
    """Sum of all committed offsets: it rises with every commit."""
    return sum(sum(pipeline.committed(topic)) for topic in pipeline.inputs)


RARE = (slow, out_of_memory, scripts_forgotten, restarted_empty, away_for_long)
FAULTS = [away, flushed, *(pytest.param(fault, marks=pytest.mark.slow) for fault in RARE)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_with_a_fault(
    fault: Callable[[RedisServer], object], films: Dataset, redis: RedisServer, make_pipeline: Callable[..., Pipeline]
) -> None:
    rows = films.events[:EVENTS]
    wiped = fault in (restarted_empty, flushed)
    pipeline = make_pipeline(kv_url=redis.url, session_timeout_s=10)  # a starved machine is another matter
    pipeline.start()
    pipeline.until_ready()
    with RedisProber(redis) as prober:
        with feeding(pipeline, rows, 1_500):
            pipeline.until(lambda: pipeline.length(pipeline.output) > 1_000, "events flow")
            with fault(redis):  # type: ignore[attr-defined]
                before = committed(pipeline)
            pipeline.until(lambda: committed(pipeline) > before, "events flow again")
        pipeline.until_committed(120)
        if wiped:
            pipeline.until(lambda: all(pipeline.epochs()), "all partitions are rebuilt")
    log = pipeline.log.read_text()
    if fault in (away, away_for_long, out_of_memory):
        assert "nothing is committed meanwhile" in log, "the fault did not fire"
        assert "answers again" in log
    assert ("lost what was written" in log) == wiped
    assert "Traceback" not in log
    assert pipeline.process is not None
    assert pipeline.process.poll() is None
    assert sum("claimed epoch" in line for line in log.splitlines()) == pipeline.partitions, "there was a rebalance"
    assert prober.looks > 10
    assert wiped or prober.back == []
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


def test_a_store_that_stays_away_stops_the_worker(
    films: Dataset, redis: RedisServer, make_pipeline: Callable[..., Pipeline]
) -> None:
    rows = films.events[:EVENTS]
    pipeline = make_pipeline(kv_url=redis.url, delivery_timeout_s=3)
    pipeline.start()
    pipeline.until_ready()
    with feeding(pipeline, rows, 3_000):
        pipeline.until(lambda: pipeline.length(pipeline.output) > 1_000, "events flow")
        redis.kill()
        assert pipeline.wait(60) == 75
    said = [line for line in pipeline.log.read_text().splitlines() if line.startswith("uemb: ")]
    assert len(said) == 1
    assert str(redis.port) in said[0]
    assert pipeline.lag() > 0
    redis.start()
    pipeline.start()
    pipeline.until_committed(120)
    pipeline.until(lambda: all(pipeline.epochs()), "all partitions are rebuilt")
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


def test_writes_that_were_applied_but_whose_answers_were_lost(
    films: Dataset, redis: RedisServer, make_pipeline: Callable[..., Pipeline]
) -> None:
    rows = films.events[:EVENTS]
    with HalfOpenProxy(redis.port) as proxy:
        pipeline = make_pipeline(kv_url=f"redis://127.0.0.1:{proxy.port}/0", session_timeout_s=10)
        pipeline.start()
        pipeline.until_ready()
        with RedisProber(redis) as prober, feeding(pipeline, rows, 1_500):
            for n in range(1, 11):
                length = pipeline.length(pipeline.output)
                proxy.lose_answer_to(b"EVALSHA")
                pipeline.until(lambda n=n: proxy.lost == n, "an answer is lost")  # type: ignore[misc]
                pipeline.until(lambda n=length: pipeline.length(pipeline.output) > n, "events flow")  # type: ignore[misc]
        pipeline.until_committed(120)
        assert prober.back == []
        assert len(pipeline.claims()) == pipeline.partitions
        assert pipeline.log.read_text().count("claimed epoch") == pipeline.partitions, "there was a rebalance"
        pipeline.check(len({row.user_id for row in rows}))
        assert pipeline.stop() == 0
