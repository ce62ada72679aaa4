"""Item spaces that can't be loaded: refused in bounded time, whatever their files are."""

import asyncio
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from stream.errors import ItemSpaceError
from stream.items.popularity import NAME
from stream.items.space import ItemSpace
from stream.rollout import live_spaces
from stream.rollout.live_spaces import load_space


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ItemSpace.save(tmp_path / "v1", "v1", ["a", "b"], np.eye(2, dtype=np.float32))
    return tmp_path / "v1"


@pytest.mark.parametrize("name", ["manifest.json", "ids.txt", "vectors.npy"])
async def test_a_pipe_is_no_file_to_wait_for(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ItemSpaceError, match=f"{name} .*is no regular file"):
        await load_space(folder, 60.0)


def test_nor_is_one_in_place_of_the_popularity_list(folder: Path) -> None:
    os.mkfifo(folder / NAME)
    with pytest.raises(ItemSpaceError, match="no regular file"):
        ItemSpace.load(folder).popular(1)


async def test_a_file_system_that_hangs_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, beats = threading.Event(), 0
    monkeypatch.setattr(live_spaces.ItemSpace, "load", lambda _: hanging.wait(60))
    loading = asyncio.create_task(load_space(folder, 0.2))
    while not loading.done():  # the loop goes on
        await asyncio.sleep(0.01)
        beats += 1
    assert beats > 1
    with pytest.raises(ItemSpaceError, match=r"not loaded within 0\.2 s; see its file system"):
        await loading
    hanging.set()


async def test_what_is_loaded_is_given_back_and_what_is_wrong_is_raised(folder: Path) -> None:
    assert (await load_space(folder, 60.0)).version == "v1"
    (folder / "ids.txt").write_text("x")
    with pytest.raises(ItemSpaceError, match=r"ids\.txt"):
        await load_space(folder, 60.0)
