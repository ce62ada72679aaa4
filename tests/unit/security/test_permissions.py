"""Folders of histories and vectors: closed whatever the umask and whatever was there; a named group may read."""

import asyncio
import grp
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kv_entries import entry

from stream.errors import ConfigError
from stream.feed.send_plan import Position
from stream.feed.send_progress import SendProgress
from stream.kv.protocol import Meta
from stream.kv.rocksdb.writer import RocksKV
from stream.kv.stores import check_place
from stream.security.permissions import close_folder, guard

NOBODY = 65534
#: A group that every system has, and that is not root's own.
GROUP = grp.getgrgid(next(g.gr_gid for g in grp.getgrall() if g.gr_gid not in (0, NOBODY)))
#: The library writes it anew wherever it opens a database.
WRITTEN_BY_READERS = {"p-00000/rocksdict-config.json": oct(0o660)}
#: Reads a store as another user, with the groups that are named.
READ = """
import os, sys
from stream.kv.rocksdb.reader import RocksReader
os.setgroups([int(group) for group in sys.argv[2:]])
os.setgid(65534)
os.setuid(65534)
print(RocksReader(sys.argv[1]).get([(b"42", b"uemb:u:i:42")])[0])
"""


def read_as_another(path: Path, *groups: int) -> str:
    command = [sys.executable, "-c", READ, str(path), *map(str, groups)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return ended.stdout + ended.stderr


@pytest.fixture(params=[0o000, 0o077], ids=["umask 000", "umask 077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


async def fill(path: Path) -> RocksKV:
    kv = RocksKV(path)
    await kv.update_meta(lambda _: Meta("app", 1))
    await kv.open_partition(0)
    await kv.put(0, {b"uemb:u:i:42": entry(1, 1)})
    await kv.ask_rebuild(0)
    return kv


@pytest.mark.parametrize("existed", [False, True])
async def test_a_store_is_closed_to_others(existed: bool, umask: int, tmp_path: Path) -> None:
    path = tmp_path / "kv"
    if existed:
        kv = await fill(path)
        await kv.close()
        for some in (path, *path.rglob("*")):
            some.chmod(0o755)
    guard()
    check_place(f"rocksdb://{path}")
    kv = await fill(path)
    await kv.close()
    found = modes(path)
    assert len(found) > 8
    assert {name: oct(mode) for name, mode in found.items() if mode not in (0o700, 0o600)} == {}
    assert found["."] == found["p-00000"] == 0o700


@pytest.fixture
def others_may_enter() -> Iterator[Path]:
    """A folder whose way is open to other users, as that of pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
async def test_a_group_that_is_named_may_read_a_store_and_nobody_else(umask: int, others_may_enter: Path) -> None:
    path = others_may_enter / "kv"
    kv = await fill(path)
    await kv.close()
    guard(GROUP.gr_name)
    check_place(f"rocksdb://{path}", str(GROUP.gr_gid) if umask else GROUP.gr_name)
    kv = await fill(path)
    found = modes(path)
    assert {name: oct(mode) for name, mode in found.items() if mode not in (0o2750, 0o640)} == WRITTEN_BY_READERS
    assert str(entry(1, 1)) in await asyncio.to_thread(read_as_another, path, GROUP.gr_gid)
    assert "can't be read (Permission denied)" in await asyncio.to_thread(read_as_another, path)
    await kv.close()


def test_a_group_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="UEMB_KV_GROUP: there is no group nobodys"):
        check_place(f"rocksdb://{tmp_path / 'kv'}", "nobodys")


def test_a_folder_that_is_not_ours_alone_stays_as_it_is(tmp_path: Path) -> None:
    shared, sticky = tmp_path / "srv", tmp_path / "tmp"
    for folder, mode in ((shared, 0o755), (sticky, 0o1777)):
        (folder / "app" / "deep").mkdir(parents=True)
        for some in (folder / "app", folder / "app" / "deep"):
            some.chmod(0o755)
        folder.chmod(mode)
    (shared / "else").mkdir()
    (shared / "else").chmod(0o755)
    (shared / "app" / "link").symlink_to(shared / "else")
    for folder in (shared, sticky):
        close_folder(folder, lambda name: name == "app")
    assert modes(sticky) == {".": 0o1777, "app": 0o700, "app/deep": 0o700}
    found = modes(shared)
    assert (found["."], found["else"], found["app"], found["app/deep"]) == (0o755, 0o755, 0o700, 0o700)


def test_where_a_send_has_come_is_closed_to_others(umask: int, tmp_path: Path) -> None:
    events, place = tmp_path / "events.csv", tmp_path / "progress"
    events.write_text("user_id,item_id,type,ts\n")
    place.with_name("progress.tmp").write_text("")
    place.with_name("progress.tmp").chmod(0o644)
    progress = SendProgress(place, [events], "settings", lambda _: None)
    progress.reached(Position(0, 1))
    assert progress.save()
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
