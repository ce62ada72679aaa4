"""Validated events and erasures from Kafka records, and the reasons for which a record is turned away."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple, Self

import msgspec

from stream.core.field_paths import FieldPath, NoValue, Values, parse_path
from stream.core.framing import FRAME_BYTES, MAGIC, Moment, NotOfSchema, Schemas, schema_id_of
from stream.core.history_codec import MAX_TS_MS, TS_BYTES
from stream.keys import MAX_ID_BYTES, canonical_id

#: How far an event's own time may run ahead of its record's Kafka timestamp.
MAX_LEAD_MS: Final = 5 * 60 * 1000
#: 1980-01-01; seconds sent as milliseconds land in January 1970.
EARLIEST_TS_MS: Final = 315_532_800_000
_MEMO_LIMIT: Final = 1 << 18
_ID_TYPES: Final = (str, int)

TsUnit = Literal["ms", "s", "us", "ns", "iso8601"]
#: How many of a unit are a second.
PER_SECOND: Final[Mapping[str, int]] = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_NAMES: Final = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
#: Up to here, in 2100, a time is taken for one that a producer means, when a unit is guessed.
_LIKELY_TS_MS: Final = 4_102_444_800_000
#: Longest number, or time, that is read from text.
_TIME_MAX_CHARS: Final = 64
_HUGE: Final = 1e300
_SURELY_64_BITS: Final = 10**18
#: Longest detail of a reject: msgspec's texts hold the way to a value, which may be as deep as JSON may nest.
_DETAIL_MAX_CHARS: Final = 300
#: Values in a document of which Python objects are made: a hundred bytes each, where two of JSON may be enough.
MAX_VALUES: Final = 1 << 20
_ZONE_APART: Final = re.compile(r"\s*(?:UTC|GMT|[zZ]|([+-]\d{2}:?\d{2}))$")
FIELDS: Final = ("user_id", "item_id", "type", "ts")
#: The order in which they are looked up: the type, which a topic or file may fix, last.
ORDER: Final = ("user_id", "item_id", "ts", "type")


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
    UNKNOWN_SCHEMA = "unknown_schema"
    SCHEMA_MISMATCH = "schema_mismatch"


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
        fields: where each of our fields is found in the producer's JSON; see `stream.core.field_paths`.
        ts_unit: unit of the producer's time field.
        type_by_topic: type of all events of a topic, for producers that send none.
        source: where an event says what led to it, None where none does; it decides nothing, but is counted.
        own_sources: values of that for what was found with user vectors.
    """

    types: Mapping[str, int]
    ignored: frozenset[str] = frozenset()
    fields: Mapping[str, str] = field(default_factory=dict)
    ts_unit: TsUnit = "ms"
    type_by_topic: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None
    own_sources: frozenset[str] = frozenset()

    @property
    def native(self) -> bool:
        """Whether producers use our own names and units."""
        return self.ts_unit == "ms" and all(self.fields.get(f, f) == f for f in FIELDS)

    def paths(self, topic: str) -> tuple[FieldPath, ...]:
        """Where user, item and time are in a topic's events, and the type unless the topic has one of its own.

        Raises:
            ValueError: a field is at no path, or they go through different arrays.
        """
        names = ORDER[:3] if topic in self.type_by_topic else ORDER
        paths = tuple(parse_path(self.fields.get(name, name)) for name in names)
        Values(paths)
        if paths[0].inside is not None:
            msg = f"user_id={paths[0].text}: an event is of one user, whose id is the record's key"
            raise ValueError(msg)
        return paths


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
        return Reject(Reason.MISSING_FIELD if missing else Reason.WRONG_TYPE, str(exc)[:_DETAIL_MAX_CHARS])
    if isinstance(exc, RecursionError):
        return Reject(Reason.NOT_JSON, "JSON is nested too deeply")
    if isinstance(exc, UnicodeDecodeError):
        return Reject(Reason.NOT_JSON, f"not UTF-8 at byte {exc.start}")
    return Reject(Reason.NOT_JSON, str(exc))


_NO_REGISTRY: Final = Reject(
    Reason.NOT_JSON, "a value in the framing of a schema registry; set UEMB_SCHEMA_REGISTRY_URL to have it read"
)
#: What decoding a value may raise.
JSON_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def framed_document(value: bytes, schemas: Schemas | None) -> Any:
    """What a value in the framing of schema registries says; raises `Rejected`, or one of `JSON_ERRORS`."""
    if schemas is None:
        raise Rejected(
            Reason.NOT_JSON, "not JSON but a value framed for a schema registry; is UEMB_SCHEMA_REGISTRY_URL set?"
        )
    about = ""
    try:
        number = schema_id_of(value)
        about = f"schema {number}: "
        read = schemas.reader_of(number)
        if read is not None:
            return read(value[FRAME_BYTES:])
    except NotOfSchema as exc:
        raise Rejected(Reason.SCHEMA_MISMATCH, f"{about}{exc}") from None
    raise Rejected(Reason.UNKNOWN_SCHEMA, f"the schema registry has no schema {number}")


def implausible(ts_ms: float, unit: TsUnit) -> str:
    """What to say of a time that is too early or too late: it may be that of another unit."""
    what = _NAMES.get(unit)
    if what is None:
        return "event time must be from 1980 on"
    return f"event time must be epoch {what} from 1980 on{_looks_like(ts_ms * PER_SECOND[unit], unit)}"


def _looks_like(thousandfold: float, unit: TsUnit) -> str:
    """Which other unit a time may be in, given times 1,000."""
    for other, n in PER_SECOND.items():
        if other != unit and EARLIEST_TS_MS * n <= thousandfold <= _LIKELY_TS_MS * n:
            return f"; it looks like {_NAMES[other]}: is the unit {other}?"
    return ""


def check_time(ts_ms: int, record_ts_ms: int, unit: TsUnit = "ms") -> Reject | None:
    """Reject an event time before 1980, beyond the stored range, or ahead of its record's timestamp.

    Args:
        ts_ms: the event's time.
        record_ts_ms: its record's, negative for none.
        unit: in which the time was written.
    """
    if not EARLIEST_TS_MS <= ts_ms <= MAX_TS_MS:
        return Reject(Reason.IMPLAUSIBLE_TIMESTAMP, implausible(ts_ms, unit))
    if 0 <= record_ts_ms < ts_ms - MAX_LEAD_MS:
        return Reject(Reason.FUTURE_TIMESTAMP, "event time is over 5 minutes after the record's own timestamp")
    return None


def check_user(user_id: int | str, key: bytes) -> Reject | None:
    """Reject a user id that is none, or that is not the record's key."""
    try:
        text = canonical_id(user_id)
    except ValueError as exc:
        return Reject(Reason.INVALID_ID, f"user_id: {exc}")
    if text.encode() != key:
        return Reject(Reason.KEY_MISMATCH, "the record's key is not the canonical user id")
    return None


def _keyless(value: bytes | None) -> Reject:
    if isinstance(value, Unread):
        return Reject(Reason.EXPANDS_BEYOND_LIMIT, value.detail)
    return Reject(Reason.NULL_KEY, "a record's key must be the canonical user id")


def json_document(data: bytes) -> Any:
    """A JSON document as Python values, in bounded memory.

    Raises:
        msgspec.DecodeError: it is none, or holds more than `MAX_VALUES` values.
        UnicodeDecodeError: a text in it is not UTF-8.
        RecursionError: it is nested too deeply.
    """
    # a comma or bracket for each; those in texts count, too, which needs a document of more than a megabyte to matter
    if len(data) > MAX_VALUES and data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        msg = f"JSON holds more than {MAX_VALUES:,} values"
        raise msgspec.DecodeError(msg)
    return msgspec.json.decode(data)


class EventDecoder:
    """Turns one record of an event topic into the sort key of its interaction.

    Args:
        rules: what events look like.
        schemas: of values in the framing of schema registries; None: no registry is used, and none is such a value.
    """

    def __init__(self, rules: EventRules, schemas: Schemas | None = None) -> None:
        self.rules = rules
        self.schemas = schemas
        self._types = frozenset(rules.types)
        self._mapped_topics = frozenset(rules.type_by_topic)
        self._all_native = rules.native
        self._unit = rules.ts_unit
        self._native = msgspec.json.Decoder(UserEvent)
        self._values: dict[str, Values] = {}
        self._suffixes: dict[tuple[int | str, str], bytes | Reject | None] = {}

    def decode(
        self, topic: str, key: bytes | None, value: bytes | None, record_ts_ms: int
    ) -> bytes | tuple[bytes, ...] | Reject | None:
        """Return the interaction's sort key, a reject, or None for an ignored type.

        An event whose elements are interactions gives the sort keys of those that are admitted, None if none is; one
        that is at fault turns the whole event away.
        """
        if key is None:
            return _keyless(value)
        if value is None:
            return Reject(Reason.NULL_VALUE, "an event must have a value")
        try:
            if self.schemas is not None and value.startswith(MAGIC):
                events = self._mapped(topic, framed_document(value, self.schemas))
            else:
                if not value.isascii():
                    value.decode()  # msgspec leaves fields unread that we don't ask for
                if self._all_native and topic not in self._mapped_topics:
                    try:
                        event = self._native.decode(value)
                    except msgspec.ValidationError as exc:  # but for a time that is a number in quotes
                        event = self._quoted(topic, value, exc)
                    return self._key(event, key, record_ts_ms)
                events = self._mapped(topic, json_document(value))
            if len(events) != 1:
                return self._several(events, key, record_ts_ms)
            return self._key(events[0], key, record_ts_ms)
        except JSON_ERRORS as exc:
            return _NO_REGISTRY if self.schemas is None and value.startswith(MAGIC) else json_reject(exc)
        except Rejected as exc:
            return exc.reject

    def _several(self, events: list[UserEvent], key: bytes, record_ts_ms: int) -> tuple[bytes, ...] | Reject | None:
        keys = []
        for event in events:
            found = self._key(event, key, record_ts_ms)
            if isinstance(found, Reject):
                return found
            if found is not None:
                keys.append(found)
        return tuple(keys) or None

    def _key(self, event: UserEvent, key: bytes, record_ts_ms: int) -> bytes | Reject | None:
        # What is as it should be is seen here at once; what isn't, or may not be, is left to those who can say why.
        user_id, ts, is_users = event.user_id, event.ts, False
        if type(user_id) is int:
            is_users = -_SURELY_64_BITS < user_id < _SURELY_64_BITS and str(user_id).encode() == key
        elif type(user_id) is str:
            is_plain = user_id.isascii() and user_id.isprintable() and 0 < len(user_id) <= MAX_ID_BYTES
            is_users = is_plain and user_id.encode() == key
        if not is_users and (reject := check_user(user_id, key)):
            return reject
        memo = (event.item_id, event.type)
        suffix = self._suffixes.get(memo, NotImplemented)
        if suffix is NotImplemented:
            suffix = self._suffix(memo)
        if isinstance(suffix, Reject):
            return suffix
        is_timely = EARLIEST_TS_MS <= ts <= MAX_TS_MS and (record_ts_ms < 0 or ts - MAX_LEAD_MS <= record_ts_ms)
        if not is_timely and (reject := check_time(ts, record_ts_ms, self._unit)):
            return reject
        return None if suffix is None else ts.to_bytes(TS_BYTES, "big") + suffix

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

    def _quoted(self, topic: str, value: bytes, refused: msgspec.ValidationError) -> UserEvent:
        try:
            (event,) = self._mapped(topic, json_document(value))
        except (Rejected, *JSON_ERRORS):
            raise refused from None
        return event

    def _mapped(self, topic: str, document: Any) -> list[UserEvent]:
        values = self._values.get(topic)
        if values is None:
            values = self._values[topic] = Values(self.rules.paths(topic))
        fixed_type = self.rules.type_by_topic.get(topic)
        events = []
        for found in found_at(document, values):
            user_id, item_id, ts = found[:3]
            if type(user_id) not in _ID_TYPES or type(item_id) not in _ID_TYPES:
                _check_id_type("user_id", user_id)
                _check_id_type("item_id", item_id)
            type_name = fixed_type if fixed_type is not None else found[3]
            if not isinstance(type_name, str):
                raise Rejected(Reason.WRONG_TYPE, "type must be a string")
            events.append(UserEvent(user_id, item_id, type_name, to_ms(ts, self._unit)))
        return events


def _check_id_type(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise Rejected(Reason.WRONG_TYPE, f"{name} must be a string or an integer")


def found_at(document: Any, values: Values) -> list[tuple[Any, ...]]:
    """See `Values.of`; raises `Rejected`."""
    try:
        return values.of(document)
    except NoValue as exc:
        raise Rejected(Reason.MISSING_FIELD if exc.missing else Reason.WRONG_TYPE, str(exc)) from None


def to_ms(ts: Any, unit: TsUnit) -> int:
    """Epoch milliseconds of a producer's time field; raises `Rejected`. `from_ms` is its inverse.

    Numbers may be text; what is finer than a millisecond is cut off, but for seconds, which are rounded.
    """
    if unit == "ms" and type(ts) is int:  # as a rule
        return ts
    if type(ts) is Moment:
        return int(ts)
    if unit == "iso8601":
        if not isinstance(ts, str):
            hint = _looks_like(ts * 1000, unit) if isinstance(ts, int | float) else ""
            raise Rejected(Reason.WRONG_TYPE, f"ts must be an ISO 8601 string{hint}")
        return _iso_ms(ts)
    if isinstance(ts, str):
        ts = _number(ts, unit)
    if isinstance(ts, bool) or not isinstance(ts, int | float | Decimal if unit == "s" else int):
        raise Rejected(Reason.WRONG_TYPE, _no_number(unit))
    if unit == "s":
        if not -MAX_TS_MS <= ts <= MAX_TS_MS:  # catches a NaN too; abs() of a Decimal may overflow
            raise Rejected(Reason.IMPLAUSIBLE_TIMESTAMP, implausible(_finite(ts) * 1000, unit))
        return round(ts * 1000)
    return ts * 1000 // PER_SECOND[unit]


def _finite(number: float | Decimal) -> float:
    """A number that can be compared and multiplied."""
    return float(number) if -_HUGE < number < _HUGE else 0.0


def _number(text: str, unit: TsUnit) -> int | float | Decimal:
    text = text.strip()
    if len(text) > _TIME_MAX_CHARS and text.isdecimal():  # Python reads no numbers of thousands of digits
        raise Rejected(Reason.IMPLAUSIBLE_TIMESTAMP, implausible(0, unit))
    try:
        if len(text) > _TIME_MAX_CHARS or not text.isascii() or "_" in text:
            raise ValueError
        if unit != "s" or text.isdecimal():
            return int(text)
        number = Decimal(text)
        return number if number.is_finite() else float(text)
    except (ValueError, InvalidOperation):
        hint = "; it looks like ISO 8601: is the unit iso8601?" if _parsed(text) else ""
        raise Rejected(Reason.WRONG_TYPE, _no_number(unit) + hint) from None


def _no_number(unit: TsUnit) -> str:
    return f"ts must be a {'' if unit == 's' else 'whole '}number of epoch {_NAMES[unit]}"


def _iso_ms(text: str) -> int:
    moment = _parsed(text)
    if moment is None:
        number = text.strip()
        likely = number.isascii() and number.isdecimal() and len(number) <= _TIME_MAX_CHARS
        hint = _looks_like(int(number) * 1000, "iso8601") if likely else ""
        raise Rejected(Reason.WRONG_TYPE, f"ts is not ISO 8601{hint}")
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000


def _parsed(text: str) -> datetime | None:
    """Of ISO 8601 and its relatives: a space for the T, a zone as UTC, GMT or apart, any fraction; no zone is UTC."""
    if len(text) > _TIME_MAX_CHARS:
        return None
    text = text.strip().replace(",", ".")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(_ZONE_APART.sub(lambda zone: zone[1] or "+00:00", text))
        except ValueError:
            return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


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
    return ts_ms * PER_SECOND[unit] // 1000


class DeletionDecoder:
    """Turns one record of the deletion topic into the time up to which its user is erased; `schemas` as for events."""

    def __init__(self, schemas: Schemas | None = None) -> None:
        self._schemas = schemas
        self._decoder = msgspec.json.Decoder(UserDeletion)

    def decode(self, key: bytes | None, value: bytes | None, record_ts_ms: int) -> int | Reject | None:
        """Return erased_at in epoch ms, a reject, or None for a withdrawn record (null value)."""
        if key is None:
            return _keyless(value)
        if value is None:
            return None
        try:
            if self._schemas is not None and value.startswith(MAGIC):
                deletion = _deletion_of(framed_document(value, self._schemas))
            else:
                if not value.isascii():
                    value.decode()  # as for events
                deletion = self._decoder.decode(value)
        except JSON_ERRORS as exc:
            return _NO_REGISTRY if self._schemas is None and value.startswith(MAGIC) else json_reject(exc)
        except Rejected as exc:
            return exc.reject
        if reject := check_user(deletion.user_id, key) or check_time(deletion.ts, record_ts_ms):
            return reject
        return min(deletion.ts + MAX_LEAD_MS, MAX_TS_MS)


_DELETION: Final = Values((parse_path("user_id"), parse_path("ts")))


def _deletion_of(document: Any) -> UserDeletion:
    ((user_id, ts),) = found_at(document, _DELETION)
    _check_id_type("user_id", user_id)
    return UserDeletion(user_id, to_ms(ts, "ms"))


class EventRow(NamedTuple):
    """One interaction; ids are canonical texts, `ts_ms` is event time."""

    user_id: str
    item_id: str
    type: str
    ts_ms: int


def event_order(row: EventRow) -> tuple[int, str, str]:
    """Sort key of a stream: time, user, item; texts by code point, which is UTF-8 byte order.

    Sorting is stable, so rows that agree in all three keep the order of their source.
    """
    return row.ts_ms, row.user_id, row.item_id
