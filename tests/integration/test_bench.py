"""``uemb bench`` compares what does the same: the worker and a plain Faust agent publish equal vectors."""

from pathlib import Path

import pytest
from kafka_broker import KafkaBroker
from pipeline import delete_topics

from stream.cli.bench.load import Load
from stream.cli.bench.throughput import Ends, Setup, check_equal
from stream.config import load_settings


@pytest.mark.slow
def test_both_publish_the_same(
    kafka: KafkaBroker, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UEMB_BOOTSTRAP_SERVERS", kafka.bootstrap)
    setup = Setup(load_settings(), unique, tmp_path, Load(users=200, length=20, items=500))
    ends = Ends(setup.client, setup.partitions)
    try:
        setup.prepare()
        compared, _ = check_equal(setup, ends, print)
        assert compared > 0
    finally:
        ends.close()
        delete_topics(kafka.bootstrap, unique)
