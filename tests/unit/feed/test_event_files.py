"""Files in every format and shape give the same rows; what can't be read is one line."""

import csv
import gzip
import io
import json
import sys
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.core.events import EventRow, to_ms
from stream.errors import ConfigError
from stream.feed.event_files import EventFile, read_file
from stream.feed.shape import NATIVE, BadRow, FileShape
from stream.items.input_files import MAX_LINE_BYTES, files_in

TIMES_MS = [1_600_000_000_000, 1_650_000_000_123, 1_700_000_000_500]
ROWS = [EventRow("7", "a", "view", TIMES_MS[0]), EventRow("é", "b", "like", TIMES_MS[1])]
ROWS.append(EventRow("-9", "c", "view", TIMES_MS[2]))
MAPPED = {"user_id": "uid", "item_id": "product.id", "type": "event", "ts": "at"}
SHAPES = {
    "native": NATIVE,
    "ms": FileShape(MAPPED),
    "s": FileShape(MAPPED, "s"),
    "us": FileShape(MAPPED, "us"),
    "ns": FileShape(MAPPED, "ns"),
    "iso8601": FileShape(MAPPED, "iso8601"),
    "fixed": FileShape({"item_id": "product.id"}, "ms", "view"),
}


def time_as(ts_ms, unit):
    if unit in ("us", "ns"):
        return ts_ms * 1000 if unit == "us" else ts_ms * 1_000_000
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


def names(shape):
    return [path.text for path in shape.paths]


def as_csv(path, shape):
    lines = [",".join(["more", *names(shape)]), *(",".join(["x", *map(str, cells(r, shape))]) for r in ROWS)]
    path.write_text("\n".join(lines) + "\n")


def as_jsonl(path, shape):
    path.write_text("".join(json.dumps(nested(names(shape), cells(row, shape))) + "\n" for row in ROWS))


def as_parquet(path, shape):
    pq.write_table(pa.Table.from_pylist([nested(names(shape), cells(row, shape)) for row in ROWS]), path)


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


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["1", "a b", "é", "x,y", 'q"q', "t|t;"]),
            st.sampled_from(["7", "i"]),
            st.sampled_from(["view", "like"]),
            st.integers(TIMES_MS[0], TIMES_MS[2]),
        ),
        min_size=1,
        max_size=5,
    ),
    delimiter=st.sampled_from(",\t;|"),
    header=st.booleans(),
    unit=st.sampled_from(["ms", "us", "ns"]),
    ends=st.sampled_from(["\n", "\r\n", "\r"]),
    bom=st.booleans(),
    blank=st.integers(0, 2),
)
def test_csv_of_any_making_gives_the_same_rows(tmp_path_factory, rows, delimiter, header, unit, ends, bom, blank):
    path = tmp_path_factory.mktemp("csv") / "e"
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=ends)
    if header:
        writer.writerow(["ts", "item_id", "more", "user_id", "type"])
    for user, item, kind, ts in rows:
        writer.writerow([time_as(ts, unit), item, "", user, kind])
    path.write_text("\ufeff" * bom + ends * blank + text.getvalue(), newline="")
    columns = None if header else ("ts", "item_id", "_", "user_id", "type")
    shape = FileShape(ts_unit=unit, columns=columns)
    assert list(read_file(path, shape)) == [EventRow(*row) for row in rows]
    assert list(read_file(path, FileShape(ts_unit=unit, columns=columns, delimiter=delimiter)))
    skipped = [row for _, row in EventFile(path, shape).rows(1)]
    assert skipped == [EventRow(*row) for row in rows[1:]]


ODD_FILES = [
    (b"1,2,view,1700000000000\n", NATIVE, "line 1: the header lacks user_id.*--columns"),
    (b"user,item_id,type,ts\n", NATIVE, "line 1: the header lacks user_id .*--fields"),
    (b"1,2,3\n", FileShape(columns=("user_id", "item_id", "type", "ts")), "line 1: has 3 columns, --columns 4"),
    (b"1,2,3\n", FileShape(columns=("user_id", "item_id", "_")), "--columns lacks ts, type"),
    ("user_id,item_id,type,ts\n".encode("utf-16"), NATIVE, "UTF-16; convert it: iconv"),
    (b"\x28\xb5\x2f\xfd1234", NATIVE, "zstd; unpack it"),
    (b"PK\x03\x041234", NATIVE, "zip archive; unpack it"),
    ("user_id,item_id,type,ts\n".encode("utf-16-le"), NATIVE, "UTF-16: convert it"),
    ("user_id,item_id,type,ts\n".encode("utf-16-be"), NATIVE, "UTF-16: convert it"),
    ("user_id,item_id,type,ts\n".encode("utf-32"), NATIVE, "UTF-32; convert it"),
    (b"e.csv".ljust(257, b"\0") + b"ustar\0", NATIVE, "tar archive; unpack it"),
    (gzip.compress(b"e.csv".ljust(257, b"\0") + b"ustar\0"), NATIVE, "tar archive; unpack it"),
    (b"\x04\x22\x4d\x18", NATIVE, "lz4; unpack it"),
    (b"\x80\x02\0\n", NATIVE, "is binary"),
    (b'{\n "user_id": 1\n}\n', NATIVE, "line 1: .*each line must hold one whole object"),
    (b"[\n{}]", NATIVE, "JSON array; write one object a line"),
    (b"uid,sku,kind,at\n", FileShape(columns=("user_id", "item_id", "type", "ts")), "line 1: .*--fields, without"),
    (b"BZh91234", NATIVE, "bzip2"),
    (b"\xfd7zXZ\x00", NATIVE, "xz"),
    (b"x" * (MAX_LINE_BYTES + 1), NATIVE, "line 1: is longer than 16 MiB"),
    (gzip.compress(b"{" + b" " * (MAX_LINE_BYTES + 1)), NATIVE, "line 1: is longer than 16 MiB"),
    (b"user_id,item_id,type,ts\n1,2,view,1700000000\n", NATIVE, "looks like seconds: is the unit s"),
    (b"user_id,item_id,type,ts\n1,2,view,1700000000000000\n", NATIVE, "looks like microseconds: is the unit us"),
    (b"user_id,item_id,type,ts\n1,2,view,1700000000000\n", FileShape(ts_unit="us"), "is the unit ms"),
    (b"user_id,item_id,type,ts\n1,2,view,2024-01-01 10:00\n", NATIVE, "is the unit iso8601"),
    (b"user_id,item_id,type,ts\n1,2,view,1700000000\n", FileShape(ts_unit="iso8601"), "is the unit s"),
    (b'{"user_id":1,"item_id":2,"type":"view","ts":1700000000000}', FileShape(ts_unit="iso8601"), "is the unit ms"),
]


# named by what is said: a parameter of bytes is its own name, of 16 MiB, and gzip's has the time in it
@pytest.mark.parametrize(("data", "shape", "says"), ODD_FILES, ids=[says for *_, says in ODD_FILES])
def test_files_that_are_not_what_they_should_be_say_what_to_do(tmp_path, data, shape, says):
    (tmp_path / "e").write_bytes(data)
    with pytest.raises(ConfigError, match=says) as caught:
        list(read_file(tmp_path / "e", shape))
    assert "\n" not in str(caught.value)


def test_a_line_of_several_items_is_several_rows_or_one_at_fault_which_can_be_skipped_one_by_one(tmp_path):
    event = {"user_id": 1, "type": "like", "ts": str(TIMES_MS[0])}
    lines = [{**event, "items": [{"id": n} for n in range(k)]} for k in (2, 0, 3)]
    lines += [{**event, "items": [{"id": 0}, {"id": ""}, {"id": None}]}, {**event, "items": [{"id": 0}, {}]}]
    (tmp_path / "e").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = EventFile(tmp_path / "e", FileShape({"item_id": "items[].id"}))
    rows = list(file.rows())
    assert [(number, row.item_id) for number, row in rows[:5]] == [(1, "0"), (1, "1"), (3, "0"), (3, "1"), (3, "2")]
    assert [(number, row.reason) for number, row in rows[5:]] == [(4, "invalid_id"), (5, "missing_field")]
    assert [list(file.rows(skip)) for skip in range(8)] == [rows[skip:] for skip in range(8)]


def test_a_header_beside_columns_is_one_bad_row(tmp_path):
    (tmp_path / "e").write_text(f"uid,sku,kind,at\n1,2,view,{TIMES_MS[0]}\n,2,view,\n")
    rows = [row for _, row in EventFile(tmp_path / "e", FileShape(columns=("user_id", "item_id", "type", "ts"))).rows()]
    assert [type(row) for row in rows] == [BadRow, EventRow, BadRow]


def test_a_folder_stands_for_its_files(tmp_path):
    for n, row in enumerate(ROWS):
        values = {"user_id": row.user_id, "item_id": row.item_id, "type": row.type, "ts": row.ts_ms}
        pq.write_table(pa.Table.from_pylist([values]), tmp_path / f"part-{n}.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".part-0.crc").write_text("")
    (tmp_path / "part-9.parquet").write_text("")
    (tmp_path / "part-0.parquet.uemb-send.json").write_text("{}")
    assert [row for file in files_in([tmp_path]) for row in read_file(file)] == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="without files"):
        files_in([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="holds folders, as empty"):
        files_in([tmp_path])


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2024-01-01", 1_704_067_200_000),
        ("2024-01-01 10:00:00", 1_704_103_200_000),
        ("2024-01-01T10:00:00Z", 1_704_103_200_000),
        ("2024-01-01t10:00:00z", 1_704_103_200_000),
        ("2024-01-01 10:00:00 UTC", 1_704_103_200_000),
        ("2024-01-01 10:00:00 GMT", 1_704_103_200_000),
        ("2024-01-01 12:00:00 +0200", 1_704_103_200_000),
        ("2024-01-01 12:00:00 +02:00", 1_704_103_200_000),
        ("2024-01-01T12:00:00.5+02:00", 1_704_103_200_500),
        ("2024-01-01T10:00:00,123456789Z", 1_704_103_200_123),
        ("20240101T100000Z", 1_704_103_200_000),
        (" 2024-01-01 10:00 ", 1_704_103_200_000),
    ],
)
def test_relatives_of_iso_8601(text, ms):
    assert to_ms(text, "iso8601") == ms


@pytest.mark.parametrize(
    ("ts", "unit", "ms"),
    [
        ("1700000000123", "ms", 1_700_000_000_123),
        (" 1700000000 ", "s", 1_700_000_000_000),
        ("1700000000.123", "s", 1_700_000_000_123),
        (1_700_000_000_123_999, "us", 1_700_000_000_123),
        ("1700000000123999", "us", 1_700_000_000_123),
        (1_700_000_000_123_999_999, "ns", 1_700_000_000_123),
    ],
)
def test_numbers_of_each_unit_may_be_text(ts, unit, ms):
    assert to_ms(ts, unit) == ms
