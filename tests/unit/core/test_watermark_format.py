"""What is read of watermarks that are damaged, or of another release."""

import json

import pytest

from stream.core.records import kv_prefix
from stream.core.watermark import Watermark, decode_watermark

SOUND = {"offsets": {"events": 5}, "kafka_time_ms": 3, "lag_ms": 2, "heartbeat_ms": 1}


def stored(body: bytes) -> bytes:
    return kv_prefix(7, 1) + body


def test_fields_of_later_releases_are_passed_over() -> None:
    told = Watermark(offsets={"events": 5}, kafka_time_ms=3, lag_ms=2, heartbeat_ms=1)
    assert decode_watermark(stored(json.dumps({**SOUND, "colour": "red"}).encode())) == told
    assert decode_watermark(told.entry(7, 1)) == told


@pytest.mark.parametrize(
    "entry",
    [
        None,
        b"",
        b"\0" * 15,
        *map(stored, (b"", b"{", b"\xff", b"[]", b"null", b"{}", b"[" * 100_000)),
        *(
            stored(json.dumps({**SOUND, **change}).encode())
            for change in (
                {"offsets": None},
                {"offsets": {"events": "5"}},
                {"lag_ms": None},
                {"lag_ms": float("inf")},
                {"lag_ms": 10**400},
                {"lag_ms": -(10**400)},
                {"heartbeat_ms": float("nan")},
                {"heartbeat_ms": "1"},
                {"kafka_time_ms": 0.5},
            )
        ),
    ],
)
def test_a_damaged_entry_says_nothing(entry: bytes | None) -> None:
    assert decode_watermark(entry) is None
