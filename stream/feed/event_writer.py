"""Interactions as records that a worker of the same settings accepts: `stream.core.events.EventDecoder` reversed."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec

from stream.core.events import FIELDS, EventRow, EventRules, check_time, from_ms
from stream.core.field_paths import FieldPath
from stream.errors import ConfigError
from stream.feed.shape import BadRow

Encode = Callable[[EventRow], bytes]


class EventWriter:
    """Gives an interaction its topic, key and value, or says why a worker would not take it.

    Values are in the producers' shape: their field names with nested objects for dotted paths, their unit of time, and
    no type on a topic that has one of its own.

    Args:
        rules: how the worker reads events and which it admits.
        topic_of: topic of an interaction type; raises `ValueError` where there is none.
        topic: takes all interactions instead, whatever their type.
    """

    def __init__(self, rules: EventRules, topic_of: Callable[[str], str], *, topic: str | None = None) -> None:
        self._rules = rules
        self._topic_of = topic_of
        self._topic = topic
        self._routes: dict[str, tuple[str, Encode]] = {}

    def record(self, row: EventRow, now_ms: int) -> tuple[str, bytes, bytes] | BadRow:
        """Topic, key and value of a row that is sent now.

        Raises:
            ConfigError: the field mapping describes no document that could be written.
        """
        route = self._routes.get(row.type) or self._route(row.type)
        if isinstance(route, BadRow):
            return route
        if reject := check_time(row.ts_ms, now_ms):
            return BadRow.of(reject)
        topic, encode = route
        return topic, row.user_id.encode(), encode(row)

    def _route(self, kind: str) -> tuple[str, Encode] | BadRow:
        if kind in self._rules.ignored:
            return BadRow("ignored_type", "its type is among UEMB_IGNORED_TYPES: a worker would drop it")
        if kind not in self._rules.types:
            return BadRow("unknown_type", "its type is not among UEMB_EVENT_TYPES: a worker would refuse it")
        try:
            topic = self._topic or self._topic_of(kind)
        except ValueError as exc:
            return BadRow("no_topic", str(exc))
        return self._routes.setdefault(kind, (topic, self._encode(topic)))

    def _encode(self, topic: str) -> Encode:
        typed = topic in self._rules.type_by_topic
        if self._rules.native and not typed:
            return _native
        unit = self._rules.ts_unit
        places = _places(self._rules.paths(topic))

        def encode(row: EventRow) -> bytes:
            values = (row.user_id, row.item_id, from_ms(row.ts_ms, unit), row.type)
            document: dict[str, Any] = {}
            for place, value in zip(places, values, strict=False):  # the type, which is last, may have none
                _put(document, place, value)
            return msgspec.json.encode(document)

        return encode


def _native(row: EventRow) -> bytes:
    return msgspec.json.encode({"user_id": row.user_id, "item_id": row.item_id, "type": row.type, "ts": row.ts_ms})


def _places(paths: tuple[FieldPath, ...]) -> list[tuple[str | int, ...]]:
    """Steps to each place, in arrays of one element.

    Raises:
        ConfigError: two are one, or one is inside of another, or is not in the first element of its array.
    """
    places = [path.to if path.inside is None else (*path.to, 0, *path.inside) for path in paths]
    for path, place in zip(paths, places, strict=True):
        if any(isinstance(step, int) and step for step in place):
            msg = (
                f"UEMB_EVENT_FIELDS: events with {path.text} can't be written: their arrays would have but one element"
            )
            raise ConfigError(msg)
    for i, one in enumerate(places):
        for j, other in enumerate(places[i + 1 :], i + 1):
            if one[: len(other)] == other[: len(one)]:
                msg = (
                    f"UEMB_EVENT_FIELDS: {paths[i].text} and {paths[j].text} can't both hold a value, so events of "
                    f"this shape can't be written; {', '.join(FIELDS)} need places of their own"
                )
                raise ConfigError(msg)
    return places


def _put(document: dict[str, Any], place: tuple[str | int, ...], value: object) -> None:
    at: Any = document
    for step, following in pairwise((*place, None)):
        inner: Any = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(step, int):
            if not at:
                at.append(inner)
            at = at[0]
        elif following is None:
            at[step] = inner
        else:
            at = at.setdefault(step, inner)
