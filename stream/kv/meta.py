"""The shared record as JSON: one format for every store, so that a record can be moved between them."""

from typing import Annotated, Final

import msgspec

from stream.core.json_records import decode_json, encode_json, format_of
from stream.errors import StateError, StateMismatch
from stream.kv.protocol import Meta, Serving

META_FORMAT: Final = 1
#: Far beyond what brokers bear; a reader opens a database of each.
MAX_PARTITIONS: Final = 100_000


class _Record(msgspec.Struct, frozen=True):
    """Fields of the record, in their order; fallbacks are in base64."""

    format: int
    app: str | None
    partitions: Annotated[int, msgspec.Meta(gt=0, le=MAX_PARTITIONS)] | None
    current: Serving | None
    fallbacks: dict[str, bytes]
    encoders: dict[str, str]


def encode_meta(meta: Meta) -> bytes:
    """The record's JSON, the same bytes for the same record."""
    record = _Record(
        format=META_FORMAT,
        app=meta.app,
        partitions=meta.partitions,
        current=meta.current,
        fallbacks=dict(sorted(meta.fallbacks.items())),
        encoders=dict(sorted(meta.encoders.items())),
    )
    return encode_json(record, indent=1) + b"\n"


def decode_meta(data: bytes, where: str, repair: str) -> Meta:
    """The record from its JSON.

    Args:
        data: what the store holds.
        where: names it in errors.
        repair: what the operator does about damage, without a full stop.

    Raises:
        StateError: the record is damaged.
        StateMismatch: it is of a format that this release does not know.
    """
    try:
        if (found := format_of(data)) != META_FORMAT:
            msg = f"{where} has format {found}, this release reads {META_FORMAT}; upgrade"
            raise StateMismatch(msg)
        record = decode_json(data, _Record)
    except ValueError as exc:
        msg = f"{where} is damaged; {repair}"
        raise StateError(msg) from exc
    return Meta(record.app, record.partitions, record.current, record.fallbacks, record.encoders)


def encode_serving(serving: Serving) -> bytes:
    """The serving pair alone, as other clients read it."""
    return encode_json(serving)
