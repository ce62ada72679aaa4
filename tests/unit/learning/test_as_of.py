"""Rows to train on: each vector is the one from before its event, as the worker would have published it."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from oracle import Oracle
from strategies import Driver, Event, random_space

from stream.cli.root import cli
from stream.core.encoders import AvgEncoder, MixEncoder, VersionedEncoder
from stream.core.events import EventRow
from stream.errors import ConfigError
from stream.items.space import ItemSpace
from stream.learning import as_of
from stream.learning.as_of import save_parquet, vectors_before

T0 = 1_700_000_000_000
SPACE = random_space("items_v1", 4, metric="dot")
TYPES = ("view", "like")


def some_events(count: int = 400, *, distinct_times: bool = False, seed: int = 1) -> list[EventRow]:
    rng = random.Random(seed)
    return [
        EventRow(
            rng.choice("uvw"),
            str(rng.randrange(40)),  # of which the space lacks some
            rng.choice(("view", "view", "like", "shown")),
            T0 + 1_000 * (n if distinct_times else n // 3),
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("limit", [2, 7, 100])
@pytest.mark.parametrize("weights", [{}, {"like": 3.0}])
def test_each_vector_is_of_what_is_strictly_older(limit: int, weights: dict[str, float]) -> None:
    events = some_events()
    encoder = VersionedEncoder(MixEncoder(type_weights=weights), limit)
    found = list(vectors_before(events[::-1], SPACE, encoder, TYPES))
    assert sorted(row.event for row in found) == sorted(events)
    for row in found:
        oracle = Oracle(limit, [SPACE], type_weights=weights)
        for user, item, kind, ts_ms in events:
            if ts_ms < row.event.ts_ms and kind in TYPES:
                oracle.event(user, item, kind, ts_ms)
        want = oracle.expected(row.event.user_id)
        if want is None:
            assert (row.status, row.reason, row.history_len, row.as_of) == ("fallback", "no_known_items", 0, None)
            np.testing.assert_array_equal(row.vector, SPACE.fallback)
            continue
        names = ("status", "reason", "history_len", "unknown_items", "as_of")
        assert {name: getattr(row, name) for name in names} == {name: want[name] for name in names}
        np.testing.assert_allclose(row.vector, want["vector"], atol=1e-6)


def test_no_label_and_nothing_later_is_in_a_vector() -> None:
    """Whatever the event is, and whatever comes with it or after it, its vector is the same."""
    events = some_events()
    encoder = VersionedEncoder(MixEncoder(), 100)
    before = {row.event: row.vector for row in vectors_before(events, SPACE, encoder, TYPES)}
    cut_ms = events[200].ts_ms
    changed = [row if row.ts_ms < cut_ms else row._replace(item_id="29", type="like") for row in events]
    after = list(vectors_before(changed, SPACE, encoder, TYPES))
    compared = 0
    for event, vector in before.items():
        if event.ts_ms == cut_ms:
            same = next(row for row in after if (row.event.user_id, row.event.ts_ms) == (event.user_id, cut_ms))
            np.testing.assert_array_equal(same.vector, vector)
            compared += 1
    assert compared


@pytest.mark.parametrize("encoder", [MixEncoder(), AvgEncoder()], ids=lambda encoder: encoder.name)
def test_it_is_what_the_worker_published_by_then(encoder: MixEncoder | AvgEncoder) -> None:
    events = [row for row in some_events(distinct_times=True) if row.type in TYPES]
    versioned = VersionedEncoder(encoder, 20)
    driver = Driver([SPACE], versioned)
    published: dict[str, np.ndarray] = {}
    want: dict[EventRow, np.ndarray] = {}
    for event in events:
        if event.user_id in published:
            want[event] = published[event.user_id]
        driver.apply(Event(event.user_id, event.item_id, event.type, event.ts_ms))
        published[event.user_id] = driver.record(event.user_id).vector
    found = {row.event: row.vector for row in vectors_before(events, SPACE, versioned, TYPES)}
    assert len(want) == len(events) - 3
    for event, vector in want.items():
        np.testing.assert_allclose(found[event], vector, atol=1e-6)


def test_a_history_is_a_set_and_each_event_has_its_row() -> None:
    row = EventRow("u", "1", "view", T0)
    later = EventRow("u", "2", "view", T0 + 1)
    found = list(vectors_before([row, row, later], SPACE, VersionedEncoder(), TYPES))
    assert [one.event for one in found] == [row, row, later]
    assert [one.history_len for one in found] == [0, 0, 1]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    want = list(vectors_before(some_events(), SPACE, VersionedEncoder(), TYPES))
    monkeypatch.setattr(as_of, "_BLOCK", 7)
    found = list(vectors_before(some_events(), SPACE, VersionedEncoder(), TYPES))
    assert [row.event for row in found] == [row.event for row in want]
    np.testing.assert_allclose([row.vector for row in found], [row.vector for row in want], atol=1e-7)


# -- the file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An item space and events of its items, as settings name them."""
    ItemSpace.save(tmp_path / "items", "items_v1", range(30), SPACE.vectors, metric="dot")
    lines = [f"{row.user_id},{row.item_id},{row.type},{row.ts_ms}\n" for row in some_events()]
    (tmp_path / "events.csv").write_text("user_id,item_id,type,ts\n" + "".join(lines))
    monkeypatch.setenv("UEMB_ITEMS", str(tmp_path / "items"))
    monkeypatch.setenv("UEMB_IGNORED_TYPES", "shown")
    return tmp_path


def test_from_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_of, "_BLOCK", 150)
    command = ["export", str(folder / "out.parquet"), "--as-of", str(folder / "events.csv"), "--json"]
    ran = CliRunner().invoke(cli, command)
    assert ran.exit_code == 0, ran.output
    facts = json.loads(ran.stdout)
    encoder = VersionedEncoder()
    assert (facts["events"], facts["item_embedding_version"]) == (400, "items_v1")
    assert facts["user_embedding_version"] == encoder.version
    table = pq.read_table(folder / "out.parquet")
    assert table.schema.metadata[b"item_embedding_version"] == b"items_v1"
    assert table.schema.metadata[b"user_embedding_version"] == encoder.version.encode()
    want = list(vectors_before(some_events(), ItemSpace.load(folder / "items"), encoder, TYPES))
    rows = table.to_pylist()
    assert [(row["user_id"], row["item_id"], row["type"], row["ts"]) for row in rows] == [row.event for row in want]
    names = ("status", "reason", "history_len", "unknown_items", "as_of")
    assert [tuple(row[name] for name in names) for row in rows] == [
        tuple(getattr(row, name) for name in names) for row in want
    ]
    np.testing.assert_array_equal([row["vector"] for row in rows], [row.vector for row in want])
    again = CliRunner().invoke(cli, command)
    assert isinstance(again.exception, ConfigError)
    assert "exists already" in str(again.exception)


def test_types_that_nobody_knows_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UEMB_IGNORED_TYPES")
    ran = CliRunner().invoke(cli, ["export", str(folder / "out.parquet"), "--as-of", str(folder / "events.csv")])
    assert isinstance(ran.exception, ConfigError)
    assert "unknown type 'shown'" in str(ran.exception)
    assert not (folder / "out.parquet").exists()


def test_a_file_that_can_not_be_written_leaves_nothing(folder: Path) -> None:
    rows = vectors_before(some_events(), SPACE, VersionedEncoder(), TYPES)
    with pytest.raises(ConfigError, match="can't be written"):
        save_parquet(rows, folder / "nowhere" / "out.parquet", SPACE, VersionedEncoder())

    def failing():
        yield next(vectors_before(some_events(), SPACE, VersionedEncoder(), TYPES))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_parquet(failing(), folder / "out.parquet", SPACE, VersionedEncoder())
    assert not list(folder.glob("*out.parquet*"))


def test_without_items_it_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UEMB_ITEMS")
    ran = CliRunner().invoke(cli, ["export", str(folder / "out.parquet"), "--as-of", str(folder / "events.csv")])
    assert "UEMB_ITEMS" in str(ran.exception)
