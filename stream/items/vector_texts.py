"""Item vectors in text: word2vec's format, with or without its first line, and CSV with lists or a column a number."""

import csv
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np

from stream.core.formulas import Float64
from stream.errors import ConfigError
from stream.items.input_files import MAX_LINE_BYTES, RecordLines, lines_of, open_lines

#: An id, its numbers (None if they are none), and why the row holds no item at all, empty if it does.
Row = tuple[object, Float64 | None, str]
_DELIMITERS: Final = ",\t;|"
_NUMBERED: Final = re.compile(r"(.*?)(\d{1,6})$")
_HEADER: Final = re.compile(rb"(\d{1,12}) (\d{1,6})\s*$")
_BRACKETS: Final = ("[]", "{}", "()")


def word2vec_rows(file: Path) -> Iterator[Row]:
    """Rows of word2vec's text format, as gensim, fastText and GloVe write it.

    Raises:
        ConfigError: a line is too long.
    """
    with open_lines(file) as lines:
        dim = 0
        for number, line in enumerate(lines_of(lines)):
            if line.isspace():
                continue
            if not number and (header := _HEADER.fullmatch(line)):
                dim = int(header[2])
                continue
            text = line.decode("utf-8", "surrogateescape").rstrip()
            dim = dim or len(text.split(" ")) - 1
            name, *numbers = text.rsplit(" ", dim) if dim else [text]  # GloVe has names with spaces
            yield name, _floats(numbers), ""


def word2vec_binary_rows(file: Path) -> Iterator[Row]:
    """Rows of word2vec's binary format.

    Raises:
        ConfigError: the file is no such, or ends before its last row.
    """
    with open_lines(file) as data:
        first = data.readline(64)
        header = _HEADER.fullmatch(first)
        if header is None:
            msg = f"{file} is not word2vec's binary format, which begins with a line of two numbers"
            raise ConfigError(msg)
        count, dim = int(header[1]), int(header[2])
        for number in range(count):
            name = _until_space(data, file, number)
            vector = data.read(4 * dim)
            if len(vector) < 4 * dim:
                msg = f"{file} ends in row {number}, its first line names {count:,}"
                raise ConfigError(msg)
            numbers = np.array(struct.unpack(f"<{dim}f", vector))
            yield name.decode("utf-8", "surrogateescape"), numbers, ""


def _until_space(data: BinaryIO, file: Path, row: int) -> bytes:
    name = bytearray()
    while (byte := data.read(1)) != b" ":
        if not byte or len(name) > MAX_LINE_BYTES:
            msg = f"{file} ends in row {row}"
            raise ConfigError(msg)
        if byte != b"\n" or name:  # some end each row
            name += byte
    return bytes(name)


def csv_vector_rows(file: Path, id_column: str, vector_column: str) -> Iterator[Row]:
    """Rows of CSV, whatever its delimiter.

    A vector is one column of a list (pgvector's, JSON's, or numbers apart), or the columns of one name with numbers at
    its end. Two columns without a header, of which the second is such a list, are an id and its vector.

    Args:
        file: what to read.
        id_column: name of the ids.
        vector_column: name of the lists, or what the names of the dimensions begin with; if there is no such, all
            columns whose names are alike but for a number are dimensions.

    Raises:
        ConfigError: there are no such columns.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # a vector may be longer than a text as a rule is
    with open_lines(file) as data:
        lines = (line.decode("utf-8", "surrogateescape") for line in lines_of(data))
        first = next((line for line in lines if line.strip()), "")
        look = _look(file, first, id_column, vector_column)
        records = RecordLines(chain([first], lines) if look.headless else lines)
        rows = csv.reader(records, strict=True, delimiter=look.delimiter)
        while True:
            try:
                for row in rows:
                    records.next_record()
                    if row and len(row) != look.columns:
                        yield None, None, f"has {len(row)} columns, not {look.columns}"
                    elif row:
                        cells = [row[at] for at in look.vectors]
                        numbers = _listed(cells[0]) if look.one_list else _floats(cells)
                        yield row[look.ids].strip(), numbers, ""
            except csv.Error as exc:
                records.next_record()
                yield None, None, f"is no CSV ({exc})"
            else:
                return


class _Look(NamedTuple):
    delimiter: str
    columns: int
    ids: int
    vectors: Sequence[int]
    one_list: bool
    headless: bool = False


def _look(file: Path, first: str, id_column: str, vector_column: str) -> _Look:
    shown: list[str] = []
    for delimiter in _DELIMITERS:
        try:
            cells = [cell.strip() for cell in next(csv.reader([first], strict=True, delimiter=delimiter), [])]
        except csv.Error:
            continue
        shown = max(shown, cells, key=len)
        if id_column in cells:
            ids = cells.index(id_column)
            if vector_column in cells:
                return _Look(delimiter, len(cells), ids, [cells.index(vector_column)], one_list=True)
            if dimensions := _dimensions(cells, ids, vector_column):
                return _Look(delimiter, len(cells), ids, dimensions, one_list=False)
        elif len(cells) == 2 and _is_list(cells[1]):
            return _Look(delimiter, 2, 0, [1], one_list=True, headless=True)
    msg = (
        f"{file} line 1 has no columns {id_column} and {vector_column}, nor dimensions as {vector_column}_0, "
        f"{vector_column}_1 (it has {len(shown)} columns); name them with --id-column and --vector-column"
    )
    raise ConfigError(msg)


def _dimensions(cells: list[str], ids: int, vector_column: str) -> list[int]:
    """Columns of the dimensions in their order; none where they are not clear."""
    groups: dict[str, dict[int, int]] = {}
    for at, name in enumerate(cells):
        if at != ids and (found := _NUMBERED.fullmatch(name)):
            groups.setdefault(found[1], {})[int(found[2])] = at
    named = {prefix: group for prefix, group in groups.items() if prefix.rstrip("_.-") == vector_column.rstrip("_.-")}
    whole = [g for g in (named or groups).values() if sorted(g) in ([*range(len(g))], [*range(1, len(g) + 1)])]
    return [at for _, at in sorted(whole[0].items())] if len(whole) == 1 else []


def _is_list(cell: str) -> bool:
    return cell[:1] + cell[-1:] in _BRACKETS and _listed(cell) is not None


def _listed(cell: str) -> Float64 | None:
    cell = cell.strip()
    if cell[:1] + cell[-1:] in _BRACKETS:
        cell = cell[1:-1]
    return _floats(cell.replace(",", " ").replace(";", " ").split())


def _floats(texts: Sequence[str]) -> Float64 | None:
    """Texts as numbers; None if one is none."""
    try:
        if any("_" in text for text in texts):  # which Python takes for a separator
            return None
        return np.array([float(text) for text in texts], dtype=np.float64)
    except ValueError:
        return None
