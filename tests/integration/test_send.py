"""`uemb send`: producers' shapes end to end, and interruptions of every kind without a lost row."""

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm_start
from confluent_kafka import Consumer, Producer, TopicPartition
from documents import example
from kafka_broker import KafkaBroker
from pipeline import UEMB, Pipeline, check_end_state, expected

from stream.config import load_settings
from stream.core.events import EventDecoder, EventRow
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.kafka.embedded_broker import DevBroker

USER_VERSION = load_settings().versioned_encoder.version
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("UEMB_")}
ROWS = [EventRow(str(n % 40), str(n), "view" if n % 3 else "like", 1_600_000_000_000 + n) for n in range(2000)]


@pytest.fixture
def broker() -> Iterator[DevBroker]:
    with DevBroker() as broker:
        yield broker


def write_csv(path: Path, rows: list[EventRow]) -> Path:
    path.write_text("user_id,item_id,type,ts\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    return path


def start(*args: object, **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*UEMB, "send", *map(str, args)], env={**CLEAN, **environment}, text=True, **pipes)


def send(*args: object, stdin: str = "", **environment: str) -> tuple[int, str, str]:
    ended = warm_start.run([*UEMB, "send", *map(str, args)], {**CLEAN, **environment}, text=stdin)
    return ended.returncode, ended.stdout, " ".join(ended.stderr.split())


def values(bootstrap: str, *topics: str) -> list[dict[str, object]]:
    """All values on some topics."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "look", "log_level": 2})
    try:
        found = []
        for topic in topics:
            ends = {p: consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=60)[1] for p in range(4)}
            consumer.assign([TopicPartition(topic, p, 0) for p in ends])
            for _ in range(sum(ends.values())):
                message = consumer.poll(10)
                assert message is not None
                assert message.error() is None
                found.append(json.loads(message.value()))
        return found
    finally:
        consumer.close()


def both(broker: DevBroker) -> Counter[str]:
    """How often each row of `ROWS` is on the default topics; their items are their numbers."""
    return Counter(str(value["item_id"]) for value in values(broker.bootstrap, "user-events.view", "user-events.like"))


def until_saved(process: subprocess.Popen[str], progress: Path) -> int:
    """Wait until a running send has noted its first position."""
    deadline = time.monotonic() + 120
    while not progress.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing was noted"
        time.sleep(0.02)
    return int(json.loads(progress.read_text())["rows"])


def test_a_producers_file_arrives_in_the_producers_shape(broker: DevBroker, tmp_path: Path) -> None:
    mapping = {
        "UEMB_BOOTSTRAP_SERVERS": broker.bootstrap,
        "UEMB_EVENT_TOPICS": "shop.clicks,shop.like",
        "UEMB_EVENT_FIELDS": "user_id=uid,item_id=product.id,type=event,ts=at",
        "UEMB_EVENT_TS_UNIT": "iso8601",
        "UEMB_EVENT_TYPE_BY_TOPIC": "shop.clicks=view",
    }
    line = {"uid": 7, "product": {"id": "a"}, "at": "2024-05-01T12:00:00.250+02:00"}
    (tmp_path / "like.jsonl").write_text(json.dumps({**line, "event": "like"}) + "\n")
    at = pa.array([1_714_557_600_250], pa.timestamp("ms"))
    pq.write_table(pa.table({"who": ["7"], "sku": ["a"], "ts": at}), tmp_path / "other.parquet")
    assert send(tmp_path / "like.jsonl", "--json", **mapping)[0] == 0
    code, out, _ = send("-", "--topic", "shop.clicks", "--json", stdin=json.dumps(line), **mapping)
    assert (code, json.loads(out)["sent"]) == (0, 1)
    other = ["--fields", "user_id=who,item_id=sku", "--type", "view"]
    assert send(tmp_path / "other.parquet", *other, **mapping)[0] == 0
    want = {"uid": "7", "product": {"id": "a"}, "at": "2024-05-01T10:00:00.250Z"}
    assert values(broker.bootstrap, "shop.clicks") == [want, want]
    assert values(broker.bootstrap, "shop.like") == [{**want, "event": "like"}]
    rules = load_settings(
        event_topics=mapping["UEMB_EVENT_TOPICS"],
        event_fields=mapping["UEMB_EVENT_FIELDS"],
        event_ts_unit="iso8601",
        event_type_by_topic=mapping["UEMB_EVENT_TYPE_BY_TOPIC"],
    ).rules
    read = EventDecoder(rules).decode("shop.clicks", b"7", json.dumps(want).encode(), time.time_ns() // 1_000_000)
    assert read == (1_714_557_600_250).to_bytes(6, "big") + b"a\0view"


def test_bad_rows_end_the_sending_or_are_counted(broker: DevBroker, tmp_path: Path) -> None:
    at = {"UEMB_BOOTSTRAP_SERVERS": broker.bootstrap, "UEMB_IGNORED_TYPES": "shown"}
    ahead = time.time_ns() // 1_000_000 + 600_000
    bad = [
        ROWS[0],
        ROWS[1]._replace(type="buy"),
        ROWS[2]._replace(ts_ms=ahead),
        ROWS[3]._replace(type="shown"),
        ROWS[4],
    ]
    one, two = write_csv(tmp_path / "one.csv", bad), write_csv(tmp_path / "two.csv", ROWS[5:7])
    code, _, err = send(one, two, **at)
    assert code == 2
    assert "one.csv line 3: its type is not among UEMB_EVENT_TYPES" in err
    code, out, err = send(one, two, "--skip-bad", "--json", **at)
    report = json.loads(out)
    assert (code, report["sent"]) == (0, 4)
    assert report["skipped"] == {"future_timestamp": 1, "ignored_type": 1, "unknown_type": 1}
    assert "3 bad rows skipped" in err
    assert "line 3" in err
    assert list(tmp_path.glob("*.json")) == []


def test_stopped_in_order_it_goes_on_with_the_next_row(broker: DevBroker, tmp_path: Path) -> None:
    at = {"UEMB_BOOTSTRAP_SERVERS": broker.bootstrap}
    files = [tmp_path / "parts"]
    files[0].mkdir()
    write_csv(files[0] / "a.csv", ROWS[:900])
    write_csv(files[0] / "b.csv", ROWS[900:])
    progress = files[0] / "a.csv.uemb-send.json"
    with start(*files, "--rate", "600", **at) as process:
        until_saved(process, progress)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume" in err
    assert 0 < sum(both(broker).values()) < len(ROWS)

    settings = send(*files, "--resume", **at, UEMB_EVENT_TYPES="like:2,view:1,buy:3")
    assert (settings[0], "other settings" in settings[2]) == (2, True)
    code, out, _ = send(*files, "--resume", "--json", **at)
    assert (code, json.loads(out)["interrupted"]) == (0, False)
    assert both(broker) == Counter(row.item_id for row in ROWS), "every row once: all was acknowledged and noted"
    assert not progress.exists()
    code, _, err = send(write_csv(tmp_path / "c.csv", ROWS[:1]), "--resume", **at)
    assert (code, "nothing to resume" in err) == (0, True)


def test_a_file_that_changed_and_an_input_that_is_gone_are_not_resumed(broker: DevBroker, tmp_path: Path) -> None:
    at = {"UEMB_BOOTSTRAP_SERVERS": broker.bootstrap}
    file, progress = write_csv(tmp_path / "e.csv", ROWS), tmp_path / "kept.json"
    with start(file, "--rate", "500", "--progress", progress, **at) as process:
        until_saved(process, progress)
        process.kill()
    assert json.loads(progress.read_text())["files"][0]["name"] == "e.csv"
    write_csv(file, [*ROWS[:-1], ROWS[-1]._replace(item_id="x")])
    code, _, err = send(file, "--resume", "--progress", progress, **at)
    assert (code, "e.csv is not what it was" in err) == (2, True)
    code, _, err = send("-", "--resume", **at)
    assert (code, "not standard input" in err) == (2, True)
    code, _, err = send(file, "--progress", progress, **at)
    assert (code, "starting over" in err) == (0, True)
    assert not progress.exists()
    progress.write_text("{")
    code, _, err = send(file, "--resume", "--progress", progress, **at)
    assert (code, "is damaged" in err) == (2, True)


def test_ctrl_c_is_heard_while_standard_input_is_silent(broker: DevBroker) -> None:
    with Feeder(broker.bootstrap) as feeder:
        feeder.send(ROWS[1:2])  # now the topic is there to look at
    with start("-", UEMB_BOOTSTRAP_SERVERS=broker.bootstrap) as process:
        assert process.stdin is not None
        process.stdin.write('{"user_id":1,"item_id":"0","type":"view","ts":1600000000000}\n{"user_id":')
        process.stdin.flush()
        deadline = time.monotonic() + 120
        while len(values(broker.bootstrap, "user-events.view")) < 2:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out[:2]) == (130, "1 ")


def test_purchases_of_several_items_and_a_table_without_header(
    films: Dataset, space: ItemSpace, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    rows = films.events[:3_000]
    purchases: dict[tuple[str, str, int], list[str]] = {}
    for row in rows[:2_000]:
        purchases.setdefault((row.user_id, row.type, row.ts_ms), []).append(row.item_id)
    assert max(map(len, purchases.values())) > 1
    pipeline = make_pipeline(event_fields="item_id=items[].item_id")
    pipeline.start()
    pipeline.until_ready()
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random"})
    for (user, kind, ts), items in [*purchases.items(), *reversed(purchases.items())]:  # each of them twice
        value = {"user_id": user, "type": kind, "ts": str(ts), "items": [{"item_id": item} for item in items]}
        producer.produce(pipeline.topics[kind], json.dumps(value), user)
    assert producer.flush(30) == 0
    table = tmp_path / "u.data"
    table.write_text("".join(f"{r.user_id}\t{r.item_id}\t5\t{r.ts_ms}\t{r.type}\n" for r in rows[2_000:]))
    said = pipeline.uemb("send", str(table), "--columns", "user_id,item_id,_,ts,type", "--fields", "item_id=item_id")
    assert "1,000 " in said
    pipeline.until_committed()
    check_end_state(pipeline, expected(map(tuple, rows), space), space, USER_VERSION)
    assert pipeline.read(pipeline.dlq) == []
    pipeline.check(len({row.user_id for row in rows}))
    assert pipeline.stop() == 0


def test_killed_in_the_middle_and_resumed_beside_live_traffic_of_the_same_users(
    films: Dataset, space: ItemSpace, make_pipeline: Callable[..., Pipeline], kafka: KafkaBroker, tmp_path: Path
) -> None:
    users = set(list(dict.fromkeys(row.user_id for row in films.events))[:100])
    events = [row for row in films.events if row.user_id in users][:12_000]
    past, live = events[::2], events[1::2]
    file = write_csv(tmp_path / "year.csv", past)
    pipeline = make_pipeline(publish="latest")
    at = {k: v for k, v in pipeline.environment.items() if k.startswith("UEMB_")}
    pipeline.start()
    pipeline.until_ready()
    stop = threading.Event()
    with Feeder(kafka.bootstrap, pipeline.topics) as feeder:
        traffic = threading.Thread(target=feeder.send, args=(live,), kwargs={"rate": 1500.0, "stop": stop})
        traffic.start()
        try:
            with start(file, "--rate", "200", **at) as process:
                until_saved(process, tmp_path / "year.csv.uemb-send.json")
                process.kill()
            mark = json.loads((tmp_path / "year.csv.uemb-send.json").read_text())["rows"]
            assert 0 < mark < len(past), "killed too late to see anything"
            code, out, err = send(file, "--resume", "--json", **at)
            assert code == 0, err
            assert json.loads(out)["sent"] == len(past) - mark
            traffic.join(60)
        finally:
            stop.set()
            traffic.join()
    pipeline.until_committed()
    found = Counter(tuple(json.loads(r.value()).values()) for t in pipeline.topics.values() for r in pipeline.read(t))
    want = Counter((row.user_id, row.item_id, row.type, row.ts_ms) for row in events)
    assert set(found) == set(want)
    again = {tuple(row) for row in past[mark:]}
    assert {row for row, count in found.items() if count > want[row]} <= again, "what was noted is not sent again"
    check_end_state(pipeline, expected(map(tuple, events), space), space, USER_VERSION)
    assert pipeline.read(pipeline.dlq) == []
    assert pipeline.stop() == 0


def test_movielens_is_sent_in_the_shape_of_the_settings(films: Dataset, broker: DevBroker) -> None:
    at = {"UEMB_BOOTSTRAP_SERVERS": broker.bootstrap, "UEMB_EVENT_FIELDS": "user_id=uid"}
    code, out, err = send("--movielens", "--json", **at)
    assert code == 0, err
    assert json.loads(out)["sent"] == len(films.events)
    sent = values(broker.bootstrap, "user-events.view", "user-events.like")
    assert Counter((v["uid"], v["item_id"], v["type"], v["ts"]) for v in sent) == Counter(map(tuple, films.events))
    for wrong in (("--movielens", "events.csv"), ()):
        assert send(*wrong, **at) == (2, "", "uemb: name files of events, or --movielens")
    assert send("--movielens", "--resume", **at)[0] == 2


def test_the_commands_of_a_backfill_run(
    space: ItemSpace, make_pipeline: Callable[..., Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    worker, *others = example("stream/feed/README.md", "backfill").strip().splitlines()
    assert worker == "UEMB_PUBLISH=latest uemb worker &"
    items = [item.decode() for item in space.ids[:50]]
    events = [("42", item, "view", 1_600_000_000_000 + n) for n, item in enumerate(items)]
    columns = zip(("user_id", "item_id", "type", "ts"), zip(*events, strict=True), strict=True)
    pq.write_table(pa.table({name: list(cells) for name, cells in columns}), tmp_path / "year.parquet")
    pipeline = make_pipeline()
    pipeline.start(UEMB_PUBLISH="latest")
    pipeline.until_ready()
    printed = ""
    for line in others:
        command = [*UEMB, *shlex.split(line)[1:]]
        ran = warm_start.run(command, pipeline.environment)
        assert ran.returncode == 0, ran.stderr
        printed = ran.stdout
        pipeline.until_committed()
    answer = json.loads(printed)
    assert (answer["status"], answer["history_len"], answer["stale"]) == ("ok", 50, False)
    assert answer["lag_s"] < 5
    assert len(pipeline.read(pipeline.output)) < len(events), "latest publishes less than one record per event"
    assert pipeline.stop() == 0
