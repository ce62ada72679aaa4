"""Fixtures of tests that run workers: real data, learned item vectors, and a pipeline on the real Kafka."""

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kafka_broker import KafkaBroker
from pipeline import Pipeline, delete_topics

from stream.feed.dataset import Dataset, DatasetUnavailable
from stream.feed.movielens import movielens
from stream.items.space import ItemSpace
from stream.learning.build import build_space


@pytest.fixture(scope="session")
def films() -> Dataset:
    """MovieLens-100K."""
    try:
        return movielens()
    except DatasetUnavailable as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def item_folder(films: Dataset, shared_folder: Path) -> Path:
    """Item vectors learned from the first 80 % of the films' stream; made once a run, never changed."""
    folder = shared_folder / "items" / "v1"
    with (shared_folder / "items.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            build_space(films.events, folder, "films_v1")
    return folder


@pytest.fixture(scope="session")
def space(item_folder: Path) -> ItemSpace:
    """The item space in `item_folder`."""
    return ItemSpace.load(item_folder)


@pytest.fixture
def make_pipeline(
    kafka: KafkaBroker, unique: str, tmp_path: Path, item_folder: Path
) -> Iterator[Callable[..., Pipeline]]:
    """Makes the test's pipeline on the real Kafka; its settings are keyword arguments."""
    made: list[Pipeline] = []

    def make(**settings: object) -> Pipeline:
        made.append(Pipeline(kafka.bootstrap, unique, tmp_path, item_folder, **settings))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()
    if not kafka.external:
        kafka.restore()
    delete_topics(kafka.bootstrap, unique)


@pytest.fixture
def make_workers(make_pipeline: Callable[..., Pipeline], tmp_path: Path) -> Callable[..., list[Pipeline]]:
    """Makes several workers of one application on one host: one store, a state folder and a log for each."""

    def make(count: int, **settings: object) -> list[Pipeline]:
        workers = []
        for number in range(count):
            workers.append(make_pipeline(state_dir=tmp_path / f"state-{number}", **settings))
            workers[-1].state = tmp_path / f"state-{number}"
            workers[-1].log = tmp_path / f"worker-{number}.log"
        return workers

    return make
