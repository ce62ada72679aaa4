"""Other items and encoders while events flow, workers die and join, and a rollback comes in between."""

import json
import random
import shutil
from collections import Counter
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
MIX = "mix-edd8f311"


#: User and item version that a reader is pinned to, None for what it follows.
Pin = tuple[str | None, str | None]
FOLLOWING: Pin = (None, None)


class RolloutProber(Prober):
    """Asks readers that follow, and that are pinned to versions; notes mixed and older vectors, and who is served.

    Args:
        kv_url: the store.
        users: who is asked for.
        dims: dimension of each item version.
        pins: what readers are pinned to, besides one that follows; by default one for each item version.
    """

    pause_s = 0.01

    def __init__(self, kv_url: str, users: list[str], dims: dict[str, int], pins: list[Pin] | None = None) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.served: list[tuple[str, str]] = []
        self.ok: Counter[Pin] = Counter()
        self._users = users
        self._dims = dims
        self._readers: dict[Pin, EmbeddingReader] = {FOLLOWING: EmbeddingReader.open(kv_url, timeout_s=1.0)}
        for pin in pins if pins is not None else [(None, version) for version in dims]:
            user_version, item_version = pin
            assert item_version is not None
            self._readers[pin] = EmbeddingReader.open(
                kv_url,
                user_version=user_version,
                item_version=item_version,
                fallback=np.ones(dims[item_version]),
                timeout_s=1.0,
            )
        self._newest: dict[tuple[Pin, tuple[str, str], str], tuple[int, int]] = {}  # of each reader: one may be ahead

    @property
    def served_items(self) -> list[str]:
        """Item versions that were served, one after another."""
        return [item_version for _, item_version in self.served]

    def close(self) -> None:
        """See `Prober`."""
        for reader in self._readers.values():
            reader.close()

    def look(self) -> None:
        """See `Prober`."""
        some = random.sample(self._users, min(50, len(self._users)))
        for pin, reader in self._readers.items():
            vectors, found = reader.get_many(some)
            pairs = {(one.user_embedding_version, one.item_embedding_version) for one in found}
            pinned = [want is None or {pair[n] for pair in pairs} == {want} for n, want in enumerate(pin)]
            if len(pairs) != 1 or not all(pinned):
                self.wrong.append(f"pinned to {pin}: {pairs}")
                continue
            (pair,) = pairs
            if vectors.shape[1] != self._dims[pair[1]]:
                self.wrong.append(f"{pair}: {vectors.shape}")
            if pin == FOLLOWING and pair not in self.served[-1:]:
                self.served.append(pair)
            for one in found:
                if one.status == "ok":
                    self.ok[pin] += 1
                    key, order = (pin, pair, one.user_id), (one.epoch, one.revision)
                    if order < self._newest.get(key, (0, 0)):
                        self.wrong.append(f"{pair}: {order} after {self._newest[key]}")
                    self._newest[key] = order
        self.looks += 1


@pytest.mark.slow
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
    with feeding(one, rows, 3_000):
        one.until(lambda: one.length(one.output) > 3_000, "events flow")
        with RolloutProber(one.kv_url, users, {"films_v1": 48, "films_v2": 64}) as prober:
            one.uemb("items", "publish", str(folder))
            two.kill()  # at whatever it has covered
            shutil.rmtree(two.state)
            before = one.epochs()
            three.start()
            one.until_epochs_rise(before)
            one.uemb("items", "activate", "films_v2", "--wait")
            one.until(lambda: prober.served_items[-1:] == ["films_v2"], "readers change over")
            one.uemb("items", "rollback", "--wait")
            one.until(lambda: prober.served_items[-1:] == ["films_v1"], "readers go back")
            three.kill()
            one.uemb("items", "activate", "films_v2", "--force")
            one.until(lambda: prober.served_items[-1:] == ["films_v2"], "and on again")
    one.until_committed(120)
    assert prober.looks > 10
    assert prober.wrong == []
    assert prober.served_items == ["films_v1", "films_v2", "films_v1", "films_v2"]
    one.uemb("items", "status", "films_v2", "--wait")
    one.check(len(users))
    assert one.verified_items == {"films_v1", "films_v2"}
    assert one.stop() == 0


@pytest.mark.slow
def test_from_one_table_and_the_mixture_to_two_tables_and_a_learned_encoder(
    films: Dataset, item_folder: Path, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """While events flow; a reader that follows sees whole pairs only, pinned ones theirs from beginning to end."""
    rows = films.events[:EVENTS]
    build_space(films.events, tmp_path / "one", "one_table", "ppmi", dim=32)
    pipeline = make_pipeline()
    pipeline.environment["UEMB_ITEMS"] = str(tmp_path / "one")
    trained = pipeline.uemb("encoder", "train", str(tmp_path / "ridge"), "--items", str(item_folder), "--json")
    learned = json.loads(trained)["user_version"]
    pipeline.start()
    pipeline.until_ready()
    users = sorted({row.user_id for row in rows})
    pins: list[Pin] = [(MIX, "one_table"), (MIX, "films_v1"), (learned, "films_v1")]
    with feeding(pipeline, rows, 500):
        pipeline.until(lambda: pipeline.length(pipeline.output) > 500, "events flow")
        with RolloutProber(pipeline.kv_url, users, {"one_table": 32, "films_v1": 48}, pins) as prober:
            served = [(MIX, "one_table")]
            pipeline.until(lambda: prober.served == served, "the first pair is served")

            def until_served(*pair: str) -> None:
                served.append(pair)
                pipeline.until(lambda: prober.served[-1:] == [pair], f"{pair} is served")

            pipeline.uemb("items", "publish", str(item_folder), "--wait")
            pipeline.uemb("items", "activate", "films_v1")
            until_served(MIX, "films_v1")
            pipeline.uemb("encoder", "publish", str(tmp_path / "ridge"), "--wait")
            pipeline.uemb("encoder", "activate", learned)
            until_served(learned, "films_v1")
            pipeline.uemb("encoder", "activate", MIX)
            until_served(MIX, "films_v1")
            pipeline.uemb("items", "rollback")
            until_served(MIX, "one_table")
            pipeline.uemb("encoder", "activate", learned)  # and the items that it was made for, at once
            until_served(learned, "films_v1")
    assert prober.wrong == []
    assert prober.served == served
    assert set(prober.ok) == {FOLLOWING, *pins}, "every reader has seen vectors of users' own"
    pipeline.until_committed(120)
    pipeline.check(len(users))
    assert set(pipeline.verified) == {f"{MIX}:one_table", f"{MIX}:films_v1", f"{learned}:films_v1"}
    assert pipeline.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["publish", "retire"])
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
    length = pipeline.length(pipeline.output)
    pipeline.uemb("items", *(["publish", str(folder)] if command == "publish" else ["retire", "films_v1"]))
    pipeline.until(lambda: pipeline.length(pipeline.output) > length, "the work has begun")
    pipeline.kill()
    done = pipeline.length(pipeline.output) - length
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
