"""Workers with a `UEMB_GROUP_INSTANCE_ID`: one that is back in time has its partitions again, and no other notices.

What the group does is read from the broker's own log of it: each time that it spreads its partitions anew, its
generation rises.
"""

import re
import struct
import sys
from collections.abc import Callable

import pytest
from pipeline import Pipeline, feeding

from stream.core.events import EventRow
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder

pytestmark = pytest.mark.kafka

#: As it is when a supervisor starts it on another host.
ELSEWHERE = "import socket; socket.gethostname = lambda: 'elsewhere'; from stream.cli import main; main()"
#: Longer than a restart takes on a slow machine.
SESSION_S = 60


def generation(pipeline: Pipeline) -> int:
    """How often the group was made anew, as the broker keeps it for its own restarts."""
    newest = 0
    for record in pipeline.read("__consumer_offsets"):
        version, length = struct.unpack_from(">hh", record.key())
        if version == 2 and record.key()[4:].decode() == pipeline.app_id and record.value() is not None:
            (length,) = struct.unpack_from(">h", record.value(), 2)
            (newest,) = struct.unpack_from(">i", record.value(), 4 + length)
        # of other versions are offsets, and other groups' members
    return newest


def claimed(worker: Pipeline) -> dict[int, int]:
    """Newest epoch of each partition that a worker has claimed, in all its runs."""
    found = re.findall(r"partition (\d+): .*claimed epoch (\d+)", worker.log.read_text())
    return {int(partition): int(epoch) for partition, epoch in found}


def owned(worker: Pipeline) -> set[int]:
    """Partitions whose newest claim is this worker's."""
    return {p for p, epoch in claimed(worker).items() if worker.epochs()[p] == epoch}


def start_all(workers: list[Pipeline]) -> None:
    """Start workers one by one, each when the one before has joined, until each has its share."""
    for number, worker in enumerate(workers):
        worker.start()
        worker.until_ready()
        worker.until(lambda: all(map(owned, workers[: number + 1])), "all own partitions")  # noqa: B023


def said(worker: Pipeline) -> list[str]:
    return [line for line in worker.log.read_text().splitlines() if line.startswith("uemb: ")]


def users(rows: list[EventRow]) -> int:
    return len({row.user_id for row in rows})


@pytest.mark.slow
def test_a_rolling_restart_disturbs_no_other_worker(
    films: Dataset, make_workers: Callable[..., list[Pipeline]]
) -> None:
    rows = films.events[:40_000]
    workers = make_workers(3, session_timeout_s=SESSION_S)
    for number, worker in enumerate(workers):
        worker.environment["UEMB_GROUP_INSTANCE_ID"] = f"worker-{number}"
    start_all(workers)
    before = generation(workers[0])
    with feeding(workers[0], rows, 1_000):
        for worker in workers:
            others = [other for other in workers if other is not worker]
            claims, mine = [claimed(other) for other in others], owned(worker)
            epochs, length = worker.epochs(), worker.length(worker.output)
            assert worker.stop() == 0
            worker.start([sys.executable, "-c", ELSEWHERE, "worker"] if worker is workers[1] else None)
            worker.until(lambda: all(worker.epochs()[p] > epochs[p] for p in mine), "it has its partitions again")  # noqa: B023
            assert [claimed(other) for other in others] == claims, "the others were disturbed"
            assert [e for p, e in enumerate(worker.epochs()) if p not in mine] == [
                e for p, e in enumerate(epochs) if p not in mine
            ]
            worker.until(lambda: worker.length(worker.output) > length, "events flow")  # noqa: B023
    assert generation(workers[0]) == before
    workers[0].until_committed()
    workers[0].check(users(rows))
    assert generation(workers[0]) == before
    for worker in workers:
        assert worker.stop() == 0
        assert said(worker) == []


@pytest.mark.parametrize("busy", [pytest.param(True, marks=pytest.mark.slow), False])
def test_of_two_with_one_id_the_newer_stays_and_the_older_says_why_it_ends(
    busy: bool, films: Dataset, make_workers: Callable[..., list[Pipeline]]
) -> None:
    """What is fenced first is a write, or with none under way the older one's part in the group."""
    rows = films.events[:20_000]
    older, newer = make_workers(2, session_timeout_s=10, group_instance_id="the-one")
    older.start()
    older.until_ready()
    with feeding(older, rows if busy else [], 1_000):
        older.until(lambda: not busy or older.length(older.output) > 500, "events flow")
        before = older.epochs()
        newer.start()
        assert older.wait(60) == 2, older.tail()
        newer.until_epochs_rise(before)
    with Feeder(newer.bootstrap, newer.topics) as feeder:
        feeder.send(rows)
    newer.until_committed()
    newer.check(users(rows))
    (line,) = said(older)
    assert "UEMB_GROUP_INSTANCE_ID=the-one" in line
    assert "Traceback" not in older.log.read_text()
    assert newer.log.read_text().count("claimed epoch") == newer.partitions, "the older one took the name back"
    assert newer.stop() == 0
    assert said(newer) == []


@pytest.mark.slow
def test_one_that_does_not_come_back_in_time_loses_its_partitions_to_the_others(
    films: Dataset, make_workers: Callable[..., list[Pipeline]]
) -> None:
    rows = films.events[:5_000]
    stays, leaves = workers = make_workers(2, session_timeout_s=10)
    for number, worker in enumerate(workers):
        worker.environment["UEMB_GROUP_INSTANCE_ID"] = f"worker-{number}"
    start_all(workers)
    before, epochs, claims = generation(stays), stays.epochs(), claimed(stays)
    assert leaves.stop() == 0
    assert (generation(stays), claimed(stays)) == (before, claims), "it has left the group at once"
    with Feeder(stays.bootstrap, stays.topics) as feeder:
        feeder.send(rows)
    stays.until_epochs_rise(epochs)
    assert generation(stays) > before
    assert owned(stays) == set(range(stays.partitions))
    stays.until_committed()
    stays.check(users(rows))
    leaves.start()
    leaves.until(lambda: all(map(owned, workers)), "it has a share again")
    for worker in workers:
        assert worker.stop() == 0
