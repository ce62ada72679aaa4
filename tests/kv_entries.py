"""What tests of the key-value stores share: entries, and waiting for what another process or thread does."""

import time
from collections.abc import Callable

from stream.core.records import kv_prefix


def entry(epoch: int, revision: int, body: bytes = b"body") -> bytes:
    """A key-value entry."""
    return kv_prefix(epoch, revision) + body


def eventually(check: Callable[[], bool], within_s: float = 60.0) -> None:
    """Wait until `check` holds."""
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.002)
