"""Records that must be turned away, each with its reason, and a producer of whatever bytes."""

import json
import time
from typing import Any, NamedTuple

from confluent_kafka import Producer

from stream.keys import partition_of

NOW_MS = time.time_ns() // 1_000_000
MINUTE_MS = 60_000
PARTITIONS = 4
DLQ_MAX_BYTES = 65_536
#: Part of every user id and of much of the bad payload: it must not get into the log or a header.
MARK = "hush"
USERS = [f"{MARK}-{n}" for n in range(9)] + ["99887766554433", "\u00fc" * 126 + MARK]  # the last has 256 bytes
OWN_HEADERS = [("trace", b"\x00\xffid"), ("trace", b"again"), ("empty", b""), ("none", None)]
BAD_USER = f"{MARK}-1"


class Bad(NamedTuple):
    """A record that must be turned away, on view, like or deletions; without a partition it goes where its key does."""

    reason: str
    value: bytes | None
    key: bytes | None = BAD_USER.encode()
    topic: str = "view"
    partition: int | None = None


def event(**fields: object) -> bytes:
    """A valid event of `BAD_USER`, but for `fields`; ... leaves a field out."""
    right = {"user_id": BAD_USER, "item_id": 7, "type": "view", "ts": NOW_MS - MINUTE_MS}
    return json.dumps({name: value for name, value in {**right, **fields}.items() if value is not ...}).encode()


def raw(item: bytes = b"7", ts: bytes = b"%d" % (NOW_MS - MINUTE_MS), more: bytes = b"") -> bytes:
    """The same with JSON text of one's own."""
    return b'{"user_id": "%b", "item_id": %b, "type": "view", "ts": %b%b}' % (BAD_USER.encode(), item, ts, more)


def erasure(**fields: object) -> bytes:
    """A valid erasure of `BAD_USER`, but for `fields`."""
    return json.dumps(
        {n: v for n, v in {"user_id": BAD_USER, "ts": NOW_MS - MINUTE_MS, **fields}.items() if v is not ...}
    ).encode()


_THERE = partition_of(BAD_USER.encode(), PARTITIONS)
BAD = {
    "not_json": Bad("not_json", b"{%b" % MARK.encode()),
    "empty": Bad("not_json", b""),
    "csv": Bad("not_json", f"{BAD_USER},7,view,{NOW_MS}".encode(), topic="like"),
    "two_documents": Bad("not_json", event() + event()),
    "nan": Bad("not_json", raw(ts=b"NaN")),
    "infinity_in_an_extra_field": Bad("not_json", raw(more=b', "x": -Infinity')),
    "invalid_utf8": Bad("not_json", raw(item=b'"%b\xff\xfe"' % MARK.encode())),
    "utf16": Bad("not_json", event().decode().encode("utf-16")),
    "byte_order_mark": Bad("not_json", b"\xef\xbb\xbf" + event(), topic="like"),
    "lone_surrogate": Bad("not_json", raw(item=b'"%b\\ud800"' % MARK.encode())),
    "deep_nesting": Bad("not_json", raw(more=b', "x": ' + b"[" * 20_000 + b"]" * 20_000)),
    "deep_nesting_of_an_id": Bad("wrong_type", raw(item=b"[" * 20_000 + b"]" * 20_000)),
    "array": Bad("wrong_type", b"[%b]" % event()),
    "null": Bad("wrong_type", b"null"),
    "item_is_null": Bad("wrong_type", event(item_id=None)),
    "item_is_a_fraction": Bad("wrong_type", event(item_id=7.5), topic="like"),
    "item_is_a_truth_value": Bad("wrong_type", event(item_id=True)),
    "user_is_an_object": Bad("wrong_type", event(user_id={"id": BAD_USER})),
    "type_is_a_number": Bad("wrong_type", event(type=1)),
    "time_is_text": Bad("wrong_type", event(ts=MARK)),
    "time_is_a_fraction": Bad("wrong_type", event(ts=1.7e12 + 0.5)),
    "time_missing": Bad("missing_field", event(ts=...)),
    "user_missing": Bad("missing_field", event(user_id=...), topic="like"),
    "all_missing": Bad("missing_field", b"{}"),
    "null_key": Bad("null_key", event(), None, partition=_THERE),
    "null_key_and_value": Bad("null_key", None, None, "like", partition=2),
    "null_value": Bad("null_value", None),
    "key_of_another": Bad("key_mismatch", event(), f"{MARK}-2".encode()),
    "key_in_quotes": Bad("key_mismatch", event(), f'"{BAD_USER}"'.encode()),
    "key_with_zeros": Bad("key_mismatch", event(user_id=7), b"007"),
    "key_not_utf8": Bad("key_mismatch", event(), b"\xff\xfe"),
    "key_empty": Bad("key_mismatch", event(), b"", partition=0),
    "wrong_partition": Bad("wrong_partition", event(), partition=(_THERE + 1) % PARTITIONS),
    "oversize_user": Bad("invalid_id", event(user_id=MARK.ljust(257, "x")), MARK.ljust(257, "x").encode()),
    "oversize_item": Bad("invalid_id", event(item_id="\u00fc" * 126 + MARK + "x"), topic="like"),
    "empty_user": Bad("invalid_id", event(user_id=""), b"", partition=1),
    "empty_item": Bad("invalid_id", event(item_id="")),
    "control_character": Bad("invalid_id", event(item_id=f"{MARK}\0view")),
    "line_break": Bad("invalid_id", event(user_id=f"{MARK}\n1"), f"{MARK}\n1".encode()),
    "huge_integer": Bad("invalid_id", event(item_id=1 << 63)),
    "huge_integer_user": Bad("invalid_id", raw().replace(b'"%b"' % BAD_USER.encode(), b"9" * 400), b"9" * 400),
    "huger_integer": Bad("wrong_type", raw(item=b"9" * 5_000)),
    "future": Bad("future_timestamp", event(ts=NOW_MS + 5 * MINUTE_MS + 1)),
    "far_future": Bad("future_timestamp", event(ts=(1 << 48) - 1)),
    "seconds": Bad("implausible_timestamp", event(ts=NOW_MS // 1000)),
    "before_1970": Bad("implausible_timestamp", event(ts=-1), topic="like"),
    "microseconds": Bad("implausible_timestamp", event(ts=NOW_MS * 1000)),
    "huge_time": Bad("implausible_timestamp", raw(ts=b"9" * 400)),
    "unknown_type": Bad("unknown_type", event(type=f"{MARK}-buy")),
    "type_in_capitals": Bad("unknown_type", event(type="View")),
    "empty_type": Bad("unknown_type", event(type="")),
    "erasure_not_json": Bad("not_json", MARK.encode(), topic="deletions"),
    "erasure_without_time": Bad("missing_field", erasure(ts=...), topic="deletions"),
    "erasure_at_text": Bad("wrong_type", erasure(ts="now"), topic="deletions"),
    "erasure_of_another": Bad("key_mismatch", erasure(), f"{MARK}-2".encode(), "deletions"),
    "erasure_elsewhere": Bad("wrong_partition", erasure(), topic="deletions", partition=(_THERE + 2) % PARTITIONS),
    "erasure_in_the_future": Bad("future_timestamp", erasure(ts=NOW_MS + 6 * MINUTE_MS), topic="deletions"),
    "erasure_in_seconds": Bad("implausible_timestamp", erasure(ts=NOW_MS // 1000), topic="deletions"),
    "erasure_of_a_control_character": Bad(
        "invalid_id", erasure(user_id=f"{MARK}\t"), f"{MARK}\t".encode(), topic="deletions"
    ),
    "as_large_as_is_kept": Bad("not_json", MARK.encode() * (DLQ_MAX_BYTES // len(MARK))),
    "larger_than_is_kept": Bad("not_json", MARK.encode() * (DLQ_MAX_BYTES // len(MARK)) + b"!"),
    "much_larger_than_is_kept": Bad("not_json", MARK.encode() * 1_000_000),  # compressed it fits the topic's limit
}
REFERENCES = {"larger_than_is_kept", "much_larger_than_is_kept"}


class Sent(NamedTuple):
    """Where a record went."""

    topic: str
    partition: int
    offset: int


class Sender:
    """A producer of whatever bytes; remembers where each named record went."""

    def __init__(self, bootstrap: str) -> None:
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "partitioner": "murmur2_random",
                "enable.idempotence": True,
                "compression.type": "lz4",
                "message.max.bytes": 20_000_000,
                "log_level": 2,
            }
        )
        self.sent: dict[str, Sent] = {}

    def send(
        self, topic: str, key: bytes | None, value: bytes | None, partition: int | None = None, name: str = ""
    ) -> None:
        def delivered(error: object, message: Any) -> None:
            assert error is None, error
            self.sent[name] = Sent(message.topic(), message.partition(), message.offset())

        where = {} if partition is None else {"partition": partition}
        headers = OWN_HEADERS if name else None
        self._producer.produce(topic, value, key, headers=headers, timestamp=NOW_MS, on_delivery=delivered, **where)
        self._producer.poll(0)

    def flush(self) -> None:
        assert self._producer.flush(20) == 0
