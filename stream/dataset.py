"""Interactions to feed in: MovieLens-100K fetched at run time, a file of one's own, or a seeded synthetic stream.

MovieLens-100K (F. M. Harper and J. A. Konstan, 2015, doi:10.1145/2827872) may not be redistributed, so nothing of it
is in this package: it is read out of a wheel on the Python package index, whose sha256 is pinned here.
"""

import csv
import hashlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urljoin

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, UembError
from stream.keys import canonical_id

DEFAULT_CACHE_DIR: Final = Path("~/.cache/user-embedding-stream")
FETCH_TIMEOUT_S: Final = 60.0

_WHEEL: Final = "recbole-1.2.1-py3-none-any.whl"
_WHEEL_SHA256: Final = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_WHEEL_MAX_BYTES: Final = 16 << 20
_INDEX: Final = "https://pypi.org/simple/recbole/"
_INDEX_FORMAT: Final = "application/vnd.pypi.simple.v1+json"  # PEP 691
_MEMBER: Final = "recbole/dataset_example/ml-100k/ml-100k."
_CONNECT_TIMEOUT_S: Final = 15.0
_UNAVAILABLE: Final = "MovieLens-100K can't be had"

#: Bounds of an event time in the contract's schema, milliseconds.
_TS_MS: Final = (315_532_800_000, 281_474_976_710_655)
_FIELDS: Final = ("user_id", "item_id", "type", "ts")
_TYPE_MAX_CHARS: Final = 64

_TOPICS: Final = ("jazz", "chess", "hiking", "baking", "sailing", "opera", "robots", "gardens", "history", "running")
_SYNTHETIC_START_S: Final = 1_700_000_000  # fixed, and in the past: a stream is the same whenever it is made
_SYNTHETIC_SPAN_S: Final = 42 * 86_400
_SESSION_EVENTS: Final = 15

Progress = Callable[[int, int | None], None]
Note = Callable[[str], None]


class DatasetUnavailable(UembError):
    """The real data can't be had: no network, no index, or not the bytes that were pinned."""


class EventRow(NamedTuple):
    """One interaction; ids are canonical texts, `ts_ms` is event time."""

    user_id: str
    item_id: str
    type: str
    ts_ms: int


@dataclass(frozen=True)
class Dataset:
    """A named stream.

    Attributes:
        name: what to call it on screen.
        events: sorted by `event_order`.
        titles: text for an item id, where one is known.
        synthetic: whether it was made up.
    """

    name: str
    events: list[EventRow]
    titles: dict[str, str]
    synthetic: bool


def event_order(row: EventRow) -> tuple[int, str, str]:
    """Sort key of a stream: time, user, item; texts by code point, which is UTF-8 byte order.

    Sorting is stable, so rows that agree in all three keep the order of their source.
    """
    return row.ts_ms, row.user_id, row.item_id


def load(
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
    events_file: str | Path | None = None,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> Dataset:
    """The file if one is given, else MovieLens-100K, else (one line through `on_note`) the synthetic stream.

    Raises:
        ConfigError: the file can't be read or holds a bad row.
    """
    if events_file is not None:
        return load_file(events_file)
    try:
        return movielens(cache_dir, on_progress)
    except DatasetUnavailable as exc:
        if on_note is not None:
            on_note(f"{exc}; using a synthetic stream instead")
        return synthetic()


def movielens(
    cache_dir: str | Path = DEFAULT_CACHE_DIR, on_progress: Progress | None = None, timeout_s: float = FETCH_TIMEOUT_S
) -> Dataset:
    """MovieLens-100K: a rating of 4 or 5 is a `like`, any other a `view`; unix seconds become milliseconds.

    Args:
        cache_dir: folder that keeps the wheel; it is verified at every use and fetched again if damaged.
        on_progress: called with bytes fetched and their total where it is known.
        timeout_s: bound on the whole fetch.

    Raises:
        DatasetUnavailable: in one line, why it can't be had.
    """
    with zipfile.ZipFile(io.BytesIO(_wheel(Path(cache_dir), on_progress, timeout_s))) as wheel:
        ratings = wheel.read(f"{_MEMBER}inter").decode().splitlines()[1:]
        films = wheel.read(f"{_MEMBER}item").decode().splitlines()[1:]
    events = []
    for line in ratings:
        user, item, rating, ts_s = line.split("\t")
        events.append(EventRow(user, item, "like" if float(rating) >= 4 else "view", int(ts_s) * 1000))
    events.sort(key=event_order)
    titles = {}
    for line in films:
        item, title, year, _ = line.split("\t")
        titles[item] = f"{title} ({year})" if year.isdigit() else title
    return Dataset("MovieLens-100K", events, titles, synthetic=False)


def _wheel(cache_dir: Path, on_progress: Progress | None, timeout_s: float) -> bytes:
    """Bytes of the pinned wheel: out of the cache if they verify, else fetched and put there whole."""
    try:
        cached = cache_dir.expanduser() / _WHEEL
        data = cached.read_bytes() if cached.exists() else b""
        if _is_pinned(data):
            return data
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Within the cache folder, so that the rename below stays on one file system and is atomic.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cached.parent) as staging:
            data = _fetch(Path(staging), on_progress, time.monotonic() + timeout_s)
            if not _is_pinned(data):
                msg = f"{_UNAVAILABLE}: what the package index sent is not the pinned file (sha256 differs)"
                raise DatasetUnavailable(msg)
            if on_progress is not None:
                on_progress(len(data), len(data))
            verified = Path(staging) / "verified"
            verified.write_bytes(data)
            verified.replace(cached)
    except (OSError, RuntimeError) as exc:  # RuntimeError: there is no home folder to expand ~ to
        msg = f"{_UNAVAILABLE}: {cache_dir} can't be its cache ({getattr(exc, 'strerror', None) or exc})"
        raise DatasetUnavailable(msg) from exc
    return data


def _is_pinned(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == _WHEEL_SHA256


def _fetch(staging: Path, on_progress: Progress | None, deadline: float) -> bytes:
    """Fetch with pip, which knows the user's index settings; straight from the public index where there is no pip."""
    if on_progress is not None:
        on_progress(0, None)
    if importlib.util.find_spec("pip") is not None:
        return _fetch_by_pip(staging, deadline)
    return _fetch_by_https(on_progress, deadline)


def _fetch_by_pip(staging: Path, deadline: float) -> bytes:
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--retries", "1", "--timeout", str(int(_CONNECT_TIMEOUT_S)), "--dest", str(staging), "recbole==1.2.1"]
    # Output goes to a file: a grandchild (a keyring, say) that outlives pip would keep a pipe open past the deadline.
    with (staging / "pip.log").open("w+b") as log:
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter, no shell, fixed arguments
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=max(deadline - time.monotonic(), 0.0),
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            msg = f"{_UNAVAILABLE}: pip did not finish in time"
            raise DatasetUnavailable(msg) from exc
        log.seek(0)
        said = log.read().decode(errors="replace")
    if done.returncode != 0:
        msg = f"{_UNAVAILABLE}: pip could not download it ({_last_error(said)})"
        raise DatasetUnavailable(msg)
    try:
        return (staging / _WHEEL).read_bytes()
    except FileNotFoundError as exc:
        msg = f"{_UNAVAILABLE}: pip brought no {_WHEEL}"
        raise DatasetUnavailable(msg) from exc


def _last_error(said: str) -> str:
    """Pip's last error line, without the credentials that an index address may hold."""
    errors = [line.removeprefix("ERROR:").strip() for line in said.splitlines() if line.startswith("ERROR:")]
    return re.sub(r"://[^/@\s]*@", "://***@", errors[-1])[:200] if errors else "it gave no reason"


def _fetch_by_https(on_progress: Progress | None, deadline: float) -> bytes:
    opener = _https_opener()
    try:
        project = json.loads(_get(opener, _INDEX, deadline, None))
        url = next(file["url"] for file in project["files"] if file["hashes"].get("sha256") == _WHEEL_SHA256)
        return _get(opener, urljoin(_INDEX, url), deadline, on_progress)
    except (OSError, HTTPException) as exc:
        reason = getattr(exc, "reason", None) or str(exc) or type(exc).__name__
        msg = f"{_UNAVAILABLE}: the package index did not answer ({reason})"
        raise DatasetUnavailable(msg) from exc
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as exc:
        msg = f"{_UNAVAILABLE}: the package index no longer lists the pinned file"
        raise DatasetUnavailable(msg) from exc


def _https_opener() -> urllib.request.OpenerDirector:
    """An opener that knows https and nothing else, so that no redirect leads to plain http or to a file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _get(opener: urllib.request.OpenerDirector, url: str, deadline: float, on_progress: Progress | None) -> bytes:
    body = bytearray()
    request = urllib.request.Request(url, headers={"Accept": f"{_INDEX_FORMAT}, */*;q=0.1"})  # noqa: S310 - https only
    with opener.open(request, timeout=max(min(_CONNECT_TIMEOUT_S, deadline - time.monotonic()), 0.1)) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        # `read1` returns what one packet brought: a server that trickles can't hold us past the deadline.
        while chunk := response.read1(1 << 16):
            body += chunk
            if time.monotonic() > deadline:
                msg = "too slow"
                raise TimeoutError(msg)
            if len(body) > _WHEEL_MAX_BYTES:
                msg = "its answer is too large"
                raise HTTPException(msg)
            if on_progress is not None:
                on_progress(len(body), total)
    return bytes(body)


class _Line(msgspec.Struct):
    user_id: int | str
    item_id: int | str
    type: str
    ts: int


def load_file(path: str | Path) -> Dataset:
    """Events of one's own, sorted by `event_order`; for the format see `read_file`.

    Raises:
        ConfigError: the file can't be read, holds no events, or has a bad row.
    """
    events = sorted(read_file(path), key=event_order)
    if not events:
        msg = f"{path} holds no events"
        raise ConfigError(msg)
    return Dataset(Path(path).name, events, {}, synthetic=False)


def read_file(path: str | Path) -> Iterator[EventRow]:
    """Rows of a file in their order, one at a time.

    CSV has a header with `user_id`, `item_id`, `type` and `ts` (epoch milliseconds) in any order; JSON lines (the first
    character is a brace) have the same fields. Other columns and fields are ignored.

    Raises:
        ConfigError: the file can't be read, or a row is bad (its line number, never its content).
    """

    def bad(number: int, why: object) -> ConfigError:
        return ConfigError(f"{path} line {number}: {why}")

    try:
        # Bytes that are no UTF-8 become lone surrogates, which the row's own check refuses under the right line number.
        with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.read(1)
            file.seek(0)
            for number, line in _json_lines(file, bad) if first == "{" else _csv_lines(file, bad):
                try:
                    row = _checked(line)
                except ValueError as exc:
                    raise bad(number, exc) from exc
                yield row
    except OSError as exc:
        msg = f"{path} can't be read ({exc.strerror})"
        raise ConfigError(msg) from exc


_Bad = Callable[[int, object], ConfigError]


def _json_lines(file: Iterable[str], bad: _Bad) -> Iterator[tuple[int, _Line]]:
    decode = msgspec.json.Decoder(_Line).decode
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            yield number, decode(line)
        except UnicodeEncodeError as exc:
            raise bad(number, "not UTF-8 text") from exc
        except msgspec.DecodeError as exc:
            raise bad(number, exc) from exc


def _csv_lines(file: Iterable[str], bad: _Bad) -> Iterator[tuple[int, _Line]]:
    reader = csv.reader(file, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if missing := [name for name in _FIELDS if name not in header]:
            raise bad(
                1, f"the header lacks {', '.join(missing)} (CSV needs {','.join(_FIELDS)}; else write JSON lines)"
            )
        at = [header.index(name) for name in _FIELDS]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise bad(reader.line_num, f"has {len(row)} columns, the header {len(header)}")
            user, item, kind, ts = (row[i].strip() for i in at)
            if not (ts.isascii() and ts.isdecimal()):
                raise bad(reader.line_num, "ts must be a whole number of epoch milliseconds")
            yield reader.line_num, _Line(user, item, kind, int(ts))
    except csv.Error as exc:
        raise bad(reader.line_num, exc) from exc


def _checked(line: _Line) -> EventRow:
    if not _TS_MS[0] <= line.ts <= _TS_MS[1]:
        msg = f"ts must be epoch milliseconds from {_TS_MS[0]} (1980) to {_TS_MS[1]}; is it in seconds?"
        raise ValueError(msg)
    if not line.type.isprintable() or not 1 <= len(line.type) <= _TYPE_MAX_CHARS:
        msg = f"type must be 1 to {_TYPE_MAX_CHARS} printable characters"
        raise ValueError(msg)
    return EventRow(canonical_id(line.user_id), canonical_id(line.item_id), line.type, line.ts)


def synthetic(seed: int = 7, users: int = 1000, items: int = 1500, events: int = 100_000) -> Dataset:
    """A made-up stream that behaves like a real one; the same arguments give the same stream.

    Items fall into topics and follow Zipf's law within them. A user's taste drifts from one mixture of topics to
    another over six weeks; sessions bring several interactions within the same second, as MovieLens does. No
    interaction occurs twice.

    Raises:
        ValueError: a count is below 1.
    """
    if min(users, items, events) < 1:
        msg = "a synthetic stream needs at least one user, one item and one event"
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    topics = min(len(_TOPICS), items)
    topic_of = rng.permutation(np.arange(items) % topics)  # every topic has an item

    activity = rng.lognormal(0.0, 1.0, users)
    user = np.sort(rng.choice(users, events, p=activity / activity.sum()))
    sessions = 1 + np.bincount(user, minlength=users) // _SESSION_EVENTS
    session = (np.cumsum(sessions) - sessions)[user] + rng.integers(0, sessions[user])
    session.sort()  # users own ascending ranges of sessions, so this keeps `user` aligned
    start = rng.random(int(sessions.sum()))[session]  # as a share of the span

    early, late = rng.dirichlet(np.full(topics, 0.2), (2, users))
    taste = (1 - start)[:, None] * early[user] + start[:, None] * late[user]  # [events, topics]
    topic = np.minimum((taste.cumsum(axis=1) < rng.random(events)[:, None]).sum(axis=1), topics - 1)
    liked = rng.random(events) < 0.2 + 0.5 * taste[np.arange(events), topic]
    item = np.empty(events, dtype=np.int64)
    for t in range(topics):
        members = np.flatnonzero(topic_of == t)
        weight = 1.0 / np.arange(1, len(members) + 1)
        item[topic == t] = rng.choice(members, int((topic == t).sum()), p=weight / weight.sum())

    gap = rng.geometric(0.25, events) - 1  # seconds since the session's previous interaction, often none
    elapsed = np.cumsum(gap)
    first = np.r_[True, session[1:] != session[:-1]]
    elapsed -= np.maximum.accumulate(np.where(first, elapsed, 0))
    ts_s = _SYNTHETIC_START_S + (start * _SYNTHETIC_SPAN_S).astype(np.int64) + elapsed
    while len(again := _repeats(user, item, ts_s)):
        ts_s[again] += 1

    types = np.where(liked, "like", "view").tolist()
    columns = zip((user + 1).tolist(), (item + 1).tolist(), types, (ts_s * 1000).tolist(), strict=True)
    rows = sorted((EventRow(str(u), str(i), kind, ts) for u, i, kind, ts in columns), key=event_order)
    titles = {str(i + 1): f"Item {i + 1} ({_TOPICS[t]})" for i, t in enumerate(topic_of.tolist())}
    return Dataset("synthetic stream", rows, titles, synthetic=True)


def _repeats(*columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of rows that equal an earlier one."""
    first = np.unique(np.stack(columns, axis=1), axis=0, return_index=True)[1]
    return np.setdiff1d(np.arange(len(columns[0])), first)
