"""Item spaces of two sides: what items count as in a history is written, checked, imported, exported, and summed."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from strategies import random_space

from stream.cli.root import cli
from stream.core.encoders import MixEncoder, VersionedEncoder
from stream.core.formulas import build_user_embedding, user_embed_mix
from stream.errors import ConfigError, ItemSpaceError
from stream.items import importer
from stream.items.exporter import export_items
from stream.items.importer import import_items
from stream.items.space import ItemSpace
from stream.items.writer import SpaceWriter

IDS = ["a", "b", "c", "d"]
INDEX = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, -2.0], [0.6, 0.8]])
HISTORY = np.array([[0.0, 12.0], [1.0, 1.0], [-1.0, 0.5], [2.0, -2.0]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder of four items."""
    ItemSpace.save(tmp_path / "items", "v1", IDS, INDEX, metric="dot", history_vectors=HISTORY)
    return tmp_path / "items"


def test_what_is_saved_is_loaded(folder: Path) -> None:
    space = ItemSpace.load(folder)
    np.testing.assert_array_equal(space.vectors, INDEX.astype(np.float32))
    np.testing.assert_array_equal(space.history_vectors, HISTORY.astype(np.float32))
    assert space.two_sided
    assert space.max_row_norm == 12.0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["max_row_norm"], manifest["history_max_row_norm"]) == (5.0, 12.0)
    digest = hashlib.sha256((folder / "history_vectors.npy").read_bytes()).hexdigest()
    assert manifest["sha256"]["history_vectors.npy"] == digest
    centroid = INDEX.mean(axis=0)
    np.testing.assert_allclose(space.fallback, centroid / np.linalg.norm(centroid), atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        space.history_vectors[0, 0] = 1


def test_a_space_of_one_side_is_as_it_was(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "v1", "v1", IDS, INDEX)
    assert not space.two_sided
    assert space.history_vectors is space.vectors
    assert "history_max_row_norm" not in json.loads((tmp_path / "v1" / "manifest.json").read_text())


def test_the_rows_of_a_cosine_space_have_length_1_on_both_sides(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "v1", "v1", IDS, INDEX, history_vectors=HISTORY)
    lengths = np.linalg.norm(HISTORY, axis=1, keepdims=True)
    np.testing.assert_allclose(space.history_vectors, HISTORY / lengths, atol=1e-6)
    assert space.max_row_norm == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("history", "why"),
    [
        (HISTORY[:3], "shape"),
        (HISTORY[:, :1], "shape"),
        (np.array([[1, 0], [0, 0], [1, 1], [1, 1]]), "history row 1 is zero"),
        (np.array([[1, 0], [1, 0], [1, np.inf], [1, 1]]), "history row 2 is not finite"),
        (np.array([[1, 0], [1, 0], [1, 0], [1e39, 1]]), "history row 3 is not finite"),
    ],
    ids=["rows", "dim", "zero", "infinite", "too large"],
)
def test_rows_that_are_none_are_refused(history: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ItemSpaceError, match=why):
        ItemSpace.save(tmp_path / "items", "v", IDS, INDEX, metric="dot", history_vectors=history)
    assert list(tmp_path.iterdir()) == []


def test_all_items_or_none_have_a_history_side(tmp_path: Path) -> None:
    for first, then in ((HISTORY[:2], None), (None, HISTORY[2:])):
        with SpaceWriter(tmp_path / "v", "v", "dot") as writer:
            writer.append(IDS[:2], INDEX[:2], history_vectors=first)
            with pytest.raises(ItemSpaceError, match="all items or for none"):
                writer.append(IDS[2:], INDEX[2:], history_vectors=then)
        shutil.rmtree(tmp_path / "v")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))


def put(folder: Path, array: Any) -> None:
    """Other history rows, which the manifest vouches for."""
    np.save(folder / "history_vectors.npy", np.asarray(array, dtype=np.float32))
    digest = hashlib.sha256((folder / "history_vectors.npy").read_bytes()).hexdigest()
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    edit(folder, sha256={**hashes, "history_vectors.npy": digest})


def flip(folder: Path) -> None:
    file = folder / "history_vectors.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def unlist(folder: Path) -> None:
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    edit(folder, sha256={name: digest for name, digest in hashes.items() if name != "history_vectors.npy"})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / "history_vectors.npy").unlink(), r"history_vectors\.npy can't be read"),
        (flip, r"history_vectors\.npy is not the file its manifest describes"),
        (unlist, r"must list history_vectors\.npy"),
        (lambda folder: edit(folder, history_max_row_norm=None), "needs history_max_row_norm"),
        (lambda folder: edit(folder, history_max_row_norm=11.0), "history_max_row_norm is 11"),
        (lambda folder: put(folder, HISTORY[:3]), r"history_vectors\.npy is float32 \(3, 2\)"),
        (lambda folder: put(folder, HISTORY[:, :1]), r"history_vectors\.npy is float32 \(4, 1\)"),
        (lambda folder: put(folder, HISTORY * [[1], [1], [0], [1]]), "history row 2 is zero"),
        (lambda folder: put(folder, HISTORY * [[1], [1], [1], [np.nan]]), "history row 3 is not finite"),
    ],
    ids=["missing", "flipped", "not listed", "no norm", "other norm", "rows", "dim", "zero", "nan"],
)
def test_a_damaged_history_side_is_refused(folder: Path, damage: Any, why: str) -> None:
    damage(folder)
    with pytest.raises(ItemSpaceError, match=why) as caught:
        ItemSpace.load(folder)
    assert "\n" not in str(caught.value)


def test_rows_taken_back_are_taken_from_both_sides(tmp_path: Path) -> None:
    with SpaceWriter(tmp_path / "v1", "v1", "dot") as writer:
        writer.append(["a", "b", "a"], [[1, 0], [0, 2], [9, 9]], [1, 2, 3], [[1, 1], [2, 2], [50, 0]])
        writer.append(["b", "c"], [[9, 9], [3, 4]], [4, 5], [[60, 0], [3, 3]])
        writer.drop_rows(writer.repeated_rows())
    space = ItemSpace.load(tmp_path / "v1")
    assert space.ids == [b"a", b"b", b"c"]
    assert space.vectors.tolist() == [[1, 0], [0, 2], [3, 4]]
    assert space.history_vectors.tolist() == [[1, 1], [2, 2], [3, 3]]
    assert space.max_row_norm == pytest.approx(np.sqrt(18))


# -- in and out ---------------------------------------------------------------------------------------------------


def array_files(folder: Path, history: Any = HISTORY) -> tuple[Path, Path, Path]:
    np.save(folder / "index.npy", INDEX)
    np.save(folder / "history.npy", history)
    (folder / "ids.txt").write_text("".join(f"{item}\n" for item in IDS))
    return folder / "index.npy", folder / "history.npy", folder / "ids.txt"


def json_file(file: Path, ids: list[str], rows: Any) -> Path:
    lines = [{"item_id": item, "vector": list(row)} for item, row in zip(ids, rows, strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("kind", ["npy", "jsonl", "npy beside jsonl"])
def test_both_sides_are_imported(kind: str, tmp_path: Path) -> None:
    index, history, ids = array_files(tmp_path)
    if kind != "npy":
        index, own = json_file(tmp_path / "index.jsonl", IDS, INDEX), None
    if kind == "jsonl":
        history = json_file(tmp_path / "history.jsonl", IDS, HISTORY)
    if kind == "npy beside jsonl":
        with pytest.raises(ConfigError, match="--ids"):
            import_items(index, tmp_path / "v1", "v1", metric="dot", history_vectors=history)
        return
    own = ids if kind == "npy" else None
    space, bad = import_items(index, tmp_path / "v1", "v1", metric="dot", ids=own, history_vectors=history)
    np.testing.assert_array_equal(space.vectors, INDEX.astype(np.float32))
    np.testing.assert_array_equal(space.history_vectors, HISTORY.astype(np.float32))
    assert not bad.total


def test_pieces_of_the_two_files_need_not_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = importer.pieces

    def small(file: Path, *args: Any) -> Any:
        size = 3 if file.name.startswith("index") else 2
        for piece in whole(file, *args):
            for start in range(0, len(piece.ids), size):
                some = slice(start, start + size)
                yield piece._replace(ids=piece.ids[some], vectors=piece.vectors[some])

    monkeypatch.setattr(importer, "pieces", small)
    index, history, ids = array_files(tmp_path)
    space, _ = import_items(index, tmp_path / "v1", "v1", metric="dot", ids=ids, history_vectors=history)
    np.testing.assert_array_equal(space.history_vectors, HISTORY.astype(np.float32))


def test_a_row_that_is_bad_on_the_history_side_is_named_or_left_out(tmp_path: Path) -> None:
    index, history, ids = array_files(tmp_path, HISTORY * [[1], [0], [1], [1]])
    with pytest.raises(ItemSpaceError, match="row 1 of the history vectors is zero"):
        import_items(index, tmp_path / "v1", "v1", metric="dot", ids=ids, history_vectors=history)
    space, bad = import_items(
        index, tmp_path / "v1", "v1", metric="dot", ids=ids, history_vectors=history, drop_bad=True
    )
    assert space.ids == [b"a", b"c", b"d"]
    assert space.history_vectors.tolist() == HISTORY[[0, 2, 3]].tolist()
    assert bad.total == 1


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (["a", "c", "b", "d"], "row 1 is another item"),
        (IDS[:3], r"ends after 3 rows.*same order"),
        ([*IDS, "e"], r"goes on where .* ends, after 4 rows"),
    ],
)
def test_both_files_hold_the_same_items_in_the_same_order(ids: list[str], why: str, tmp_path: Path) -> None:
    index = json_file(tmp_path / "index.jsonl", IDS, INDEX)
    history = json_file(tmp_path / "history.jsonl", ids, np.ones((len(ids), 2)))
    with pytest.raises(ConfigError, match=why):
        import_items(index, tmp_path / "v1", "v1", metric="dot", history_vectors=history)
    assert not (tmp_path / "v1").exists()


def test_from_the_command_line_and_back(tmp_path: Path) -> None:
    index, history, ids = array_files(tmp_path)
    options = ["--ids", str(ids), "--version", "v1", "--metric", "dot", "--history-vectors", str(history), "--json"]
    made = CliRunner().invoke(cli, ["items", "import", str(index), str(tmp_path / "v1"), *options])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["two_sided"] is True
    checked = CliRunner().invoke(cli, ["items", "check", str(tmp_path / "v1"), "--json"])
    assert json.loads(checked.stdout)["two_sided"] is True
    for more, want in (([], INDEX), (["--history"], HISTORY)):
        out = tmp_path / f"out{len(more)}.npy"
        written = CliRunner().invoke(cli, ["items", "export", str(tmp_path / "v1"), str(out), *more])
        assert written.exit_code == 0, written.output
        np.testing.assert_array_equal(np.load(out), want.astype(np.float32))


def test_a_space_of_one_side_has_no_history_to_export(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "v1", "v1", IDS, INDEX)
    with pytest.raises(ConfigError, match="without --history"):
        export_items(space, tmp_path / "out.npy", history=True)


# -- summed -------------------------------------------------------------------------------------------------------


def test_a_history_is_summed_on_its_side_and_searches_the_other() -> None:
    space = random_space("v1", 4, metric="dot")
    assert space.two_sided
    rows = np.array([3, 1, 7, 7, 2])
    by_hand = VersionedEncoder(MixEncoder(), 100).embed(space, [str(row) for row in rows])[0]
    np.testing.assert_allclose(by_hand, user_embed_mix(rows, space.history_vectors), atol=1e-6)
    np.testing.assert_allclose(by_hand, build_user_embedding(1, rows.tolist(), space), atol=1e-6)
    assert np.abs(by_hand - user_embed_mix(rows, space.vectors)).max() > 0.1
