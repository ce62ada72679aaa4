"""What is stored and damaged, or of a format that nobody knows; what is sound is in ``tests/compat``."""

from collections.abc import Mapping

import pytest

from stream.core.records import kv_prefix
from stream.core.watermark import Watermark
from stream.errors import StateError
from stream.kafka.topic_owners import Written, decode_topics
from stream.kv.redis.losses import Known
from stream.pipeline.watermark import Progress
from stream.worker.claims import Claim

CLAIM = Claim(7, "app", 4, 100, {"view": 1, "like": 2}, {}, "00" * 16).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"{}",
        CLAIM.replace(b'"format": 1', b'"format": 2'),
        CLAIM.replace(b'"format": 1, ', b""),
        CLAIM.replace(b'"epoch": 7, ', b""),
        CLAIM.replace(b'"epoch": 7', b'"epoch": "7"'),
        CLAIM.replace(b'"epoch": 7', b'"epoch": 7, "colour": "red"'),
    ],
)
def test_a_claim_of_a_format_that_is_not_known_stops_the_worker(data: bytes) -> None:
    with pytest.raises(StateError, match="upgrade the worker"):
        Claim.decode(data)


class Standing:
    """What a partition's watermark vouches for."""

    def __init__(self, lag_ms: int) -> None:
        self._lag_ms = lag_ms

    def lag_ms(self, offsets: Mapping[str, int], kafka_time_ms: int | None) -> int:
        return self._lag_ms

    def known_ms(self, offsets: Mapping[str, int]) -> int:
        return 1700000000999


def test_a_workers_progress_is_written_as_a_watermark() -> None:
    offsets = {"user-events.été": 5, "user-deletions": 0}
    progress = Progress(7, offsets, kafka_time_ms=1700000000003, sequence=183)
    told = Watermark(offsets=offsets, kafka_time_ms=1700000000003, lag_ms=996, heartbeat_ms=1700000000999)
    assert progress.entry(Standing(996)) == told.entry(7, 184)  # type: ignore[arg-type]
    first = Watermark(lag_ms=0, heartbeat_ms=1700000000999)
    assert Progress(7).entry(Standing(0)) == first.entry(7, 1)  # type: ignore[arg-type]


def test_damaged_sentinels_tell_nothing() -> None:
    damaged = [b"", b"{", kv_prefix(7, 0), *(kv_prefix(7, 0) + body for body in (b"{", b"[]", b'{"node": "a1"}'))]
    assert Known.by(damaged) == Known()


def test_damaged_topics_of_others_tell_nothing() -> None:
    assert [decode_topics(value) for value in (b"", b"\xff", b"[]", b"{}", b'{"output": 7}')] == [Written()] * 5
