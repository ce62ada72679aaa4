"""Erasures: everything of a user is gone, stays gone through replays and lost disks, and a new history can begin."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from pipeline import Event, Pipeline, check_end_state, compact, event_json, expected, killing_worker
from rocksdict import Cache
from topic_admin import set_config

from stream.config import load_settings
from stream.core.history import History
from stream.core.history_codec import NEVER, HistoryCodec
from stream.core.records import kv_entry
from stream.items.space import ItemSpace
from stream.pipeline.table import PartitionDB
from stream.retrieval.reader import EmbeddingReader

SETTINGS = load_settings()
USER_VERSION = SETTINGS.versioned_encoder.version
NOW_MS = time.time_ns() // 1_000_000
MINUTE_MS = 60_000
#: What `erased_at` lies after an erasure's own time.
LEAD_MS = 5 * MINUTE_MS
#: The time of all erasures; events are up to hours before it and up to minutes after `ERASED_AT_MS`.
ERASURE_MS = NOW_MS - 60 * MINUTE_MS
ERASED_AT_MS = ERASURE_MS + LEAD_MS
ALWAYS = [f"kept-{n}" for n in range(6)]
ERASED, DOWN, NULLED, UNSEEN = "erased-1", "erased-2", "nulled", "erased-unseen"


@pytest.fixture(scope="module")
def item_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty items in eight dimensions: what is tested here needs no real ones."""
    folder = tmp_path_factory.mktemp("items") / "v1"
    ItemSpace.save(folder, "items_v1", range(50), np.random.default_rng(3).normal(size=(50, 8)))
    return folder


@pytest.fixture(scope="module")
def space(item_folder: Path) -> ItemSpace:
    """The item space in `item_folder`."""
    return ItemSpace.load(item_folder)


class Side:
    """Producers' side of a pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._producer = Producer(
            {"bootstrap.servers": pipeline.bootstrap, "partitioner": "murmur2_random", "log_level": 2}
        )

    def events(self, events: Iterable[Event]) -> None:
        for user, item, kind, ts in events:
            self._producer.produce(self.pipeline.topics[kind], event_json(user, item, kind, ts), user)
        assert self._producer.flush(60) == 0

    def erase(self, user: str, ts: int = ERASURE_MS) -> None:
        self._producer.produce(self.pipeline.deletions, json.dumps({"user_id": user, "ts": ts}), user)
        assert self._producer.flush(60) == 0

    def withdraw(self, user: str) -> None:
        """A null value for the user's key on the deletion topic."""
        self._producer.produce(self.pipeline.deletions, None, user)
        assert self._producer.flush(60) == 0

    def output_ends(self) -> dict[int, int]:
        """End of each partition of the output topic."""
        consumer = Consumer({"bootstrap.servers": self.pipeline.bootstrap, "group.id": "ends", "log_level": 2})
        try:
            places = [TopicPartition(self.pipeline.output, p) for p in range(self.pipeline.partitions)]
            return {place.partition: consumer.get_watermark_offsets(place, timeout=60)[1] for place in places}
        finally:
            consumer.close()

    def rewind(self, topics: Iterable[str]) -> None:
        """Set the group back to the beginning of topics, as who wants a replay does; the worker must be down."""
        places = [TopicPartition(topic, p, 0) for topic in topics for p in range(self.pipeline.partitions)]
        admin = AdminClient({"bootstrap.servers": self.pipeline.bootstrap, "log_level": 2})
        asked = [ConsumerGroupTopicPartitions(self.pipeline.app_id, places)]
        for future in admin.alter_consumer_group_offsets(asked).values():
            future.result()


class Look:
    """What there is of users at one moment, wherever the pipeline keeps or publishes it."""

    def __init__(self, pipeline: Pipeline, space: ItemSpace) -> None:
        self.pipeline = pipeline
        self.space = space
        self.output = pipeline.read(pipeline.output)
        self.changelog = pipeline.read(pipeline.changelog)

    def key(self, user: str) -> str:
        return f"uemb:{USER_VERSION}:{self.space.version}:{user}"

    def entry(self, user: str) -> bytes | None:
        """The user's entry in the store."""
        return self.pipeline.entries({user: self.key(user)})[user]

    def published(self, user: str, since: Mapping[int, int] | None = None) -> list[bytes | None]:
        """Values of the user's records on the output topic, from an offset of each partition on."""
        mine = [r for r in self.output if r.key().decode() == self.key(user)]
        return [r.value() for r in mine if since is None or r.offset() >= since[r.partition()]]

    def state(self, user: str) -> History:
        """The user's last history in the changelog."""
        values = [r.value() for r in self.changelog if r.key() == user.encode()]
        return History.decode(values[-1], HistoryCodec(SETTINGS.event_types), SETTINGS.history_limit)

    def check_gone(self, user: str) -> None:
        """Nothing of the user is left but the marker."""
        entry = self.entry(user)
        assert entry is not None
        assert len(entry) == 16, "a deletion is the prefix with an empty body"
        epoch, revision, body = kv_entry(entry)
        assert (epoch > 0, revision > 0, body) == (True, True, b"")
        assert self.published(user)[-1] is None
        state = self.state(user)
        assert (state.keys, state.erased_at) == ([], ERASED_AT_MS)
        with EmbeddingReader.open(self.pipeline.kv_url, timeout_s=1.0) as reader:
            found = reader.get(user)
        assert (found.status, found.reason, found.history_len, found.as_of) == ("fallback", "erased", 0, None)
        np.testing.assert_array_equal(found.vector, self.space.fallback)

    def check_kept(self, events: Iterable[Event]) -> None:
        """The users of `events`, and no others, have vectors, of these events."""
        last = {r.key().decode(): r.value() for r in self.output}
        there = {key: value for key, value in last.items() if value is not None}
        check_end_state(self.pipeline, expected(events, self.space), self.space, USER_VERSION, there)


def history(user: str, start_ms: int, count: int = 6, step_ms: int = 1000) -> list[Event]:
    """`count` events of a user from `start_ms` on, on both topics."""
    first = sum(user.encode())
    return [(user, str((first + 7 * n) % 50), ("view", "like")[n % 2], start_ms + n * step_ms) for n in range(count)]


def test_erasures(space: ItemSpace, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    side = Side(pipeline)
    old = ERASURE_MS - 120 * MINUTE_MS
    kept = [event for user in [*ALWAYS, NULLED] for event in history(user, old)]
    pipeline.start()
    pipeline.until_ready()
    side.events([*kept, *history(ERASED, old), *history(DOWN, old)])
    pipeline.until_committed(30)
    first = Look(pipeline, space)
    first.check_kept([*kept, *history(ERASED, old), *history(DOWN, old)])
    nulled = first.entry(NULLED)

    # erased while the worker runs, also who was never seen; a null value changes nothing
    side.erase(ERASED)
    side.erase(UNSEEN)
    side.withdraw(NULLED)
    pipeline.until_committed(30)
    look = Look(pipeline, space)
    look.check_gone(ERASED)
    look.check_kept([*kept, *history(DOWN, old)])
    assert look.entry(NULLED) == nulled
    assert look.published(NULLED) == first.published(NULLED)

    # a replay, late events up to erased_at itself, an older erasure, and a withdrawn one bring nothing back
    late = [*history(ERASED, old), *history(ERASED, ERASURE_MS - 3000), *history(ERASED, ERASED_AT_MS - 3000, 4)]
    assert late[-1][3] == ERASED_AT_MS
    before = side.output_ends()
    side.events([*late, *history(UNSEEN, old)])
    side.erase(ERASED, ERASURE_MS - MINUTE_MS)
    side.withdraw(ERASED)
    pipeline.until_committed(30)
    look = Look(pipeline, space)
    look.check_gone(ERASED)
    assert set(look.published(ERASED, before)) <= {None}
    assert set(look.published(UNSEEN)) <= {None}
    assert pipeline.stop() == 0

    # with the worker down and its disk gone, another is erased while all events wait to be replayed
    side.events(history(DOWN, ERASURE_MS - 3000))
    side.erase(DOWN)
    side.rewind(pipeline.topics.values())
    shutil.rmtree(pipeline.state)
    before = side.output_ends()
    pipeline.start()
    pipeline.until_ready()
    pipeline.until_committed(30)
    look = Look(pipeline, space)
    for user in (ERASED, DOWN):
        look.check_gone(user)
        assert set(look.published(user, before)) <= {None}, f"{user} was published again"
    assert look.published(DOWN, before), "no tombstone"
    assert look.published(ALWAYS[0], before), "nothing was replayed"
    look.check_kept(kept)

    # later events start a new history, from erased_at's next millisecond on
    new = [*history(ERASED, ERASED_AT_MS + 1), *history(DOWN, ERASED_AT_MS + MINUTE_MS, 2)]
    side.events([*new, *history(ERASED, old), *history(DOWN, ERASED_AT_MS - 1, 2, step_ms=1)])
    pipeline.until_committed(30)
    look = Look(pipeline, space)
    look.check_kept([*kept, *new])
    assert look.state(ERASED).erased_at == ERASED_AT_MS
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        assert [reader.get(user).status for user in (ERASED, DOWN)] == ["ok", "ok"]
    assert pipeline.read(pipeline.dlq) == []
    assert pipeline.stop() == 0


def test_a_changelog_that_was_lost_is_no_way_back(space: ItemSpace, make_pipeline: Callable[..., Pipeline]) -> None:
    """Without a claim in the changelog, the deletion topic is read from its beginning, whatever was committed."""
    pipeline = make_pipeline()
    side = Side(pipeline)
    old = ERASURE_MS - 120 * MINUTE_MS
    kept = [event for user in ALWAYS for event in history(user, old)]
    pipeline.start()
    pipeline.until_ready()
    side.events([*kept, *history(ERASED, old)])
    side.erase(ERASED)
    pipeline.until_committed(30)
    assert pipeline.stop() == 0
    epochs = pipeline.epochs()
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    for future in admin.delete_topics([pipeline.changelog], operation_timeout=60).values():
        future.result()
    shutil.rmtree(pipeline.state)
    side.rewind(pipeline.topics.values())
    before = side.output_ends()
    pipeline.start()
    pipeline.until_ready()
    pipeline.until_committed(30)
    assert all(new > old for new, old in zip(pipeline.epochs(), epochs, strict=True))
    look = Look(pipeline, space)
    look.check_gone(ERASED)
    assert set(look.published(ERASED, before)) <= {None}
    look.check_kept(kept)
    assert pipeline.stop() == 0


def test_uemb_delete_leaves_no_trace_but_the_marker(
    space: ItemSpace, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """In every item version, after compaction, and after all that the user ever did was sent again."""
    pipeline = make_pipeline()
    side = Side(pipeline)
    old = ERASURE_MS - 120 * MINUTE_MS
    pipeline.start()
    pipeline.until_ready()
    side.events([event for user in [*ALWAYS, ERASED, DOWN] for event in history(user, old)])
    pipeline.until_committed(30)
    ItemSpace.save(tmp_path / "v2", "items_v2", range(50), np.random.default_rng(4).normal(size=(50, 5)))
    pipeline.uemb("items", "publish", str(tmp_path / "v2"), "--wait")
    assert "control characters" in pipeline.uemb("delete", "a\nb", code=2)
    said = pipeline.uemb("delete", ERASED, DOWN, "--wait")
    assert "2 erasures sent" in said
    assert f"{pipeline.output}: earlier vectors, for 2 days at most" in said
    left = json.loads(pipeline.uemb("delete", ERASED, "--json"))["traces"]
    assert {pipeline.topics["view"], pipeline.changelog, pipeline.output, pipeline.dlq} <= {t["where"] for t in left}
    assert {t["where"] for t in left if t["longest_s"] is None} == {"local tables", "changelog, local tables, store"}

    versions = ("items_v1", "items_v2")
    keys = [f"uemb:{USER_VERSION}:{version}:{user}" for version in versions for user in (ERASED, DOWN)]
    entries = pipeline.entries({key.rsplit(":", 1)[1]: key for key in keys})
    assert [len(entry or b"") for entry in entries.values()] == [16, 16]
    compact(pipeline)
    for n in range(2):  # segments roll, and are compacted, when there is news
        side.events(history(ALWAYS[0], ERASED_AT_MS + n * MINUTE_MS, 1))
        for partition, user in pipeline.users_by_partition().items():
            side.events(history(user.decode(), ERASED_AT_MS + (n + partition) * MINUTE_MS, 1))
        pipeline.until_committed(30)

    def records(topic: str) -> list[bytes | None]:
        names = (ERASED.encode(), DOWN.encode())
        return [r.value() for r in pipeline.read(topic) if r.key() in names or r.key().decode() in keys]

    pipeline.until(lambda: len(records(pipeline.changelog)) == 2, "the changelog is compacted")
    pipeline.until(lambda: set(records(pipeline.output)) <= {None}, "the output is compacted")
    for state in records(pipeline.changelog):
        assert state is not None
        assert History.decode(state, HistoryCodec(SETTINGS.event_types), SETTINGS.history_limit).keys == []

    assert pipeline.stop() == 0
    side.rewind(pipeline.topics.values())
    pipeline.start()
    pipeline.until_ready()
    pipeline.until_committed(30)
    assert set(records(pipeline.output)) <= {None}
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        assert [reader.get(user).reason for user in (ERASED, DOWN)] == ["erased", "erased"]
    report = pipeline.verify()
    assert report["differ"] == 0
    assert pipeline.verified_items == set(versions)
    assert pipeline.stop() == 0


def test_a_marker_ends_when_it_was_kept_for_long_enough(
    space: ItemSpace, make_pipeline: Callable[..., Pipeline]
) -> None:
    """In store, changelog and local tables, across kills in between; who comes back then begins anew."""
    pipeline = make_pipeline()
    side = Side(pipeline)
    old = ERASURE_MS - 120 * MINUTE_MS
    kept = [event for user in ALWAYS for event in history(user, old)]
    pipeline.start()
    pipeline.until_ready()
    side.events([*kept, *history(ERASED, old), *history(DOWN, old)])
    pipeline.until_committed(30)
    for user in (ERASED, DOWN):
        side.erase(user)
    pipeline.until_committed(30)
    look = Look(pipeline, space)
    look.check_gone(ERASED)
    look.check_gone(DOWN)
    assert pipeline.stop() == 0

    def logged(user: str) -> bytes | None:
        return [r.value() for r in pipeline.read(pipeline.changelog) if r.key() == user.encode()][-1]

    compact(pipeline)  # meanwhile, for the brokers take their time
    # erased 55 minutes ago; the input forgets after 40, and so do we after 45
    for topic in pipeline.topics.values():
        set_config(pipeline.bootstrap, topic, retention_ms=30 * MINUTE_MS, segment_ms=10 * MINUTE_MS)
    pipeline.environment["UEMB_ERASURE_MARKER_RETENTION"] = "45m"
    pipeline.start(killing_worker("kv", [ERASED]))
    assert pipeline.wait() == -9
    assert (Look(pipeline, space).entry(ERASED), logged(ERASED) is None) == (None, False)
    pipeline.start(killing_worker("forgotten", [ERASED]))
    assert pipeline.wait() == -9
    assert logged(ERASED) is None
    shutil.rmtree(pipeline.state)
    pipeline.start()
    pipeline.until_ready()
    pipeline.until(lambda: logged(DOWN) is None, "all markers are gone")
    look = Look(pipeline, space)
    assert (look.entry(ERASED), look.entry(DOWN), logged(ERASED)) == (None, None, None)

    # retention has not taken the events yet, as the topics promised
    report = pipeline.verify(code=1)
    assert report["differ"] == 2
    assert all("outlived its marker" in difference["what"] for difference in report["differences"])
    ends = [TopicPartition(topic, p, -1) for topic in pipeline.topics.values() for p in range(pipeline.partitions)]
    admin = AdminClient({"bootstrap.servers": pipeline.bootstrap, "log_level": 2})
    for future in admin.delete_records(ends).values():
        future.result()

    new = history(ERASED, ERASED_AT_MS + 1)
    side.events(new)
    pipeline.until_committed(30)
    look = Look(pipeline, space)
    look.check_kept([*kept, *new])
    assert look.state(ERASED).erased_at == NEVER
    with EmbeddingReader.open(pipeline.kv_url, timeout_s=1.0) as reader:
        assert [reader.get(user).reason for user in (ERASED, DOWN)] == ["", "missing"]
    pipeline.check(len(ALWAYS) + 2)
    pipeline.until(
        lambda: not [r for r in pipeline.read(pipeline.changelog) if r.key() == DOWN.encode() and r.value()],
        "the changelog is compacted",  # the returned user's news are in the same partition
    )
    left = json.loads(pipeline.uemb("delete", UNSEEN, "--json"))["traces"]
    (marker,) = [trace for trace in left if trace["what"] == "the erasure's marker"]
    assert 50 * 60 < marker["longest_s"] < 3 * 86_400
    assert pipeline.deletions in {trace["where"] for trace in left}
    assert pipeline.stop() == 0
    local: set[bytes] = set()
    for path in pipeline.state.rglob("user-history-*.db"):
        db = PartitionDB(path, Cache(1 << 20))
        local |= {user for user, _ in db.users()}
        db.close()
    assert local - {UNSEEN.encode()} == {user.encode() for user in (*ALWAYS, ERASED)}
