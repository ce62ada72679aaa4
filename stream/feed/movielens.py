"""MovieLens-100K, fetched at run time out of a wheel on the Python package index whose sha256 is pinned here.

The data (F. M. Harper and J. A. Konstan, 2015, doi:10.1145/2827872) may not be redistributed, so nothing of it is in
this package.
"""

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
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.parse import urljoin

from stream.core.events import EventRow, event_order
from stream.feed.dataset import DEFAULT_CACHE_DIR, Dataset, DatasetUnavailable
from stream.logs import OnProgress

FETCH_TIMEOUT_S: Final = 60.0
_WHEEL: Final = "recbole-1.2.1-py3-none-any.whl"
_WHEEL_SHA256: Final = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_WHEEL_MAX_BYTES: Final = 16 << 20
_INDEX: Final = "https://pypi.org/simple/recbole/"
_INDEX_FORMAT: Final = "application/vnd.pypi.simple.v1+json"  # PEP 691
_MEMBER: Final = "recbole/dataset_example/ml-100k/ml-100k."
_CONNECT_TIMEOUT_S: Final = 15.0
_UNAVAILABLE: Final = "MovieLens-100K can't be had"


def movielens(
    cache_dir: str | Path = DEFAULT_CACHE_DIR, on_progress: OnProgress | None = None, timeout_s: float = FETCH_TIMEOUT_S
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


def _wheel(cache_dir: Path, on_progress: OnProgress | None, timeout_s: float) -> bytes:
    """Bytes of the pinned wheel: out of the cache if they verify, else fetched and put there whole."""
    try:
        cached = cache_dir.expanduser() / _WHEEL
        data = cached.read_bytes() if cached.exists() else b""
        if _is_pinned(data):
            return data
        cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def _fetch(staging: Path, on_progress: OnProgress | None, deadline: float) -> bytes:
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


def _fetch_by_https(on_progress: OnProgress | None, deadline: float) -> bytes:
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


def _get(opener: urllib.request.OpenerDirector, url: str, deadline: float, on_progress: OnProgress | None) -> bytes:
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
