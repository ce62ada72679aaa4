"""Every kind of record that is not a plain event or erasure, and what becomes of it; a producer of whatever bytes."""

import hashlib
import json
import random
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition

from stream.keys import partition_of

NOW_MS = time.time_ns() // 1_000_000
MINUTE_MS = 60_000
PARTITIONS = 4
DLQ_MAX_BYTES = 65_536
#: Part of every user id and of much of the bad payload: it must not get into the log or a header.
MARK = "hush"
OWN_HEADERS = [("trace", b"\x00\xffid"), ("trace", b"again"), ("empty", b""), ("none", None)]
LARGE_HEADERS = [*OWN_HEADERS, ("h", b"x" * 65_000), ("dlq.reason", b"its own")]
BAD_USER = f"{MARK}-1"
LONG = MARK.ljust(257, "x")
NOISE = random.Random(2).randbytes(2_000_000)

APPLIED = "applied"
UNSEEN = "unseen"
REFUSED = "refused by the broker"


class Kind(NamedTuple):
    """A record, how it is sent, and its outcome: `APPLIED`, `UNSEEN`, `REFUSED`, or the reason of its dead letter.

    Attributes:
        on_events: outcome on a topic of events.
        on_deletions: outcome on the deletion topic, where an item and a type are fields that mean nothing.
        value: its value; of what is applied, the value for a user.
        key: its key; None for a null key. That of what is applied is the user.
        partition: where it goes, by default where its key belongs.
        how: a codec; ``headers`` for 64 KiB of them; ``committed`` or ``aborted`` in a transaction.
        item: that an event which is applied is about.
        user: the user's id, made of a text.
    """

    on_events: str
    on_deletions: str
    value: bytes | Callable[[str], bytes] | None
    key: bytes | None = BAD_USER.encode()
    partition: int | None = None
    how: str = "lz4"
    item: str = "7"
    user: Callable[[str], str] = lambda text: f"{MARK}-{text}"

    def outcome(self, topic: str) -> str:
        """Outcome on ``view``, ``like`` or ``deletions``."""
        return self.on_deletions if topic == "deletions" else self.on_events


def event(**fields: object) -> bytes:
    """A valid event of `BAD_USER`, but for `fields`; ... leaves a field out."""
    right = {"user_id": BAD_USER, "item_id": 7, "type": "view", "ts": NOW_MS - MINUTE_MS}
    return json.dumps({name: value for name, value in {**right, **fields}.items() if value is not ...}).encode()


def raw(item: bytes = b"7", ts: bytes = b"%d" % (NOW_MS - MINUTE_MS), more: bytes = b"", user: str = BAD_USER) -> bytes:
    """The same with JSON text of one's own."""
    return b'{"user_id": "%b", "item_id": %b, "type": "view", "ts": %b%b}' % (user.encode(), item, ts, more)


def plain(user: str) -> bytes:
    """An event, or an erasure, of a user."""
    return event(user_id=user)


def erasure(**fields: object) -> bytes:
    """A valid erasure of `BAD_USER`, but for `fields`."""
    return json.dumps(
        {n: v for n, v in {"user_id": BAD_USER, "ts": NOW_MS - MINUTE_MS, **fields}.items() if v is not ...}
    ).encode()


def longest(text: str) -> str:
    """A user id of 256 bytes."""
    return f"{MARK}-{text}".ljust(255, "x").replace("xx", "\u00fc", 100) + "y"


_THERE = partition_of(BAD_USER.encode(), PARTITIONS)
KINDS = {
    "not_json": Kind("not_json", "not_json", b"{%b" % MARK.encode()),
    "empty": Kind("not_json", "not_json", b""),
    "csv": Kind("not_json", "not_json", f"{BAD_USER},7,view,{NOW_MS}".encode()),
    "two_documents": Kind("not_json", "not_json", event() + event()),
    "nan": Kind("not_json", "not_json", raw(ts=b"NaN")),
    "infinity_in_an_extra_field": Kind("not_json", "not_json", raw(more=b', "x": -Infinity')),
    "invalid_utf8": Kind("not_json", "not_json", raw(item=b'"%b\xff\xfe"' % MARK.encode())),
    "utf16": Kind("not_json", "not_json", event().decode().encode("utf-16")),
    "byte_order_mark": Kind("not_json", "not_json", b"\xef\xbb\xbf" + event()),
    "lone_surrogate": Kind("not_json", "not_json", raw(item=b'"%b\\ud800"' % MARK.encode())),
    "deep_nesting": Kind("not_json", "not_json", raw(more=b', "x": ' + b"[" * 20_000 + b"]" * 20_000)),
    "deep_nesting_of_an_id": Kind("wrong_type", "not_json", raw(item=b"[" * 20_000 + b"]" * 20_000)),
    "array": Kind("wrong_type", "wrong_type", b"[%b]" % event()),
    "null": Kind("wrong_type", "wrong_type", b"null"),
    "item_is_null": Kind("wrong_type", APPLIED, event(item_id=None)),
    "item_is_a_fraction": Kind("wrong_type", APPLIED, event(item_id=7.5)),
    "item_is_a_truth_value": Kind("wrong_type", APPLIED, event(item_id=True)),
    "user_is_an_object": Kind("wrong_type", "wrong_type", event(user_id={"id": BAD_USER})),
    "type_is_a_number": Kind("wrong_type", APPLIED, event(type=1)),
    "time_is_text": Kind("wrong_type", "wrong_type", event(ts=MARK)),
    "time_is_a_fraction": Kind("wrong_type", "wrong_type", event(ts=1.7e12 + 0.5)),
    "time_missing": Kind("missing_field", "missing_field", event(ts=...)),
    "user_missing": Kind("missing_field", "missing_field", event(user_id=...)),
    "all_missing": Kind("missing_field", "missing_field", b"{}"),
    "null_key": Kind("null_key", REFUSED, event(), key=None, partition=_THERE),
    "null_key_and_value": Kind("null_key", REFUSED, None, key=None, partition=2),
    "null_value": Kind("null_value", APPLIED, None),
    "key_of_another": Kind("key_mismatch", "key_mismatch", event(), key=f"{MARK}-2".encode()),
    "key_in_quotes": Kind("key_mismatch", "key_mismatch", event(), key=f'"{BAD_USER}"'.encode()),
    "key_with_zeros": Kind("key_mismatch", "key_mismatch", event(user_id=7), key=b"007"),
    "key_not_utf8": Kind("key_mismatch", "key_mismatch", event(), key=b"\xff\xfe"),
    "key_empty": Kind("key_mismatch", "key_mismatch", event(), key=b"", partition=0),
    "wrong_partition": Kind("wrong_partition", "wrong_partition", event(), partition=(_THERE + 1) % PARTITIONS),
    "oversize_user": Kind("invalid_id", "invalid_id", event(user_id=LONG), key=LONG.encode()),
    "oversize_item": Kind("invalid_id", APPLIED, event(item_id="\u00fc" * 126 + MARK + "x")),
    "empty_user": Kind("invalid_id", "invalid_id", event(user_id=""), key=b"", partition=1),
    "empty_item": Kind("invalid_id", APPLIED, event(item_id="")),
    "control_character": Kind("invalid_id", APPLIED, event(item_id=f"{MARK}\0view")),
    "line_break": Kind("invalid_id", "invalid_id", event(user_id=f"{MARK}\n1"), key=f"{MARK}\n1".encode()),
    "huge_integer": Kind("invalid_id", APPLIED, event(item_id=1 << 63)),
    "huge_integer_user": Kind(
        "invalid_id", "invalid_id", raw().replace(b'"%b"' % BAD_USER.encode(), b"9" * 400), key=b"9" * 400
    ),
    "huger_integer": Kind("wrong_type", APPLIED, raw(item=b"9" * 5_000)),
    "future": Kind("future_timestamp", "future_timestamp", event(ts=NOW_MS + 60 * MINUTE_MS)),
    "far_future": Kind("future_timestamp", "future_timestamp", event(ts=(1 << 48) - 1)),
    "seconds": Kind("implausible_timestamp", "implausible_timestamp", event(ts=NOW_MS // 1000)),
    "before_1970": Kind("implausible_timestamp", "implausible_timestamp", event(ts=-1)),
    "microseconds": Kind("implausible_timestamp", "implausible_timestamp", event(ts=NOW_MS * 1000)),
    "huge_time": Kind("implausible_timestamp", "implausible_timestamp", raw(ts=b"9" * 400)),
    "unknown_type": Kind("unknown_type", APPLIED, event(type=f"{MARK}-buy")),
    "type_in_capitals": Kind("unknown_type", APPLIED, event(type="View")),
    "empty_type": Kind("unknown_type", APPLIED, event(type="")),
    "erasure_not_json": Kind("not_json", "not_json", MARK.encode()),
    "erasure_without_time": Kind("missing_field", "missing_field", erasure(ts=...)),
    "erasure_at_text": Kind("wrong_type", "wrong_type", erasure(ts="now")),
    "erasure_of_another": Kind("missing_field", "key_mismatch", erasure(), key=f"{MARK}-2".encode()),
    "erasure_elsewhere": Kind("missing_field", "wrong_partition", erasure(), partition=(_THERE + 2) % PARTITIONS),
    "erasure_in_the_future": Kind("missing_field", "future_timestamp", erasure(ts=NOW_MS + 6 * MINUTE_MS)),
    "erasure_in_seconds": Kind("missing_field", "implausible_timestamp", erasure(ts=NOW_MS // 1000)),
    "erasure_of_a_control_character": Kind(
        "missing_field", "invalid_id", erasure(user_id=f"{MARK}\t"), key=f"{MARK}\t".encode()
    ),
    "as_large_as_is_kept": Kind("not_json", "not_json", MARK.encode() * (DLQ_MAX_BYTES // len(MARK))),
    "larger_than_is_kept": Kind("not_json", "not_json", MARK.encode() * (DLQ_MAX_BYTES // len(MARK)) + b"!"),
    "much_larger_than_is_kept": Kind("not_json", "not_json", MARK.encode() * 1_000_000),
    "large_and_incompressible": Kind("not_json", "not_json", NOISE),
    "beyond_all_numbers": Kind("wrong_type", "wrong_type", raw(ts=b"1e400")),
    "minus_zero_as_time": Kind("implausible_timestamp", "implausible_timestamp", raw(ts=b"-0")),
    "headers_of_64_KiB": Kind("not_json", "not_json", b"{", how="headers"),
    "bad_in_a_transaction": Kind("not_json", "not_json", b"{", how="committed"),
    "bad_in_an_aborted_transaction": Kind(UNSEEN, UNSEEN, b"{", how="aborted"),
    "bad_in_gzip": Kind("not_json", "not_json", b"{" * 1000, how="gzip"),
    "fine_in_an_aborted_transaction": Kind(UNSEEN, UNSEEN, plain, how="aborted"),
    "fine_in_a_transaction": Kind(APPLIED, APPLIED, plain, how="committed"),
    "fine_with_headers_of_64_KiB": Kind(APPLIED, APPLIED, plain, how="headers"),
    "fine_in_no_codec": Kind(APPLIED, APPLIED, plain, how="none"),
    "fine_in_gzip": Kind(APPLIED, APPLIED, plain, how="gzip"),
    "fine_in_snappy": Kind(APPLIED, APPLIED, plain, how="snappy"),
    "fine_in_lz4": Kind(APPLIED, APPLIED, plain),
    "fine_in_zstd": Kind(APPLIED, APPLIED, plain, how="zstd"),
    "minus_zero": Kind(APPLIED, APPLIED, lambda user: raw(item=b"-0", user=user), item="0"),
    "key_twice_in_the_object": Kind(
        APPLIED, APPLIED, lambda u: raw(item=b"1", more=b', "item_id": 2', user=u), item="2"
    ),
    "user_twice_in_the_object": Kind(APPLIED, APPLIED, lambda u: raw(more=b', "user_id": "%b"' % u.encode())),
    "fields_of_its_own": Kind(
        APPLIED, APPLIED, lambda u: raw(more=b', "x": {"y": [1e-7, -0, "\\ud83d\\ude00", null, true]}', user=u)
    ),
    "beyond_all_numbers_in_an_extra_field": Kind(APPLIED, APPLIED, lambda u: raw(more=b', "x": 1e400', user=u)),
    "huge_integer_in_an_extra_field": Kind(APPLIED, APPLIED, lambda u: raw(more=b', "x": ' + b"9" * 400, user=u)),
    "escaped": Kind(APPLIED, APPLIED, lambda u: raw(item=b'"\\u0034"', user=u), item="4"),
    "blanks_around": Kind(APPLIED, APPLIED, lambda u: b" \n\t" + raw(user=u) + b"\r\n"),
    "integer_user": Kind(
        APPLIED, APPLIED, lambda u: event(user_id=int(u)), user=lambda text: str(10**15 + zlib.crc32(text.encode()))
    ),
    "longest_user": Kind(APPLIED, APPLIED, plain, user=longest),
}


class Sent(NamedTuple):
    """Where a record went, and its time."""

    topic: str
    partition: int
    offset: int
    timestamp: int


class Sender:
    """A producer of whatever bytes; remembers where each named record went."""

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._producers: dict[str, Producer] = {}
        self.sent: dict[str, Sent] = {}
        self._last = (0, 0)  # partition and offset

    def _producer(self, codec: str, transactional: bool) -> Producer:
        config = {
            "bootstrap.servers": self._bootstrap,
            "partitioner": "murmur2_random",
            "enable.idempotence": True,
            "compression.type": codec,
            "message.max.bytes": 20_000_000,
            "log_level": 2,
        }
        name = "transactional" if transactional else codec
        if name not in self._producers:
            if transactional:
                config["transactional.id"] = uuid.uuid4().hex
            self._producers[name] = Producer(config)
            if transactional:
                self._producers[name].init_transactions(20)
        return self._producers[name]

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        partition: int | None = None,
        name: str = "",
        how: str = "lz4",
    ) -> None:
        """Send a record; `how` as in `Kind`."""

        def delivered(error: object, message: Any) -> None:
            assert error is None, error
            self._last = message.partition(), message.offset()
            self.sent[name] = Sent(message.topic(), message.partition(), message.offset(), message.timestamp()[1])

        where = {} if partition is None else {"partition": partition}
        headers = LARGE_HEADERS if how == "headers" else OWN_HEADERS if name else None
        transaction = how in ("committed", "aborted")
        producer = self._producer("lz4" if transaction or how == "headers" else how, transaction)
        try:
            if transaction:
                producer.begin_transaction()
            producer.produce(topic, value, key, headers=headers, timestamp=NOW_MS, on_delivery=delivered, **where)
            if transaction:
                producer.flush(60)
                producer.commit_transaction(20) if how == "committed" else producer.abort_transaction(20)
                self._until_marked(topic)
        except KafkaException as exc:
            raise AssertionError(exc) from exc
        producer.poll(0)

    def _until_marked(self, topic: str) -> None:
        """Wait for the marker of the last transaction: it is written after the answer, and what comes before it isn't.

        No commit covers a marker that a partition ends in.
        """
        partition, offset = self._last
        group = Consumer({"bootstrap.servers": self._bootstrap, "group.id": "markers", "log_level": 2})
        deadline = time.monotonic() + 60
        while group.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)[1] < offset + 2:
            assert time.monotonic() < deadline, "no marker"
            time.sleep(0.02)
        group.close()

    def flush(self) -> None:
        """Wait until all is acknowledged."""
        for producer in self._producers.values():
            assert producer.flush(60) == 0


def check_letter(letter: Message, kind: Kind, topic: str, sent: Sent) -> None:
    """The letter of a record: its bytes untouched, and ours after its own headers, each once."""
    own = LARGE_HEADERS if kind.how == "headers" else OWN_HEADERS
    headers = letter.headers()
    assert headers[: len(own)] == own
    added = {name: value.decode() for name, value in headers[len(own) :]}
    assert len(added) == len(headers) - len(own), "a header was added twice"
    detail = added.pop("dlq.detail")
    assert detail
    assert detail.isprintable()
    assert MARK not in detail
    place = {"dlq.topic": sent.topic, "dlq.partition": str(sent.partition), "dlq.offset": str(sent.offset)}
    want = {"dlq.reason": kind.outcome(topic), **place, "dlq.timestamp": str(sent.timestamp)}
    value = kind.value
    assert value is None or isinstance(value, bytes)
    if value is not None and len(value) > DLQ_MAX_BYTES:
        want |= {"dlq.value_sha256": hashlib.sha256(value).hexdigest(), "dlq.value_size": str(len(value))}
        value = None
    assert added == want
    assert letter.key() == kind.key
    assert letter.value() == value


def letters_by_source(letters: list[Message]) -> Mapping[tuple[str, int, int], Message]:
    """Letters by the place of their records; a record has one."""
    found = {}
    for letter in letters:
        headers = dict(letter.headers())
        found[headers["dlq.topic"].decode(), int(headers["dlq.partition"]), int(headers["dlq.offset"])] = letter
    assert len(found) == len(letters), "a record has two letters"
    return found
