"""How long fetches are held: events among few at once, many together, none for long while others are waited for."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiokafka
import pytest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.structs import TopicPartition
from confluent_kafka import Producer

from stream.config import load_settings
from stream.kafka.client_internals import hold_fetches
from stream.kafka.embedded_broker import DevBroker
from stream.kafka.fetch_pace import GATHER_BYTES, IDLE_MS, SHORT_MS, FetchPace, Hold
from stream.worker.app import EmbeddingApp

GATHER_MS = 12


def test_an_idle_worker_is_answered_at_once_and_asks_seldom() -> None:
    pace = FetchPace(GATHER_MS)
    assert pace.hold(0.0, is_partial=False) == Hold(IDLE_MS, 1)
    pace.took(1, 0.0)
    holds = [pace.hold(0.0, is_partial=False) for _ in range(3)]
    assert holds == [Hold(SHORT_MS, 1), Hold(IDLE_MS, 1), Hold(IDLE_MS, 1)], "an event is often followed by another"


def test_a_broker_that_answers_when_the_time_is_up_is_given_little() -> None:
    pace = FetchPace(GATHER_MS)
    pace.idle_ms = SHORT_MS
    assert pace.hold(0.0, is_partial=False) == Hold(SHORT_MS, 1)
    pace.took(1_000, 0.0)
    assert pace.hold(0.0, is_partial=False).wait_ms == GATHER_MS


@pytest.mark.parametrize(
    ("rate", "gather_ms", "gathers"),
    [(50, 12, False), (100, 12, False), (400, 12, True), (100, 50, True), (20, 50, False), (400, 1, False)],
)
@pytest.mark.parametrize("at_once", [1, 5])
def test_events_are_gathered_when_some_will_meet(rate: float, gather_ms: int, gathers: bool, at_once: int) -> None:
    pace, now_s = FetchPace(gather_ms), 0.0
    for _ in range(int(10 * rate / at_once)):
        now_s += at_once / rate
        pace.took(at_once, now_s)
    assert (pace.hold(now_s, is_partial=False) == Hold(gather_ms, GATHER_BYTES)) == gathers


async def test_a_worker_gathers_for_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UEMB_GATHER_MS", "77")
    monkeypatch.setenv("UEMB_STATE_DIR", str(tmp_path))
    pace = EmbeddingApp(load_settings()).consumer._new_consumer_thread()._pace
    pace.took(10_000, 0.0)
    assert pace.hold(0.0, is_partial=False).wait_ms == 77


def test_a_burst_is_forgotten() -> None:
    pace = FetchPace(GATHER_MS)
    pace.took(10_000, 5.0)
    assert pace.hold(5.0, is_partial=False).wait_ms == GATHER_MS
    pace.hold(5.75, is_partial=False)
    assert pace.hold(5.75, is_partial=False) == Hold(IDLE_MS, 1), "however large it was"


def test_partitions_that_are_left_out_are_not_held_up_for_the_sake_of_the_others() -> None:
    pace = FetchPace(GATHER_MS)
    for records in (0, 10_000):
        pace.took(records, 0.0)
        assert pace.hold(0.0, is_partial=True) == Hold(SHORT_MS, 1)


async def test_the_client_asks_brokers_to_hold_its_fetches_as_it_is_told() -> None:
    with DevBroker() as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap})
        places = [TopicPartition("events", n) for n in range(2)]
        for place in places:
            producer.produce("events", b"x", partition=place.partition)
        assert producer.flush(60) == 0
        client = aiokafka.AIOKafkaConsumer(bootstrap_servers=broker.bootstrap, auto_offset_reset="earliest")
        await client.start()
        told: list[bool] = []
        asked: asyncio.Queue[tuple[Hold, set[int]]] = asyncio.Queue()

        def hold(is_partial: bool) -> Hold:
            told.append(is_partial)
            return Hold(len(told), 1000 + len(told))

        send = client._client.send

        async def noted(node: int, request: Any, **how: Any) -> Any:
            if isinstance(request, FetchRequest):
                partitions = {entry[0] for _, entries in request.topics for entry in entries}
                asked.put_nowait((Hold(request._max_wait_ms, request._min_bytes), partitions))
            return await send(node, request, **how)

        client._client.send = noted
        hold_fetches(client, hold)
        client.assign(places)
        assert await client.getmany(places[0], timeout_ms=60_000)
        holds = []
        while True:  # the other one was fetched too, and nobody takes it in
            held, partitions = await asked.get()
            holds.append(held)
            assert told[held.wait_ms - 1] == (partitions != {0, 1})
            if partitions == {0}:
                break
        assert all(held == Hold(held.wait_ms, 1000 + held.wait_ms) for held in holds)
        assert all(first.wait_ms < second.wait_ms for first, second in pairwise(holds))
        await client.stop()
