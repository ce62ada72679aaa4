"""A worker on a Redis whose access list changes under it: it waits, and in the end says what is missing."""

from collections.abc import Callable

import pytest
from pipeline import Pipeline
from redis_server import RedisServer

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.kv.redis.grants import writer
from stream.kv.urls import RedisAddress, parse_kv_url


@pytest.fixture
def pipeline(redis: RedisServer, make_pipeline: Callable[..., Pipeline]) -> Pipeline:
    """One whose worker is the user ``ali``; others look at the store as who may do all."""
    made = make_pipeline()
    made.kv_url = redis.url
    made.environment["UEMB_KV_URL"] = redis.url.replace("://", "://ali:pw@")
    return made


def allow(redis: RedisServer, *without: str) -> None:
    address = parse_kv_url(redis.url)
    assert isinstance(address, RedisAddress)
    commands = [f"+{command}" for command in writer(address).commands if command not in without]
    with redis.client() as client:
        client.execute_command("ACL", "SETUSER", "ali", "reset", "on", ">pw", "~uemb:*", "-@all", *commands)


def test_an_access_list_that_is_replaced_stops_nobody(redis: RedisServer, pipeline: Pipeline, films: Dataset) -> None:
    allow(redis)
    pipeline.start()
    pipeline.until_ready()
    slices = iter(range(0, 100_000, 200))

    def until_said(text: str, start: int) -> None:
        pipeline.until(lambda: text in pipeline.log.read_text()[start:], f"{text} is said")

    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:

        def flow() -> None:
            start = next(slices)
            feeder.send(films.events[start : start + 200])

        for missing in ("evalsha", "getrange", "mset"):
            start = len(pipeline.log.read_text())
            allow(redis, missing)
            flow()
            until_said(f"grant +{missing} (see `uemb acl --format redis-acl`); trying again for ", start)
            allow(redis)
            pipeline.until_committed()
        start = len(pipeline.log.read_text())
        with redis.client() as client:
            client.execute_command("ACL", "DELUSER", "ali")
        flow()
        until_said("refused the login", start)
        allow(redis)
        pipeline.until_committed()
    assert pipeline.stop() == 0
    log = pipeline.log.read_text()
    assert "Traceback" not in log
    assert "the key-value store answers again" in log
    pipeline.environment["UEMB_KV_URL"] = redis.url
    report = pipeline.verify()
    assert (report["differ"], report["busy"]) == (0, 0)


def test_one_that_stays_so_stops_the_worker(redis: RedisServer, pipeline: Pipeline) -> None:
    """A start is told at once."""
    line = "does not let its user run {0}; grant +{0} (see `uemb acl --format redis-acl`)"
    allow(redis, "get")
    pipeline.start()
    assert pipeline.wait() == 2
    assert pipeline.log.read_text().splitlines()[-1].endswith(line.format("get"))
    allow(redis)
    pipeline.start(UEMB_DELIVERY_TIMEOUT_S="1")
    pipeline.until_ready()
    allow(redis, "mset")
    assert pipeline.wait() == 2
    log = pipeline.log.read_text()
    assert log.splitlines()[-1].endswith(line.format("mset"))
    assert "Traceback" not in log
