"""Where the demo's interactions come from, and what happens when they can't be had."""

import hashlib
import io
import json
import os
import urllib.error
import zipfile
from collections import Counter

import numpy as np
import pytest

from stream.core.events import EventRow, event_order
from stream.errors import ConfigError
from stream.feed import dataset
from stream.feed import movielens as ml
from stream.feed.dataset import DatasetUnavailable
from stream.feed.event_files import read_file
from stream.feed.sources import load, load_file
from stream.feed.synthetic import synthetic

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"


# -- MovieLens, the real bytes


def test_movielens_is_complete_and_sorted():
    cache = os.environ.get("UEMB_CACHE_DIR", dataset.DEFAULT_CACHE_DIR)
    try:
        data = ml.movielens(cache)
    except DatasetUnavailable as exc:
        pytest.skip(str(exc))
    assert len(data.events) == len(set(data.events)) == 100_000
    assert len({row.user_id for row in data.events}) == 943
    assert len({row.item_id for row in data.events}) == len(data.titles) == 1_682
    assert Counter(row.type for row in data.events) == {"like": 55_375, "view": 44_625}
    assert data.events == sorted(data.events, key=lambda r: (r.ts_ms, r.user_id, r.item_id))
    assert (data.events[0].ts_ms, data.events[-1].ts_ms) == (874_724_710_000, 893_286_638_000)
    assert (data.titles["50"], data.titles["267"]) == ("Star Wars (1977)", "unkonwn")  # sic, without a year
    assert data.titles["1005"] == "Double vie de Véronique, La (Double Life of Veronique, The) (1991)"
    assert not data.synthetic


# -- fetching, with a stand-in wheel on a local index


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel of the same shape, on the only index that pip may use; its hash is the pinned one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = "recbole-1.2.1.dist-info/"
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
        rows = "7\t9\t4\t20\n7\t8\t3\t20\n10\t9\t5\t20\n3\t9\t1\t10\n"
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", INTER + rows)
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.item", ITEM + "9\tAlien\t1979\tHorror\n")
    index = tmp_path / "index"
    index.mkdir()
    file = index / "recbole-1.2.1-py3-none-any.whl"
    file.write_bytes(buffer.getvalue())
    monkeypatch.setattr(ml, "_WHEEL_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return file


def test_pip_fetches_once_and_a_damaged_cache_is_fetched_again(wheel, tmp_path):
    cache = tmp_path / "not" / "yet" / "there"
    seen = []
    data = ml.movielens(cache, lambda done, total: seen.append((done, total)))
    assert data.events == [
        EventRow("3", "9", "view", 10_000),
        EventRow("10", "9", "like", 20_000),  # text order: "10" before "7"
        EventRow("7", "8", "view", 20_000),
        EventRow("7", "9", "like", 20_000),
    ]
    assert data.titles == {"9": "Alien (1979)"}
    size = wheel.stat().st_size
    assert seen == [(0, None), (size, size)]
    assert [p.name for p in cache.iterdir()] == [wheel.name]

    (cache / wheel.name).write_bytes(b"damaged" + wheel.read_bytes())
    assert ml.movielens(cache).events == data.events
    assert (cache / wheel.name).read_bytes() == wheel.read_bytes()

    wheel.unlink()  # nothing to fetch any more: what is cached and whole suffices
    seen.clear()
    assert ml.movielens(cache, lambda done, total: seen.append((done, total))).events == data.events
    assert seen == []


def test_other_bytes_than_those_pinned_are_refused_and_not_kept(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(ml, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(DatasetUnavailable, match="not the pinned file"):
        ml.movielens(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_the_data_one_line_says_so_and_the_stream_is_synthetic(wheel, tmp_path):
    wheel.unlink()
    notes = []
    data = load(tmp_path / "cache", on_note=notes.append)
    assert data.synthetic
    (note,) = notes
    assert note == (
        "MovieLens-100K can't be had: pip could not download it (No matching distribution found for recbole==1.2.1); "
        "using a synthetic stream instead"
    )


def test_a_hanging_pip_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(ml.sys, "executable", str(_script(tmp_path, "exec sleep 60")))
    with pytest.raises(DatasetUnavailable, match="in time"):
        ml.movielens(tmp_path / "cache", timeout_s=0.3)


def test_credentials_of_an_index_stay_out_of_the_message(tmp_path, monkeypatch):
    said = "echo 'ERROR: 403 for url https://me:secret@index.example/simple/' >&2; exit 1"
    monkeypatch.setattr(ml.sys, "executable", str(_script(tmp_path, said)))
    with pytest.raises(DatasetUnavailable, match=r"https://\*\*\*@index\.example") as caught:
        ml.movielens(tmp_path / "cache")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unusable_cache_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DatasetUnavailable, match="can't be its cache"):
        ml.movielens(tmp_path / "file")


def _script(folder, body):
    script = folder / "fake-python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return script


# -- fetching where there is no pip


class FakeIndex:
    """Stands in for the https opener: answers from a dict of url to bytes, in packets of `packet` bytes."""

    def __init__(self, pages, packet=1 << 20):
        self.pages, self.packet, self.asked = pages, packet, []

    def open(self, request, timeout):
        assert 0 < timeout <= 15
        self.asked.append(request.full_url)
        if request.full_url not in self.pages:
            raise urllib.error.URLError("unreachable")
        body = io.BytesIO(self.pages[request.full_url])
        body.headers = {"Content-Length": str(len(body.getvalue()))}
        if self.packet:
            body.read1 = lambda n: body.read(min(n, self.packet))
        else:
            body.read1 = lambda n: b"x"  # a server that never ends
        return body


@pytest.fixture
def no_pip(monkeypatch):
    monkeypatch.setattr(ml.importlib.util, "find_spec", lambda name: None)

    def use(index):
        monkeypatch.setattr(ml, "_https_opener", lambda: index)
        return index

    return use


def listing(sha256, url="../../files/recbole.whl"):
    files = [
        {"url": "https://elsewhere/old.whl", "hashes": {"sha256": "1" * 64}},
        {"url": url, "hashes": {"sha256": sha256}},
    ]
    return json.dumps({"files": files}).encode()


def test_without_pip_the_public_index_is_asked(wheel, tmp_path, no_pip):
    data = wheel.read_bytes()
    page = "https://pypi.org/simple/recbole/"
    file = "https://pypi.org/files/recbole.whl"
    index = no_pip(FakeIndex({page: listing(hashlib.sha256(data).hexdigest()), file: data}, packet=100))
    seen = []
    assert len(ml.movielens(tmp_path / "cache", lambda done, total: seen.append((done, total))).events) == 4
    assert index.asked == [page, file]
    assert seen[1] == (100, len(data))
    assert seen[-1] == (len(data), len(data))


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (None, "did not answer \\(unreachable\\)"),
        (listing("2" * 64), "no longer lists"),
        (b"<html>", "no longer lists"),
        (b"[]", "no longer lists"),
    ],
)
def test_without_pip_a_failure_is_one_line(page, says, tmp_path, no_pip):
    no_pip(FakeIndex({} if page is None else {"https://pypi.org/simple/recbole/": page}))
    with pytest.raises(DatasetUnavailable, match=says) as caught:
        ml.movielens(tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_server_that_trickles_is_given_up(tmp_path, no_pip):
    no_pip(FakeIndex({"https://pypi.org/simple/recbole/": b""}, packet=0))
    with pytest.raises(DatasetUnavailable, match="too slow"):
        ml.movielens(tmp_path / "cache", timeout_s=0.2)


def test_a_server_that_sends_too_much_is_given_up(tmp_path, no_pip, monkeypatch):
    monkeypatch.setattr(ml, "_WHEEL_MAX_BYTES", 1000)
    no_pip(FakeIndex({"https://pypi.org/simple/recbole/": b""}, packet=0))
    with pytest.raises(DatasetUnavailable, match="too large"):
        ml.movielens(tmp_path / "cache", timeout_s=20)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "file:///etc/hostname", "ftp://127.0.0.1/"])
def test_nothing_but_https_is_opened(url):
    with pytest.raises(urllib.error.URLError, match="unknown url type"):
        ml._https_opener().open(url, timeout=1)


# -- the synthetic stream


def test_the_synthetic_stream_is_a_function_of_its_arguments():
    first = synthetic(users=50, items=80, events=3000)
    assert synthetic(users=50, items=80, events=3000) == first
    assert synthetic(seed=8, users=50, items=80, events=3000).events != first.events


@pytest.mark.parametrize(("users", "items", "events"), [(1, 1, 40), (3, 2, 500), (50, 80, 3000)])
def test_the_synthetic_stream_has_the_size_asked_for_and_no_interaction_twice(users, items, events):
    data = synthetic(users=users, items=items, events=events)
    assert data.synthetic
    assert len(data.events) == len({row[:2] + row[3:] for row in data.events}) == events
    assert data.events == sorted(data.events, key=event_order)
    assert {int(row.user_id) for row in data.events} <= set(range(1, users + 1))
    assert {row.item_id for row in data.events} <= set(data.titles)
    assert len(data.titles) == items


@pytest.mark.parametrize("wrong", [{"users": 0}, {"items": 0}, {"events": 0}])
def test_an_empty_synthetic_stream_is_refused(wrong):
    with pytest.raises(ValueError, match="at least one"):
        synthetic(**wrong)


def test_the_synthetic_stream_is_plausible():
    data = synthetic()
    rows = data.events
    days = (rows[-1].ts_ms - rows[0].ts_ms) / 86_400_000
    assert 35 < days < 45
    assert all(row.ts_ms % 1000 == 0 for row in rows)
    in_one_second = Counter((row.user_id, row.ts_ms) for row in rows)
    assert sum(n > 1 for n in in_one_second.values()) > 5_000
    popularity = sorted(Counter(row.item_id for row in rows).values(), reverse=True)
    assert sum(popularity[:75]) > 0.3 * len(rows)  # the top 5 %
    topic = {item: title.partition("(")[2] for item, title in data.titles.items()}
    assert data.titles["17"].startswith("Item 17 (")

    # Tastes are narrow and drift: a user's halves differ more than alternate interactions of the whole do.
    by_user = {}
    for row in rows:
        by_user.setdefault(row.user_id, []).append(topic[row.item_id])
    busy = [topics for topics in by_user.values() if len(topics) >= 200]
    half = np.mean([distance(t[: len(t) // 2], t[len(t) // 2 :]) for t in busy])
    alternate = np.mean([distance(t[::2], t[1::2]) for t in busy])
    assert half > 3 * alternate


def distance(a, b):
    a, b = Counter(a), Counter(b)
    return sum(abs(a[k] / a.total() - b[k] / b.total()) for k in a.keys() | b.keys())


# -- a file of one's own


def write(tmp_path, text, name="events.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


GOOD = [EventRow("7", "a,b", "view", 1_600_000_000_000), EventRow("7", "é", "like", 1_700_000_000_000)]


@pytest.mark.parametrize(
    "text",
    [
        'user_id,item_id,type,ts\n7,é,like,1700000000000\n7,"a,b",view,1600000000000\n',
        '\ufeffts,extra,type,item_id,user_id\r\n1700000000000,x,like,é,7\r\n\r\n1600000000000,,view,"a,b",7\r\n',
        '{"user_id": 7, "item_id": "é", "type": "like", "ts": 1700000000000}\n\n'
        '{"user_id": "7", "item_id": "a,b", "type": "view", "ts": 1600000000000, "extra": [1]}',
    ],
)
def test_a_file_is_read_whatever_its_layout_and_sorted(tmp_path, text):
    path = write(tmp_path, text)
    data = load(tmp_path / "cache", events_file=path)
    assert data.events == GOOD
    assert (data.name, data.titles, data.synthetic) == ("events.csv", {}, False)
    assert list(read_file(path)) == GOOD[::-1]  # file order
    assert not (tmp_path / "cache").exists()


def test_rows_that_agree_in_time_user_and_item_keep_their_order(tmp_path):
    rows = [f"u,i,{kind},1700000000000\n" for kind in ("view", "like", "view", "buy")]
    data = load_file(write(tmp_path, "user_id,item_id,type,ts\n" + "".join(rows)))
    assert [row.type for row in data.events] == ["view", "like", "view", "buy"]


OK_CSV = "user_id,item_id,type,ts\nu,i,view,1700000000000\n"
OK_JSON = '{"user_id":1,"item_id":2,"type":"view","ts":1700000000000}\n'


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("user_id,item,type\nu,i,view\n", 1, "header lacks item_id, ts"),
        ("\x1f\x8b\x08 something compressed", 1, "header lacks"),
        ("", 1, "is empty"),
        (OK_CSV + "SECRET,i,view\n", 3, "3 columns, the header 4"),
        (OK_CSV + "SECRET,i,view,soon\n", 3, "whole number of epoch milliseconds"),
        (OK_CSV + "SECRET,i,view,-5\n", 3, "from 1980 on"),
        (OK_CSV + "SECRET,i,view,1700000000\n", 3, "is the unit s"),
        (OK_CSV + ",i,view,1700000000000\n", 3, "1 to 256"),
        (OK_CSV + "SECRET,,view,1700000000000\n", 3, "1 to 256"),
        (OK_CSV + "SECRET,i,,1700000000000\n", 3, "type must be"),
        (OK_CSV + "SECRET\x00,i,view,1700000000000\n", 3, "no control characters"),
        (OK_CSV + 'SECRET,"two\nlines",view,1700000000000\n', 4, "no control characters"),
        (OK_CSV + 'SECRET,"never closed,view,1700000000000\n', 3, "unexpected end"),
        (OK_CSV.encode() + b"SECRET\xff,i,view,1700000000000\n", 3, "Unicode"),
        (OK_JSON + "\n" + '{"user_id":1,"item_id":"SECRET","ts":1700000000000}', 3, "missing required field `type`"),
        (
            OK_JSON + '{"user_id":1,"item_id":"SECRET","type":"view","ts":"x"}',
            2,
            "ts must be a whole number of epoch milliseconds",
        ),
        (OK_JSON + '{"user_id":true,"item_id":"SECRET","type":"view","ts":1700000000000}', 2, "got `bool`"),
        (OK_JSON + '{"user_id":99999999999999999999,"item_id":"SECRET","type":"view","ts":1700000000000}', 2, "64"),
        (OK_JSON + '{"user_id":1,"item_id":"SECRET"', 2, "truncated"),
        (OK_JSON.encode() + b'{"user_id":1,"item_id":"SECRET\xff"}', 2, "not UTF-8"),
    ],
)
def test_a_bad_row_is_one_line_with_its_number_and_without_its_content(tmp_path, text, line, says):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path} line {line}: ")
    assert "\n" not in message
    assert "SECRET" not in message


def test_a_file_that_is_missing_or_holds_nothing_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.csv can't be read \(No such file or directory\)"):
        load_file(tmp_path / "nowhere.csv")
    with pytest.raises(ConfigError, match="holds no events"):
        load_file(write(tmp_path, "user_id,item_id,type,ts\n"))
