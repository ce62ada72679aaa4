"""Whether a partition's vectors are stale: what its progress record says of the pipeline, not of the user (law 10)."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Final

from stream.answers import Freshness
from stream.keys import partition_of
from stream.kv.base import KVReader
from stream.records import kv_entry

HEARTBEAT_S: Final = 1.5  # a younger heartbeat adds nothing to the lag
STALE_HEARTBEAT_S: Final = 5.0
#: Of a partition without a progress record, and of what is no user's.
UNVOUCHED: Final[Freshness] = (True, None)
_REMEMBERED: Final = 256


class Judge:
    """Judges progress records; safe to use from several threads.

    Args:
        max_lag_s: a pipeline further behind is stale; None leaves it to the heartbeat.
        clock: wall clock in epoch seconds.
    """

    def __init__(self, max_lag_s: float | None, clock: Callable[[], float]) -> None:
        self._max_lag_s = max_lag_s
        self._clock = clock
        self._progress: dict[bytes, tuple[float, float]] = {}

    def freshness(self, store: KVReader | None, names: Sequence[str | None], partitions: int) -> list[Freshness]:
        """Of each user [n] whether its vector is stale, and the lag in seconds; None stands for what is no id."""
        known: dict[int, Freshness] = {}
        out = []
        for name in names:
            if name is None or store is None:
                out.append(UNVOUCHED)
                continue
            user_id = name.encode()
            partition = partition_of(user_id, partitions)
            if partition not in known:
                known[partition] = self._judge(store.watermark(user_id))
            out.append(known[partition])
        return out

    def _judge(self, watermark: bytes | None) -> Freshness:
        """Whether a partition's progress record makes its vectors stale, and how far behind it says they are."""
        if watermark is None:
            return UNVOUCHED
        progress = self._progress.get(watermark)
        if progress is None:
            progress = _progress(watermark)
            if progress is None:
                return UNVOUCHED
            if len(self._progress) >= _REMEMBERED:
                self._progress.clear()
            self._progress[watermark] = progress
        lag_s, heartbeat_s = progress
        silent_s = self._clock() - heartbeat_s
        lag_s += max(0.0, silent_s - HEARTBEAT_S)
        behind = self._max_lag_s is not None and lag_s > self._max_lag_s
        return silent_s > STALE_HEARTBEAT_S or behind, lag_s


def _progress(watermark: bytes) -> tuple[float, float] | None:
    """Lag and heartbeat, in seconds, of a partition's progress record; None when it is damaged."""
    try:
        body = json.loads(kv_entry(watermark)[2])
        lag_s, heartbeat_s = body["lag_ms"] / 1000, body["heartbeat_ms"] / 1000
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return (lag_s, heartbeat_s) if math.isfinite(lag_s + heartbeat_s) else None
