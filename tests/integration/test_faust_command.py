"""``faust -A stream.app worker`` runs the same application as ``uemb worker``."""

import sys
import time
from collections.abc import Callable

from kafka_broker import free_ports
from pipeline import Pipeline, check_end_state, expected

from stream.config import load_settings
from stream.core.events import EventRow
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace


def test_the_faust_command_runs_the_application(space: ItemSpace, make_pipeline: Callable[..., Pipeline]) -> None:
    now = time.time_ns() // 1_000_000
    rows = [EventRow(f"u{i % 7}", str(i % 50 + 1), "like" if i % 3 else "view", now - 1000 + i) for i in range(200)]
    pipeline = make_pipeline()
    (port,) = free_ports(1)  # of its web pages, where others beside it have theirs
    pipeline.start([sys.executable, "-m", "faust", "-A", "stream.app", "worker", "-l", "warn", "--web-port", str(port)])
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(rows)
    pipeline.until_committed()
    assert pipeline.stop() == 0
    check_end_state(pipeline, expected(rows, space), space, load_settings().versioned_encoder.version)
