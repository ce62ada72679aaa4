"""``kill -9`` between the stages of a batch's way to durability, on the last events of users (law 5)."""

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline import Event, Pipeline, check_end_state, expected

from stream.config import load_settings
from stream.dataset import Dataset, EventRow
from stream.feed import Feeder
from stream.items import ItemSpace

USER_VERSION = load_settings().versioned_encoder.version
KILLING_WORKER = Path(__file__).parents[1] / "killing_worker.py"
STAGES = ("local", "changelog", "output", "kv")


@pytest.mark.parametrize("disk", ["kept", "wiped"])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_on_the_last_event_of_several_users(
    stage: str, disk: str, films: Dataset, space: ItemSpace, make_pipeline: Callable[..., Pipeline]
) -> None:
    some = list(dict.fromkeys(row.user_id for row in films.events))[:120]
    events = [row for row in films.events if row.user_id in set(some)]
    last = {row.user_id: row for row in events}
    victims = [last[user] for user in some[:8]]
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([row for row in events if row not in victims])
        pipeline.until_committed()
        assert pipeline.stop() == 0
        # from here on no victim has another event: only the replay of its last one can publish it
        pipeline.start([sys.executable, str(KILLING_WORKER), stage, ",".join(v.user_id for v in victims)])
        pipeline.until_ready()
        feeder.send(victims)
        assert pipeline.wait() == -signal.SIGKILL, "the fault did not fire"
    assert 0 < pipeline.lag() <= len(victims)
    if disk == "wiped":
        shutil.rmtree(pipeline.state)
    pipeline.start()
    pipeline.until_ready()
    pipeline.until_committed()
    check_end_state(pipeline, expected(map(_event, events), space), space, USER_VERSION)
    assert pipeline.read(pipeline.dlq) == []
    assert pipeline.stop() == 0


def _event(row: EventRow) -> Event:
    return (row.user_id, row.item_id, row.type, row.ts_ms)
