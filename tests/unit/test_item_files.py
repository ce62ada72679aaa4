"""Item vectors of one's own: four kinds of files in, four out, and bad rows named or left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from stream import item_files
from stream.cli import cli
from stream.errors import ConfigError, ItemSpaceError
from stream.item_export import export_items
from stream.item_files import Columns, import_items
from stream.items import ItemSpace

IDS = ["a", "7", "été", "0b0e0c52-95cf-4d4e-9d0a-2c2a2b9b8d11", "x" * 256]
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
    again: list[Path] = export_items(space, tmp_path / f"out{kind}")
    back, _ = import_items(again[0], tmp_path / "v2", "v1", metric=metric, ids=again[1] if len(again) > 1 else None)
    assert back.ids == want.ids
    np.testing.assert_array_equal(back.vectors, want.vectors) if metric == "dot" else np.testing.assert_allclose(
        back.vectors, want.vectors, atol=1e-7
    )
    with pytest.raises(ConfigError, match="exists already"):
        export_items(space, tmp_path / f"out{kind}")


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
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*BAD, *RAGGED])
def test_a_bad_row_is_named_or_left_out(name: str, kind: str, tmp_path: Path) -> None:
    if name in RAGGED and kind in (".npy", ".npz"):
        return  # a matrix can't hold it
    item, vector, why = {**BAD, **RAGGED}[name]
    file, ids = write(tmp_path, kind, [("a", GOOD), ("c", GOOD), ("d", GOOD), (item, vector), ("e", GOOD)])
    with pytest.raises(ItemSpaceError, match=rf"row 3 .*{why}.*--drop-bad") as caught:
        import_items(file, tmp_path / "v1", "v1", ids=ids)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "v1").exists()
    space, bad = import_items(file, tmp_path / "v1", "v1", ids=ids, drop_bad=True)
    assert list(space.ids) == [b"a", b"c", b"d", b"e"]
    assert bad.total == 1
    assert why in next(iter(bad.counts))


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


def _text(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_npy, "--ids"),
        (_objects, "plain arrays"),
        (_text("a.csv", b"x"), "must end in"),
        (_text("a.npy", b"x"), "--ids"),
        (_text("a.npz", b"x"), "not a .npz"),
        (_text("a.parquet", b"x"), "Parquet"),
        (_text("a.jsonl", b"{"), "line 1"),
        (_text("a.jsonl", b"[]\n"), "line 1"),
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
