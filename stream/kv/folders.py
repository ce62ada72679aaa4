"""Whether a folder is fit for databases: it is looked at, and nothing in it is touched."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from stream.findings import Finding, failed, ok, warning

#: Less room than this, or than this share of the file system, is worth a warning.
LEAST_FREE_BYTES: Final = 2 << 30
LEAST_FREE_SHARE: Final = 0.05
#: File systems of other hosts: their locks and renames are not what databases take them for.
_REMOTE: Final = re.compile(r"nfs|cifs|smb|9p|afs|ceph|gluster|lustre|fuse\.(sshfs|s3fs|gcsfuse|rclone)")
_OF_THE_KERNEL: Final = ("proc", "sysfs", "cgroup", "cgroup2", "devpts")
_MOUNTS: Final = Path("/proc/self/mounts")


def look_at_folder(path: Path, setting: str) -> list[Finding]:
    """What may be said against a folder that a worker makes where it is missing, or one line in its favour.

    Args:
        path: the folder.
        setting: names it for who is to change it.
    """
    found = list(_against(path, setting))
    if found:
        return found
    state = "is there" if path.is_dir() else "can be made"
    return [ok(f"{setting} {path} {state}, {_gb(_free(_lowest(path))[0])} free")]


def _against(path: Path, setting: str) -> Iterator[Finding]:
    lowest = _lowest(path)
    change = f"give it to this user, or set {setting} to another folder"
    if not lowest.is_dir():
        yield failed(f"{setting} {path} can't be used ({lowest} is no folder)", f"set {setting} to another folder")
        return
    kind = _file_system(lowest)
    # a superuser may write to whatever takes writes at all; the kernel's own takes no folders
    if not os.access(lowest, os.W_OK | os.X_OK) or kind in _OF_THE_KERNEL:
        yield failed(f"{setting} {path} can't be used ({lowest} can't be written to)", change)
        return
    if lowest == path:
        about = path.stat()
        if os.geteuid() not in (0, about.st_uid):
            yield warning(f"{setting} {path} belongs to another user", change)
        if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            yield warning(f"{setting} {path} is open to other users", f"chmod 700 {path}")
    if _REMOTE.search(kind):
        yield warning(
            f"{setting} {path} is on a file system of another host ({kind})",
            f"set {setting} to a folder on a local disk",
        )
    free, size = _free(lowest)
    if free < LEAST_FREE_BYTES or free < LEAST_FREE_SHARE * size:
        yield warning(
            f"{setting} {path} has only {_gb(free)} free of {_gb(size)}", "make room, or move it to a larger disk"
        )


def _lowest(path: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _free(folder: Path) -> tuple[int, int]:
    """Bytes that this user may still write, and of how many."""
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize, about.f_blocks * about.f_frsize


def _file_system(folder: Path) -> str:
    """Kind of the file system that a folder is on; empty where the system doesn't tell."""
    try:
        lines = _MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    place, kinds = folder.resolve(), dict[Path, str]()
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        kinds[Path(point.replace("\\040", " "))] = kind
    return next((kinds[above] for above in (place, *place.parents) if above in kinds), "")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
