"""Another item version while events flow, workers die and join, and a rollback comes in between."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pipeline import Pipeline, feeding
from prober import Prober

from stream.feed.dataset import Dataset
from stream.learning.build import build_space
from stream.retrieval.reader import EmbeddingReader

EVENTS = 20_000


class RolloutProber(Prober):
    """Asks readers that follow, and that are pinned to a version; notes mixed and older vectors, and who is served."""

    pause_s = 0.01

    def __init__(self, kv_url: str, users: list[str], dims: dict[str, int]) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.served: list[str] = []
        self._users = users
        self._dims = dims
        self._readers: dict[str | None, EmbeddingReader] = {None: EmbeddingReader.open(kv_url, timeout_s=1.0)}
        for version, dim in dims.items():
            pinned = EmbeddingReader.open(kv_url, item_version=version, fallback=np.ones(dim), timeout_s=1.0)
            self._readers[version] = pinned
        self._newest: dict[tuple[str | None, str, str], tuple[int, int]] = {}  # of each reader: one may be ahead

    def close(self) -> None:
        """See `Prober`."""
        for reader in self._readers.values():
            reader.close()

    def look(self) -> None:
        """See `Prober`."""
        some = random.sample(self._users, 50)
        for pinned, reader in self._readers.items():
            vectors, found = reader.get_many(some)
            versions = {one.item_embedding_version for one in found}
            if len(versions) != 1 or (pinned is not None and versions != {pinned}):
                self.wrong.append(f"pinned to {pinned}: {versions}")
                continue
            (version,) = versions
            if vectors.shape[1] != self._dims[version]:
                self.wrong.append(f"{version}: {vectors.shape}")
            if pinned is None and version not in self.served[-1:]:
                self.served.append(version)
            for one in found:
                if one.status == "ok":
                    key, order = (pinned, version, one.user_id), (one.epoch, one.revision)
                    if order < self._newest.get(key, (0, 0)):
                        self.wrong.append(f"{version}: {order} after {self._newest[key]}")
                    self._newest[key] = order
        self.looks += 1


def test_a_rollout_under_load(
    films: Dataset,
    make_workers: Callable[..., list[Pipeline]],
    tmp_path: Path,
) -> None:
    """A worker is killed while a version is being covered, one joins, and the version is rolled back and on again."""
    folder = tmp_path / "v2"
    build_space(films.events, folder, "films_v2", dim=64, share=1.0)
    rows = [*films.events, *films.events[:30_000]]  # what comes twice changes nothing, and lasts longer
    users = sorted({row.user_id for row in rows})
    one, two, three = make_workers(3)
    one.start()
    one.until_ready()
    before = one.epochs()
    two.start()
    one.until_epochs_rise(before)
    with feeding(one, rows, 3_000) as thread:
        one.until(lambda: len(one.read(one.output)) > 3_000, "events flow")
        with RolloutProber(one.kv_url, users, {"films_v1": 48, "films_v2": 64}) as prober:
            one.uemb("items", "publish", str(folder))
            two.kill()  # at whatever it has covered
            shutil.rmtree(two.state)
            before = one.epochs()
            three.start()
            one.until_epochs_rise(before)
            one.uemb("items", "activate", "films_v2", "--wait")
            one.until(lambda: prober.served[-1:] == ["films_v2"], "readers change over")
            one.uemb("items", "rollback", "--wait")
            one.until(lambda: prober.served[-1:] == ["films_v1"], "readers go back")
            three.kill()
            one.uemb("items", "activate", "films_v2", "--force")
            one.until(lambda: prober.served[-1:] == ["films_v2"], "and on again")
            assert thread.is_alive(), "all events were sent before the end"
    one.until_committed(120)
    assert prober.looks > 10
    assert prober.wrong == []
    assert prober.served == ["films_v1", "films_v2", "films_v1", "films_v2"]
    one.uemb("items", "status", "films_v2", "--wait")
    one.check(len(users))
    assert one.verified_items == {"films_v1", "films_v2"}
    assert one.stop() == 0


@pytest.mark.parametrize("command", ["publish", pytest.param("retire", marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_the_work_on_all_users(
    command: str, films: Dataset, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    folder = tmp_path / "v2"
    build_space(films.events, folder, "films_v2", dim=64, share=1.0)
    rows = films.events[:EVENTS]
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with feeding(pipeline, rows, 1_000_000):
        pass
    pipeline.until_committed()
    if command == "retire":
        pipeline.uemb("items", "publish", str(folder), "--wait")
        pipeline.uemb("items", "activate", "films_v2")
    length = len(pipeline.read(pipeline.output))
    pipeline.uemb("items", *(["publish", str(folder)] if command == "publish" else ["retire", "films_v1"]))
    pipeline.until(lambda: len(pipeline.read(pipeline.output)) > length, "the work has begun")
    pipeline.kill()
    done = len(pipeline.read(pipeline.output)) - length
    users = {row.user_id for row in rows}
    pipeline.start()
    pipeline.uemb("items", "status", "films_v2" if command == "publish" else "films_v1", "--wait")
    assert done
    pipeline.check(len(users))
    assert pipeline.verified_items == ({"films_v1", "films_v2"} if command == "publish" else {"films_v2"})
    if command == "retire":
        left = [key for key, value in pipeline.last_output().items() if ":films_v1:" in key and value is not None]
        assert left == []
    assert pipeline.stop() == 0
