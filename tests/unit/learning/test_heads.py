"""Learned encoders: what they learn, from what, and that the model in the folder is what was learned."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from strategies import Driver, Event, make_space

from stream.core.encoders import VersionedEncoder
from stream.core.events import EventRow
from stream.core.formulas import make_user_features
from stream.core.learned_encoder import SEED_FEATURES, LearnedEncoder
from stream.encoders.folder import load_encoder
from stream.errors import ConfigError, EncoderError
from stream.items.space import ItemSpace
from stream.learning import heads
from stream.learning.heads import FEATURES, Head, train_encoder, train_head
from stream.learning.histories import by_user, split_by_time

ITEMS, DIM, T0 = 40, 8, 1_700_000_000_000


def space(metric: str = "dot") -> ItemSpace:
    sides = np.random.default_rng(1).normal(size=(2, ITEMS, DIM))
    return make_space("items_v1", range(ITEMS), sides[0], metric=metric, history=sides[1] if metric == "dot" else None)


def walks(users: int = 120, length: int = 12, seed: int = 0, step: int = 7) -> list[EventRow]:
    """Each user goes through the items in steps of seven: the newest item says which is next, their mean doesn't."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        start = int(rng.integers(ITEMS))
        for n in range(length):
            at = T0 + 60_000 * n + user
            rows.append(EventRow(str(user), str((start + step * n) % ITEMS), "view", at))
    return rows


@pytest.mark.parametrize("method", ["ridge", pytest.param("mlp", marks=pytest.mark.slow)])
def test_it_learns_what_comes_next_where_a_mixture_can_not(method: str) -> None:
    _, training = train_head(by_user(walks()), space(), method=method, features=SEED_FEATURES)
    assert training.mix_recall_10 < 0.6
    assert training.recall_10 > 0.9
    assert training.method == method
    assert training.validated == training.cases // 10


@pytest.mark.parametrize("method", ["ridge", "mlp"])
def test_the_same_events_give_the_same_model(method: str) -> None:
    one, other = (train_head(by_user(walks(users=40), 0), space(), method=method)[0] for _ in range(2))
    for (w, b), (v, c) in zip(one.layers, other.layers, strict=True):
        np.testing.assert_array_equal(w, v)
        np.testing.assert_array_equal(b, c)


def test_features_are_those_that_the_worker_makes_of_what_is_strictly_older(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each learned case, the features are the seed's, of the history before it; ties see nothing of each other."""
    rows = walks(users=3, length=60)
    rows += [EventRow("tied", str(item), "view", T0 + 1_000 * (item // 4)) for item in range(40)]
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    ridge = heads._ridge
    monkeypatch.setattr(heads, "_ridge", lambda r, w, lam: seen.append((r.features, r.target)) or ridge(r, w, lam))
    items, histories = space("cosine"), by_user(rows)
    train_head(histories, items, features=SEED_FEATURES)
    features, targets = seen[-1]
    want = []
    for row in rows:
        of_user = [other for other in rows if other.user_id == row.user_id]
        before = [int(other.item_id) for other in of_user if other.ts_ms < row.ts_ms]
        if len(before) >= 2 and int(row.item_id) not in before:
            want.append(
                (row.ts_ms, int(row.item_id), make_user_features(before, np.asarray(items.vectors, np.float64)))
            )
    assert sorted(targets.tolist()) == sorted(item for _, item, _ in want)
    for feature, target in zip(features, targets.tolist(), strict=True):
        assert any(item == target and np.allclose(feature, f, atol=1e-6) for _, item, f in want)


def test_nothing_later_is_learned_from(tmp_path: Path) -> None:
    rows, items = walks(), space()
    ordered = sorted(rows, key=lambda row: row.ts_ms)
    cut = round(0.8 * len(rows))
    later = [row._replace(item_id="3") for row in ordered[cut:]]  # something else altogether
    one, _ = train_encoder(rows, items, tmp_path / "one")
    other, _ = train_encoder([*ordered[:cut], *later], items, tmp_path / "other")
    assert one.model_sha256 == other.model_sha256


@pytest.mark.parametrize("method", ["ridge", "mlp"])
def test_the_folder_holds_what_was_learned_and_the_stream_publishes_it(tmp_path: Path, method: str) -> None:
    items = space()
    rows = walks(users=40)
    head, _ = train_head(by_user(split_by_time(rows, 0.8)[0], 0), items, method=method, features=FEATURES)
    made, training = train_encoder(rows, items, tmp_path / "e", method=method)
    loaded = load_encoder(tmp_path / "e")
    assert loaded.params == made.params
    assert loaded.made_for == (items.version, items.sha256, items.dim)
    about = json.loads((tmp_path / "e" / "encoder.json").read_bytes())["about"]
    assert about == {**asdict(training), "share": 0.8, "seed": 0}
    history = [3, 10, 17, 24]
    in_numpy = VersionedEncoder(LearnedEncoder(head, "0" * 64, loaded.made_for, FEATURES), 20)
    want, status, _ = in_numpy.embed(items, history)
    assert status == 0
    driver = Driver([items], VersionedEncoder(loaded, 20))
    driver.apply(*[Event("u", item, "view", T0 + n) for n, item in enumerate(history)])
    np.testing.assert_allclose(driver.record("u").vector, want, atol=1e-6)


def test_a_network_in_onnx_says_what_it_says_in_numpy() -> None:
    from onnxruntime import InferenceSession

    rng = np.random.default_rng(0)
    head = Head(((rng.normal(size=(6, 5)), rng.normal(size=5)), (rng.normal(size=(5, 3)), rng.normal(size=3))))
    features = rng.normal(size=(7, 6))
    (said,) = InferenceSession(head.onnx(), providers=["CPUExecutionProvider"]).run(None, {"features": features})
    np.testing.assert_allclose(said, head(features), rtol=1e-12)


def test_too_little_to_learn_from_is_said(tmp_path: Path) -> None:
    for rows in ([], walks(users=2, length=5)):
        with pytest.raises(EncoderError, match="learn from"):
            train_encoder(rows, space(), tmp_path / "e")
    with pytest.raises(ValueError, match="no method 'forest'"):
        train_head(by_user(walks()), space(), method="forest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a feature is mean"):
        train_encoder(walks(), space(), tmp_path / "e", features=["median"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "method"), [("sklearn.neural_network", "mlp"), ("onnx", "ridge")])
def test_what_to_install_is_said(tmp_path: Path, package: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'user-embedding-stream\[training\]'"):
        train_encoder(walks(), space(), tmp_path / "e", method=method)
    assert list(tmp_path.iterdir()) == []
