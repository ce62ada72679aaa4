"""The shared record as JSON: one format for every store, so that a record can be moved between them."""

import base64
import json
from collections.abc import Mapping
from typing import Any, Final

from stream.errors import StateError
from stream.kv.base import Meta, Serving

META_FORMAT: Final = 1


def encode_meta(meta: Meta) -> bytes:
    """The record's JSON, the same bytes for the same record."""
    current = meta.current
    raw = {
        "format": META_FORMAT,
        "app": meta.app,
        "partitions": meta.partitions,
        "current": current and serving_fields(current),
        "fallbacks": {key: base64.b64encode(record).decode() for key, record in sorted(meta.fallbacks.items())},
        "encoders": dict(sorted(meta.encoders.items())),
    }
    return json.dumps(raw, indent=1).encode() + b"\n"


def decode_meta(data: bytes, where: str, repair: str) -> Meta:
    """The record from its JSON.

    Args:
        data: what the store holds.
        where: names it in errors.
        repair: what the operator does about damage, without a full stop.

    Raises:
        StateError: the record is damaged, or of a format that this release does not know.
    """
    try:
        raw = json.loads(data)
        if raw["format"] != META_FORMAT:
            msg = f"{where} has format {raw['format']!r}, this release reads {META_FORMAT}; upgrade"
            raise StateError(msg)
        return _meta_from(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        msg = f"{where} is damaged; {repair}"
        raise StateError(msg) from exc


def serving_fields(serving: Serving) -> dict[str, str | int]:
    """The serving pair as JSON fields."""
    return {"user_version": serving.user_version, "item_version": serving.item_version, "offset": serving.offset}


def _meta_from(raw: Mapping[str, Any]) -> Meta:
    current = raw["current"]
    meta = Meta(
        app=raw["app"],
        partitions=raw["partitions"],
        current=None
        if current is None
        else Serving(str(current["user_version"]), str(current["item_version"]), int(current["offset"])),
        fallbacks={str(k): base64.b64decode(v, validate=True) for k, v in raw["fallbacks"].items()},
        encoders={str(k): str(v) for k, v in raw["encoders"].items()},
    )
    if not isinstance(meta.app, str | None) or (meta.partitions is not None and not int(meta.partitions) > 0):
        raise TypeError
    return meta
