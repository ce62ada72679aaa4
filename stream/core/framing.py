"""Values in the framing of schema registries: a zero byte, the schema's id (4 bytes, big-endian), then the body.

What an id stands for is a registry's to say, which others ask (`stream.kafka.schema_registry`).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any, Final

import fastavro
import msgspec
from fastavro.read import LOGICAL_READERS
from fastavro.schema import parse_schema

MAGIC: Final = b"\0"
#: Of the zero byte and the id.
FRAME_BYTES: Final = 5
#: Ids that are remembered as unknown to the registry, which may be anything; those that it has are as many as it has.
MAX_UNKNOWN: Final = 10_000

#: What a body says, as JSON would have it: dicts, lists, texts, numbers, None.
ReadBody = Callable[[bytes], Any]


class NotOfSchema(ValueError):
    """A body is not what its schema says, or nothing can be read with that schema; the text holds no payload."""


class Moment(int):
    """Epoch milliseconds of a time whose unit is told by the schema, not by the settings."""

    __slots__ = ()


def frame(schema_id: int) -> bytes:
    """What precedes a body.

    >>> frame(7).hex()
    '0000000007'
    """
    return MAGIC + schema_id.to_bytes(FRAME_BYTES - 1, "big")


def schema_id_of(value: bytes) -> int:
    """The id in a value's framing.

    Raises:
        NotOfSchema: the value ends before its id does.
    """
    if len(value) < FRAME_BYTES:
        msg = "the value ends within the framing of a schema registry"
        raise NotOfSchema(msg)
    return int.from_bytes(value[1:FRAME_BYTES], "big")


class Schemas:
    """What reads bodies, by schema id; filled by those who ask a registry, before anything is decoded."""

    def __init__(self) -> None:
        self._readers: dict[int, ReadBody | NotOfSchema] = {}
        self._unknown: dict[int, None] = {}

    def add(self, schema_id: int, read: ReadBody | NotOfSchema | None) -> None:
        """Keep what was found of an id: what reads bodies, why nothing does, or None where the registry has none."""
        if read is not None:
            self._readers[schema_id] = read
            return
        if len(self._unknown) >= MAX_UNKNOWN:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[schema_id] = None

    def forget_unknown(self) -> None:
        """Have the registry asked again for what it did not have: it may have it now."""
        self._unknown.clear()

    def missing(self, values: Iterable[bytes | None]) -> set[int]:
        """Ids in the framing of some values of which nothing was kept yet."""
        framed = [value for value in values if value is not None and value.startswith(MAGIC)]
        ids = {int.from_bytes(value[1:FRAME_BYTES], "big") for value in framed if len(value) >= FRAME_BYTES}
        return {number for number in ids if number not in self._readers and number not in self._unknown}

    def reader_of(self, schema_id: int) -> ReadBody | None:
        """What reads bodies of a schema, None where the registry has none.

        Raises:
            NotOfSchema: nothing can.
        """
        found = self._readers.get(schema_id)
        if isinstance(found, NotOfSchema):
            raise NotOfSchema(str(found))
        return found


# -- JSON -------------------------------------------------------------------------------------------------------------


class JsonReader:
    """Reads bodies that are JSON. Their schema is not looked at: what counts is checked in every event."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder().decode

    def __call__(self, body: bytes) -> Any:
        """See `ReadBody`; raises what `msgspec` does, like any event in JSON."""
        return self._decode(body)


# -- Avro -------------------------------------------------------------------------------------------------------------

#: How many of Avro's units of time are a millisecond.
_PER_MS: Final = {"millis": 1, "micros": 1_000, "nanos": 1_000_000}
#: Avro's times under a name of ours: as numbers they cost less than as `datetime`, and have its full range.
_OURS: Final = {f"{kind}timestamp-{unit}": f"uemb-timestamp-{unit}" for kind in ("", "local-") for unit in _PER_MS}


def _moments(per_ms: int) -> Callable[..., Moment]:
    return lambda ticks, _writer=None, _reader=None: Moment(ticks // per_ms)


for _unit, _per_ms in _PER_MS.items():
    LOGICAL_READERS[f"long-uemb-timestamp-{_unit}"] = _moments(_per_ms)  # fastavro's way to add logical types


class AvroReader:
    """Reads bodies in Avro.

    Args:
        schema: the writer's schema, as text.
        references: schemas of the names that it takes from elsewhere, each after those that it needs itself.

    Raises:
        NotOfSchema: that is no schema, or one whose bodies may be huge while they take no bytes.
    """

    def __init__(self, schema: str, references: Sequence[str] = ()) -> None:
        try:
            named: dict[str, Any] = {}
            for text in references:
                parse_schema(_prepared(json.loads(text)), named_schemas=named)
            self._schema = parse_schema(_prepared(json.loads(schema)), named_schemas=named)
            endless = _has_endless_array(self._schema, named)
        except Exception as exc:  # fastavro raises many kinds
            msg = f"its Avro schema can't be used ({type(exc).__name__})"
            raise NotOfSchema(msg) from exc
        if endless:
            msg = "its Avro schema has an array whose elements take no bytes, so that a few may stand for millions"
            raise NotOfSchema(msg)

    def __call__(self, body: bytes) -> Any:
        """See `ReadBody`.

        Raises:
            NotOfSchema: the body is not of the schema.
        """
        data = BytesIO(body)
        try:
            document = fastavro.schemaless_reader(data, self._schema, None)
        except Exception as exc:  # fastavro raises many kinds on damaged bytes
            msg = "the body is not of its Avro schema"
            raise NotOfSchema(msg) from exc
        if data.tell() != len(body):
            msg = "the body goes on after the end of its Avro schema"
            raise NotOfSchema(msg)
        return document


def _prepared(schema: Any) -> Any:
    """A schema whose times become a `Moment`, and whose other logical types stay what they are in bytes."""
    if isinstance(schema, list):
        return [_prepared(branch) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    out = {name: _prepared(part) for name, part in schema.items() if name in ("type", "items", "values")}
    if "fields" in schema:
        out["fields"] = [{"name": field["name"], "type": _prepared(field["type"])} for field in schema["fields"]]
    kept = ("name", "namespace", "symbols", "size")
    out |= {name: schema[name] for name in kept if name in schema}
    if ours := _OURS.get(str(schema.get("logicalType"))):
        out["logicalType"] = ours
    return out


def _has_endless_array(schema: Any, named: Mapping[str, Any]) -> bool:
    """Whether a schema has an array of elements that take no bytes, as null and records without fields do."""
    todo = [schema, *named.values()]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            if part["type"] == "array" and not _takes_bytes(part["items"], named, set()):
                return True
            todo += [field["type"] for field in part.get("fields", ())]
            todo += [part[name] for name in ("items", "values") if name in part]
            if not isinstance(part["type"], str):
                todo.append(part["type"])
    return False


def _takes_bytes(part: Any, named: Mapping[str, Any], within: set[str]) -> bool:
    """Whether a value takes bytes; `within` are the records that it lies in, which must end somewhere."""
    if isinstance(part, list):
        return True  # the number of its branch
    kind = part["type"] if isinstance(part, dict) else part
    if not isinstance(kind, str):
        return _takes_bytes(kind, named, within)
    if kind in named and kind not in within:
        return _takes_bytes(named[kind], named, within)
    if kind in ("record", "error"):
        inner = within | {part["name"]}
        return any(_takes_bytes(field["type"], named, inner) for field in part["fields"])
    return part["size"] > 0 if kind == "fixed" else kind != "null"
