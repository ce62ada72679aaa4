"""Small records as JSON: one way to write them, whose bytes are stored for good, and one to read them."""

import json
from typing import TypeVar

import msgspec

_Kind = TypeVar("_Kind")


class NotJson(ValueError):
    """A value that is no JSON object at all; its text says what it is not."""


class WrongFields(ValueError):
    """A JSON object that lacks a field, or has one of another kind; its text says which."""


class _Format(msgspec.Struct):
    format: int


def format_of(data: bytes) -> int:
    """The number of the format that a record says it has.

    Raises:
        NotJson: as `decode_json`.
        WrongFields: it says none.
    """
    return decode_json(data, _Format).format


def encode_json(record: object, *, sort_keys: bool = False, indent: int | None = None) -> bytes:
    """JSON of a struct or dataclass, its fields in their order; bytes in it become base64.

    In the standard library's spelling (ASCII, a space after ``,`` and ``:``), not msgspec's shorter one: these bytes
    are stored, and what is written again must be what was there.
    """
    return json.dumps(msgspec.to_builtins(record, str_keys=True), sort_keys=sort_keys, indent=indent).encode()


def decode_json(data: bytes, kind: type[_Kind]) -> _Kind:
    """The record in `data`; fields that `kind` doesn't name, a later release's, are passed over.

    Raises:
        NotJson: the bytes are no JSON object.
        WrongFields: a field is missing, or has no value of its kind.
    """
    try:
        fields = msgspec.json.decode(data)  # which, unlike the standard library, refuses halves of surrogate pairs
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:  # to old releases of msgspec the two differ
        msg = "the value is no JSON"
        raise NotJson(msg) from exc
    if not isinstance(fields, dict):
        msg = "the value is no JSON object"
        raise NotJson(msg)
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as exc:
        raise WrongFields(str(exc)) from exc
