"""Small files, read whole: no pipe is waited for, no device is read, and what is larger than it may be is refused."""

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path, max_bytes: int) -> bytes:
    """All that a file holds.

    Raises:
        OSError: it can't be read, is no regular file, or is larger than that; `strerror` says which.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as exc:  # a zero byte, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no path") from exc
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        data = file.read(max_bytes + 1)  # it may grow meanwhile
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes:,} bytes")
    return data
