"""A folder is judged by what is there, and nothing is made to find out."""

from pathlib import Path

import pytest

from stream.findings import Finding, Status
from stream.kv import folders
from stream.kv.folders import look_at_folder


def look(path: Path) -> list[Finding]:
    return look_at_folder(path, "UEMB_X")


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk of whoever runs this is."""
    monkeypatch.setattr(folders, "LEAST_FREE_BYTES", 0)
    monkeypatch.setattr(folders, "LEAST_FREE_SHARE", 0.0)


def test_one_that_is_there_and_one_that_can_be_made(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    for path, state in ((own, "is there"), (own / "a" / "b", "can be made")):
        (found,) = look(path)
        assert found.status is Status.OK
        assert found.detail.startswith(f"UEMB_X {path} {state}, ")
    assert list(own.iterdir()) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        (found,) = look(path)
        assert (found.status, found.todo) == (Status.FAILED, "set UEMB_X to another folder")
        assert "is no folder" in found.detail


def test_where_nothing_can_be_made() -> None:
    (found,) = look(Path("/proc/nobody/state"))
    assert found.status is Status.FAILED
    assert "can't be written to" in found.detail


def test_one_that_is_open_to_others(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for mode in (0o710, 0o704):
        own.chmod(mode)
        (found,) = look(own)
        assert (found.status, found.todo) == (Status.WARNING, f"chmod 700 {own}")


def test_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    for name, value in (("LEAST_FREE_BYTES", 1 << 80), ("LEAST_FREE_SHARE", 1.1)):
        with monkeypatch.context() as less:
            less.setattr(folders, name, value)
            (found,) = look(tmp_path)
        assert found.status is Status.WARNING
        assert " GB free of " in found.detail


@pytest.mark.parametrize(
    ("kind", "status"), [("ext4", Status.OK), ("nfs4", Status.WARNING), ("fuse.sshfs", Status.WARNING)]
)
def test_the_file_system_of_another_host(
    kind: str, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "a disk"
    own.mkdir(mode=0o700)
    mounts = tmp_path / "mounts"
    shown = str(own.resolve()).replace(" ", "\\040")
    mounts.write_text(f"/dev/x / ext4 rw 0 0\nhost:/y {shown} {kind} rw 0 0\n")
    monkeypatch.setattr(folders, "_MOUNTS", mounts)
    (found,) = look(own / "kv")
    assert found.status is status
    assert (kind in found.detail) is (status is Status.WARNING)
