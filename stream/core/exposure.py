"""How much of what users do was put before them by what their own vectors found.

A recommender that learns from clicks on its own recommendations learns from itself. The vector does not depend on what
retrieval returned, but its history does where most of it was shown rather than looked for; so that share is counted.
"""

from stream.core.counters import Counter
from stream.core.events import JSON_ERRORS, Rejected, framed_document, json_document
from stream.core.field_paths import NoValue, Values, parse_path
from stream.core.framing import MAGIC, Schemas


class Exposure:
    """Says of an event what led to it.

    Args:
        path: of the field that says so, see `stream.core.field_paths`.
        own: values of it for what was found with user vectors.
        schemas: of values in the framing of schema registries.

    Raises:
        ValueError: it is no path to one value.
    """

    def __init__(self, path: str, own: frozenset[str], schemas: Schemas | None = None) -> None:
        found = parse_path(path)
        if found.inside is not None:
            msg = f"{path!r}: an event has one source, not one of each element"
            raise ValueError(msg)
        self._values = Values((found,))
        self._own = own
        self._schemas = schemas

    def of(self, value: bytes) -> tuple[Counter, ...]:
        """What is to be counted of a sound event."""
        try:
            if self._schemas is not None and value.startswith(MAGIC):
                document = framed_document(value, self._schemas)
            else:
                document = json_document(value)
            ((source,),) = self._values.of(document)
        except (NoValue, Rejected, *JSON_ERRORS):
            return ()
        if not isinstance(source, str):
            return ()
        return (Counter.SOURCED, Counter.SELF_CAUSED) if source in self._own else (Counter.SOURCED,)
