"""Whether a partition's vectors are stale: what its watermark says of the pipeline, not of the user (law 10)."""

from collections.abc import Callable, Sequence
from typing import Final

from stream.core.watermark import Watermark, decode_watermark
from stream.keys import partitions_of
from stream.kv.protocol import KVReader
from stream.retrieval.answers import Freshness

HEARTBEAT_S: Final = 1.5  # a younger heartbeat adds nothing to the lag
STALE_HEARTBEAT_S: Final = 5.0
#: Of a partition without a watermark, and of what is no user's.
UNVOUCHED: Final[Freshness] = (True, None)
_REMEMBERED: Final = 256


class Judge:
    """Judges watermarks; safe to use from several threads.

    Args:
        max_lag_s: a pipeline further behind is stale; None leaves it to the heartbeat.
        clock: wall clock in epoch seconds.
    """

    def __init__(self, max_lag_s: float | None, clock: Callable[[], float]) -> None:
        self._max_lag_s = max_lag_s
        self._clock = clock
        self._decoded: dict[bytes, Watermark] = {}

    def freshness(self, store: KVReader | None, names: Sequence[str | None], partitions: int) -> list[Freshness]:
        """Of each user [n] whether its vector is stale, and the lag in seconds; None stands for what is no id."""
        if store is None:
            return [UNVOUCHED] * len(names)
        user_ids = [b"" if name is None else name.encode() for name in names]
        where = partitions_of(user_ids, partitions)
        some_user = dict(zip(where, user_ids, strict=True))
        known = {partition: self._judge(store.watermark(user_id)) for partition, user_id in some_user.items()}
        return [UNVOUCHED if name is None else known[partition] for name, partition in zip(names, where, strict=True)]

    def _judge(self, watermark: bytes | None) -> Freshness:
        """Whether a partition's watermark makes its vectors stale, and how far behind it says they are."""
        if watermark is None:
            return UNVOUCHED
        found = self._decoded.get(watermark)
        if found is None:
            found = decode_watermark(watermark)
            if found is None:
                return UNVOUCHED
            if len(self._decoded) >= _REMEMBERED:
                self._decoded.clear()
            self._decoded[watermark] = found
        silent_s = self._clock() - found.heartbeat_ms / 1000
        lag_s = found.lag_ms / 1000 + max(0.0, silent_s - HEARTBEAT_S)
        behind = self._max_lag_s is not None and lag_s > self._max_lag_s
        return silent_s > STALE_HEARTBEAT_S or behind, lag_s
