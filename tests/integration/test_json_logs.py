"""With `UEMB_LOG_FORMAT=json` all that a worker writes is one object a line, from its first word to its last."""

import json
import re
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from kafka_broker import free_ports
from pipeline import UEMB, Pipeline

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder

pytestmark = pytest.mark.kafka

#: On stdout it draws a banner, whoever looks.
FAUST = [
    "/bin/sh",
    "-c",
    'exec "$@" > /dev/null',
    "",
    sys.executable,
    "-m",
    "faust",
    "-A",
    "stream.app",
    "worker",
    "-l",
    "info",
    "--web-port",
    str(*free_ports(1)),
]


def written(pipeline: Pipeline) -> list[dict[str, Any]]:
    """What the worker and its children wrote."""
    objects = [json.loads(line) for line in pipeline.log.read_text().splitlines()]
    for fields in objects:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields["time"])
        assert datetime.fromisoformat(fields["time"]).utcoffset() == timedelta()
        assert {"level", "logger", "message", "pid"} <= fields.keys()
    return objects


def test_a_worker_and_its_processes(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline(log_format="json", group_instance_id="host-7")
    pipeline.start([*UEMB, "worker", "--processes", "2"], UEMB_HISTORY_LIMT="20")
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:500])
    pipeline.until_committed()
    assert pipeline.stop() == 0
    objects = written(pipeline)
    assert {fields.get("process") for fields in objects} == {None, 0, 1}
    claims = [fields for fields in objects if "claimed epoch" in fields["message"]]
    assert {fields["app"] for fields in claims} == {pipeline.app_id}
    for number in (0, 1):
        own = [fields for fields in objects if fields.get("process") == number]
        assert len({fields["pid"] for fields in own}) == 1
        assert {f["instance"] for f in own if "instance" in f} == {f"host-7-{number}"}
    assert "UEMB_HISTORY_LIMT is not a setting" in objects[0]["message"]


@pytest.mark.parametrize("command", [[*UEMB, "worker"], FAUST], ids=["uemb", "faust"])
def test_the_reason_why_it_does_not_start(command: list[str], make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline(log_format="json")
    pipeline.start(command, UEMB_ITEMS="/nowhere")
    assert pipeline.wait() == 2
    last = written(pipeline)[-1]
    assert last["level"] == "CRITICAL"
    assert "/nowhere" in last["message"]


def test_a_setting_that_is_wrong(make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline(log_format="json", partitions="none")
    pipeline.start()
    assert pipeline.wait() == 2
    (only,) = written(pipeline)
    assert "UEMB_PARTITIONS" in only["message"]


@pytest.mark.slow
def test_fausts_own_command(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline(log_format="json")
    pipeline.start(FAUST)
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:500])
    pipeline.until_committed()
    assert pipeline.stop() == 0
    assert any("claimed epoch" in fields["message"] for fields in written(pipeline))
