"""What `pip install` gives: the reader alone, on the oldest and newest libraries that it takes; the image's lock.

Each environment is a fresh one with the wheel of this tree. So pip needs an index.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from documents import ROOT, example
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from reader_store import META, PARTITIONS, USER, record, stored
from redis_server import RedisServer

from stream.items import ItemSpace
from stream.keys import fallback_key, partition_of, user_cache_key
from stream.kv.protocol import Serving
from stream.kv.stores import open_writer
from stream.records import encode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_200)]

PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: What no service that reads vectors should get.
NOT_FOR_READERS: Final = {"faust", "mode", "aiokafka", "confluent_kafka", "numba", "scipy", "click", "rich", "pydantic"}
READERS_TESTS: Final = (
    "tests/unit/retrieval/test_reader.py",
    "tests/unit/retrieval/test_async_reader.py",
    "tests/unit/retrieval/test_reader_deadline.py",
    "tests/unit/retrieval/test_reader_metrics.py",
    "tests/unit/kv/test_kv_contract.py",
    "tests/unit/kv/test_kv_memory.py",
    "tests/unit/kv/test_kv_redis_reader.py",
    "tests/unit/kv/test_kv_redis_server.py",
    "tests/unit/kv/test_kv_redis_cluster.py",
    "tests/unit/kv/test_kv_rocksdb.py",
    "tests/unit/items/test_ids.py",
)
TOOLS: Final = ("pytest", "pytest-asyncio", "pytest-xdist", "pytest-timeout", "hypothesis")
ITEMS: Final = "films_v1"
#: Beside the README's block: users of the topic as a matrix, and no module of a client of Kafka anywhere.
CHECKS: Final = f"""
import json, sys
from stream import UserMatrix
matrix = UserMatrix(space.dim, item_version=space.version, user_version={USER!r})
for user, vector in zip(users[:2], vectors):
    entry = open(sys.argv[1] + "/" + user.user_id, "rb").read()
    matrix.apply(f"uemb:{USER}:{{space.version}}:{{user.user_id}}".encode(), entry)
reader.close()
print(json.dumps({{
    "answers": [(user.user_id, user.status, user.reason) for user in users],
    "rows": rows.shape,
    "norms": [float(vector @ vector) for vector in vectors],
    "matrix": bool((matrix.vectors[matrix.live] == vectors[:2]).all()),
    "modules": sorted({{name.partition(".")[0] for name in sys.modules}}),
}}))
"""


def run(*words: str | Path, **how: Any) -> "subprocess.CompletedProcess[str]":
    how = {"timeout": 600, "check": False, "cwd": "/", **how}
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, **how)


def done(*words: str | Path, **how: Any) -> str:
    ended = run(*words, **how)
    assert ended.returncode == 0, f"{words}\n{ended.stdout}{ended.stderr}"
    return ended.stdout


def environment(folder: Path, *requirements: str | Path) -> Path:
    """A fresh environment's folder of programs."""
    venv.create(folder, with_pip=True, symlinks=True)
    done(folder / "bin" / "python", "-m", "pip", "install", "-q", *requirements)
    return folder / "bin"


def pinned(extra: str, *names: str) -> list[str]:
    """Requirements of an extra, only those of the names if there are any."""
    found = [text for text in PROJECT["optional-dependencies"][extra] if not text.startswith(PROJECT["name"])]
    return [text for text in found if not names or Requirement(text).name in names]


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs that a release is made with."""
    return environment(tmp_path_factory.mktemp("tools") / "venv", *pinned("release"))


@pytest.fixture(scope="module")
def built(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution of this tree, and the wheel that is made of that."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("stream", "schemas"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    done(tools / "python", "-m", "build", "--outdir", folder, tree)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def reader(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment that has the reader alone."""
    return environment(tmp_path_factory.mktemp("reader") / "venv", wheel)


def test_a_wheel_has_all_of_the_packages_and_the_license(built: Path, wheel: Path) -> None:
    def ours(suffixes: tuple[str, ...]) -> set[str]:
        files = [file for top in ("stream", "schemas") for file in (ROOT / top).rglob("*") if file.suffix in suffixes]
        return {str(file.relative_to(ROOT)) for file in files}

    expected = ours((".py",)) | ours((".json", ".avsc", ".yaml")) | {"stream/py.typed", "stream/LICENSE.txt"}
    expected |= {str(file.relative_to(ROOT)) for file in (ROOT / "stream" / "inspector" / "static").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in archive.namelist()}
    assert there == expected
    assert about["licenses/stream/LICENSE.txt"] == (ROOT / "stream" / "LICENSE.txt").read_text()
    assert "License-Expression: Apache-2.0" in about["METADATA"]
    assert "uemb = stream.cli:main" in about["entry_points.txt"]
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert expected | {"pyproject.toml", "README.md"} <= inside


def test_the_reader_brings_five_libraries_and_none_of_the_worker(reader: Path) -> None:
    listed = json.loads(done(reader / "python", "-m", "pip", "list", "--format", "json"))
    names = {canonicalize_name(one["name"]) for one in listed} - {"pip", "setuptools"}
    own = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    # What these bring: redis on Pythons before 3.11.3, and msgspec or rocksdict perhaps some day.
    assert {PROJECT["name"], *own} <= names <= {PROJECT["name"], *own, "async-timeout", "typing-extensions"}


def test_importing_it_says_nothing(reader: Path) -> None:
    quiet = run(reader / "python", "-W", "error", "-c", "import stream; from stream import *")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "code",
    [
        "from stream import worker",
        "from stream import config",
        "from stream.config import Settings",
        "import stream.kafka.grants",
        "from stream.pipeline.table import HistoryStore",
        "from stream.rollout import records",
        "from stream.learning import ppmi",
        "from stream.feed import dataset",
        "from stream.app import app",
    ],
)
def test_what_workers_need_names_their_extra(reader: Path, code: str) -> None:
    refused = run(reader / "python", "-c", code)
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert re.fullmatch(r"ImportError: stream\.\w+ needs .*: pip install 'user-embedding-stream\[worker\]'", last)


@pytest.mark.parametrize("words", [("get", "42"), ("worker",), ("--help",), ()])
def test_uemb_names_its_extra_in_one_line(reader: Path, words: tuple[str, ...]) -> None:
    refused = run(reader / "uemb", *words)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"uemb: uemb needs .*: pip install 'user-embedding-stream\[worker\]'\n", refused.stderr)


def fill(url: str, space: ItemSpace, records: Path) -> None:
    """Write a store as the worker's versions do, and the records of two users as files."""

    async def write() -> None:
        kv = open_writer(url)
        pair = Serving(USER, space.version, -1)
        fallbacks = {fallback_key(space.version, USER): encode(record("fallback", space.version))}
        await kv.update_meta(lambda _: replace(META, current=pair, fallbacks=fallbacks))
        for partition in range(PARTITIONS):
            await kv.open_partition(partition)
        for user in ("42", "7"):
            one = record(user, space.version)
            (records / user).write_bytes(encode(one))
            key = user_cache_key(user, space.version, USER).encode()
            await kv.put(partition_of(user.encode(), PARTITIONS), {key: stored(one)})
        await kv.close()

    asyncio.run(write())


@pytest.fixture
def space(tmp_path: Path) -> ItemSpace:
    """Twenty items in the dimension of the records."""
    vectors = np.random.default_rng(7).normal(size=(20, len(record("42").vector))).astype(np.float32)
    ItemSpace.save(tmp_path / "items", ITEMS, [str(n) for n in range(20)], vectors)
    return ItemSpace.load(tmp_path / "items")


def check_reading(programs: Path, url: str, space: ItemSpace, folder: Path) -> None:
    """Fill a store, and have an environment run the README's block on it."""
    folder.mkdir()
    fill(url, space, folder)
    code = example("README.md", "read").replace("version=space.version)", "version=space.version, timeout_s=20)")
    settings = {"UEMB_KV_URL": url, "UEMB_ITEMS": str(folder.parent / "items"), "PATH": os.environ["PATH"]}
    said = json.loads(done(programs / "python", "-W", "error", "-c", code + CHECKS, folder, env=settings))
    assert said["answers"] == [["42", "ok", ""], ["7", "ok", ""], ["anna", "fallback", "missing"]]
    assert said["rows"] == [3, 10]
    assert np.allclose(said["norms"], 1.0, atol=1e-5)
    assert said["matrix"]
    assert not NOT_FOR_READERS & set(said["modules"])


def test_the_first_example_runs_on_rocksdb(reader: Path, space: ItemSpace, tmp_path: Path) -> None:
    check_reading(reader, f"rocksdb://{tmp_path / 'kv'}", space, tmp_path / "records")


def test_the_first_example_runs_on_redis(reader: Path, space: ItemSpace, tmp_path: Path, redis: RedisServer) -> None:
    check_reading(reader, redis.url, space, tmp_path / "records")


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_readers_pass_their_tests_on_both_ends_of_the_ranges(
    end: str, wheel: Path, space: ItemSpace, tmp_path: Path, make_redis: Callable[..., RedisServer]
) -> None:
    versions = [re.sub(r">=([\w.]+),.*", r"==\1", text) for text in PROJECT["dependencies"]] if end == "oldest" else []
    registry = ["prometheus-client==0.20.0" if end == "oldest" else "prometheus-client"]  # a service's own
    programs = environment(tmp_path / "venv", wheel, *versions, *registry, *pinned("dev", *TOOLS))
    check_reading(programs, f"rocksdb://{tmp_path / 'kv'}", space, tmp_path / "records")
    check_reading(programs, make_redis().url, space, tmp_path / "records-2")
    # As a program, not `python -m`: that would put this tree before what is installed.
    words = ["-q", "-n", "4", "-p", "no:cacheprovider", "-k", "not needs_neither_faust", *READERS_TESTS]
    said = done(programs / "pytest", *words, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""})
    passed = re.search(r"(\d+) passed", said)
    assert passed, said
    assert int(passed[1]) > 300, said


# -- the lock ---------------------------------------------------------------------------------------------------------


def shell(document: str, words: str) -> str:
    """The one line of a document's shell that has these words."""
    (line,) = [line for line in (ROOT / document).read_text().splitlines() if words in line]
    return line.strip()


def test_the_documented_command_leaves_the_lock_as_it_is(tools: Path, tmp_path: Path) -> None:
    lock = tmp_path / "stream" / "worker" / "requirements.lock"
    lock.parent.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "stream/worker/requirements.lock", "stream/LICENSE.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    path = f"{tools}:{os.environ['PATH']}"
    line = shell("stream/worker/README.md", "uv pip compile")
    assert line.removeprefix("uv ") in lock.read_text(), "the lock says how it was made"
    done("/bin/sh", "-c", line, cwd=tmp_path, env={**os.environ, "PATH": path})
    assert lock.read_text() == (ROOT / "stream" / "worker" / "requirements.lock").read_text()


def dry_run(programs: Path, lock: Path, *words: str) -> None:
    done(programs / "python", "-m", "pip", "install", "-q", "--dry-run", "--require-hashes", "-r", lock, *words)


def test_nothing_is_missing_in_the_lock(tmp_path: Path) -> None:
    programs = environment(tmp_path / "venv", "pip")
    dry_run(programs, ROOT / "stream" / "worker" / "requirements.lock")


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_lock_is_for_other_machines_and_pythons_too(python: str, machine: str, tools: Path, tmp_path: Path) -> None:
    locked = (ROOT / "stream" / "worker" / "requirements.lock").read_text()
    if machine == "aarch64":  # Faust has wheels for the other only; here it is built of its source
        locked, n = re.subn(r"^faust-streaming==.*\n(?:    .*\n)+", "", locked, flags=re.MULTILINE)
        assert n == 1
    lock = tmp_path / "requirements.lock"
    lock.write_text(locked)
    places = [word for glibc in ("2_28", "2_27", "2_17") for word in ("--platform", f"manylinux_{glibc}_{machine}")]
    there = ["--python-version", python, "--implementation", "cp", *places, "--platform", f"manylinux2014_{machine}"]
    dry_run(tools, lock, "--no-deps", "--ignore-installed", "--only-binary", ":all:", "--target", str(tmp_path), *there)


def test_the_list_of_parts_is_that_of_the_lock(tools: Path, tmp_path: Path) -> None:
    line = shell("stream/worker/README.md", "cyclonedx-py requirements")
    made = tmp_path / "sbom.json"
    path = f"{tools}:{os.environ['PATH']}"
    done("/bin/sh", "-c", line.replace("sbom.json", str(made)), cwd=ROOT, env={**os.environ, "PATH": path})
    parts = json.loads(made.read_text())
    assert (parts["bomFormat"], parts["metadata"]["component"]["name"]) == ("CycloneDX", PROJECT["name"])
    assert parts["metadata"]["component"]["version"] == PROJECT["version"]
    locked = set(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "stream/worker/requirements.lock").read_text(), re.MULTILINE))
    assert {(part["name"], part["version"]) for part in parts["components"]} == locked
