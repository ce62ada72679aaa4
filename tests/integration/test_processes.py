"""`uemb worker --processes 2` on the real Kafka: one application, two processes, one that is killed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import supervised
from pipeline import UEMB, Pipeline, feeding

from stream.feed.dataset import Dataset

pytestmark = pytest.mark.kafka


def children(pipeline: Pipeline) -> list[int]:
    assert pipeline.process is not None
    return supervised.children(pipeline.process.pid)


@pytest.mark.slow
def test_two_processes_share_the_partitions_and_one_that_is_killed_comes_back(
    films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    rows = films.events[:6_000]
    pipeline = make_pipeline()
    pipeline.start([*UEMB, "worker", "--processes", "2"])
    pipeline.until_ready()
    pipeline.until(lambda: set(supervised.owners(pipeline.log.read_text())) == {"0", "1"}, "both own partitions")
    assert sorted(path.name for path in pipeline.state.iterdir()) == ["process-0", "process-1"]
    with feeding(pipeline, rows, 1_000):
        pipeline.until(lambda: pipeline.length(pipeline.output) > 500, "events flow")
        first, second = children(pipeline)
        os.kill(first, signal.SIGKILL)
        pipeline.until(lambda: len(children(pipeline)) == 2 and first not in children(pipeline), "it is started again")
        assert second in children(pipeline)
    pipeline.until_committed(120)
    pipeline.check(len({row.user_id for row in rows}))
    assert "process 0 ended with 137; it is started again in 1 s" in pipeline.log.read_text()
    left = children(pipeline)
    assert pipeline.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in left)


def test_a_setting_that_is_wrong_ends_all_processes(make_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.environment["UEMB_ITEMS"] = str(tmp_path / "nowhere")
    pipeline.start([*UEMB, "worker", "--processes", "2"])
    assert pipeline.wait() == 2
    assert "what it was told is wrong; the others are stopped" in pipeline.tail()
