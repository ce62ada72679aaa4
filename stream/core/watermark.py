"""Bytes of a partition's watermark: how far its owner is, written into the store beside the vectors (law 10)."""

from typing import Annotated

import msgspec

from stream.core.json_records import decode_json, encode_json
from stream.core.records import kv_entry, kv_prefix
from stream.keys import INT64_MAX, INT64_MIN

_Ms = Annotated[int, msgspec.Meta(ge=INT64_MIN, le=INT64_MAX)]


class Watermark(msgspec.Struct, frozen=True, kw_only=True):
    """What one heartbeat of a partition's owner says.

    Attributes:
        offsets: next offset of each input topic; all before it is in the store.
        kafka_time_ms: Kafka time of the last durable record, None before the first.
        lag_ms: how far the partition is behind its topics.
        heartbeat_ms: when that was known, by the worker's clock.
    """

    offsets: dict[str, int] = {}
    kafka_time_ms: _Ms | None = None
    lag_ms: _Ms
    heartbeat_ms: _Ms

    def entry(self, epoch: int, sequence: int) -> bytes:
        """Key-value entry of the watermark, the `sequence`-th of the owner's epoch."""
        return kv_prefix(epoch, sequence) + encode_json(self)


def decode_watermark(entry: bytes | None) -> Watermark | None:
    """What a watermark entry as stored says; None without one, and for a damaged one, which vouches for nothing."""
    if entry is None:
        return None
    try:
        return decode_json(kv_entry(entry)[2], Watermark)
    except ValueError:
        return None
