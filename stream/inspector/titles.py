"""What items are called: a table with a column for the id and one for the title, CSV or tabs, plain or in gzip."""

import csv
import zlib
from pathlib import Path
from typing import Final

from stream.errors import ConfigError
from stream.items.input_files import RecordLines, lines_of, open_lines
from stream.keys import canonical_id

COLUMNS: Final = ("item_id", "title")
#: Longest title that is kept.
_MAX_CHARS: Final = 200


def read_titles(path: Path) -> dict[str, str]:
    """Titles by canonical item id.

    Raises:
        ConfigError: the file can't be read, or has not the columns; a row that is none is left out.
    """
    try:
        with open_lines(path) as file:
            lines = RecordLines(line.decode("utf-8", "replace") for line in lines_of(file))
            header = next(lines, "")
            delimiter = "\t" if "\t" in header else ","
            names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
            if not set(COLUMNS) <= set(names):
                msg = f"{path}: its first line must name the columns {' and '.join(COLUMNS)}"
                raise ConfigError(msg)
            item_at, title_at = map(names.index, COLUMNS)
            titles = {}
            for row in csv.reader(lines, delimiter=delimiter):
                lines.next_record()
                if len(row) == len(names):
                    try:
                        titles[canonical_id(row[item_at].strip())] = row[title_at].strip()[:_MAX_CHARS]
                    except ValueError:
                        continue
            return titles
    except (OSError, EOFError, zlib.error, csv.Error) as exc:
        msg = f"titles {path} can't be read ({getattr(exc, 'strerror', None) or exc})"
        raise ConfigError(msg) from exc
