"""Validated events and erasures from Kafka records, and the reasons for which a record is turned away."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple, Self

import msgspec

from stream.history_codec import MAX_TS_MS, TS_BYTES
from stream.keys import canonical_id

#: How far an event's own time may run ahead of its record's Kafka timestamp.
MAX_LEAD_MS: Final = 5 * 60 * 1000
#: 1980-01-01; seconds sent as milliseconds land in January 1970.
EARLIEST_TS_MS: Final = 315_532_800_000
_MEMO_LIMIT: Final = 1 << 18

TsUnit = Literal["ms", "s", "iso8601"]
FIELDS: Final = ("user_id", "item_id", "type", "ts")


class Reason(StrEnum):
    """Why a record is dead-lettered; listed for everyone in ``schemas/dead_letter_reasons.v1.json``."""

    NULL_KEY = "null_key"
    NULL_VALUE = "null_value"
    NOT_JSON = "not_json"
    WRONG_TYPE = "wrong_type"
    MISSING_FIELD = "missing_field"
    INVALID_ID = "invalid_id"
    KEY_MISMATCH = "key_mismatch"
    WRONG_PARTITION = "wrong_partition"
    UNKNOWN_TYPE = "unknown_type"
    FUTURE_TIMESTAMP = "future_timestamp"
    IMPLAUSIBLE_TIMESTAMP = "implausible_timestamp"
    EXPANDS_BEYOND_LIMIT = "expands_beyond_limit"


class Reject(NamedTuple):
    """A record's reason for the dead-letter topic; `detail` says more and never holds payload."""

    reason: Reason
    detail: str


#: Largest expanded size of a compressed batch that is looked at. Producers limit theirs before compression, as a rule
#: to 1 MB, and the largest single event or letter that we handle is `UEMB_DLQ_MAX_BYTES`, 64 MiB.
MAX_EXPANDED_BYTES: Final = 128 << 20


class Unread(bytes):
    """In place of the value of a record without key: it was not read, because of `detail`."""

    detail: str

    def __new__(cls, detail: str) -> Self:
        """See the class; as bytes it is empty."""
        unread = super().__new__(cls)
        unread.detail = detail
        return unread


class UserEvent(msgspec.Struct, gc=False):
    """One interaction as producers write it (``schemas/user_event.v1.schema.json``)."""

    user_id: int | str
    item_id: int | str
    type: str
    ts: int


class UserDeletion(msgspec.Struct, gc=False):
    """One erasure as producers write it (``schemas/user_deletion.v1.schema.json``)."""

    user_id: int | str
    ts: int


@dataclass(frozen=True)
class EventRules:
    """What events look like and which are admitted.

    Attributes:
        types: interaction types admitted to histories, each with its permanent code.
        ignored: types that are valid but never admitted.
        fields: where each of our fields is found in the producer's JSON, as a dotted path.
        ts_unit: unit of the producer's time field.
        type_by_topic: type of all events of a topic, for producers that send none.
    """

    types: Mapping[str, int]
    ignored: frozenset[str] = frozenset()
    fields: Mapping[str, str] = field(default_factory=dict)
    ts_unit: TsUnit = "ms"
    type_by_topic: Mapping[str, str] = field(default_factory=dict)

    @property
    def native(self) -> bool:
        """Whether producers use our own names and units."""
        return self.ts_unit == "ms" and all(self.fields.get(f, f) == f for f in FIELDS)


class Rejected(Exception):
    """Raised inside decoding to leave with a reject."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reject = Reject(reason, detail)


def json_reject(exc: Exception) -> Reject:
    """Reason and detail of one of `JSON_ERRORS`."""
    if isinstance(exc, msgspec.ValidationError):
        # msgspec names fields and JSON types in these texts, never values.
        missing = "missing required field" in str(exc)
        return Reject(Reason.MISSING_FIELD if missing else Reason.WRONG_TYPE, str(exc))
    if isinstance(exc, RecursionError):
        return Reject(Reason.NOT_JSON, "JSON is nested too deeply")
    if isinstance(exc, UnicodeDecodeError):
        return Reject(Reason.NOT_JSON, f"not UTF-8 at byte {exc.start}")
    return Reject(Reason.NOT_JSON, str(exc))


#: What decoding a value may raise.
JSON_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def check_time(ts_ms: int, record_ts_ms: int) -> Reject | None:
    """Reject an event time before 1980, beyond the stored range, or ahead of its record's timestamp."""
    if not EARLIEST_TS_MS <= ts_ms <= MAX_TS_MS:
        return Reject(Reason.IMPLAUSIBLE_TIMESTAMP, "event time must be epoch milliseconds from 1980 on")
    if 0 <= record_ts_ms < ts_ms - MAX_LEAD_MS:
        return Reject(Reason.FUTURE_TIMESTAMP, "event time is over 5 minutes after the record's own timestamp")
    return None


def check_user(user_id: int | str, key: bytes) -> Reject | None:
    """Reject a user id that is none, or that is not the record's key."""
    text = user_id if isinstance(user_id, str) else str(user_id)
    try:
        canonical_id(user_id)
    except ValueError as exc:
        return Reject(Reason.INVALID_ID, f"user_id: {exc}")
    if text.encode() != key:
        return Reject(Reason.KEY_MISMATCH, "the record's key is not the canonical user id")
    return None


def _keyless(value: bytes | None) -> Reject:
    if isinstance(value, Unread):
        return Reject(Reason.EXPANDS_BEYOND_LIMIT, value.detail)
    return Reject(Reason.NULL_KEY, "a record's key must be the canonical user id")


class EventDecoder:
    """Turns one record of an event topic into the sort key of its interaction."""

    def __init__(self, rules: EventRules) -> None:
        self.rules = rules
        self._types = frozenset(rules.types)
        self._mapped_topics = frozenset(rules.type_by_topic)
        self._all_native = rules.native
        self._native = msgspec.json.Decoder(UserEvent)
        self._any = msgspec.json.Decoder()
        self._suffixes: dict[tuple[int | str, str], bytes | Reject | None] = {}

    def decode(self, topic: str, key: bytes | None, value: bytes | None, record_ts_ms: int) -> bytes | Reject | None:
        """Return the interaction's sort key, a reject, or None for an ignored type."""
        if key is None:
            return _keyless(value)
        if value is None:
            return Reject(Reason.NULL_VALUE, "an event must have a value")
        try:
            native = self._all_native and topic not in self._mapped_topics
            if not value.isascii():
                value.decode()  # msgspec leaves fields unread that we don't ask for
            event = self._native.decode(value) if native else self._mapped(topic, value)
        except JSON_ERRORS as exc:
            return json_reject(exc)
        except Rejected as exc:
            return exc.reject
        if reject := check_user(event.user_id, key):
            return reject
        memo = (event.item_id, event.type)
        suffix = self._suffixes.get(memo, NotImplemented)
        if suffix is NotImplemented:
            suffix = self._suffix(memo)
        if isinstance(suffix, Reject):
            return suffix
        if reject := check_time(event.ts, record_ts_ms):
            return reject
        return None if suffix is None else event.ts.to_bytes(TS_BYTES, "big") + suffix

    def _suffix(self, memo: tuple[int | str, str]) -> bytes | Reject | None:
        item_id, type_name = memo
        result: bytes | Reject | None
        try:
            item = canonical_id(item_id)
        except ValueError as exc:
            return Reject(Reason.INVALID_ID, f"item_id: {exc}")
        if type_name in self._types:
            result = item.encode() + b"\0" + type_name.encode()
        elif type_name in self.rules.ignored:
            result = None
        else:
            return Reject(Reason.UNKNOWN_TYPE, "the interaction type is neither admitted nor ignored")
        if len(self._suffixes) >= _MEMO_LIMIT:
            self._suffixes.clear()
        self._suffixes[memo] = result
        return result

    def _mapped(self, topic: str, value: bytes) -> UserEvent:
        document = self._any.decode(value)
        fixed_type = self.rules.type_by_topic.get(topic)
        found = {
            name: follow(document, self.rules.fields.get(name, name))
            for name in FIELDS
            if not (name == "type" and fixed_type is not None)
        }
        for name in ("user_id", "item_id"):
            if isinstance(found[name], bool) or not isinstance(found[name], int | str):
                raise Rejected(Reason.WRONG_TYPE, f"{name} must be a string or an integer")
        type_name = fixed_type if fixed_type is not None else found["type"]
        if not isinstance(type_name, str):
            raise Rejected(Reason.WRONG_TYPE, "type must be a string")
        return UserEvent(found["user_id"], found["item_id"], type_name, to_ms(found["ts"], self.rules.ts_unit))


def follow(document: Any, path: str) -> Any:
    """The value at a dotted path of a decoded JSON document; raises `Rejected`."""
    for part in path.split("."):
        if not isinstance(document, dict):
            raise Rejected(Reason.WRONG_TYPE, f"expected an object on the path {path}")
        if part not in document:
            raise Rejected(Reason.MISSING_FIELD, f"no field at the path {path}")
        document = document[part]
    return document


def to_ms(ts: Any, unit: TsUnit) -> int:
    """Epoch milliseconds of a producer's time field; raises `Rejected`. `from_ms` is its inverse."""
    if unit == "iso8601":
        if not isinstance(ts, str):
            raise Rejected(Reason.WRONG_TYPE, "ts must be an ISO 8601 string")
        try:
            moment = datetime.fromisoformat(ts)
        except ValueError:
            raise Rejected(Reason.WRONG_TYPE, "ts is not ISO 8601") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        since = moment - datetime(1970, 1, 1, tzinfo=UTC)
        return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000
    if isinstance(ts, bool) or not isinstance(ts, int | float if unit == "s" else int):
        raise Rejected(Reason.WRONG_TYPE, f"ts must be a number of {unit}")
    if unit == "s":
        if not abs(ts) <= MAX_TS_MS:  # catches a NaN too
            raise Rejected(Reason.IMPLAUSIBLE_TIMESTAMP, "event time must be epoch seconds from 1980 on")
        return round(ts * 1000)
    return int(ts)


def from_ms(ts_ms: int, unit: TsUnit) -> int | float | str:
    """A time as producers with this unit write it: `to_ms` gives back the same milliseconds.

    Raises:
        OverflowError: the time is after the year 9999, which ISO 8601 can't name.
    """
    if unit == "iso8601":
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ts_ms)
        return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"
    if unit == "s":
        return ts_ms // 1000 if ts_ms % 1000 == 0 else ts_ms / 1000
    return ts_ms


class DeletionDecoder:
    """Turns one record of the deletion topic into the time up to which its user is erased."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(UserDeletion)

    def decode(self, key: bytes | None, value: bytes | None, record_ts_ms: int) -> int | Reject | None:
        """Return erased_at in epoch ms, a reject, or None for a withdrawn record (null value)."""
        if key is None:
            return _keyless(value)
        if value is None:
            return None
        try:
            if not value.isascii():
                value.decode()  # as for events
            deletion = self._decoder.decode(value)
        except JSON_ERRORS as exc:
            return json_reject(exc)
        if reject := check_user(deletion.user_id, key) or check_time(deletion.ts, record_ts_ms):
            return reject
        return min(deletion.ts + MAX_LEAD_MS, MAX_TS_MS)
