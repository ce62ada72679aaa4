"""Item spaces: what is written, what is refused, and in which words."""

import hashlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ids as any_ids

from stream.errors import ItemSpaceError
from stream.items.space import ItemSpace
from stream.items.writer import SpaceWriter

IDS = ["a", 5, "é", "0f0e0d0c-0b0a-0908-0706-050403020100"]
ROWS = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, -2.0], [0.6, 0.8]])


@pytest.fixture
def folder(tmp_path):
    """A good folder of four items."""
    ItemSpace.save(tmp_path / "items", "items_v1", IDS, ROWS, popularity=[1, 2, 3, 4])
    return tmp_path / "items"


def refused(folder, why):
    """The folder is refused in one line that names it and says `why`."""
    with pytest.raises(ItemSpaceError, match=why) as caught:
        ItemSpace.load(folder)
    one_line(caught.value, folder)


def one_line(error, folder):
    text = str(error)
    assert "\n" not in text
    assert len(text) < 400 + len(str(folder))
    assert str(folder) in text


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            del manifest[name]
        else:
            manifest[name] = value
    path.write_text(json.dumps(manifest))


def replace_file(folder, name, data):
    """Put other bytes in place of a file, and have the manifest vouch for them."""
    (folder / name).write_bytes(data)
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    edit_manifest(folder, sha256={**hashes, name: hashlib.sha256(data).hexdigest()})


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), **options)
    return buffer.getvalue()


# -- what is written ----------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(folder):
    space = ItemSpace.load(folder)
    assert (space.version, space.dim, len(space), space.metric) == ("items_v1", 2, 4, "cosine")
    assert space.ids == [str(i).encode() for i in IDS]
    np.testing.assert_allclose(space.vectors, ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True), atol=1e-7)
    assert space.vectors.dtype == space.fallback.dtype == np.float32
    assert space.popularity.tolist() == [1, 2, 3, 4]
    assert space.sha256 == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert space.max_row_norm == pytest.approx(1.0, abs=1e-6)
    assert space.rows(["é", 5, "5", "nobody", "a"]).tolist() == [2, 1, 1, -1, 0]
    assert space.row(b"5", -1) == 1
    assert space.row(b"6", -1) == -1


def test_the_folder_is_as_the_contract_says(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "ids.txt",
        "manifest.json",
        "popularity.npy",
        "vectors.npy",
    ]
    assert (folder / "ids.txt").read_bytes() == "".join(f"{i}\n" for i in IDS).encode()
    array = np.load(folder / "vectors.npy", allow_pickle=False)
    assert (array.dtype, array.shape) == (np.dtype("<f4"), (4, 2))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"version", "dim", "count", "dtype", "metric", "fallback", "sha256", "max_row_norm"} <= manifest.keys()
    assert (manifest["version"], manifest["dim"], manifest["count"]) == ("items_v1", 2, 4)
    assert (manifest["dtype"], manifest["metric"]) == ("float32", "cosine")
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert set(manifest["sha256"]) == {"ids.txt", "vectors.npy", "popularity.npy"}


def test_saving_the_same_twice_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        ItemSpace.save(tmp_path / name, "v", IDS, ROWS)
    for name in ("manifest.json", "ids.txt", "vectors.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_dot_keeps_rows_as_they_are(tmp_path):
    space = ItemSpace.save(tmp_path / "dot", "v", IDS, ROWS, metric="dot")
    np.testing.assert_array_equal(space.vectors, ROWS.astype(np.float32))
    assert space.max_row_norm == pytest.approx(5.0)
    assert space.popularity is None


def test_vectors_are_mapped_and_read_only(folder):
    space = ItemSpace.load(folder)
    with pytest.raises(ValueError, match="read-only"):
        space.vectors[0, 0] = 1
    base = space.vectors
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@settings(max_examples=10)
@given(st.lists(any_ids, min_size=1, max_size=6, unique_by=str))
def test_every_acceptable_id_can_name_a_row(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("items") / "v"
    space = ItemSpace.save(path, "v", names, np.ones((len(names), 2)))
    assert space.rows(names).tolist() == list(range(len(names)))
    assert ItemSpace.load(path).ids == [str(name).encode() for name in names]


# -- the fallback -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_the_fallback_is_the_normalised_centroid(tmp_path, metric):
    space = ItemSpace.save(tmp_path / "v", "v", IDS, ROWS, metric=metric)
    rows = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True) if metric == "cosine" else ROWS
    centroid = rows.mean(axis=0)
    np.testing.assert_allclose(space.fallback, centroid / np.linalg.norm(centroid), rtol=0, atol=1e-6)
    assert abs(float(np.linalg.norm(space.fallback)) - 1) <= 1e-5


@pytest.mark.parametrize("dim", [1, 2, 48])
def test_the_fallback_is_the_seeds_where_the_centroid_vanishes(tmp_path, dim):
    row = np.arange(1.0, dim + 1)
    space = ItemSpace.save(tmp_path / "v", "v", ["a", "b"], np.array([row, -row]))
    np.testing.assert_allclose(space.fallback, np.ones(dim) / np.sqrt(dim), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1 - 1.003e-5, 1 - 0.997e-5, 1 + 0.997e-5, 1 + 1.003e-5])
def test_the_length_of_a_fallback_is_measured_as_readers_measure_it(tmp_path, length):
    """In float64: a fallback that loads here must not be corrupt to a reader, nor one refused that readers take."""
    folder = tmp_path / "v1"
    direction = np.random.default_rng(48).normal(size=48)
    direction /= np.linalg.norm(direction)
    ItemSpace.save(folder, "v1", ["a", "b"], np.stack([direction, direction]))
    edit_manifest(folder, fallback=[float(x) for x in (direction * length).astype(np.float32)])
    if abs(length - 1) < 1e-5:
        assert ItemSpace.load(folder).fallback.shape == (48,)
    else:
        with pytest.raises(ItemSpaceError, match="unit vector"):
            ItemSpace.load(folder)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-12, 1e-9, 1e-3, 1e3, 1e12, 1e25, 1e37])
def test_the_fallback_of_a_dot_space_does_not_depend_on_its_unit(tmp_path, scale):
    space = ItemSpace.save(tmp_path / "v", "v", IDS, ROWS * scale, metric="dot")
    centroid = ROWS.mean(axis=0)
    np.testing.assert_allclose(space.fallback, centroid / np.linalg.norm(centroid), rtol=0, atol=1e-5)
    assert space.max_row_norm == pytest.approx(5 * scale, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e-9, 1e-6, 1e6, 1e30])
def test_rows_of_any_length_are_normalised_for_cosine(tmp_path, scale):
    space = ItemSpace.save(tmp_path / "v", "v", IDS, ROWS * scale)
    np.testing.assert_allclose(space.vectors, ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True), atol=1e-6)


# -- what saving refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ids": ["a", "b", "c", "a"]}, "row 3 repeats"),
        ({"ids": ["a", 5, "5", "c"]}, "row 2 repeats"),
        ({"ids": ["a", "b", "c", ""]}, "id"),
        ({"ids": ["a", "b", "c", "d\n"]}, "id"),
        ({"ids": ["a", "b", "c", "x" * 257]}, "id"),
        ({"ids": ["a", "b", "c", "\ud800"]}, "id"),
        ({"ids": ["a", "b", "c", True]}, "id"),
        ({"ids": ["a", "b", "c", None]}, "id"),
        ({"ids": ["a", "b", "c", 1.5]}, "id"),
        ({"ids": ["a", "b", "c", b"d"]}, "id"),
        ({"ids": ["a", "b", "c"]}, "shape"),
        ({"ids": []}, "shape"),
        ({"ids": [], "vectors": np.zeros((0, 2))}, "shape"),
        ({"vectors": ROWS[:, :0]}, "shape"),
        ({"vectors": ROWS[0]}, "shape"),
        ({"vectors": ROWS[None]}, "shape"),
        ({"vectors": np.array([[1, 0], [np.nan, 0], [1, 1], [1, 1]])}, "row 1 is not finite"),
        ({"vectors": np.array([[1, 0], [1, 0], [1, -np.inf], [1, 1]])}, "row 2 is not finite"),
        ({"vectors": np.array([[1, 0], [1, 0], [1, 0], [0, 0]])}, "row 3 is zero"),
        ({"vectors": np.array([[1, 0], [1, 0], [1, 0], [0, 0]]), "metric": "dot"}, "row 3 is zero"),
        ({"vectors": np.array([[1, 0], [1, 0], [1, 0], [0, 1e-60]]), "metric": "dot"}, "row 3 is zero"),
        ({"vectors": np.array([[1, 0], [1e39, 0], [1, 0], [0, 1]]), "metric": "dot"}, "row 1 is not finite"),
        ({"version": "a:b"}, "version"),
        ({"version": "fallback"}, "reserved"),
        ({"version": ""}, "version"),
        ({"metric": "euclid"}, "metric"),
        ({"popularity": [1, 2, 3]}, "popularity"),
        ({"popularity": [1, 2, 3, np.nan]}, "popularity"),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, dict) else None,
)
def test_what_can_not_be_saved_leaves_nothing_behind(tmp_path, changes, why):
    arguments = {"version": "v", "ids": IDS, "vectors": ROWS, **changes}
    with pytest.raises(ItemSpaceError, match=why) as caught:
        ItemSpace.save(tmp_path / "items", **arguments)
    one_line(caught.value, tmp_path / "items")
    assert list(tmp_path.iterdir()) == []


def test_versions_are_immutable(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ItemSpaceError, match="immutable") as caught:
        ItemSpace.save(folder, "items_v1", IDS, ROWS)
    one_line(caught.value, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(SpaceWriter, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        ItemSpace.save(tmp_path / "items", "v", IDS, ROWS)
    assert list(tmp_path.iterdir()) == []


# -- what loading refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", "ids.txt", "vectors.npy", "popularity.npy"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, name)


def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "nowhere", r"manifest\.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", r"manifest\.json")


@pytest.mark.parametrize("name", ["ids.txt", "vectors.npy", "popularity.npy"])
def test_a_file_that_is_not_the_one_described_is_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, f"{name}.*sha256")


@pytest.mark.parametrize("length", [0, 1, 10, 127, 130, -1])
def test_truncated_vectors_are_refused(folder, length):
    data = (folder / "vectors.npy").read_bytes()
    (folder / "vectors.npy").write_bytes(data[:length])
    refused(folder, "sha256")
    replace_file(folder, "vectors.npy", data[:length])
    refused(folder, r"vectors\.npy")


def with_row(row, at=1):
    rows = (ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)).astype(np.float32)
    rows[at] = row
    return rows


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (with_row([np.nan, 0]), "row 1 is not finite"),
        (with_row([np.inf, 0], at=3), "row 3 is not finite"),
        (with_row([0, 0], at=0), "row 0 is zero"),
        (with_row([2, 0]), "row 1 is not of unit length"),
        (with_row([0.99, 0]), "row 1 is not of unit length"),
        (with_row([1, 0])[:3], "shape|manifest"),
        (with_row([1, 0])[:, :1], "shape|manifest"),
        (with_row([1, 0]).astype(np.float64), "float64"),
        (with_row([1, 0]).astype(">f4"), ">f4"),
        (with_row([1, 0]).reshape(-1), "manifest"),
        (np.zeros((4, 2), np.int32), "int32"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}{value.shape}",
)
def test_vectors_that_are_not_what_they_must_be(folder, array, why):
    replace_file(folder, "vectors.npy", npy(array))
    refused(folder, why)


class Bomb:
    """Fails the test when something unpickles it."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["vectors.npy", "popularity.npy"])
def test_pickles_are_refused_unopened(folder, name):
    replace_file(folder, name, npy(np.array([[Bomb()]], dtype=object), allow_pickle=True))
    refused(folder, name)


def test_an_archive_in_disguise_is_refused(folder):
    buffer = io.BytesIO()
    np.savez(buffer, vectors=with_row([1, 0]))
    replace_file(folder, "vectors.npy", buffer.getvalue())
    refused(folder, r"vectors\.npy")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"a\n5\nb\na\n", "row 3 repeats"),
        (b"a\n5\nb\n", "lines"),
        (b"a\n5\nb\nc\nd\n", "lines"),
        (b"a\n5\nb\nc", "lines"),
        (b"", "lines"),
        (b"a\n\nb\nc\n", "line 2"),
        (b"a\r\n5\r\nb\r\nc\r\n", "line 1"),
        (b"a\n5\n\xff\nc\n", "line 3"),
        (b"a\n5\nb\n" + b"x" * 257 + b"\n", "line 4"),
        (b"a\n5\nb\x00\nc\n", "line 3"),
    ],
)
def test_ids_that_are_not_what_they_must_be(folder, text, why):
    replace_file(folder, "ids.txt", text)
    refused(folder, why)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff{}", b"{}", b'{"format": 1}', b"\xef\xbb\xbf{}", b"[" * 100_000],
)
def test_what_is_no_manifest_is_refused(folder, data):
    (folder / "manifest.json").write_bytes(data)
    refused(folder, r"manifest\.json")


@pytest.mark.parametrize(
    "changes",
    [{name: ...} for name in ("version", "dim", "count", "dtype", "metric", "fallback", "sha256", "max_row_norm")]
    + [
        {"version": "a:b"},
        {"version": 5},
        {"version": None},
        {"version": "app"},
        {"dim": 0},
        {"dim": -2},
        {"dim": 3},
        {"dim": "two"},
        {"dim": None},
        {"dim": 2.5},
        {"count": 0},
        {"count": 5},
        {"count": []},
        {"dtype": "float64"},
        {"metric": "euclid"},
        {"metric": []},
        {"metric": None},
        {"max_row_norm": 2.0},
        {"max_row_norm": -1.0},
        {"max_row_norm": float("nan")},
        {"max_row_norm": "long"},
        {"fallback": [1.0]},
        {"fallback": [1.0, 1.0]},
        {"fallback": [0.0, 0.0]},
        {"fallback": [float("nan"), 1.0]},
        {"fallback": ["x", "y"]},
        {"fallback": [[1.0], [0.0, 1.0]]},
        {"fallback": None},
        {"fallback": {"a": 1}},
        {"sha256": {}},
        {"sha256": []},
        {"sha256": ["ids.txt", "vectors.npy"]},
        {"sha256": "ids.txt vectors.npy"},
        {"sha256": {"ids.txt": "0" * 64, "vectors.npy": "0" * 64}},
        {"sha256": {"ids.txt": None, "vectors.npy": None}},
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else_is_refused(folder, changes):
    edit_manifest(folder, **changes)
    refused(folder, ".")


def test_a_manifest_can_not_point_outside_its_folder(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    edit_manifest(folder, sha256={**hashes, "../secret": hashlib.sha256(b"x").hexdigest()})
    refused(folder, ".")
