"""The examples of reading, run as they stand: from users in the store to titles out of a FAISS index of the items."""

import asyncio
import csv
import json
import shutil
import subprocess
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import example, run_example
from pipeline import UEMB, Pipeline

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.retrieval import AsyncEmbeddingReader

PAGE = "stream/retrieval/README.md"
USERS = ("42", "7")  # those of the examples that MovieLens has; it has no "anna"


def run_async(block: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a block that awaits; what it leaves in its names."""
    body = textwrap.indent(f"{block}\nreturn locals()", "    ")
    exec(f"async def example():\n{body}", names)
    return dict(asyncio.run(names["example"]()))


def make_popular(folder: Path, films: Dataset, file: Path) -> list[str]:
    """Make a list with `uemb items popular`; the ten items that a plain count puts first."""
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["user_id", "item_id", "type", "ts"])
        writer.writerows(films.events)
    command = [*UEMB, "items", "popular", str(folder), str(file), "--version", "p1", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    shown = json.loads(ended.stdout)
    known = {item.decode(): row for row, item in enumerate(ItemSpace.load(folder).ids)}
    counts = Counter(row.item_id for row in films.events if row.item_id in known)
    best = sorted(counts, key=lambda item: (-counts[item], known[item]))[:10]
    assert shown["items"] == [{"item_id": item, "score": float(counts[item])} for item in best]
    assert (shown["popularity_version"], shown["events"]) == ("p1", sum(counts.values()))
    assert shown["unknown_items"] == len(films.events) - sum(counts.values())
    return best


def test_the_examples_go_from_users_to_titles(
    films: Dataset,
    space: ItemSpace,
    item_folder: Path,
    make_pipeline: Callable[..., Pipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        feeder.send([row for row in films.events if row.user_id in USERS])
    pipeline.until_committed()

    folder = tmp_path / "items"
    shutil.copytree(item_folder, folder)
    counted = make_popular(folder, films, tmp_path / "events.csv")
    popular = [films.titles[item] for item in counted]
    monkeypatch.setenv("UEMB_ITEMS", str(folder))
    monkeypatch.setenv("UEMB_KV_URL", pipeline.kv_url)
    names: dict[str, Any] = {}

    def answered() -> bool:
        """Run the block; a busy machine may exceed the 20 ms that a reader waits, which is no finding here."""
        names.clear()
        names.update(titles=films.titles)
        run_example(PAGE, "retrieve", names)
        names["reader"].close()
        return not {user.reason for user in names["users"]} & {"timeout", "store_down"}

    pipeline.until(answered, "the store answers in time")
    users, vectors = names["users"], names["vectors"]
    assert [(user.user_id, user.status, user.reason) for user in users] == [
        ("42", "ok", ""),
        ("7", "ok", ""),
        ("anna", "fallback", "missing"),
    ]
    scores = vectors.astype(np.float64) @ space.vectors.astype(np.float64).T
    best = -np.sort(-scores, axis=1)[:, :10]
    np.testing.assert_allclose(names["scores"], best, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, names["rows"], axis=1), best, rtol=0, atol=1e-5)
    own = {user: [films.titles[space.ids[row].decode()] for row in names["rows"][i]] for i, user in enumerate(USERS)}
    assert names["candidates"] == {**own, "anna": popular}
    assert names["passing"] == []

    def answered_in_a_loop() -> bool:
        names["AsyncEmbeddingReader"] = AsyncEmbeddingReader
        names["loop"] = run_async(example(PAGE, "retrieve-async"), names)
        return not {user.reason for user in names["loop"]["users"]} & {"timeout", "store_down"}

    def answered_at_first_sight() -> bool:
        names["first"] = {}
        run_example("README.md", "read", names["first"])
        names["first"]["reader"].close()
        return not {user.reason for user in names["first"]["users"]} & {"timeout", "store_down"}

    pipeline.until(answered_at_first_sight, "the store answers in time")
    np.testing.assert_array_equal(names["first"]["vectors"], vectors)
    np.testing.assert_allclose(np.take_along_axis(scores, names["first"]["rows"], axis=1), best, rtol=0, atol=1e-5)

    pipeline.until(answered_in_a_loop, "the store answers in time")
    np.testing.assert_array_equal(names["loop"]["vectors"], vectors)
    assert names["loop"]["user"].user_id == "42"
    assert own["42"] != own["7"]
    assert pipeline.stop() == 0
