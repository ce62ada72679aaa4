"""A worker that is paused past its session and comes back with writes under way leaves nothing old behind (law 7)."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline import Pipeline, compact, erase, feeding, killing_worker
from prober import RedisProber
from redis_server import RedisServer

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.keys import CLAIM_KEY


def freeze(pipeline: Pipeline) -> None:
    """SIGSTOP: its timers stand still, its connections stay open."""
    assert pipeline.process is not None
    os.kill(pipeline.process.pid, signal.SIGSTOP)


def thaw(pipeline: Pipeline) -> None:
    assert pipeline.process is not None
    os.kill(pipeline.process.pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_zombie_with_writes_under_way(
    films: Dataset,
    redis: RedisServer,
    make_pipeline: Callable[..., Pipeline],
    tmp_path: Path,
) -> None:
    rows = films.events[:30_000]
    zombie, owner = (make_pipeline(kv_url=redis.url, state_dir=tmp_path / name) for name in ("zombie", "owner"))
    owner.log = tmp_path / "owner.log"
    zombie.start()
    zombie.until_ready()
    with Feeder(zombie.bootstrap, zombie.topics) as feeder:
        feeder.send(rows[:10_000])
        zombie.until(lambda: zombie.length(zombie.output) > 1_000, "events flow")
        freeze(zombie)  # in the middle of a backlog: batches are queued, and on their way
        try:
            assert zombie.lag() > 0, "it had nothing under way"
            before = owner.epochs()
            owner.start()
            owner.until_epochs_rise(before)
            feeder.send(rows[10_000:])
            owner.until_committed(120)
            length = len(owner.read(owner.output))
        finally:
            thaw(zombie)
        code = zombie.wait(60)
    assert code == 75, zombie.tail()
    said = [line for line in zombie.log.read_text().splitlines() if line.startswith("uemb: ")]
    assert len(said) == 1
    assert "newer owner" in said[0] or "has lost it" in said[0]
    assert "Traceback" not in zombie.log.read_text()
    # nothing of it is in the logs: the broker refused what came after the fence
    assert len(owner.read(owner.output)) == length
    owner.check(len({row.user_id for row in rows}))
    compact(owner)
    with Feeder(owner.bootstrap, owner.topics) as feeder:  # segments roll, and are compacted, when there is news
        feeder.send(films.events[30_000:30_200])
        owner.until_committed()
        feeder.send(films.events[30_200:30_400])
    owner.until_committed()
    owner.until(lambda: len(owner.read(owner.output)) < length, "the output is compacted")
    owner.check(len({row.user_id for row in films.events[:30_400]}))
    assert owner.stop() == 0


def until_frozen(pipeline: Pipeline) -> None:
    """Wait until the worker has stopped itself."""
    assert pipeline.process is not None
    status = Path(f"/proc/{pipeline.process.pid}/status")
    pipeline.until(lambda: "\nState:\tT" in status.read_text(), "the fault fires", 120)


@pytest.mark.parametrize(
    ("stage", "then", "refused_by"),
    [
        ("local", "silence", "changelog"),
        ("changelog", "erasure", "store"),
        pytest.param("local", "erasure", "changelog", marks=pytest.mark.slow),
    ],
)
def test_a_zombie_whose_write_would_be_the_last_of_its_user(
    stage: str,
    then: str,
    refused_by: str,
    films: Dataset,
    redis: RedisServer,
    make_pipeline: Callable[..., Pipeline],
    tmp_path: Path,
) -> None:
    """No later record of the owner covers it up: in silence nothing but the fence comes after it on its partition."""
    rows = films.events[:3_000]
    last = rows[-1]
    zombie, owner = (make_pipeline(kv_url=redis.url, state_dir=tmp_path / name) for name in ("zombie", "owner"))
    owner.log = tmp_path / "owner.log"
    zombie.start(killing_worker(stage, [last.user_id], "SIGSTOP"))
    zombie.until_ready()
    with Feeder(zombie.bootstrap, zombie.topics) as feeder:
        feeder.send([row for row in rows if row.user_id != last.user_id])
        zombie.until_committed()
        with RedisProber(redis) as prober:
            feeder.send([row for row in rows if row.user_id == last.user_id])
            until_frozen(zombie)
            try:
                assert zombie.lag() > 0, "it had nothing under way"
                before = owner.epochs()
                owner.start()
                owner.until_epochs_rise(before)
                if then == "erasure":
                    erase(owner, [last])
                owner.until_committed()
                logs = published(owner)
            finally:
                thaw(zombie)
            assert zombie.wait(60) == 75, zombie.tail()
            said = [line for line in zombie.log.read_text().splitlines() if line.startswith("uemb: ")]
            assert len(said) == 1
            assert "newer owner" in said[0]
            assert (zombie.changelog if refused_by == "changelog" else "epoch") in said[0], (
                "it was not its write that was refused"
            )
            assert "Traceback" not in zombie.log.read_text()
            looks = prober.looks
            owner.until(lambda: prober.looks > looks, "the store is looked at once more")
        assert prober.back == []
        assert published(owner) == logs
        gone = {key.rsplit(":", 1)[1] for key, value in owner.last_output().items() if value is None}
        assert gone == ({last.user_id} if then == "erasure" else set())
        feeder.send(films.events[3_000:3_500])
    owner.until_committed()
    owner.check(len({row.user_id for row in films.events[:3_500]}))
    assert owner.stop() == 0


def published(pipeline: Pipeline) -> list[tuple[str, int, int]]:
    """Places of all states and vectors on changelog and output; a zombie that comes back has its owner claim again."""
    records = [record for topic in (pipeline.changelog, pipeline.output) for record in pipeline.read(topic)]
    return sorted((r.topic(), r.partition(), r.offset()) for r in records if r.key() != CLAIM_KEY)


@pytest.mark.slow
def test_a_zombie_whose_store_is_locked(films: Dataset, make_workers: Callable[..., list[Pipeline]]) -> None:
    """The embedded store has one writer: a new owner waits for the lock, gives up, and takes over when it is free."""
    rows = films.events[:10_000]
    early = {row.user_id for row in rows[:3_000]}
    late = next(row.user_id for row in rows[3_000:] if row.user_id not in early)
    zombie, owner = make_workers(2, kv_lock_patience_s=3)
    zombie.start(killing_worker("local", [late], "SIGSTOP"))  # with writes under way: else it just joins again
    zombie.until_ready()
    with feeding(zombie, rows, 2_000):
        until_frozen(zombie)
        try:
            owner.start()
            assert owner.wait(60) == 75
        finally:
            thaw(zombie)
        said = [line for line in owner.log.read_text().splitlines() if line.startswith("uemb: ")]
        assert len(said) == 1
        assert "still held by another process" in said[0]
        assert zombie.wait(60) == 75  # fenced by the one that did not get the store
        owner.start()
        time.sleep(0.5)
    owner.until_committed(120)
    owner.check(len({row.user_id for row in rows}))
    assert owner.stop() == 0
