"""Files in every format and shape give the same rows; what can't be read is one line."""

import gzip
import json
import sys
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream.dataset import EventRow
from stream.errors import ConfigError
from stream.event_files import EventFile, read_file
from stream.event_shape import NATIVE, BadRow, FileShape

TIMES_MS = [1_600_000_000_000, 1_650_000_000_123, 1_700_000_000_500]
ROWS = [EventRow("7", "a", "view", TIMES_MS[0]), EventRow("é", "b", "like", TIMES_MS[1])]
ROWS.append(EventRow("-9", "c", "view", TIMES_MS[2]))
MAPPED = {"user_id": "uid", "item_id": "product.id", "type": "event", "ts": "at"}
SHAPES = {
    "native": NATIVE,
    "ms": FileShape(MAPPED),
    "s": FileShape(MAPPED, "s"),
    "iso8601": FileShape(MAPPED, "iso8601"),
    "fixed": FileShape({"item_id": "product.id"}, "ms", "view"),
}


def time_as(ts_ms, unit):
    if unit == "iso8601":
        return datetime.fromtimestamp(ts_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return ts_ms / 1000 if unit == "s" else ts_ms


def cells(row, shape):
    return [row.user_id, row.item_id, time_as(row.ts_ms, shape.ts_unit), row.type][: len(shape.paths)]


def nested(paths, values):
    document = {"more": [1]}
    for path, value in zip(paths, values, strict=True):
        *parents, leaf = path.split(".")
        at = document
        for parent in parents:
            at = at.setdefault(parent, {})
        at[leaf] = value
    return document


def as_csv(path, shape):
    lines = [",".join(["more", *shape.paths]), *(",".join(["x", *map(str, cells(r, shape))]) for r in ROWS)]
    path.write_text("\n".join(lines) + "\n")


def as_jsonl(path, shape):
    path.write_text("".join(json.dumps(nested(shape.paths, cells(row, shape))) + "\n" for row in ROWS))


def as_parquet(path, shape):
    pq.write_table(pa.Table.from_pylist([nested(shape.paths, cells(row, shape)) for row in ROWS]), path)


def packed(write):
    def pack(path, shape):
        write(path, shape)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return pack


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "write",
    [as_csv, as_jsonl, as_parquet, packed(as_csv), packed(as_jsonl)],
    ids=["csv", "jsonl", "parquet", "csv.gz", "jsonl.gz"],
)
def test_every_format_and_shape_gives_the_same_rows(tmp_path, write, shape):
    path = tmp_path / "events"  # no suffix: the content says what it is
    write(path, shape)
    want = [row._replace(type="view") if shape.type else row for row in ROWS]
    assert list(read_file(path, shape)) == want
    for skip in range(4):
        assert [row for _, row in EventFile(path, shape).rows(skip)] == want[skip:]


@pytest.mark.parametrize(
    "ts",
    [
        pa.array(TIMES_MS),
        pa.array(TIMES_MS, pa.timestamp("ms")),
        pa.array([t * 1000 + 999 for t in TIMES_MS], pa.timestamp("us", "Europe/Paris")),
        pa.array([t * 1_000_000 for t in TIMES_MS], pa.timestamp("ns")),
    ],
)
@pytest.mark.parametrize("users", [pa.array([5, -6, 7]), pa.array(["5", "-6", "7"]).dictionary_encode()])
def test_parquet_types_that_mean_the_same_are_the_same(tmp_path, ts, users):
    items = pa.array([1, 2, 3], pa.uint32())
    kinds = pa.array(["view", "like", "view"], pa.large_string())
    table = pa.table({"user_id": users, "item_id": items, "ts": ts, "type": kinds})
    pq.write_table(table, tmp_path / "e", row_group_size=2)
    rows = [EventRow(*row) for row in zip(["5", "-6", "7"], "123", ["view", "like", "view"], TIMES_MS, strict=True)]
    assert list(read_file(tmp_path / "e")) == rows
    for skip in range(4):
        assert [(n, r) for n, r in EventFile(tmp_path / "e").rows(skip)] == list(enumerate(rows, 1))[skip:]


def test_a_parquet_timestamp_knows_its_unit_and_its_path_may_hold_a_dot(tmp_path):
    ts = pa.array([1_700_000_000], pa.timestamp("s"))
    pq.write_table(pa.table({"user_id": ["u"], "product.id": ["i"], "type": ["view"], "ts": ts}), tmp_path / "e")
    shape = FileShape({"item_id": "product.id"}, "iso8601")
    assert list(read_file(tmp_path / "e", shape)) == [EventRow("u", "i", "view", 1_700_000_000_000)]


def test_nulls_are_bad_rows_with_their_numbers_and_their_neighbours_go_on(tmp_path):
    whole = {"user_id": "u", "product": {"id": "i"}, "type": "view", "ts": TIMES_MS[0]}
    table = pa.Table.from_pylist([whole, {**whole, "user_id": None}, {**whole, "product": None}, whole])
    pq.write_table(table, tmp_path / "e")
    file = EventFile(tmp_path / "e", FileShape({"item_id": "product.id"}))
    rows = list(file.rows())
    assert [n for n, row in rows if isinstance(row, BadRow)] == [2, 3]
    assert {row.reason for _, row in rows if isinstance(row, BadRow)} == {"missing_field"}
    assert str(file.refused(*rows[1])) == f"{tmp_path / 'e'} row 2: a field is null"


def test_after_a_bad_line_reading_goes_on(tmp_path):
    path = tmp_path / "e.csv"
    digits = "1" * 5000  # more than Python reads as a number
    path.write_text(f'user_id,item_id,type,ts\nu,i,view,{digits}\nu,"x"y,view,1\nu,i\nu,i,view,{TIMES_MS[0]}\n')
    rows = list(EventFile(path).rows())
    assert [row.reason for _, row in rows[:-1]] == ["implausible_timestamp", "not_csv", "not_csv"]
    assert rows[-1] == (5, EventRow("u", "i", "view", TIMES_MS[0]))
    path.write_text('{"user_id": 1\n{"user_id":1,"item_id":2,"ts":1600000000000,"type":"view"}\n{}\n')
    assert [row[0] for _, row in EventFile(path).rows()] == ["not_json", "1", "missing_field"]


@pytest.mark.parametrize("ts", ["nan", "inf", "-5", "1e300", "1700000000000", "later"])
def test_seconds_that_are_no_time_are_a_bad_row(tmp_path, ts):
    (tmp_path / "e.csv").write_text(f"user_id,item_id,type,ts\nu,i,view,{ts}\n")
    [(number, bad)] = EventFile(tmp_path / "e.csv", FileShape(ts_unit="s")).rows()
    assert (number, type(bad)) == (2, BadRow)


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ({"user_id": [1.5]}, "column user_id of type double; needed is text or integer"),
        ({"ts": ["2024-01-01"]}, "column ts of type string; needed is integer or timestamp"),
        ({"type": [1]}, "column type of type int64; needed is text"),
        ({"type": None}, r"no column type \(it has user_id, item_id, ts\)"),
    ],
)
def test_a_parquet_column_that_can_not_be_used_is_one_line(tmp_path, column, says):
    columns = {"user_id": ["u"], "item_id": ["i"], "ts": [TIMES_MS[0]], "type": ["view"], **column}
    pq.write_table(pa.table({name: values for name, values in columns.items() if values}), tmp_path / "e")
    with pytest.raises(ConfigError, match=says):
        list(read_file(tmp_path / "e"))


def test_damaged_files_are_one_line(tmp_path):
    (tmp_path / "e").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(ConfigError, match="is no whole Parquet file"):
        list(read_file(tmp_path / "e"))
    as_csv(tmp_path / "e", NATIVE)
    (tmp_path / "e").write_bytes(gzip.compress((tmp_path / "e").read_bytes())[:-12])
    with pytest.raises(ConfigError, match="is no whole gzip file"):
        list(read_file(tmp_path / "e"))
    (tmp_path / "e").write_text('[{"user_id": 1}]')
    with pytest.raises(ConfigError, match="JSON array; write one object a line"):
        list(read_file(tmp_path / "e"))


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    as_parquet(tmp_path / "e", NATIVE)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'user-embedding-stream\[parquet\]'"):
        list(read_file(tmp_path / "e"))
