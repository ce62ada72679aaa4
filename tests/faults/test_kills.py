"""``kill -9`` at each stage of a batch's way to durability, at random moments, and of workers in rotation."""

import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition
from pipeline import Pipeline, erase, feeding, killing_worker, seed

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder

STAGES = ("local", "changelog", "output", "kv")


@pytest.mark.parametrize("stage", [pytest.param(s, marks=[pytest.mark.slow] * (s != "changelog")) for s in STAGES])
def test_killed_on_the_last_record_of_several_users(
    stage: str, films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    """One kill after another, each on users who have no later record: only its replay can publish what it caused."""
    some = list(dict.fromkeys(row.user_id for row in films.events))[:120]
    events = [row for row in films.events if row.user_id in set(some)]
    newest = [*{row.user_id: row for row in events}.values()]
    cases = [("event", "kept"), ("event", "wiped"), ("erasure", "kept"), ("erasure", "wiped")]
    victims = {case: newest[8 * n : 8 * n + 8] for n, case in enumerate(cases)}
    held_back = [row for (last, _), rows in victims.items() if last == "event" for row in rows]
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([row for row in events if row not in held_back])
        pipeline.until_committed()
        assert pipeline.stop() == 0
        for (last, disk), rows in victims.items():
            pipeline.start(killing_worker(stage, [row.user_id for row in rows]))
            pipeline.until_ready()
            pipeline.until_committed()
            if last == "event":
                feeder.send(rows)
            else:
                erase(pipeline, rows)
            assert pipeline.wait() == -signal.SIGKILL, "the fault did not fire"
            assert 0 < pipeline.lag() <= len(rows)
            if disk == "wiped":
                shutil.rmtree(pipeline.state)
    pipeline.start()
    pipeline.until_ready()
    pipeline.until_committed()
    pipeline.check(len(some))
    gone = {key.rsplit(":", 1)[1] for key, value in pipeline.last_output().items() if value is None}
    assert gone == {row.user_id for (last, _), rows in victims.items() if last == "erasure" for row in rows}
    assert pipeline.read(pipeline.dlq) == []
    assert pipeline.stop() == 0


def ends(pipeline: Pipeline, isolation: str) -> list[int]:
    """Offsets up to which a reader of this isolation sees changelog and output."""
    config = {"bootstrap.servers": pipeline.bootstrap, "group.id": f"{pipeline.app_id}-ends", "log_level": 2}
    consumer = Consumer({**config, "isolation.level": isolation})
    try:
        topics = (pipeline.changelog, pipeline.output)
        places = [TopicPartition(topic, p) for topic in topics for p in range(pipeline.partitions)]
        return [consumer.get_watermark_offsets(place, timeout=60)[1] for place in places]
    finally:
        consumer.close()


def markers(pipeline: Pipeline) -> int:
    """Ends of transactions on changelog and output: their only offsets that are no record's."""
    records = sum(len(pipeline.read(topic)) for topic in (pipeline.changelog, pipeline.output))
    return sum(ends(pipeline, "read_uncommitted")) - records


def test_killed_between_the_halves_of_a_fence(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> None:
    """What it began at the broker holds up neither the next owner nor who reads committed records."""
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:3_000])
        pipeline.until_committed()
        assert pipeline.stop() == 0
        feeder.send(films.events[3_000:5_000])
    epochs, ended = pipeline.epochs(), markers(pipeline)
    pipeline.start([sys.executable, str(Path(__file__).parent / "half_fenced_worker.py")])
    assert pipeline.wait(60) == -signal.SIGKILL, "the fault did not fire"
    assert pipeline.lag() == 2_000
    assert (pipeline.epochs(), markers(pipeline)) == (epochs, ended), "it had ended its fence"
    assert ends(pipeline, "read_committed") == ends(pipeline, "read_uncommitted"), "readers are held up"
    pipeline.start()
    pipeline.until_ready()
    pipeline.until_committed()
    # one for each partition of both topics is the next owner's own; others end what the dead one had begun
    assert markers(pipeline) > ended + 2 * pipeline.partitions, "nothing had been begun at the broker"
    assert ends(pipeline, "read_committed") == ends(pipeline, "read_uncommitted"), "readers are held up"
    pipeline.check(len({row.user_id for row in films.events[:5_000]}))
    assert pipeline.stop() == 0


def grows(pipeline: Pipeline, length: int) -> bool:
    """Whether the output has more records than that."""
    return pipeline.length(pipeline.output) > length


def random_kills(pipeline: Pipeline, films: Dataset, kills: int, events: int, rate: float) -> None:
    rng = random.Random(seed())
    rows = films.events[:events]
    pipeline.start()
    pipeline.until_ready()
    erased = {row.user_id: row for row in rows[: events // 2]}
    done = 0
    with feeding(pipeline, rows, rate) as feed:
        for _ in range(kills):
            before = pipeline.length(pipeline.output)
            if rng.random() < 0.5:
                erase(pipeline, [erased.pop(rng.choice(list(erased)))])
            pipeline.until(lambda n=before: grows(pipeline, n) or feed.dry.is_set(), "output grows")  # type: ignore[misc]
            time.sleep(rng.uniform(0, 1.5))
            done += not feed.dry.is_set()
            pipeline.kill()
            if rng.random() < 0.3 and pipeline.state.exists():  # one that is killed early has not made it yet
                shutil.rmtree(pipeline.state)
            pipeline.start()
    assert done, "all events were sent before the first kill"
    pipeline.until_committed(120)
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


def test_random_kills_under_load(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> None:
    random_kills(make_pipeline(), films, kills=4, events=30_000, rate=1_000)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_random_kills_under_load(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> None:
    random_kills(make_pipeline(), films, kills=30, events=100_000, rate=700)


def rotation(workers: list[Pipeline], films: Dataset, turns: int, events: int, rate: float) -> None:
    rng = random.Random(seed())
    rows = films.events[:events]
    running, waiting = workers[:2], workers[2:]
    running[0].start()
    running[0].until_ready()
    before = running[0].epochs()
    running[1].start()
    running[0].until_epochs_rise(before)
    moved = 0
    with feeding(running[0], rows, rate) as feed:
        for _ in range(turns):
            before = running[0].epochs()
            output = running[0].length(running[0].output)
            if waiting and (len(running) < 2 or rng.random() < 0.4):
                running.append(waiting.pop())
                running[-1].start()
            else:
                leaver = running.pop(rng.randrange(len(running)))
                if rng.random() < 0.5:
                    leaver.kill()
                    if rng.random() < 0.5:
                        shutil.rmtree(leaver.state)
                else:
                    assert leaver.stop() == 0
                waiting.append(leaver)
            running[0].until_epochs_rise(before)
            running[0].until(lambda n=output: grows(running[0], n) or feed.dry.is_set(), "output grows")  # type: ignore[misc]
            moved += not feed.dry.is_set()
    assert moved, "all events were sent before the first turn"
    running[0].until_committed(120)
    running[0].check(len({row.user_id for row in rows}))
    for worker in running:
        assert worker.stop() == 0


@pytest.mark.slow
def test_three_workers_killed_stopped_and_added_in_rotation(
    films: Dataset, make_workers: Callable[..., list[Pipeline]]
) -> None:
    rotation(make_workers(3), films, turns=5, events=40_000, rate=1_000)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_long_rotation(films: Dataset, make_workers: Callable[..., list[Pipeline]]) -> None:
    rotation(make_workers(3), films, turns=25, events=100_000, rate=700)
