"""Clocks that are wrong: a vector has no wall clock in it, and a broker's refusal is explained.

The producer's clock is moved by libfaketime. librdkafka does not get along with it, whatever its settings: now and then
one of its condition variables waits for ever. So the producer is one of asyncio, and the clock of a worker is moved
inside of Python, where all that it writes down comes from.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline import Pipeline, event_json

from stream.core.events import EventRow
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder

EVENTS = 4_000
DAY_S = 86_400


def faked(offset: str) -> dict[str, str]:
    """Environment of a process whose wall clock is off."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip("no libfaketime: install it (Debian: libfaketime)")
    return {"LD_PRELOAD": str(found[0]), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def worker_off_by(seconds: float) -> list[str]:
    """Command of a worker whose clock is off."""
    return [sys.executable, str(Path(__file__).parent / "wrong_clock_worker.py"), str(seconds)]


@pytest.fixture
def rows(films: Dataset) -> list[EventRow]:
    return films.events[:EVENTS]


@pytest.mark.slow
def test_a_worker_a_day_behind(rows: list[EventRow], make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    pipeline.start(worker_off_by(-DAY_S))
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(rows)
    pipeline.until_committed()
    behind = [record.timestamp()[1] for record in pipeline.read(pipeline.output)]
    sent = [record.timestamp()[1] for record in pipeline.read(pipeline.topics["view"])]
    assert max(behind) < min(sent) - 80_000_000, "the fault did not fire"
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_a_producer_a_day_behind(rows: list[EventRow], make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    events = [(pipeline.topics[row.type], row.user_id, event_json(*row[:4]).decode()) for row in rows]
    command = [sys.executable, str(Path(__file__).parent / "asyncio_producer.py"), pipeline.bootstrap]
    subprocess.run(
        command,
        input="\n".join(map(json.dumps, events)),
        env={**pipeline.environment, **faked("-1d")},
        text=True,
        check=True,
        timeout=60,
    )
    pipeline.until_committed()
    sent = [record.timestamp()[1] for record in pipeline.read(pipeline.topics["view"])]
    published = [record.timestamp()[1] for record in pipeline.read(pipeline.output)]
    assert max(sent) < min(published) - 80_000_000, "the fault did not fire"
    assert pipeline.read(pipeline.dlq) == []
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_a_worker_a_day_ahead_is_told_so(rows: list[EventRow], make_pipeline: Callable[..., Pipeline]) -> None:
    """Kafka refuses records from the future."""
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(rows[: EVENTS // 2])
        pipeline.until_committed()
        assert pipeline.stop() == 0
        feeder.send(rows[EVENTS // 2 :])
    lag = pipeline.lag()
    pipeline.start(worker_off_by(DAY_S))
    assert pipeline.wait(60) == 75
    said = [line for line in pipeline.log.read_text().splitlines() if line.startswith("uemb: ")]
    assert len(said) == 1
    assert "clock" in said[0]
    assert "message.timestamp.after.max.ms" in said[0]
    assert pipeline.lag() == lag > 0
    pipeline.start()
    pipeline.until_committed()
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0
