"""The local history table: restored from a changelog with tombstones, and distrusted when it is too old."""

import asyncio
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rocksdict import Cache

from stream.config import load_settings
from stream.core.history import History
from stream.core.history_codec import HistoryCodec, sort_key
from stream.pipeline.table import HistoryStore, PartitionDB
from stream.worker.ownership import apply_changelog
from stream.worker.standby import Standbys

CODEC = HistoryCodec({"view": 1})
DAY_S = 86_400


def state(revision: int, erased_at: int = -1) -> bytes:
    keys = [] if erased_at >= 0 else [sort_key(revision, b"a", b"view")]
    return History(CODEC, 100, keys, revision=revision, erased_at=erased_at).encode(1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(log=st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.booleans()), max_size=12), cut=st.integers(0, 12))
@example(log=[(b"a", False)] * 3, cut=1)  # the join of the two that come late has the revision of the first
def test_a_tombstone_ends_what_is_before_it_whatever_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, log: list[tuple[bytes, bool]], cut: int
) -> None:
    db = PartitionDB(tmp_path_factory.mktemp("table") / "p.db", Cache(1 << 20))
    want: dict[bytes, bytes] = {}
    records = []
    for offset, (user, gone) in enumerate(log):
        value = None if gone else state(len(log) - offset)  # of a lower revision each time: only what is there joins
        records.append(SimpleNamespace(key=user, value=value, offset=offset))
        if value is None:
            want.pop(user, None)
        elif user in want:
            merged = History.decode(want[user], CODEC, 100).merge(History.decode(value, CODEC, 100))
            want[user] = merged.encode(1)
        else:
            want[user] = value
    for some in (records[:cut], records[cut:]):
        if some:
            apply_changelog(db, CODEC, 100, some)
    assert dict(db.users()) == want
    assert db.changelog_offset == len(log)
    db.close()


def test_users_are_looked_at_in_parts(tmp_path: Path) -> None:
    db = PartitionDB(tmp_path / "p.db", Cache(1 << 20))
    users = sorted(str(n).encode() for n in range(25))
    db.put(dict.fromkeys(users, b"state"), 7)
    seen: list[bytes] = []
    while some := db.some_users(seen[-1] if seen else b"", 10):
        seen += [user for user, _ in some]
    assert seen == users
    db.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    app = SimpleNamespace(conf=SimpleNamespace(tabledir=str(tmp_path / "tables"), topic_partitions=1))
    store = HistoryStore("uemb://", app, SimpleNamespace(name="user-history"))
    yield store
    store.close(0)


def age(store: HistoryStore, seconds: float) -> None:
    """As if the database had not been written for so long."""
    for file in store.path(0).iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


def test_state_is_as_old_as_its_last_write(store: HistoryStore) -> None:
    store.open(0).put({b"u": b"state"}, 1)
    store.restored(0)
    store.close(0)
    age(store, 0.9 * DAY_S)
    assert store.open(0, DAY_S).changelog_offset == 1
    store.restored(0)
    store.close(0)
    assert store.open(0, DAY_S).changelog_offset == 1, "what was restored is young again"


def test_a_start_that_fails_on_the_way_makes_no_state_younger(store: HistoryStore) -> None:
    """The changelog may have forgotten a tombstone by now, and an erased user would come back from this disk."""
    store.open(0).put({b"u": b"state"}, 1)
    store.restored(0)
    store.close(0)
    age(store, 2 * DAY_S)
    store.open(0, 3 * DAY_S).put({b"v": b"state"}, 2)  # some of the changelog, not all
    store.close(0)
    db = store.open(0, DAY_S)
    assert (db.changelog_offset, list(db.users())) == (0, [])


class QuietChangelog:
    """A consumer of a changelog whose end is reached wherever one begins."""

    def __init__(self, **_: object) -> None:
        self.sought: dict[object, int] = {}
        self.asked = asyncio.Event()

    async def start(self) -> None:
        """Nothing to do."""

    stop = start

    def assign(self, _: object) -> None:
        """Nothing to do."""

    async def end_offsets(self, places: Iterable[object]) -> dict[object, int]:
        return dict.fromkeys(places, 1)

    def seek(self, place: object, offset: int) -> None:
        self.sought[place] = offset

    async def position(self, _: object) -> int:
        return 1

    async def getmany(self, **_: object) -> dict[object, list[object]]:
        self.asked.set()
        await asyncio.Event().wait()
        return {}


async def test_a_standby_does_not_go_on_from_state_that_is_too_old(
    store: HistoryStore,
) -> None:
    store.open(0).put({b"u": b"state"}, 1)
    store.restored(0)
    store.close(0)
    age(store, 2 * DAY_S)
    consumer = QuietChangelog()

    async def fail(exc: BaseException) -> None:
        raise exc

    standbys = Standbys(load_settings(), SimpleNamespace(consumer=lambda **_: consumer), store, fail, DAY_S)
    standbys.follow([0])
    async with asyncio.timeout(5):
        await consumer.asked.wait()
    await standbys.stop()
    assert list(consumer.sought.values()) == [0]
    assert list(store.open(0).users()) == []
    assert not list(store.path(0).parent.glob("*.restoring")), "a copy that is current is as young as its last write"
