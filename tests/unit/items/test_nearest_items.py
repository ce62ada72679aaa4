"""Nearest items of a large space are found block by block."""

from pathlib import Path

import numpy as np
import pytest

from stream.items import space as item_space
from stream.items.space import ItemSpace


@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("rows", [3, 10, 1_000])
def test_nearest_items_are_those_of_the_whole_space(
    rows: int, k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(rows)
    ItemSpace.save(tmp_path / "v", "v", [f"i{n}" for n in range(57)], rng.normal(size=(57, 5)))
    space = ItemSpace.load(tmp_path / "v")
    vectors = rng.normal(size=(7, 5)).astype(np.float32)
    monkeypatch.setattr(item_space, "_CHUNK_ROWS", rows)
    found, scores = space.nearest(vectors, k)
    whole = vectors @ space.vectors.T
    np.testing.assert_array_equal(found, np.argsort(-whole, axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(scores, np.take_along_axis(whole, found, axis=1), atol=1e-6)
