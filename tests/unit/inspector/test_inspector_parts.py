"""The parts that only reckon: sources, the state at a moment, the map, the checklist, titles."""

import gzip
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_entries import eventually

from stream.core.watermark import Watermark
from stream.errors import ConfigError, StoreError
from stream.inspector.checklist import checks_of
from stream.inspector.crowd import principal_axes
from stream.inspector.letters import LettersView
from stream.inspector.now import snapshot
from stream.inspector.sources import Reading, Source
from stream.inspector.store import Sign, StoreView
from stream.inspector.titles import read_titles
from stream.inspector.versions import PairView, VersionsView
from stream.inspector.workers import Page, WorkerView
from stream.kv.protocol import Meta, Serving
from stream.rollout.comparison import Side, VersionReport
from stream.rollout.progress import progress_of
from stream.rollout.records import Coverage, EncoderRecord, Status

NOW_MS = 1_800_000_000_000


# -- sources ------------------------------------------------------------------------------------------------------


def test_a_source_keeps_what_it_saw_and_says_how_old_it_is() -> None:
    said: list[object] = ["a"]

    def look() -> object:
        if isinstance(said[0], Exception):
            raise said[0]
        return said[0]

    source = Source("test", look, every_s=0.01)
    assert source.reading == (None, float("inf"), None)
    source.start()
    eventually(lambda: source.reading.seen == "a")
    said[0] = StoreError("it is away\nfor good")
    eventually(lambda: source.reading.error == "it is away for good")
    before = source.reading
    assert before.seen == "a"
    eventually(lambda: source.reading.age_s > before.age_s)
    said[0] = ZeroDivisionError("no user id 42")  # a fault of ours is told, too, and does not end the looks
    eventually(lambda: source.reading.error == "ZeroDivisionError: no user id 42")
    said[0] = "b"
    eventually(lambda: source.reading.error is None and source.reading.seen == "b")
    source.stop()
    assert source.has_ended(time.monotonic() + 60)


def test_a_look_that_hangs_holds_up_no_other() -> None:
    gate = threading.Event()
    hangs, goes = Source("hangs", lambda: gate.wait(60)), Source("goes", lambda: 1, every_s=0.01)
    hangs.start()
    goes.start()
    eventually(lambda: goes.reading.seen == 1)
    assert hangs.reading.seen is None
    for source in (hangs, goes):
        source.stop()
    assert goes.has_ended(time.monotonic() + 60)
    assert not hangs.has_ended()
    gate.set()
    assert hangs.has_ended(time.monotonic() + 60)


# -- now ----------------------------------------------------------------------------------------------------------


def page(at_s: float = 1.0, **samples: dict[tuple[str, ...], float]) -> Page:
    """What a worker says; labels are the partition, or none."""
    found = {
        name: {tuple(("partition", one) for one in labels): value for labels, value in series.items()}
        for name, series in samples.items()
    }
    return Page(at_s, found, True, ())


def taken(workers: list[WorkerView], beats_s: list[float | None], *, age_s: float = 0.1, epoch: int = 4) -> dict:
    told = [
        None if beat is None else Sign(epoch, Watermark(lag_ms=500, heartbeat_ms=NOW_MS - int(1000 * beat)), None)
        for beat in beats_s
    ]
    store = StoreView(Meta("app", len(beats_s), Serving("mix-1", "v1", -1)), told, None)
    versions = VersionsView(len(beats_s), ("mix-1", "v1"), [], {}, {})
    letters = LettersView({("not_json", "t"): 3, ("not_json", "u"): 2, ("invalid_id", "t"): 1}, {}, {}, 0, 0)
    return snapshot(
        NOW_MS,
        Reading(workers, age_s, None),
        Reading(store, age_s, None),
        Reading(versions, age_s, None),
        Reading(letters, age_s, None),
    )


def test_each_partition_has_its_owner_and_lag() -> None:
    first = WorkerView("a:1", (page(
        uemb_partition_owned={("0",): 1, ("1",): 0},
        uemb_partition_epoch={("0",): 5},
        uemb_lag_records={("0",): 7},
        uemb_lag_seconds={("0",): 1.5},
        uemb_restore_remaining_records={("1",): 300},
    ),))  # fmt: skip
    found = taken([first], [0.5, 0.5, None])
    rows = {row["partition"]: row for row in found["partitions"]}
    assert rows[0] == {
        "partition": 0, "owner": "a:1", "epoch": 5, "lag_records": 7, "lag_s": 1.5, "heartbeat_s": 0.5,
        "restoring": None, "stale": False,
    }  # fmt: skip
    assert (rows[1]["owner"], rows[1]["restoring"], rows[1]["lag_s"]) == ("a:1", 300, 0.5)
    assert (rows[2]["owner"], rows[2]["heartbeat_s"], rows[2]["stale"]) == (None, None, True)
    assert found["partitions"][0]["partition"] == 2  # what is wrong comes first
    assert found["stale_partitions"] == 1
    assert found["letters"] == {"count": 6, "written": 0}


def test_of_two_that_claim_a_partition_the_later_claim_counts() -> None:
    views = [
        WorkerView(name, (page(uemb_partition_owned={("0",): 1}, uemb_partition_epoch={("0",): epoch}),))
        for name, epoch in (("old", 4), ("new", 6), ("older", 2))
    ]
    (row,) = taken(views, [0.1])["partitions"]
    assert (row["owner"], row["epoch"]) == ("new", 6)


def test_what_nobody_works_on_is_ever_further_behind() -> None:
    """As readers see it, and of all partitions, also of those that are not listed."""
    found = taken([], [600.0] * 300)
    assert len(found["partitions"]) == 200
    assert found["worst_lag_s"] == 0.5 + 600 - 1.5
    assert found["least_silence_s"] == 600
    ahead = taken([], [0.0, 600.0, 599.0])
    assert (ahead["worst_lag_s"], ahead["least_silence_s"]) == (599.0, 599.0)


def test_a_sign_of_life_is_as_old_as_it_was_seen_to_change() -> None:
    """Clocks of two hosts may differ by more than a worker may be silent."""
    told = Watermark(lag_ms=0, heartbeat_ms=NOW_MS + 60_000)
    store = StoreView(Meta("app", 1, None), [Sign(4, told, 9.0)], None)
    nothing = Reading(None, float("inf"), None)
    (row,) = snapshot(NOW_MS, nothing, Reading(store, 0.1, None), nothing, nothing)["partitions"]
    assert (row["heartbeat_s"], row["stale"]) == (9.1, True)


def test_a_pair_is_served_when_readers_follow_it() -> None:
    pairs = [PairView("mix-1", name, state, {}, None) for name, state in (("v2", "served"), ("v1", "active"))]
    store = StoreView(Meta("app", 1, Serving("mix-1", "v1", 3)), [None], None)
    versions = VersionsView(1, ("mix-1", "v2"), pairs, {}, {})
    nothing = Reading(None, float("inf"), None)
    found = snapshot(NOW_MS, nothing, Reading(store, 0.1, None), Reading(versions, 0.1, None), nothing)
    assert {row["item_version"]: row["state"] for row in found["rollout"]} == {"v2": "wanted", "v1": "served"}
    assert found["serving"]["wanted"] == ["mix-1", "v2"]


def test_silence_shows() -> None:
    silent = WorkerView("a:1", error="Connection refused")
    found = taken([silent], [3.5])
    assert found["workers"] == [{"address": "a:1", "answers": False, "ready": False, "reasons": ["Connection refused"]}]
    assert found["partitions"][0]["stale"]
    assert found["rates"]["events_per_s"] is None
    # a store that has not told for long vouches for nothing
    assert taken([silent], [0.1], age_s=5)["stale_partitions"] == 1
    assert not taken([silent], [0.1], age_s=5)["store"]["answers"]


def test_what_a_silent_worker_owned_is_stale_until_somebody_takes_it() -> None:
    gone = WorkerView("a:1", error="Connection refused", owned=frozenset({0, 1}))
    taker = WorkerView("b:2", (page(uemb_partition_owned={("1",): 1}, uemb_partition_epoch={("1",): 7}),))
    rows = {row["partition"]: row["stale"] for row in taken([gone, taker], [0.5, 0.5, 0.5])["partitions"]}
    assert rows == {0: True, 1: False, 2: False}


def test_before_anything_was_seen_all_is_stale() -> None:
    nothing = Reading(None, float("inf"), None)
    found = snapshot(NOW_MS, nothing, nothing, nothing, nothing)
    assert all(source["stale"] and source["age_s"] is None for source in found["sources"].values())
    assert found["partitions"] == []
    assert found["serving"] == {"user_version": None, "item_version": None, "wanted": None}


# -- the map ------------------------------------------------------------------------------------------------------


@given(st.integers(2, 60), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_axes_are_those_of_the_singular_values(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, d)) * np.linspace(3, 1, d)
    axes, explained = principal_axes(vectors)
    _, values, directions = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    shares = values**2 / max((values**2).sum(), 1e-300)
    for k in range(min(2, len(values))):
        assert abs(explained[k] - shares[k]) < 1e-9
        apart = [abs(values[k] - other) for n, other in enumerate(values) if n != k]
        if (
            values[k] > 1e-3 * values[0] and min(apart, default=1.0) > 1e-3 * values[0]
        ):  # else any turn of them is as good
            assert abs(axes[k] @ directions[k]) > 1 - 1e-6
    np.testing.assert_array_equal(principal_axes(vectors)[0], axes)


# -- the checklist ------------------------------------------------------------------------------------------------


def side(version: str, **changes: object) -> Side:
    fields = {
        "user_version": "mix-1", "version": version, "items": 10, "dim": 4, "found": 50, "fallback_share": 0.1,
        "unknown_item_share": 0.0, "least_norm": 1.0, "greatest_norm": 1.0, "centroid_cosine": (0.1, 0.4, 0.6),
    }  # fmt: skip
    return Side(**{**fields, **changes})


def verdicts(stages: list[str], refused: str | None = None, overlap: float | None = 0.6, **other: object) -> list[str]:
    coverage = Coverage()
    for partition, stage in enumerate(stages):
        coverage.add(Status("mix-1", "v2", partition, 1, stage, users=10, done=10 if stage == "covered" else 4))
    pair = PairView("mix-1", "v2", "prepare", progress_of(coverage, len(stages), "mix-1", "v2"), refused)
    view = VersionsView(len(stages), ("mix-1", "v1"), [pair], {}, {"mix-1": EncoderRecord("mix-1", "active")})
    found = checks_of(pair, view, VersionReport(side("v1"), side("v2", **other), 40, None, overlap))
    assert found["activate"] == ["uemb items activate v2"]
    return [check["verdict"] for check in found["checks"]]


@pytest.mark.parametrize(
    ("stages", "options", "at", "verdict"),
    [
        (["covered", "covering"], {}, 1, "no"),
        (["covered"], {"refused": "the folder is gone"}, 0, "no"),
        (["covered"], {"fallback_share": 0.2}, 2, "look"),
        (["covered"], {"unknown_item_share": 0.05}, 3, "look"),
        (["covered"], {"greatest_norm": 1.1}, 4, "no"),
        (["covered"], {"centroid_cosine": (0.9, 0.95, 0.99)}, 5, "look"),
        (["covered"], {"overlap": 0.1}, 6, "look"),
        (["covered"], {"overlap": None}, 6, "look"),
    ],
)
def test_each_line_of_the_checklist_can_fail(stages: list[str], options: dict, at: int, verdict: str) -> None:
    found = verdicts(stages, **options)
    assert found[at] == verdict
    assert [one for n, one in enumerate(found) if n != at] == ["ok"] * (len(found) - 1)


def test_an_encoder_that_was_made_for_a_version_brings_it_along() -> None:
    bound = EncoderRecord("learned-1", "prepare", item_version="v2")
    view = VersionsView(1, ("mix-1", "v1"), [], {}, {"learned-1": bound, "mix-2": EncoderRecord("mix-2", "prepare")})
    progress = progress_of(Coverage(), 1, "learned-1", "v2")
    assert checks_of(PairView("learned-1", "v2", "prepare", progress, None), view, None)["activate"] == [
        "uemb encoder activate learned-1"
    ]
    assert checks_of(PairView("mix-2", "v2", "prepare", progress, None), view, None)["activate"] == [
        "uemb encoder activate mix-2", "uemb items activate v2"
    ]  # fmt: skip


def test_what_can_not_be_compared_is_a_line_of_the_checklist() -> None:
    view = VersionsView(1, ("mix-1", "v1"), [], {}, {"mix-1": EncoderRecord("mix-1", "active")})
    pair = PairView("mix-1", "v2", "prepare", progress_of(Coverage(), 1, "mix-1", "v2"), "the folder is gone")
    found = checks_of(pair, view, None, "the folder is gone here, too")["checks"]
    assert [check["verdict"] for check in found] == ["no", "no", "look"]


# -- titles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("between", [",", "\t"])
def test_titles_are_read(tmp_path: Path, between: str, packed: bool) -> None:
    rows = [
        ["year", "title", "item_id"],
        ["1995", '"Heat, ""the"" film"', "5"],
        ["1996", "<img onerror=x>", " b "],
        ["x"],
    ]
    data = "\n".join(between.join(row) for row in rows).encode()
    path = tmp_path / "titles"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_titles(path) == {"5": 'Heat, "the" film', "b": "<img onerror=x>"}


@pytest.mark.parametrize("text", ["", "id,name\n1,x\n", '"'])
def test_a_table_without_titles_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError, match=r"\A[^\n]*(item_id|can't be read)[^\n]*\Z"):
        read_titles(tmp_path / "t")
    with pytest.raises(ConfigError, match="No such file"):
        read_titles(tmp_path / "nowhere")
