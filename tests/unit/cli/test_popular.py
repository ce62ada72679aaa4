"""The command ``uemb items popular``: files in, a list out, and errors that say what to do."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from stream.cli.root import cli
from stream.errors import UembError
from stream.items.space import ItemSpace

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command on a folder of four items."""
    monkeypatch.chdir(tmp_path)
    ItemSpace.save("items", "items_v1", ["a", "b", "[red]c", 4], np.eye(4) + 0.1)
    header, rows = "user_id,item_id,type,ts\n", ["1,a,view,{}", "1,b,like,{}", "2,b,view,{}", "2,gone,view,{}"]
    (tmp_path / "events.csv").write_text(header + "".join(f"{row}\n" for row in rows).replace("{}", "1700000000000"))
    other = [{"uid": 9, "sku": "[red]c", "at": 1_700_000_000 + n} for n in range(5)]
    (tmp_path / "other.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, other)).encode()))
    return lambda *args: CliRunner().invoke(cli, ["items", "popular", "items", *args])


def shown(ended: Result) -> Any:
    assert ended.exit_code == 0, (ended.output, ended.exception)
    return json.loads(ended.stdout)


def test_files_of_events_become_a_list(run: Run) -> None:
    report = shown(run("events.csv", "--version", "p1", "--type-weights", "like=3", "--json"))
    assert report == {
        "version": "items_v1",
        "popularity_version": "p1",
        "events": 3,
        "not_counted": 0,
        "unknown_items": 1,
        "as_of": 1_700_000_000_000,
        "items": [{"item_id": "b", "score": 4.0}, {"item_id": "a", "score": 1.0}],
    }
    assert ItemSpace.load("items").popular(1) == [("b", 4.0)]
    assert shown(CliRunner().invoke(cli, ["items", "check", "items", "--json"]))["popularity_version"] == "p1"


def test_a_producers_own_files_and_several_of_them(run: Run) -> None:
    fields = ["--fields", "user_id=uid,item_id=sku,ts=at", "--ts-unit", "s", "--type", "view"]
    report = shown(run("other.jsonl.gz", "other.jsonl.gz", "--version", "p1", "--json", "--top", "1", *fields))
    assert (report["events"], report["items"]) == (10, [{"item_id": "[red]c", "score": 10.0}])
    assert report["as_of"] == 1_700_000_004_000


def test_without_files_the_present_list_is_shown(run: Run) -> None:
    shown(run("events.csv", "--version", "p1", "--json"))
    ended = run()
    assert ended.exit_code == 0
    assert ended.output.splitlines() == [
        "version items_v1  popularity_version p1",
        "           2.0  b",
        "           1.0  a",
    ]


def test_types_that_histories_do_not_admit_do_not_count(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UEMB_EVENT_TYPES", "like:2")
    monkeypatch.setenv("UEMB_EVENT_TOPICS", "user-events.like")
    report = shown(run("events.csv", "--version", "p1", "--json"))
    assert (report["events"], report["not_counted"], report["items"]) == (1, 3, [{"item_id": "b", "score": 1.0}])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["events.csv"], "--version"),
        (["--version", "p1"], "files of events"),
        (["--half-life-days", "3"], "files of events"),
        ([], "uemb items popular"),
        (["nothing.csv", "--version", "p1"], "nothing.csv"),
        (["other.jsonl.gz", "--version", "p1"], "line 1"),
        (["events.csv", "--version", "a b"], "a b"),
        (["events.csv", "--version", "p1", "--type-weights", "like"], "--type-weights"),
        (["events.csv", "--version", "p1", "--type-weights", "bought=2"], "bought"),
        (["events.csv", "--version", "p1", "--half-life-days", "0"], "half-life"),
        (["events.csv", "--version", "p1", "--half-life-days", "nan"], "half-life"),
        (["events.csv", "--version", "p1", "--type", "shown"], "UEMB_EVENT_TYPES"),
    ],
)
def test_an_error_says_what_to_do_and_leaves_nothing(run: Run, arguments: list[str], says: str) -> None:
    before = sorted(path.name for path in Path("items").iterdir())
    ended = run(*arguments)
    text = str(ended.exception) if isinstance(ended.exception, UembError) else ended.output
    assert ended.exit_code != 0
    assert says in text
    assert isinstance(ended.exception, UembError | SystemExit), ended.exception
    assert sorted(path.name for path in Path("items").iterdir()) == before
