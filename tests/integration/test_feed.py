"""The feeder against the embedded broker: every record where its user's owner looks for it, whole, once."""

import asyncio
import itertools
import json
import socket
import threading
import time
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from stream.core.events import EventRow
from stream.errors import ConfigError, DeliveryError
from stream.feed import send_run as feed_run
from stream.feed.sender import Feeder
from stream.feed.synthetic import synthetic
from stream.kafka.embedded_broker import DevBroker
from stream.keys import partition_of

PARTITIONS = 4
ROWS = synthetic(users=300, items=50, events=3000).events


@pytest.fixture(scope="module")
def broker():
    with DevBroker() as broker:
        yield broker


@pytest.fixture(scope="module")
def feeder(broker):
    """Shared, because a producer's first record waits half a second for its id."""
    with Feeder(broker.bootstrap, lambda kind: kind) as feeder:
        yield feeder


@pytest.fixture
def topic(unique):
    """A topic of this test alone; the shared feeder sends a type to the topic of that name."""
    return f"{unique}.events"


def rows_for(topic, count):
    return [row._replace(type=topic) for row in ROWS[:count]]


async def read(bootstrap, *topics):
    """All records of the topics, by topic, in the order of their partitions."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, p) for topic in topics for p in range(PARTITIONS)]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        ends = await consumer.end_offsets(partitions)
        records = defaultdict(list)
        while any([await consumer.position(p) < end for p, end in ends.items()]):
            for batch in (await consumer.getmany(timeout_ms=200)).values():
                for record in batch:
                    records[record.topic].append(record)
        return records
    finally:
        await consumer.stop()


async def test_every_record_lands_whole_on_its_users_partition(broker):
    before_ms = time.time() * 1000 - 1
    with Feeder(broker.bootstrap) as feeder:
        report = await asyncio.to_thread(feeder.send, ROWS)
    records = await read(broker.bootstrap, "user-events.like", "user-events.view")
    everything = records["user-events.like"] + records["user-events.view"]
    assert report.sent == len(everything) == len(ROWS)
    assert report.seconds > 0
    for record in everything:
        assert record.partition == partition_of(record.key, PARTITIONS)
        assert before_ms <= record.timestamp <= time.time() * 1000  # the time of sending, not of the event
    assert {record.partition for record in everything} == set(range(PARTITIONS))
    values = [json.loads(record.value) for record in everything]
    assert all(set(value) == {"user_id", "item_id", "type", "ts"} for value in values)
    assert [record.key.decode() for record in everything] == [value["user_id"] for value in values]
    assert {value["type"] for value in map(json.loads, (r.value for r in records["user-events.like"]))} == {"like"}
    got = Counter(EventRow(v["user_id"], v["item_id"], v["type"], v["ts"]) for v in values)
    assert got == Counter(ROWS)
    for kind in ("like", "view"):  # per user and topic, order is kept
        sent, received = defaultdict(list), defaultdict(list)
        for row in ROWS:
            if row.type == kind:
                sent[row.user_id].append((row.item_id, row.ts_ms))
        for record in records[f"user-events.{kind}"]:
            value = json.loads(record.value)
            received[value["user_id"]].append((value["item_id"], value["ts"]))
        assert received == sent


async def test_integer_ids_stay_integers_and_share_the_key_of_their_text(broker, feeder, topic):
    rows = [
        SimpleNamespace(user_id=user, item_id=item, type=topic, ts_ms=1)
        for user, item in ((5, -9), ("5", "-9"), ("é", 0))
    ]
    assert feeder.send(rows).sent == 3
    records = (await read(broker.bootstrap, topic))[topic]
    by_key = defaultdict(list)
    for record in records:
        by_key[record.key].append(json.loads(record.value))
    assert [(v["user_id"], v["item_id"]) for v in by_key[b"5"]] == [(5, -9), ("5", "-9")]
    assert by_key["é".encode()][0]["user_id"] == "é"


async def test_a_mapping_names_topics_and_leaves_the_rest_at_the_default(broker):
    rows = [EventRow("u", "i", kind, 1) for kind in ("play", "skip")]
    with Feeder(broker.bootstrap, {"play": "plays.v1"}) as feeder:
        feeder.send(rows)
    records = await read(broker.bootstrap, "plays.v1", "user-events.skip")
    assert {topic: [json.loads(r.value)["type"] for r in rs] for topic, rs in records.items()} == {
        "plays.v1": ["play"],
        "user-events.skip": ["skip"],
    }


async def test_a_full_client_queue_loses_nothing(broker, topic):
    with Feeder(broker.bootstrap, lambda kind: kind, client_config={"queue.buffering.max.messages": 50}) as feeder:
        assert feeder.send(rows_for(topic, 2000)).sent == 2000
    assert len((await read(broker.bootstrap, topic))[topic]) == 2000


@pytest.mark.parametrize("wrong", [{"partitioner": "consistent_random"}, {"acks": "0"}])
async def test_what_decides_ownership_and_acknowledgement_can_not_be_set(broker, topic, wrong):
    with Feeder(broker.bootstrap, lambda kind: kind, client_config=wrong) as feeder:
        feeder.send(rows_for(topic, 200))
    records = (await read(broker.bootstrap, topic))[topic]
    assert len(records) == 200
    assert all(record.partition == partition_of(record.key, PARTITIONS) for record in records)


class Time:
    """A clock that goes on only while a run waits, and the client that it waits for: one without a broker."""

    def __init__(self):
        self.now_s = 1_000.0

    def monotonic(self):
        return self.now_s

    def poll(self, timeout_s):
        self.now_s += timeout_s

    def flush(self, timeout_s):
        self.now_s += timeout_s
        return 7  # not acknowledged

    def __len__(self):
        return 0


@pytest.fixture
def own_time(monkeypatch):
    own_time = Time()
    monkeypatch.setattr(feed_run, "time", own_time)
    return own_time


def test_a_rate_is_kept(feeder, topic, own_time, monkeypatch):
    run = feed_run.Run(own_time, 30.0, threading.Event(), lambda _: None, None)
    began_s = own_time.now_s
    for _ in range(300):
        run.await_turn(500.0, None)
    assert 0.59 < own_time.now_s - began_s < 0.61  # 299 gaps of 2 ms
    monkeypatch.undo()
    feeder.send(rows_for(topic, 1))
    report = feeder.send(rows_for(topic, 300), rate=500)
    assert report.sent == 300
    assert report.seconds > 0.55


def test_acknowledgements_are_not_waited_for_long_once_it_is_to_stop(own_time):
    stop = threading.Event()
    stop.set()
    run = feed_run.Run(own_time, 30.0, stop, lambda _: None, None)
    began_s = own_time.now_s
    run.drain()
    assert own_time.now_s - began_s == pytest.approx(feed_run._STOP_PATIENCE_S, abs=0.3)


def test_a_stall_is_not_made_up_for_at_once(feeder, topic):
    def rows():
        for number, row in enumerate(rows_for(topic, 250)):
            if number == 50:
                time.sleep(0.4)
            yield row

    report = feeder.send(rows(), rate=500)
    assert report.seconds > 0.5 + 0.4 - 0.15  # at most 0.1 s of the rate is caught up; all at once would take 0.5 s


def test_pace_bounds_what_is_outstanding(feeder, topic):
    allowances = [100, 0, -5, 0, 250, 40, 10_000]
    sent_when_asked = []
    progress = []

    def pace():
        sent_when_asked.append(progress[-1][0] if progress else 0)
        return allowances[len(sent_when_asked) - 1]

    def note(done, total):
        progress.append((done, total))

    report = feeder.send(rows_for(topic, 1000), pace=pace, on_progress=note)
    assert report.sent == 1000
    assert sent_when_asked == [0, 100, 100, 100, 100, 350, 390]
    assert progress[-1] == (1000, 1000)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


async def test_pace_is_asked_only_when_all_before_is_acknowledged(broker, feeder, topic):
    """What a lag is computed from, the log's end, already holds everything that was allowed."""
    ends = []
    loop = asyncio.get_running_loop()

    def pace():
        ends.append(asyncio.run_coroutine_threadsafe(read(broker.bootstrap, topic), loop).result(10))
        return 70

    await asyncio.to_thread(feeder.send, rows_for(topic, 200), pace=pace)
    assert [len(records[topic]) for records in ends] == [0, 70, 140]


@pytest.mark.parametrize("waiting_for", [{}, {"rate": 20}, {"pace": lambda: 0}])
async def test_a_stop_event_ends_it_cleanly(broker, feeder, topic, waiting_for):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    taken_late = []

    def endless():
        for row in itertools.cycle(rows_for(topic, 100)) if waiting_for else slowly(rows_for(topic, 100)):
            taken_late.extend([row] if stop.is_set() else [])
            yield row

    report = await asyncio.to_thread(feeder.send, endless(), stop=stop, **waiting_for)
    assert report.seconds > 0.25
    assert len(taken_late) <= 1, "it went on after it was told"
    assert len((await read(broker.bootstrap, topic))[topic]) == report.sent
    assert (report.sent == 0) == ("pace" in waiting_for)


def slowly(rows):
    for row in itertools.cycle(rows):
        time.sleep(0.005)
        yield row


def test_an_iterator_has_no_total(feeder, topic):
    progress = []
    feeder.send(iter(rows_for(topic, 450)), on_progress=lambda done, total: progress.append((done, total)))
    assert progress[-1] == (450, None)
    assert len(progress) >= 3


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (EventRow("", "i", "t", 1), "event 3: an id must have 1 to 256"),
        (EventRow("u\n", "i", "t", 1), "event 3: an id must hold no control"),
        (EventRow("u", "i", "not a topic", 1), "event 3: its type leads to the topic name 'not a topic'"),
    ],
)
async def test_a_bad_row_is_one_line_and_what_came_before_it_is_sent(broker, feeder, topic, bad, says):
    progress = []
    rows = [*rows_for(topic, 2), bad, *rows_for(topic, 2)]
    with pytest.raises(ConfigError, match=says) as caught:
        feeder.send(rows, on_progress=lambda done, _: progress.append(done))
    assert "\n" not in str(caught.value)
    assert progress[-1] == 2
    assert len((await read(broker.bootstrap, topic))[topic]) == 2


def test_nonsense_settings_are_one_line(broker, feeder):
    with pytest.raises(ConfigError, match=r"refuses its settings.*no\.such\.setting"):
        Feeder(broker.bootstrap, client_config={"no.such.setting": 1})
    with pytest.raises(ConfigError, match="rate must be above 0"):
        feeder.send(ROWS, rate=0)


def test_a_broker_that_is_gone_is_one_line_and_stops_the_feeding(capfd):
    with DevBroker() as broker:
        feeder = Feeder(
            broker.bootstrap, client_config={"message.timeout.ms": 1500, "queue.buffering.max.messages": 100}
        )
        assert feeder.send(ROWS[:50]).sent == 50
    with feeder:
        with pytest.raises(DeliveryError, match=r"not acknowledged .*timed out.*send all again") as caught:
            feeder.send(itertools.cycle(ROWS))  # endless: only the failure ends it
        assert "\n" not in str(caught.value)
        assert broker.bootstrap in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("message_timeout_ms", [300, 30_000])  # the client gives up before the stop, or long after
def test_a_stop_is_heard_though_the_broker_is_gone(message_timeout_ms, monkeypatch):
    monkeypatch.setattr(feed_run, "_STOP_PATIENCE_S", 0.2)
    with DevBroker() as broker:
        feeder = Feeder(broker.bootstrap, client_config={"message.timeout.ms": message_timeout_ms})
    stop = threading.Event()
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    with feeder:
        report = feeder.send(ROWS[:10], stop=stop)
    assert report.sent == 0
    assert report.seconds < 30, "the stop was not heard: the client gives up after that"


def test_the_embedded_broker_is_loopback_only_quiet_and_gone_after_close(capfd):
    broker = DevBroker()
    host, _, port = broker.bootstrap.rpartition(":")
    assert host == "127.0.0.1"
    socket.create_connection((host, int(port)), timeout=1).close()
    broker.close()
    broker.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=1)
    assert capfd.readouterr() == ("", "")


async def test_two_embedded_brokers_share_nothing(topic):
    with DevBroker() as one, DevBroker() as other:
        with Feeder(one.bootstrap, lambda kind: kind) as feeder:
            feeder.send(rows_for(topic, 5))
        assert len((await read(one.bootstrap, topic))[topic]) == 5
        assert not await read(other.bootstrap, topic)
