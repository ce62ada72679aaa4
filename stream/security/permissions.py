"""Who may look into folders of histories and vectors: their owner alone, or the members of a group that is named."""

import contextlib
import grp
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

OWNER_ONLY: Final = 0o077
OWNER_AND_GROUP: Final = 0o027
_GROUP_READS: Final = 0o2750  # what comes into the folder is the group's, too


def guard(group: str | None = None) -> None:
    """Have what this process makes closed to all others, or open to a group's eyes where a folder is the group's."""
    os.umask(OWNER_ONLY if group is None else OWNER_AND_GROUP)


def close_folder(folder: Path, is_ours: Callable[[str], bool], group: str | None = None) -> None:
    """Make a folder, or take it over as it is, for its owner and perhaps a group; what is in it, too.

    A folder that holds something else as well, as ``/srv`` may, or that is everybody's, as ``/tmp`` is, stays as open
    as it was; what is ours in it does not.

    Args:
        folder: where it is; those above it that are missing are closed to all others.
        is_ours: whether something in it, by its name, is ours.
        group: name or number of that whose members may read, None for nobody's.

    Raises:
        OSError: that can't be done.
        LookupError: there is no such group.
    """
    number = None if group is None else _number(group)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    inside = list(folder.iterdir())
    ours = [path for path in inside if is_ours(path.name)]
    is_everybodys = folder.stat().st_mode & stat.S_ISVTX
    for path in ours:
        for below in [path, *path.rglob("*")]:
            _close(below, number)
    if len(ours) == len(inside) and not is_everybodys:
        _close(folder, number)


def _number(group: str) -> int:
    return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid  # a container may know no name for it


def _close(path: Path, group: int | None) -> None:
    with contextlib.suppress(FileNotFoundError):  # RocksDB clears away what an earlier process has left
        if path.is_symlink():  # what it leads to may be somebody else's
            return
        if group is not None:
            shutil.chown(path, group=group)
        folder_mode, file_mode = (0o700, 0o600) if group is None else (_GROUP_READS, 0o640)
        path.chmod(folder_mode if path.is_dir() else file_mode)


def file_mode(folder: Path) -> int:
    """Mode of a new file: that of `folder` decides whether its group may read it."""
    return 0o640 if is_shared(folder) else 0o600


def make_below(folder: Path) -> None:
    """Make a folder that is as open as the one above it, which may be there already."""
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(_GROUP_READS if is_shared(folder.parent) else 0o700)


def is_shared(folder: Path) -> bool:
    """Whether a group may read what is in a folder of ours."""
    return stat.S_IMODE(folder.stat().st_mode) == _GROUP_READS
