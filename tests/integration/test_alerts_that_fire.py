"""The compose file's Prometheus beside real workers on a real Kafka: each fault is told, by its alerts and no others.

Every window, `for` and interval of the rules is `SCALE` times as long as in the file, scrapes are as much denser, and
nothing else differs: what counts in the thresholds of lag and commits is seconds, here too.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest
from compose_file import dashboard
from kafka_broker import KafkaBroker, free_ports
from pipeline import Pipeline, erase
from prometheus import Prometheus, why_no_prometheus
from redis_server import RedisServer

from stream.core.events import EventRow
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.timeout(1_500),
    pytest.mark.skipif(why_no_prometheus() is not None, reason=str(why_no_prometheus())),
]

SCALE: Final = 1 / 30
#: As Grafana makes `$__rate_interval`: four scrapes.
RATE_INTERVAL: Final = f"{round(4 * 15_000 * SCALE)}ms"
RATE: Final = 100.0


@contextmanager
def traffic(pipeline: Pipeline, rows: Sequence[EventRow], rate: float = RATE) -> Iterator[None]:
    """Events flow while the block runs."""
    stop = threading.Event()
    patience = {"message.timeout.ms": 600_000}
    with Feeder(pipeline.bootstrap, pipeline.topics, client_config=patience) as feeder:
        thread = threading.Thread(target=feeder.send, args=(rows,), kwargs={"rate": rate, "stop": stop})
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def watching(*workers: Pipeline) -> Iterator[Prometheus]:
    """A Prometheus that scrapes these workers."""
    folder = workers[0].folder / "prometheus"
    folder.mkdir()
    targets = [worker.environment["UEMB_HTTP"] for worker in workers]
    with Prometheus(folder, targets, scale=SCALE) as prometheus:
        prometheus.until(lambda: prometheus.value("sum(up)") == len(workers), "all are scraped")
        yield prometheus


def at_ports(*workers: Pipeline) -> None:
    """Give each worker a port that outlasts its restarts."""
    for worker, port in zip(workers, free_ports(len(workers)), strict=True):
        worker.environment["UEMB_HTTP"] = f"127.0.0.1:{port}"


def told(prometheus: Prometheus, *alerts: str) -> None:
    """Wait until these alerts fire, and no others; what they say is complete."""
    seen: list[set[str]] = []
    prometheus.until(lambda: seen.append(prometheus.firing()) or seen[-1] == set(alerts), f"{alerts} fire")  # type: ignore[func-returns-value]
    for alert in alerts:
        for text in prometheus.annotations(alert).values():
            assert text
            assert "<no value>" not in text
            assert "{{" not in text


def quiet_again(prometheus: Prometheus) -> None:
    prometheus.until(lambda: not prometheus.firing(), "nothing fires")


def all_is_well(prometheus: Prometheus) -> None:
    """Wait until records are processed, for which no alert fires."""
    flow = f"sum(rate(uemb_records_total[{RATE_INTERVAL}]))"
    prometheus.until(lambda: (prometheus.value(flow) or 0) > 0, "records are processed")
    assert not prometheus.firing()


def test_bad_records_unknown_items_and_a_refused_version(
    films: Dataset, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    pipeline = make_pipeline()
    at_ports(pipeline)
    pipeline.start()
    pipeline.until_ready()
    with watching(pipeline) as prometheus, traffic(pipeline, films.events):
        all_is_well(prometheus)
        pipeline.say(pipeline.topics["like"], b"7", b"not JSON")
        told(prometheus, "UembDeadLetters")
        quiet_again(prometheus)
        newcomers = [EventRow(f"new-{n}", f"nowhere-{n}", "view", films.events[-1].ts_ms + n) for n in range(50_000)]
        with traffic(pipeline, newcomers):
            told(prometheus, "UembFallbackShare", "UembUnknownItems")
        quiet_again(prometheus)
        record = {"version": "films_v2", "uri": str(tmp_path / "nothing"), "sha256": "0" * 64, "state": "prepare"}
        pipeline.say(pipeline.item_versions, b"films_v2", json.dumps(record).encode())
        told(prometheus, "UembRolloutStalled")
        pipeline.say(pipeline.item_versions, b"films_v2", json.dumps({**record, "state": "retired"}).encode())
        quiet_again(prometheus)
    assert pipeline.stop() == 0


def test_a_store_that_is_away_under_a_worker_and_while_another_takes_over(
    films: Dataset, make_redis: Callable[..., RedisServer], make_workers: Callable[..., list[Pipeline]]
) -> None:
    redis = make_redis(appendonly="yes")
    first, second = workers = make_workers(2, kv_url=redis.url, delivery_timeout_s=3_000)
    at_ports(*workers)
    first.start()
    first.until_ready()
    second.start()
    second.until_epochs_rise(first.epochs())
    with watching(*workers) as prometheus:
        began_s = time.time()
        with traffic(first, films.events):
            all_is_well(prometheus)
            erase(first, films.events[:1])
            first.say(first.topics["like"], b"7", b"not JSON")
            told(prometheus, "UembDeadLetters")
            quiet_again(prometheus)
            redis.kill()
            told(prometheus, "UembCommitsStalled", "UembLagGrowing", "UembStoreErrors")
            redis.start()
            quiet_again(prometheus)
        first.until_committed()
        redis.kill()  # paused, it would give an error every five seconds: the short windows would see none between
        first.kill()
        told(prometheus, "UembWorkerDown", "UembRestoreStuck", "UembStoreErrors")
        redis.start()
        first.start()
        quiet_again(prometheus)
        every_panel_shows_something(prometheus, began_s)
    for worker in workers:
        assert worker.stop() == 0


def every_panel_shows_something(prometheus: Prometheus, since_s: float) -> None:
    panels = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    assert len(panels) > 25
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"].replace("$instance", ".+").replace("$__rate_interval", RATE_INTERVAL)
            assert "$" not in expression
            found = [value for one in prometheus.query_range(expression, since_s) for _, value in one["values"]]
            assert any(math.isfinite(float(value)) for value in found), (panel["title"], expression)


def test_brokers_that_are_away(
    films: Dataset, own_kafka: KafkaBroker, unique: str, tmp_path: Path, item_folder: Path
) -> None:
    settings = {"session_timeout_s": "60", "delivery_timeout_s": "3000"}
    pipeline = Pipeline(own_kafka.bootstrap, unique, tmp_path, item_folder, **settings)
    at_ports(pipeline)
    with ExitStack() as ending:
        ending.callback(pipeline.close)
        pipeline.start()
        pipeline.until_ready()
        prometheus = ending.enter_context(watching(pipeline))
        with traffic(pipeline, films.events):
            all_is_well(prometheus)
        pipeline.until_committed()
        own_kafka.pause()
        told(prometheus, "UembCommitsStalled")
        own_kafka.resume()
        quiet_again(prometheus)
        with traffic(pipeline, films.events[:2_000]):
            all_is_well(prometheus)
        assert pipeline.stop() == 0
