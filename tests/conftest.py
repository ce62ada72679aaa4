"""What all tests share: one Kafka per run, names of their own, and a run that can forbid skips."""

import gc
import logging
import os
import re
import shutil
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import is_hypothesis_test, settings
from kafka_broker import KafkaBroker, shared_broker, why_unavailable
from redis_cluster import RedisCluster
from redis_server import RedisServer, why_no_redis
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["cluster_writers", "redis_writers"]
if find_spec("aiokafka") is not None:  # else readers' tests run, on what readers bring
    pytest_plugins += ["pipeline_fixtures", "secured_broker"]

#: Markers of tests that run only where `-m` names them.
ON_REQUEST: Final = ("slow", "bench")
_left_out: Final = pytest.StashKey[Counter[str]]()

# A worker's start is mostly imports: no process of a run should compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Laws are tried on some of their examples, with -m slow on all of them; in CI always on the same.
settings.register_profile("all", max_examples=50, deadline=None)
settings.register_profile("some", settings.get_profile("all"), max_examples=20)
for _name in ("all", "some"):
    _same = settings(settings.get_profile(_name), derandomize=True, database=None, print_blob=True)
    settings.register_profile(f"{_name} in CI", _same)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of this run, of all its processes."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def kafka(shared_folder: Path) -> Iterator[KafkaBroker]:
    """A real Kafka at `.bootstrap`, one for the whole run, started with the first test that asks for it."""
    if reason := why_unavailable():
        pytest.skip(reason)
    if os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        yield KafkaBroker()
        return
    with shared_broker(shared_folder) as broker:
        yield broker


@pytest.fixture(scope="session")
def own_kafka() -> Iterator[KafkaBroker]:
    """A real Kafka that tests may pause, stop and break; one for each process of a run."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with KafkaBroker() as broker:
        yield broker


@pytest.fixture
def make_redis() -> Iterator[Callable[..., RedisServer]]:
    """Starts servers of the test's own, which it may stop, break and starve; directives are keyword arguments."""
    if reason := why_no_redis():
        pytest.skip(reason)
    with ExitStack() as running:
        yield lambda **settings: running.enter_context(RedisServer(**settings))


@pytest.fixture
def redis(make_redis: Callable[..., RedisServer]) -> RedisServer:
    """An empty Redis of the test's own."""
    return make_redis()


@pytest.fixture
def make_cluster(make_redis: Callable[..., RedisServer]) -> Iterator[Callable[..., RedisCluster]]:
    """Starts clusters of the test's own, which it may break; arguments are those of `RedisCluster`."""
    with ExitStack() as running:
        yield lambda *args, **settings: running.enter_context(RedisCluster(*args, **settings))


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[RedisCluster]:
    """Three servers, one with another; they need seconds to find each other."""
    if reason := why_no_redis():
        pytest.skip(reason)
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    """An empty cluster of three servers, for tests that leave its servers and slots as they are."""
    shared_cluster.empty()
    return shared_cluster


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1, signed by itself; its key lies beside it as ``key.pem``."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no certificate: install openssl")
    file = tmp_path / "server.pem"
    words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, "req", "-x509", *words, *names, "-keyout", str(tmp_path / "key.pem"), "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return file


@pytest.fixture(autouse=True)
def _broker_runs_again(request: pytest.FixtureRequest) -> Iterator[None]:
    broker: KafkaBroker | None = request.getfixturevalue("own_kafka") if "own_kafka" in request.fixturenames else None
    yield
    if broker is not None:
        broker.restore()


@pytest.fixture(autouse=True)
def _umask_as_it_was() -> Iterator[None]:
    """A command that writes to a store or to state, and is run in this process, leaves its own behind."""
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """A command that is run in this process leaves its levels behind."""
    loggers = [logging.getLogger(name) for name in ("stream", "aiokafka", "aiokafka.conn", "faust", "mode")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def unique() -> str:
    """A prefix for topics, groups and application ids that no other test has."""
    return f"t{uuid.uuid4().hex[:10]}"


def pytest_configure(config: pytest.Config) -> None:
    """Begin with what takes longest, which is collected first: what is short fills the end of a run."""
    config.option.loadscopereorder = False
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput") and find_spec("numba"):
        import_module("stream.core.kernels")  # compiled here once, where nobody has; else by each process, for 12 s
    how_many = "all" if "slow" in _asked(config) else "some"
    settings.load_profile(f"{how_many} in CI" if os.environ.get("CI") else how_many)


def _asked(config: pytest.Config) -> set[str]:
    """The words of `-m`."""
    return set(re.findall(r"\w+", config.option.markexpr))


def pytest_xdist_auto_num_workers() -> int:
    """Processes of ``-n auto``: most of a test with a broker is waiting."""
    return 3 * len(os.sched_getaffinity(0))


class Scheduling(LoadScopeScheduling):
    """The tests of a file go to one process, but for those with servers that share nothing: where there is room."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return _shared(self.config.rootpath / file) or nodeid


@cache
def _shared(file: Path) -> str:
    """What the tests of a file share with each other, with those of other files too; empty if nothing."""
    text = file.read_text()
    if "secured_kafka" in text:
        return "secured_kafka"
    if "own_kafka" in text:  # a broker for each of two processes, not of all that meet one
        return "own_kafka 1" if file.stem in ("test_brokers", "test_dlq", "test_metrics_and_health") else "own_kafka 2"
    return "" if file.parent.name in ("faults", "integration") and 'scope="module"' not in text else str(file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Tests that wait side by side, and none that waits for another of its file without need."""
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what uses Kafka or Redis, and laws that are asked for all examples; leave out what nobody asked for."""
    asked = _asked(config)
    out: list[pytest.Item] = []
    counts: Counter[str] = Counter()
    for item in items:
        if {"kafka", "own_kafka", "secured_kafka"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("kafka")
        if {"make_redis", "shared_cluster"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("redis")
        if "slow" in asked and is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("slow")
        names = [name for name in ON_REQUEST if item.get_closest_marker(name)]
        if names and not asked.intersection(names):
            out.append(item)
            counts[names[0]] += 1
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]
    config.stash[_left_out] = counts


def pytest_collection_finish() -> None:
    """Leave what is there for good out of all collections: each took 0.3 s of CPU, a fifth of what all tests took."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which tests were left out, and how to run them."""
    for name, n in sorted(config.stash.get(_left_out, Counter()).items()):
        terminalreporter.write_line(f"left out: {n} marked {name!r}; run them with -m {name}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where the run must be whole."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself."""
    report = yield
    _forbid_skip(report)
    return report


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("UEMB_TEST_REQUIRE") != "all" or not report.skipped or hasattr(report, "wasxfail"):
        return
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    report.outcome = "failed"
    report.longrepr = f"UEMB_TEST_REQUIRE=all: {why.removeprefix('Skipped: ')}"
