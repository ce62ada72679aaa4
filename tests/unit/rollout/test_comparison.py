"""The comparison of two item versions: nearest items of a large space are found block by block."""

from pathlib import Path

import numpy as np
import pytest

from stream.items.space import ItemSpace
from stream.rollout import comparison as version_report


@pytest.mark.parametrize("rows", [3, 10, 1_000])
def test_nearest_items_are_those_of_the_whole_space(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(rows)
    ids = [f"i{n}" for n in range(57)]
    ItemSpace.save(tmp_path / "v", "v", ids, rng.normal(size=(57, 5)))
    space = ItemSpace.load(tmp_path / "v")
    vectors = rng.normal(size=(7, 5)).astype(np.float32)
    monkeypatch.setattr(version_report, "_ROWS", rows)
    found = version_report._nearest(space, vectors)
    for vector, nearest in zip(vectors, found, strict=True):
        scores = space.vectors @ vector
        assert nearest == {ids[row].encode() for row in np.argsort(-scores)[: version_report.NEIGHBOURS]}
