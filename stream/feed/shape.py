"""How a file names and measures what an event needs, and what is wrong with a row that does not hold it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from stream.core.events import FIELDS, ORDER, Reject, TsUnit
from stream.core.field_paths import FieldPath, parse_path

#: User, item, time and type as they stand in a file; the type is left out where the shape fixes it.
Raw = tuple[Any, ...]


@dataclass(frozen=True)
class FileShape:
    """How a file names and measures what we need.

    Attributes:
        fields: where each of our fields is found, as `stream.core.field_paths` has it (in CSV: that column);
            others have our own name.
        ts_unit: unit of the time; a Parquet timestamp knows its own.
        type: type of all rows; the file's own type is not read then.
        columns: names of the columns of CSV without a header, ``_`` for those that are not read.
        delimiter: between the columns of CSV; None is the one by which the columns that are needed are there.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    ts_unit: TsUnit = "ms"
    type: str | None = None
    columns: tuple[str, ...] | None = None
    delimiter: str | None = None

    @property
    def paths(self) -> tuple[FieldPath, ...]:
        """Paths of user, item and time, and of the type unless it is fixed: the order of `Raw`."""
        return tuple(parse_path(self.fields.get(name, name)) for name in (ORDER if self.type is None else ORDER[:3]))

    @property
    def native(self) -> bool:
        """Whether the file uses our own names and unit."""
        return self.type is None and self.ts_unit == "ms" and all(self.fields.get(f, f) == f for f in FIELDS)

    @property
    def several(self) -> bool:
        """Whether an event of a JSON file may be several rows."""
        return any(path.inside is not None for path in self.paths)


NATIVE: Final = FileShape()


class BadRow(NamedTuple):
    """Why a row can't be used: one of the dead letters' reasons or one of our own, and a detail without content."""

    reason: str
    detail: str

    @classmethod
    def of(cls, reject: Reject) -> "BadRow":
        """The same for a reason for which a worker would dead-letter the row."""
        return cls(reject.reason.value, reject.detail)
