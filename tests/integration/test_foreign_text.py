"""Ids, keys, values and headers of other people, through the commands that print them from topics."""

import json
from collections.abc import Callable
from typing import Any

from confluent_kafka import Producer
from pipeline import Pipeline
from strategies import acts

from stream.logs import escaped

USERS = ["[/x]", "[red]boo[/red]", "a:smile:b", "like:100:5", "x\u202ey", "a\u2028b"]


def send(pipeline: Pipeline, *records: tuple[bytes, bytes, list[Any]]) -> None:
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random", "log_level": 2})
    for key, value, headers in records:
        producer.produce(pipeline.topics["like"], value, key, headers=headers)
    assert producer.flush(60) == 0


def test_what_is_printed_of_topics_is_text(make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    event = {"item_id": 1, "type": "like", "ts": 1_700_000_000_000}
    send(pipeline, *[(user.encode(), json.dumps({"user_id": user, **event}).encode(), []) for user in USERS])
    evil = b"\x1b]0;title\x07\xc2\x9b31m\n[/x]"
    send(pipeline, (evil, evil, [("h\x1b[2J", evil)]))
    pipeline.until_committed()

    followed = pipeline.uemb("tail", "--from-beginning", "-n", str(len(USERS)))
    assert not acts(followed)
    assert all(f":{escaped(user)}  " in followed for user in USERS)
    for line in pipeline.uemb("tail", "--from-beginning", "-n", str(len(USERS)), "--json").splitlines():
        assert not acts(line)
        assert json.loads(line)["record"]["user_id"] in USERS

    letter, *_ = pipeline.uemb("dlq", "list", "--records", "--json").splitlines()
    assert not acts(letter)
    place = json.loads(letter)["letter"]
    for command in (["dlq", "list"], ["dlq", "list", "--records"], ["dlq", "show", place]):
        assert not acts(pipeline.uemb(*command)), command
    shown, *_ = pipeline.uemb("dlq", "show", place, "--json").splitlines()
    assert not acts(shown)
    assert json.loads(shown)["key"] == evil.decode()
    assert pipeline.stop() == 0
