"""More partitions under a live system: every user's history, vector and erasure are where they belong afterwards."""

import random
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import warm_start
from confluent_kafka import Producer
from pipeline import Pipeline, check_end_state, erase, event_json, expected
from redis_server import RedisServer
from topic_admin import add_partitions

from stream.config import load_settings
from stream.core.events import EventRow
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.kafka.topic_watch import WATCH_S
from stream.keys import partition_of
from stream.kv.meta import encode_meta
from stream.kv.protocol import Meta
from stream.kv.rocksdb.layout import META_FILE, read_meta, replace_file

USER_VERSION = load_settings().versioned_encoder.version
_DYING = Path(__file__).parent / "dying_repartition.py"


def repartition(pipeline: Pipeline, partitions: int) -> str:
    said = pipeline.uemb("repartition", "--partitions", str(partitions))
    pipeline.partitions = partitions
    pipeline.forget()
    return said


def repartition_with_deaths(pipeline: Pipeline, partitions: int, steps: tuple[int, ...]) -> int:
    """Run it to ever later deaths, then to its end; return how often it died."""
    died = 0
    for after in steps:
        command = [sys.executable, str(_DYING), str(after), str(partitions)]
        ended = warm_start.run(command, pipeline.environment)
        if ended.returncode == 0:
            break
        assert ended.returncode == -9, ended.stderr
        died += 1
        pipeline.start()  # nobody works on a half-moved state
        assert pipeline.wait() in (1, 2)
        assert f"uemb repartition --partitions {partitions}" in pipeline.tail().splitlines()[-1]
    repartition(pipeline, partitions)
    return died


@pytest.mark.parametrize(
    ("store", "partitions", "steps"),
    [
        ("rocksdb", 6, (1, 2, 5, 9)),
        pytest.param("redis", 6, (1, 3, 8), marks=pytest.mark.slow),
        pytest.param("redis", 16, (1, 4, 8), marks=pytest.mark.slow),
        pytest.param("rocksdb", 16, (1, 2, 5, 10), marks=pytest.mark.slow),
    ],
)
def test_more_partitions_with_events_and_erasures_on_their_way(
    store: str,
    partitions: int,
    steps: tuple[int, ...],
    films: Dataset,
    space: ItemSpace,
    make_pipeline: Callable[..., Pipeline],
    request: pytest.FixtureRequest,
) -> None:
    redis: RedisServer | None = request.getfixturevalue("redis") if store == "redis" else None
    pipeline = make_pipeline(**({"kv_url": redis.url} if redis else {}))
    pipeline.start()
    pipeline.until_ready()
    before, unread, after = films.events[:4_000], films.events[4_000:5_000], films.events[5_000:7_000]
    users = sorted({row.user_id for row in films.events[:7_000]})
    gone = random.Random(1).sample(users, 20)
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(before)
    last = {row.user_id: row for row in before}
    erase(pipeline, [last[user] for user in gone[:10] if user in last])
    pipeline.until_committed()
    vectors = pipeline.stored(users)
    assert pipeline.stop() == 0
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:  # to places that will not be right any more
        feeder.send(unread)
    end = {row.user_id: row for row in films.events[:7_000]}
    erase(pipeline, [end[user] for user in gone[10:]])

    died = repartition_with_deaths(pipeline, partitions, steps)
    assert died > 2
    assert pipeline.stored(users) == vectors, "retrieval reads on meanwhile"
    assert "moved: 0 histories, 0 records" in pipeline.uemb("repartition", "--partitions", str(partitions))
    pipeline.start()
    pipeline.until_ready_again()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(after)
    pipeline.until_committed()
    assert "sent again" in pipeline.uemb("dlq", "replay", "--reason", "wrong_partition")
    pipeline.until_committed()
    pipeline.check(len(users))
    erased = {user: last[user].ts_ms for user in gone[:10] if user in last}
    erased |= {user: end[user].ts_ms for user in gone[10:]}
    kept = [row for row in films.events[:7_000] if row.ts_ms > erased.get(row.user_id, 0) + 300_000]
    live = {user: entry for user, entry in pipeline.stored(users).items() if entry and len(entry) > 16}
    assert set(live) == {row.user_id for row in kept}
    want = expected(map(tuple, kept), space)
    output: dict[tuple[int, str], bytes | None] = {}
    for record in pipeline.read(pipeline.output):
        output[record.partition(), record.key().decode()] = record.value()
    live_output = {key: value for (_, key), value in output.items() if value is not None}
    places = {(place, key) for (place, key), value in output.items() if value is not None}
    assert places == {(partition_of(key.split(":", 3)[3].encode(), partitions), key) for key in live_output}
    check_end_state(pipeline, want, space, USER_VERSION, live_output)
    pipeline.uemb("kv", "rebuild")
    pipeline.check(len(users))
    assert pipeline.stop() == 0


def test_a_topic_that_grows_under_a_running_worker_stops_it(
    films: Dataset, make_pipeline: Callable[..., Pipeline]
) -> None:
    """And the way on that the line names leads to every user's whole history."""
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    events = films.events[:3_000]
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send(events[:2_000])
        pipeline.until_committed()
        add_partitions(pipeline.bootstrap, pipeline.topics["like"], 6)
        assert pipeline.wait(WATCH_S + 40) == 2
        (said,) = [line for line in pipeline.log.read_text().splitlines() if line.startswith("uemb: ")]
        assert f"{pipeline.topics['like']} has 6 partitions and 4 are served" in said
        assert said.endswith("stop all workers, then run `uemb repartition --partitions 6`")
        pipeline.start()
        assert pipeline.wait() == 2, "nor does it start"
        assert "uemb repartition --partitions 6" in pipeline.tail().splitlines()[-1]
        feeder.send(events[2_000:])
    assert "partitions" in repartition(pipeline, 6)
    pipeline.start()
    pipeline.until_ready_again()
    pipeline.until_committed()
    pipeline.uemb("dlq", "replay", "--reason", "wrong_partition")
    pipeline.until_committed()
    pipeline.check(len({row.user_id for row in events}))
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_what_can_not_be_is_one_line(make_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = make_pipeline()
    assert "there is no topic" in pipeline.uemb("repartition", "--partitions", "6", code=2)
    pipeline.start()
    pipeline.until_ready()
    assert "workers of group" in pipeline.uemb("repartition", "--partitions", "6", code=2)
    assert pipeline.stop() == 0
    assert "Kafka takes none back" in pipeline.uemb("repartition", "--partitions", "3", code=2)
    assert "4 → 6 partitions" in pipeline.uemb("repartition", "--partitions", "6", "--dry-run")
    assert "moved: 0 histories" in pipeline.uemb("repartition", "--partitions", "4")
    pipeline.environment["UEMB_HISTORY_LIMIT"] = "50"
    assert "UEMB_HISTORY_LIMIT=100" in pipeline.uemb("repartition", "--partitions", "4", code=2)
    pipeline.environment["UEMB_HISTORY_LIMIT"] = "100"
    others = tmp_path / "others"
    others.mkdir()
    replace_file(others / META_FILE, encode_meta(Meta(app="another", partitions=4)))
    pipeline.environment["UEMB_KV_URL"] = f"rocksdb://{others}"
    assert "belongs to application 'another'" in pipeline.uemb("repartition", "--partitions", "6", code=2)
    assert read_meta(others) == Meta(app="another", partitions=4)


@pytest.mark.slow
@pytest.mark.parametrize("partitions", [6, 16])
def test_twenty_thousand_users(partitions: int, space: ItemSpace, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    numbers = count(1_600_000_000_000)
    rows = [
        EventRow(f"u{n % 20_000}", space.ids[n % len(space.ids)].decode(), "view", next(numbers)) for n in range(60_000)
    ]
    producer = Producer({"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random", "linger.ms": 20})
    for row in rows:
        producer.produce(pipeline.topics["view"], event_json(*row), row.user_id)
        producer.poll(0)
    assert producer.flush(60) == 0
    pipeline.until_committed()
    assert pipeline.stop() == 0
    repartition_with_deaths(pipeline, partitions, (7, 40))
    pipeline.start()
    pipeline.until_ready_again()
    pipeline.check(20_000)
    assert pipeline.stop() == 0
