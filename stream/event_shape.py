"""How a file names and measures what an event needs, and what is wrong with a row that does not hold it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from stream.events import FIELDS, Reject, TsUnit

#: User, item, time and type as they stand in a file; the type is left out where the shape fixes it.
Raw = tuple[Any, ...]


@dataclass(frozen=True)
class FileShape:
    """How a file names and measures what we need.

    Attributes:
        fields: where each of our fields is found, as a dotted path (in CSV: the column of that name); what is not
            listed has our own name.
        ts_unit: unit of the time; a Parquet timestamp knows its own.
        type: type of all rows; the file's own type is not read then.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    ts_unit: TsUnit = "ms"
    type: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of user, item and time, and of the type unless it is fixed: the order of `Raw`."""
        names = ("user_id", "item_id", "ts", *(("type",) if self.type is None else ()))
        return tuple(self.fields.get(name, name) for name in names)

    @property
    def native(self) -> bool:
        """Whether the file uses our own names and unit."""
        return self.type is None and self.ts_unit == "ms" and all(self.fields.get(f, f) == f for f in FIELDS)


NATIVE: Final = FileShape()


class BadRow(NamedTuple):
    """Why a row can't be used: one of the dead letters' reasons or one of our own, and a detail without content."""

    reason: str
    detail: str

    @classmethod
    def of(cls, reject: Reject) -> "BadRow":
        """The same for a reason for which a worker would dead-letter the row."""
        return cls(reject.reason.value, reject.detail)
