"""Item vectors of one's own: four kinds of files in, four out, and bad rows named or left out."""

import csv
import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream.cli.root import cli
from stream.errors import ConfigError, ItemSpaceError
from stream.items import vector_files as item_files
from stream.items.exporter import export_items
from stream.items.importer import import_items
from stream.items.space import ItemSpace
from stream.items.vector_files import Columns
from stream.items.writer import SpaceWriter

IDS = ["a", "7", "été\u2028x", "0b0e0c52-95cf-4d4e-9d0a-2c2a2b9b8d11", "x" * 256]
ROWS = np.random.default_rng(1).normal(size=(5, 3))
KINDS = (".npy", ".npz", ".parquet", ".jsonl")
Rows = list[tuple[Any, Any]]


def write(folder: Path, kind: str, rows: Rows, names: Columns | None = None) -> tuple[Path, Path | None]:
    """A file of a kind; ids for .npy beside it."""
    file = folder / f"mine{kind}"
    ids, vectors = [item for item, _ in rows], [vector for _, vector in rows]
    if kind == ".npy":
        np.save(file, np.array(vectors))
        (folder / "ids.txt").write_text("".join(f"{item}\n" for item in ids))
        return file, folder / "ids.txt"
    if kind == ".npz":
        columns = names or Columns("ids", "vectors")
        np.savez(file, **{columns.ids: np.array(ids), columns.vectors: np.array(vectors)})
        return file, None
    columns = names or Columns()
    if kind == ".parquet":
        table = {columns.ids: pa.array(ids), columns.vectors: pa.array(vectors, pa.list_(pa.float64())), "x": ids}
        pq.write_table(pa.table(table), file, row_group_size=2)
    else:
        lines = [{columns.ids: item, columns.vectors: vector, "x": 1} for item, vector in rows]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file, None


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_files, "PIECE_ROWS", 2)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_the_same_space_and_comes_back(kind: str, metric: Any, tmp_path: Path) -> None:
    file, ids = write(tmp_path, kind, list(zip(IDS, ROWS.tolist(), strict=True)))
    space, bad = import_items(file, tmp_path / "v1", "v1", metric=metric, ids=ids)
    want = ItemSpace.save(tmp_path / "want", "v1", IDS, ROWS, metric=metric)
    assert bad.total == 0
    for name in ("manifest.json", "ids.txt", "vectors.npy"):
        assert (tmp_path / "v1" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()
    told: list[tuple[int, int | None]] = []
    again: list[Path] = export_items(space, tmp_path / f"out{kind}", lambda *at: told.append(at))
    assert told == [(2, 5), (4, 5), (5, 5)]
    back, _ = import_items(again[0], tmp_path / "v2", "v1", metric=metric, ids=again[1] if len(again) > 1 else None)
    assert back.ids == want.ids
    np.testing.assert_array_equal(back.vectors, want.vectors) if metric == "dot" else np.testing.assert_allclose(
        back.vectors, want.vectors, atol=1e-7
    )
    with pytest.raises(ConfigError, match="exists already"):
        export_items(space, tmp_path / f"out{kind}")

    # an export that ends early leaves nothing behind
    def stop(done: int, _: int | None) -> None:
        if done == 4:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export_items(space, tmp_path / f"other{kind}", stop)
    with pytest.raises(ConfigError, match="can't be written"):
        export_items(space, tmp_path / f"none/out{kind}")
    assert sorted(tmp_path.iterdir()) == before


def test_ids_are_lines_by_the_line_feed_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", ROWS)
    lines = tmp_path / "ids.txt"
    names = ["a\u2028b", "a\u2029", "c", "\ufeff", "d"]
    for text in ("\n".join(names), "\r\n".join(names) + "\r\n", "\ufeff" + "\n".join(names) + "\n"):
        lines.write_bytes(text.encode())
        space, _ = import_items(tmp_path / "v.npy", tmp_path / f"s{len(text)}", "v1", ids=lines)
        assert list(space.ids) == [name.encode() for name in names]
    lines.write_bytes(b"a\nb\n\xff\nd\ne\n")
    with pytest.raises(ItemSpaceError, match="row 2 an id must be valid Unicode"):
        import_items(tmp_path / "v.npy", tmp_path / "s", "v1", ids=lines)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_in_an_archive_of_any_layout(save: Callable[..., None], tmp_path: Path) -> None:
    rows = np.asfortranarray(ROWS.astype(np.float16))
    save(tmp_path / "v.npz", vectors=rows, other=np.zeros(3), ids=np.array([name.encode() for name in "abcde"]))
    space, _ = import_items(tmp_path / "v.npz", tmp_path / "s", "v1", metric="dot")
    assert list(space.ids) == [b"a", b"b", b"c", b"d", b"e"]
    np.testing.assert_array_equal(space.vectors, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "v.npz"]


def test_integer_ids_are_their_text(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", ROWS)
    np.save(tmp_path / "ids.npy", np.array([5, -3, 0, 1 << 62, 9]))
    space, _ = import_items(tmp_path / "v.npy", tmp_path / "s", "v1", ids=tmp_path / "ids.npy")
    assert list(space.ids) == [b"5", b"-3", b"0", str(1 << 62).encode(), b"9"]


def test_columns_of_other_names(tmp_path: Path) -> None:
    names = Columns("sku", "embedding")
    for kind in (".npz", ".parquet", ".jsonl"):
        file, _ = write(tmp_path, kind, list(zip(IDS, ROWS.tolist(), strict=True)), names)
        space, _ = import_items(file, tmp_path / kind[1:], "v1", columns=names)
        assert len(space) == 5
        with pytest.raises(ConfigError, match=r"lacks .*sku.*--id-column"):
            import_items(file, tmp_path / "none", "v1")
    assert not (tmp_path / "none").exists()


GOOD = [1.0, 2.0, 3.0]
BAD: dict[str, tuple[Any, Any, str]] = {
    "zero": ("b", [0.0, 0.0, 0.0], "is zero"),
    "nan": ("b", [1.0, float("nan"), 0.0], "is not finite"),
    "beyond_float32": ("b", [1e39, 1.0, 0.0], "is not finite"),
    "repeated": ("a", GOOD, "repeats an id"),
    "too_long": ("x" * 257, GOOD, "256 UTF-8 bytes"),
    "empty": ("", GOOD, "1 to 256"),
}
RAGGED: dict[str, tuple[Any, Any, str]] = {
    "short": ("b", [1.0], "has no vector of 3 numbers"),
    "null": ("b", None, "has no vector"),
    "null_id": (None, GOOD, "must be a string or an integer"),
    "empty_list": ("b", [], "has no vector of 3 numbers"),
    "null_in_it": ("b", [1.0, None, 2.0], "has no vector|is not finite"),
}
JSON_ONLY: dict[str, tuple[Any, Any, str]] = {
    "texts": ("b", ["1", "2", "3"], "has no vector of numbers"),
    "truth_values": ("b", [True, False, True], "has no vector of numbers"),
    "one_truth_value": ("b", [True, 2.0, 3.0], "has no vector of numbers"),
    "nested": ("b", [[1.0, 2.0, 3.0]], "has no vector of numbers"),
    "an_object": ("b", {"0": 1.0}, "has no vector of numbers"),
    "a_text": ("b", "123", "has no vector of numbers"),
    "beyond_all_numbers": ("b", [10**400, 1, 1], "has no vector of numbers"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*BAD, *RAGGED, *JSON_ONLY])
def test_a_bad_row_is_named_or_left_out(name: str, kind: str, tmp_path: Path) -> None:
    if name in RAGGED and kind in (".npy", ".npz"):
        return  # a matrix can't hold it
    if name in JSON_ONLY and kind != ".jsonl":
        return
    item, vector, why = {**BAD, **RAGGED, **JSON_ONLY}[name]
    file, ids = write(tmp_path, kind, [("a", GOOD), ("c", GOOD), ("d", GOOD), (item, vector), ("e", GOOD)])
    with pytest.raises(ItemSpaceError, match=rf"row 3 .*({why}).*--drop-bad") as caught:
        import_items(file, tmp_path / "v1", "v1", ids=ids)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "v1").exists()
    space, bad = import_items(file, tmp_path / "v1", "v1", ids=ids, drop_bad=True)
    assert list(space.ids) == [b"a", b"c", b"d", b"e"]
    assert bad.total == 1
    assert re.search(why, next(iter(bad.counts)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "is not JSON"),
        ("null", "lacks item_id or vector"),
        ("[1]", "lacks item_id or vector"),
        ('{"item_id": "b"}', "lacks item_id or vector"),
        ('{"vector": [1, 2, 3]}', "lacks item_id or vector"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_line_that_holds_no_item(line: str, why: str, first: bool, tmp_path: Path) -> None:
    good = [json.dumps({"item_id": name, "vector": GOOD}) for name in "acde"]
    lines = [line, *good] if first else [*good[:3], line, *good[3:]]
    (tmp_path / "v.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ItemSpaceError, match=f"row {0 if first else 3} {why}"):
        import_items(tmp_path / "v.jsonl", tmp_path / "v1", "v1")
    space, bad = import_items(tmp_path / "v.jsonl", tmp_path / "v1", "v1", drop_bad=True)
    assert list(space.ids) == [b"a", b"c", b"d", b"e"]
    assert dict(bad.counts) == {why: 1}


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_ids_are_named_by_their_rows_and_the_first_stays(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows: Rows = [(str(n % 7), rng.normal(size=3).tolist()) for n in range(30)]
    rows[3] = ("3", [0.0, 0.0, 0.0])  # a bad row repeats nothing: the next of its id is the first
    rows[20] = ("x" * 300, rows[20][1])
    file, ids = write(tmp_path, kind, rows)
    with pytest.raises(ItemSpaceError) as caught:
        import_items(file, tmp_path / "v1", "v1", ids=ids)
    said = [int(number) for number in re.findall(r"row (\d+) ", str(caught.value))]
    assert said == [3, 7, 8, 9, 11, 12, 13, 14, 15, 16]
    assert "and 13 more" in str(caught.value)
    space, bad = import_items(file, tmp_path / "v1", "v1", ids=ids, drop_bad=True)
    stay = [0, 1, 2, 4, 5, 6, 10]
    want = ItemSpace.save(tmp_path / "want", "v1", [rows[n][0] for n in stay], np.array([rows[n][1] for n in stay]))
    assert space.ids == want.ids
    np.testing.assert_array_equal(space.vectors, want.vectors)
    np.testing.assert_allclose(space.fallback, want.fallback, atol=1e-6)
    assert bad.total == 23
    assert bad.counts["repeats an id"] == 21


def test_rows_taken_back_take_their_popularity_along(tmp_path: Path) -> None:
    with SpaceWriter(tmp_path / "v1", "v1", "dot") as writer:
        writer.append(["a", "b", "a"], [[1, 0], [0, 2], [9, 9]], [1, 2, 3])
        writer.append(["b", "c"], [[9, 9], [3, 4]], [4, 5])
        assert writer.repeated_rows().tolist() == [2, 3]
        writer.drop_rows(writer.repeated_rows())
    want = ItemSpace.save(tmp_path / "w", "v1", ["a", "b", "c"], [[1, 0], [0, 2], [3, 4]], metric="dot")
    space = ItemSpace.load(tmp_path / "v1")
    assert space.ids == want.ids
    np.testing.assert_array_equal(space.vectors, want.vectors)
    assert space.popularity is not None
    assert space.popularity.tolist() == [1, 2, 5]
    assert space.max_row_norm == want.max_row_norm


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (pa.array([["1", "2"]]), "holds list<.*string>"),
        (pa.array([[True, False]]), "holds list<.*bool>"),
        (pa.array([1.0]), "holds double"),
        (pa.array(["1,2"]), "holds string"),
    ],
)
def test_a_column_that_holds_no_lists_of_numbers(column: Any, why: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": ["a"], "vector": column}), tmp_path / "v.parquet")
    with pytest.raises(ConfigError, match=f"vector {why}.*--vector-column"):
        import_items(tmp_path / "v.parquet", tmp_path / "v1", "v1")


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.float16()), pa.list_(pa.float32(), 3)])
def test_lists_of_any_numbers(kind: pa.DataType, tmp_path: Path) -> None:
    rows = np.arange(15, dtype=np.float16).reshape(5, 3)
    lists = pa.array([list(row) for row in rows] if pa.types.is_large_list(kind) else rows.tolist(), kind)
    pq.write_table(pa.table({"item_id": pa.array(range(5)), "vector": lists}), tmp_path / "v.parquet")
    space, _ = import_items(tmp_path / "v.parquet", tmp_path / "v1", "v1", metric="dot")
    np.testing.assert_array_equal(space.vectors, rows)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    file, _ = write(tmp_path, ".jsonl", [("a", GOOD), *[(f"z{n}", [0.0] * 3) for n in range(25)]])
    with pytest.raises(ItemSpaceError, match=r"row 10 is zero.* and 15 more"):
        import_items(file, tmp_path / "v1", "v1")


def _npy(folder: Path) -> Path:
    np.save(folder / "x.npy", ROWS)
    return folder / "x.npy"


def _objects(folder: Path) -> Path:
    np.savez(folder / "o.npz", ids=np.array([{}], dtype=object), vectors=np.array([[1.0]]))
    return folder / "o.npz"


def _broken(folder: Path) -> Path:
    np.savez(folder / "b.npz", ids=np.arange(50), vectors=np.ones((50, 3)))
    data = bytearray((folder / "b.npz").read_bytes())
    data[400] ^= 1  # in an array: its checksum tells
    (folder / "b.npz").write_bytes(data)
    return folder / "b.npz"


def _cut(folder: Path) -> Path:
    file = _broken(folder)
    file.write_bytes(file.read_bytes()[:700])
    return file


def _one_id(folder: Path) -> Path:
    np.savez(folder / "i.npz", ids=np.array("a"), vectors=np.ones((1, 3)))
    return folder / "i.npz"


def _text(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_npy, "--ids"),
        (_objects, "o.npz is not a .npz of plain arrays"),
        (_broken, "b.npz is not a .npz of plain arrays"),
        (_cut, "b.npz is not a .npz of plain arrays"),
        (_one_id, "ids must be one a row"),
        (_text("a.xyz", b"x"), "must end in"),
        (_text("a.npy", b"x"), "--ids"),
        (_text("a.npz", b"x"), "not a .npz"),
        (_text("a.parquet", b"x"), "Parquet"),
        (_text("a.jsonl", b"{"), "line 1"),
        (_text("a.jsonl", b"[]\n"), "a.jsonl is a JSON array"),
        (_text("a.jsonl", b'{"a": 1}\n{"item_id": 1}\n{"a": 1}'), r"line 1 lacks item_id and vector \(it has a\)"),
        (lambda folder: folder / "gone.npz", "no file"),
    ],
)
def test_what_is_no_such_file_is_one_line(make: Callable[[Path], Path], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        import_items(make(tmp_path), tmp_path / "v1", "v1")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_ids_and_vectors_must_be_as_many(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match="5 vectors need as many ids, there are 2"):
        import_items(_npy(tmp_path), tmp_path / "v1", "v1", ids=tmp_path / "ids.txt")
    np.save(tmp_path / "ids.npy", np.array(5))
    with pytest.raises(ConfigError, match="ids must be one a row"):
        import_items(_npy(tmp_path), tmp_path / "v1", "v1", ids=tmp_path / "ids.npy")


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, _ = write(tmp_path, ".jsonl", [("a", GOOD), ("b", [0.0] * 3), ("c", GOOD)])
    run = CliRunner().invoke
    ended = run(cli, ["items", "import", str(file), "--version", "v9", "--drop-bad", "--json"])
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert (found["items"], found["folder"], found["version"]) == (2, "items/v9", "v9")
    assert found["dropped"] == {"is zero and has no direction": 1}
    ended = run(cli, ["items", "export", "items/v9", "rows.npy", "--json"])
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout)["files"] == "rows.npy rows.npy.ids.txt"
    assert np.load("rows.npy").shape == (2, 3)
    assert Path("rows.npy.ids.txt").read_text() == "a\nc\n"


NUMBERS = st.floats(-1e6, 1e6, width=32).filter(lambda x: abs(x) > 1e-3)
SOME = st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=5)


def _word2vec(file: Path, names: list[str], rows: list[list[float]], header: bool) -> None:
    lines = [" ".join([name, *map(repr, row)]) for name, row in zip(names, rows, strict=True)]
    lines[:0] = [f"{len(rows)} 3"] * header
    file.write_text("\n".join(lines) + "\n")


def _binary(file: Path, names: list[str], rows: list[list[float]], header: bool) -> None:
    end = b"\n" * header  # some write one, some don't
    parts = [name.encode() + b" " + np.array(row, "<f4").tobytes() + end for name, row in zip(names, rows, strict=True)]
    file.write_bytes(f"{len(rows)} 3\n".encode() + b"".join(parts))


def _csv(write_row: Callable[[str, list[float]], list[str]], names_of: list[str], delimiter: str) -> Any:
    def make(file: Path, names: list[str], rows: list[list[float]], header: bool) -> None:
        with file.open("w", newline="") as out:
            writer = csv.writer(out, delimiter=delimiter)
            if header or len(names_of) != 2:
                writer.writerow(names_of)
            writer.writerows([write_row(name, row) for name, row in zip(names, rows, strict=True)])

    return make


def _pgvector(name: str, row: list[float]) -> list[str]:
    return [name, "[" + ",".join(map(repr, row)) + "]"]


TEXTS: dict[str, tuple[str, Any]] = {
    "word2vec": (".txt", _word2vec),
    "binary": (".bin", _binary),
    "fastText": (".VEC", _word2vec),
    "pgvector": (".csv", _csv(_pgvector, ["item_id", "vector"], ",")),
    "JSON list, tabs": (".tsv", _csv(lambda n, r: [n, json.dumps(r)], ["item_id", "vector"], "\t")),
    "numbers apart": (".csv", _csv(lambda n, r: ["x", " ".join(map(repr, r)), n], ["t", "vector", "item_id"], ";")),
    "a column each": (".CSV", _csv(lambda n, r: [n, "x", *map(repr, r)], ["item_id", "x9", "v0", "v1", "v2"], ",")),
    "by their name": (
        ".csv",
        _csv(
            lambda n, r: [*map(repr, r), n, "1", "2"], ["vector_1", "vector_2", "vector_3", "item_id", "n1", "n2"], "|"
        ),
    ),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(rows=SOME, header=st.booleans(), packed=st.booleans())
@pytest.mark.parametrize("form", TEXTS)
def test_vectors_in_text_make_the_same_space(
    form: str, rows: list[list[float]], header: bool, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    suffix, make = TEXTS[form]
    folder = tmp_path_factory.mktemp("texts")
    names = ["7", "é", "b,c", "d;e", 'f"g'][: len(rows)]
    file = folder / f"mine{suffix}"
    make(file, names, rows, header)
    if packed:
        file = folder / f"mine{suffix}.gz"
        file.write_bytes(gzip.compress((folder / f"mine{suffix}").read_bytes()))
    space, bad = import_items(file, folder / "v1", "v1", metric="dot")
    assert not bad.total
    assert [item.decode() for item in space.ids] == names
    np.testing.assert_array_equal(space.vectors, np.array(rows, np.float32))


def test_json_lines_as_people_have_them(tmp_path: Path) -> None:
    lines = [json.dumps({"item_id": name, "vector": row}) for name, row in zip(IDS, ROWS.tolist(), strict=True)]
    file = tmp_path / "MINE.JSONL"
    file.write_text("\ufeff\n" + "\n\n".join(lines) + "\n \n")
    space, _ = import_items(file, tmp_path / "v1", "v1")
    assert [item.decode() for item in space.ids] == IDS


def test_a_folder_of_parquet_parts(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "_SUCCESS").write_text("")
    for n, (name, row) in enumerate(zip(IDS, ROWS.tolist(), strict=True)):
        file, _ = write(tmp_path, ".parquet", [(name, row)])
        file.rename(folder / f"part-{n}.parquet")
    space, _ = import_items(folder, tmp_path / "v1", "v1")
    assert [item.decode() for item in space.ids] == IDS


@pytest.mark.parametrize("name", ["vectors", "arr_0"])
def test_a_npz_without_ids_takes_them_from_a_file(name: str, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "v.npz", **{name: ROWS})
    (tmp_path / "ids.txt").write_text("".join(f"{item}\n" for item in IDS))
    space, _ = import_items(tmp_path / "v.npz", tmp_path / "v1", "v1", ids=tmp_path / "ids.txt")
    assert [item.decode() for item in space.ids] == IDS
    with pytest.raises(ConfigError, match=r"lacks ids.*or the ids' file with --ids"):
        import_items(tmp_path / "v.npz", tmp_path / "v2", "v2")


def _bomb(folder: Path) -> Path:
    """A small archive whose array says of itself that it is larger than any disk."""
    head = io.BytesIO()
    np.lib.format.write_array_header_2_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50, 64)})
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ids.npy", head.getvalue())
        archive.writestr("vectors.npy", head.getvalue())
    return folder / "bomb.npz"


def _long(folder: Path) -> Path:
    """Gigabytes behind a header that speaks of a few bytes."""
    array = io.BytesIO()
    np.save(array, ROWS)
    with zipfile.ZipFile(folder / "long.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ids.npy", array.getvalue() + bytes(50 << 20))
        archive.writestr("vectors.npy", array.getvalue())
    return folder / "long.npz"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_bomb, "not a .npz of plain arrays"),
        (_long, "not a .npz of plain arrays"),
        (_text("a.jsonl.gz", gzip.compress(b"{" + b" " * (17 << 20))), "line 1: is longer than 16 MiB"),
        (_text("a.txt", b"x" * (17 << 20)), "line 1: is longer than 16 MiB"),
        (_text("a.csv.gz", gzip.compress(b"item_id,vector\n1,2\n")[:-9]), "no whole gzip file"),
        (_text("a.bin", b"hello"), "is not word2vec's binary format"),
        (_text("a.bin", b"2 3\na " + bytes(12)), "ends in row 1"),
        (_text("a.csv", b"sku,embedding\n1,[2]\n"), "--id-column and --vector-column"),
        (_text("a.csv", b"item_id,a0,a1,b0,b1\n1,2,3,4,5\n"), "--vector-column"),
    ],
)
def test_what_would_fill_memory_or_disk_is_one_line(make: Callable[[Path], Path], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        import_items(make(tmp_path), tmp_path / "v1", "v1")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "v1").exists()


def test_no_room_for_an_array_is_told_before_it_is_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "v.npz", ids=np.array(IDS), vectors=ROWS)
    monkeypatch.setattr(item_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ConfigError, match=r"needs [\d,]+ bytes beside the item space, where 10 are free"):
        import_items(tmp_path / "v.npz", tmp_path / "v1", "v1")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("a 1 2 3\nb 1 x 3\n", "row 1 has no vector of numbers"),
        ("a 1 2 3\nb 1 nan 3\n", "row 1 is not finite"),
        ("a 1 2 3\nb 1 2\n", "row 1"),
        ("a 1 2 3\na 1 2 4\n", "row 1 repeats an id"),
    ],
)
def test_bad_rows_of_text_are_named(data: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text(data)
    with pytest.raises(ItemSpaceError, match=why):
        import_items(tmp_path / "v.txt", tmp_path / "v1", "v1")
