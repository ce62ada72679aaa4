"""``uemb bench`` compares what does the same: the worker and a plain Faust agent publish equal vectors."""

from pathlib import Path

import pytest
from kafka_broker import KafkaBroker
from pipeline import delete_topics

from stream.cli.bench.load import Load
from stream.cli.bench.throughput import CHECKED_EVENTS, Ends, Setup, compare_users, read_all
from stream.config import load_settings


def test_both_publish_the_same(
    kafka: KafkaBroker, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UEMB_BOOTSTRAP_SERVERS", kafka.bootstrap)
    setup = Setup(load_settings(), unique, tmp_path, Load(users=200, length=20, items=500))
    ends = Ends(setup.client, setup.partitions)
    try:
        setup.prepare()
        setup.feed(CHECKED_EVENTS, 0)
        system, output = setup.worker("worker")
        with system:
            system.until_count(ends, output, CHECKED_EVENTS)
        ours = {key.rsplit(":", 1)[1]: found for key, found in read_all(setup, output).items()}
        assert sum(found.records for found in ours.values()) == CHECKED_EVENTS
        system, output = setup.peer("peer", {})
        with system:  # it loses records around its start, on a busy machine many
            system.until_quiet(ends, output, CHECKED_EVENTS)
        assert compare_users(ours, read_all(setup, output)) > 0
    finally:
        ends.close()
        delete_topics(kafka.bootstrap, unique)
