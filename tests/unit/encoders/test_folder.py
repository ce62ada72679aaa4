"""Folders of learned encoders: what was saved is what is loaded, and what is no encoder is refused in one line."""

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from onnx_models import linear, model_of
from strategies import random_space

from stream.core.encoders import MadeFor, MixEncoder, VersionedEncoder
from stream.core.formulas import user_embed_learned
from stream.encoders.folder import load_encoder, open_encoder, save_encoder
from stream.encoders.onnx_model import OnnxModel
from stream.errors import EncoderError

DIM = 4
SPACE = random_space("items_v1", DIM)
MADE_FOR = MadeFor(SPACE.version, SPACE.sha256, DIM)
WEIGHTS = np.random.default_rng(3).normal(size=(3 * DIM, DIM))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "encoder"
    save_encoder(made, linear(WEIGHTS), MADE_FOR, type_weights={"like": 2.0}, about={"method": "by hand"})
    return made


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_saved_encoder_says_what_the_seed_s_formula_says(tmp_path: Path, dtype: type) -> None:
    weights = WEIGHTS.astype(dtype)
    encoder = save_encoder(tmp_path / "e", linear(weights), MADE_FOR)
    for history in ([1, 2], [3, 1, 2, 9, 9], [*range(30)]):
        want = user_embed_learned(history, np.asarray(SPACE.vectors, dtype=np.float64), lambda x: x @ weights)
        got, status, _ = VersionedEncoder(encoder, 100).embed(SPACE, history)
        assert status == 0
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_it_is_read_back_with_all_that_it_was_saved_with(folder: Path) -> None:
    opened, loaded = open_encoder(folder), load_encoder(folder)
    assert opened.params == loaded.params
    assert loaded.made_for == MADE_FOR
    assert loaded.type_weights == {"like": 2.0}
    assert json.loads((folder / "encoder.json").read_bytes())["about"] == {"method": "by hand"}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    assert VersionedEncoder(opened, 100).version == VersionedEncoder(loaded, 100).version
    assert VersionedEncoder(opened, 100).version != VersionedEncoder(MixEncoder(), 100).version


def test_a_folder_is_never_written_over(folder: Path) -> None:
    with pytest.raises(EncoderError, match="exists already"):
        save_encoder(folder, linear(WEIGHTS), MADE_FOR)


def test_what_is_no_encoder_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="fails on 3"):
        save_encoder(tmp_path / "e", linear(WEIGHTS[:-1]), MADE_FOR)
    assert list(tmp_path.iterdir()) == []


def edited(folder: Path, **fields: object) -> Path:
    path = folder / "encoder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"contract": 2}, "not a manifest of this format"),
        ({"features": []}, "not a manifest of this format"),
        ({"features": ["median"]}, "a feature is mean"),
        ({"dim": 0}, "not a manifest of this format"),
        ({"items_sha256": "x"}, "not a manifest of this format"),
        ({"model_sha256": "0" * 64}, "sha256 differs"),
        ({"dim": 5}, "fails on 3"),
        ({"features": ["mean", "last"]}, "fails on 2"),
    ],
)
def test_a_manifest_that_is_none_or_of_something_else_is_refused(folder: Path, fields: dict[str, object], says: str):
    with pytest.raises(EncoderError, match=says):
        load_encoder(edited(folder, **fields))


def test_damage_is_refused(folder: Path) -> None:
    for name, data, says in (
        ("model.onnx", b"\x00" * 10, "sha256 differs"),
        ("encoder.json", b"{", "not a manifest"),
        ("encoder.json", b"[" * 100_000, "not a manifest"),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        with pytest.raises(EncoderError, match=says):
            load_encoder(folder)
        (folder / name).write_bytes(before)
    load_encoder(folder)
    for name in ("model.onnx", "encoder.json"):
        (folder / name).rename(folder / "away")
        with pytest.raises(EncoderError, match="can't be read"):
            load_encoder(folder)
        os.mkfifo(folder / name)
        with pytest.raises(EncoderError, match="no regular file"):
            load_encoder(folder)
        (folder / name).unlink()
        (folder / "away").rename(folder / name)


def test_a_model_too_large_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.encoders.folder.MAX_MODEL_BYTES", 100)
    with pytest.raises(EncoderError, match="larger than"):
        load_encoder(folder)


NODE = helper.make_node
EYE = np.eye(3 * DIM)[:, :DIM].copy()
BAD_MODELS = {
    "no model": (b"not onnx", "can't load the model"),
    "too few numbers": (linear(np.ones((3 * DIM, DIM - 1))), "must say"),
    "nothing finite": (
        model_of([NODE("MatMul", ["x", "w"], ["y"])], {"w": EYE * np.nan}, width=3 * DIM, dim=DIM),
        "no finite numbers",
    ),
    "one batch size": (
        model_of([NODE("MatMul", ["x", "w"], ["y"])], {"w": EYE}, width=3 * DIM, dim=DIM, rows=8),
        "fails on 3",
    ),
    "looks at the whole batch": (
        model_of(
            [
                NODE("MatMul", ["x", "w"], ["m"]),
                NODE("ReduceMean", ["m"], ["all"], axes=[0], keepdims=1),
                NODE("Add", ["m", "all"], ["y"]),
            ],
            {"w": EYE},
            width=3 * DIM,
            dim=DIM,
        ),
        "depends on the others",
    ),
    "of integers": (
        model_of([NODE("Identity", ["x"], ["y"])], {}, width=3 * DIM, dim=DIM, kind=7),
        "one input of floats or doubles",
    ),
}


@pytest.mark.parametrize(("model", "says"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_that_is_no_encoder_is_refused(tmp_path: Path, model: bytes, says: str) -> None:
    with pytest.raises(EncoderError, match=says) as caught:
        save_encoder(tmp_path / "e", model, MADE_FOR)
    assert "\n" not in str(caught.value)


def test_without_onnxruntime_it_is_said_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    open_encoder(folder)  # its name can be had
    with pytest.raises(EncoderError, match=r"pip install 'user-embedding-stream\[learned\]'"):
        load_encoder(folder)


def test_a_model_is_loaded_once_whoever_asks_first(folder: Path) -> None:
    reads: list[int] = []

    def read() -> bytes:
        reads.append(1)
        return (folder / "model.onnx").read_bytes()

    model = OnnxModel(read, "e")
    threads = [threading.Thread(target=model, args=(np.zeros((1, 3 * DIM)),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
