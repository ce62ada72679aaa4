"""Learned encoders: from features of a history to the item that comes next, in the items' own space.

A model's direction u is good if ``u·q`` is high for the next item's row q of the index and low for all others: least
squares over all items. Its solution is a regression on whitened rows, ``(QᵀQ + μI)⁻¹ q``, so that no user's score over
all items is ever made. Features are of what is strictly older than the event: no label, and nothing of its time, is in
them. What the item vectors themselves were learned from may be the same events; nothing later is.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from stream.core.encoders import MadeFor, MixEncoder, inputs_of, reference
from stream.core.events import EventRow
from stream.core.formulas import Float64
from stream.core.learned_encoder import LearnedEncoder
from stream.core.space import Space
from stream.core.sums import RowHistories, RunningSums
from stream.encoders.folder import save_encoder
from stream.errors import ConfigError, EncoderError
from stream.learning.cases import Cases, find_cases
from stream.learning.histories import SHARE, Histories, Int64, by_user, split_by_time

Method = Literal["ridge", "mlp"]
METHODS: Final[tuple[Method, ...]] = ("ridge", "mlp")
#: What did best within the first 80 % of MovieLens; the seed's are `SEED_FEATURES`.
FEATURES: Final = ("decay:0.02", "decay:0.1", "decay:0.3", "last")
CASES: Final = 200_000
HISTORY_LIMIT: Final = 100

_RIDGES: Final = (0.001, 0.03, 0.3)  # in units of the features' mean square
_WHITEN: Final = 0.1
_VALIDATED: Final = 0.1  # of the cases, the latest; to choose the ridge by
_MOST_VALIDATED: Final = 2_000
_HIDDEN: Final = 128
_LEAST: Final = 50
_TOP: Final = 10
_BLOCK_SCORES: Final = 4_000_000
_HINT: Final = "training encoders needs more packages; pip install 'user-embedding-stream[training]'"


@dataclass(frozen=True)
class Head:
    """A model: linear layers, with ReLU between them.

    Attributes:
        layers: weights [in, out] and bias [out] of each.
    """

    layers: tuple[tuple[Float64, Float64], ...]

    def __call__(self, features: Float64) -> Float64:
        """Directions [n, d] of features [n, F·d]."""
        said = features
        for number, (weights, bias) in enumerate(self.layers):
            said = (np.maximum(said, 0.0) if number else said) @ weights + bias
        return said

    def onnx(self) -> bytes:
        """The same in ONNX, in doubles.

        Raises:
            ConfigError: the package onnx is missing.
        """
        try:
            from onnx import TensorProto, helper, numpy_helper
        except ImportError as exc:
            raise ConfigError(_HINT) from exc
        nodes, tensors, last = [], [], "features"
        for number, (weights, bias) in enumerate(self.layers):
            if number:
                nodes.append(helper.make_node("Relu", [last], [f"relu{number}"]))
                last = f"relu{number}"
            tensors += [numpy_helper.from_array(weights, f"w{number}"), numpy_helper.from_array(bias, f"b{number}")]
            nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"product{number}"]))
            last = "direction" if number == len(self.layers) - 1 else f"layer{number}"
            nodes.append(helper.make_node("Add", [f"product{number}", f"b{number}"], [last]))
        kind = TensorProto.DOUBLE
        shapes = [("features", len(self.layers[0][0])), ("direction", len(self.layers[-1][1]))]
        ends = [helper.make_tensor_value_info(name, kind, ["n", width]) for name, width in shapes]
        graph = helper.make_graph(nodes, "encoder", ends[:1], ends[1:], tensors)
        opset = helper.make_opsetid("", 17)
        data: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
        return data


@dataclass(frozen=True)
class Training:
    """How a model came to be.

    Attributes:
        method: ``ridge`` or ``mlp``.
        cases: how many events it was learned from.
        validated: how many of them, the latest, were first left out.
        ridge: of the ridge regression, as it did best on these.
        recall_10: of the next item among all unseen ones, there.
        mix_recall_10: the same with encoder ``mix`` and its default parameters.
    """

    method: Method
    cases: int
    validated: int
    ridge: float | None
    recall_10: float
    mix_recall_10: float


class _Rows(NamedTuple):
    """Cases as a model sees them.

    Attributes:
        features: [n, F·d].
        target: row of each case's item [n].
        history: rows of the items of its history, oldest first; those seen before it in full.
        seen: rows of all its user's items before it.
    """

    features: Float64
    target: Int64
    history: list[Int64]
    seen: list[Int64]


def train_head(
    histories: Histories,
    space: Space,
    *,
    method: Method = "ridge",
    features: Sequence[str] = FEATURES,
    history_limit: int = HISTORY_LIMIT,
    cases: int = CASES,
    seed: int = 0,
) -> tuple[Head, Training]:
    """Learn a model for an item space from interactions.

    Args:
        histories: what to learn from; nothing else is looked at.
        space: the item space.
        method: ridge regression, or a network with one hidden layer (scikit-learn).
        features: what it is given, see `LearnedEncoder`.
        history_limit: L.
        cases: of more events, a random part is taken.
        seed: of that, and of the network.

    Raises:
        EncoderError: there is too little to learn from.
        ConfigError: scikit-learn is missing.
        ValueError: there is no such method or feature.
    """
    if method not in METHODS:
        msg = f"no method {method!r}; choose one of {', '.join(METHODS)}"
        raise ValueError(msg)
    rows_of = space.rows(histories.ids)
    chosen = find_cases(histories, -(1 << 62), rows_of >= 0, cases, seed, older=True)
    chosen = _sorted_by_time(chosen, histories)
    rows = _rows(histories, chosen, rows_of, space, features, history_limit)
    held = min(int(_VALIDATED * len(rows.target)), _MOST_VALIDATED)
    if len(rows.target) < _LEAST or not held:
        msg = f"there are {len(rows.target)} events to learn from, of known items after a history; more are needed"
        raise EncoderError(msg)
    index = np.asarray(space.vectors, dtype=np.float64)
    gram = index.T @ index
    white = np.linalg.solve(gram + _WHITEN * np.trace(gram) / len(gram) * np.eye(len(gram)), index.T).T
    early, late = _slice(rows, slice(None, -held)), _slice(rows, slice(-held, None))
    ridge = None
    if method == "ridge":
        tried = {r: _recall(_ridge(early, white, r)(late.features), late, index) for r in _RIDGES}
        ridge = max(tried, key=lambda r: tried[r])
        recall, head = tried[ridge], _ridge(rows, white, ridge)
    else:
        recall = _recall(_network(early, white, seed)(late.features), late, index)
        head = _network(rows, white, seed)
    mix = _recall(_mixtures(late, space), late, index)
    return head, Training(method, len(rows.target), held, ridge, recall, mix)


def train_encoder(
    events: Iterable[EventRow], space: Space, folder: Path, *, share: float = SHARE, seed: int = 0, **options: Any
) -> tuple[LearnedEncoder, Training]:
    """Learn an encoder from the earlier `share` of events, and save it; other arguments are those of `train_head`.

    Raises:
        EncoderError: there is too little to learn from, or the folder exists.
        ConfigError: an extra is missing.
        ValueError: an argument is out of its range.
    """
    if folder.exists():
        msg = f"encoder {folder}: exists already; choose a new folder"
        raise EncoderError(msg)
    earlier, _ = split_by_time(events, share)
    if not earlier:
        msg = "there are no events to learn from"
        raise EncoderError(msg)
    head, training = train_head(by_user(earlier, seed), space, seed=seed, **options)
    made_for = MadeFor(space.version, space.sha256, space.dim)
    features = tuple(options.get("features", FEATURES))
    about = {**asdict(training), "share": share, "seed": seed}
    return save_encoder(folder, head.onnx(), made_for, features=features, about=about), training


def _sorted_by_time(cases: Cases, histories: Histories) -> Cases:
    order = np.argsort(histories.ts_ms[cases.place], kind="stable")
    return Cases(*(column[order] for column in cases))


def _rows(
    histories: Histories, cases: Cases, rows_of: Int64, space: Space, features: Sequence[str], limit: int
) -> _Rows:
    """Of the cases that have two known items in their history, as the worker's own sums make them."""
    made_for = MadeFor(space.version, space.sha256, space.dim)
    encoder = LearnedEncoder(np.asarray, "", made_for, tuple(features))
    sums = RunningSums.of(space, encoder, limit)
    target, history, seen = [], [], []
    for place, start, end in zip(*(column.tolist() for column in cases), strict=True):
        rows = rows_of[histories.item[max(start, end - limit) : end]]
        rows = rows[rows >= 0]
        if len(rows) < 2:
            continue
        target.append(rows_of[histories.item[place]])
        before = rows_of[histories.item[start:end]]
        history.append(rows)
        seen.append(before[before >= 0])
    if not target:
        return _Rows(np.zeros((0, len(features) * space.dim)), np.zeros(0, dtype=np.int64), [], [])
    base = np.array([0, *accumulate(map(len, history))])
    found = sums.sum_all(RowHistories(base, np.concatenate(history).astype(np.int32)))
    inputs = inputs_of(*found, space=space)
    return _Rows(encoder.features_of(inputs), np.array(target, dtype=np.int64), history, seen)


def _slice(rows: _Rows, part: slice) -> _Rows:
    return _Rows(rows.features[part], rows.target[part], rows.history[part], rows.seen[part])


def _ridge(rows: _Rows, white: Float64, ridge: float) -> Head:
    x, y = rows.features, white[rows.target]
    gram = x.T @ x
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights: Float64 = np.linalg.solve(gram, x.T @ y).astype(np.float64)
    return Head(((weights, np.zeros(weights.shape[1])),))


def _network(rows: _Rows, white: Float64, seed: int) -> Head:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPRegressor
    except ImportError as exc:
        raise ConfigError(_HINT) from exc
    x, y = rows.features, white[rows.target]
    in_scale, out_scale = float(x.std()) or 1.0, float(y.std()) or 1.0
    network = MLPRegressor(
        hidden_layer_sizes=(_HIDDEN,),
        alpha=0.1,
        batch_size=min(512, len(x) // 2),  # a tenth is held back to stop by
        learning_rate_init=2e-3,
        max_iter=60,
        early_stopping=True,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many rounds are enough, or the figures say so
        network.fit(x / in_scale, y / out_scale)
    weights, biases = network.coefs_, network.intercepts_
    return Head(((weights[0] / in_scale, biases[0]), (weights[1] * out_scale, biases[1] * out_scale)))


def _mixtures(rows: _Rows, space: Space) -> Float64:
    vectors = space.history_vectors
    encoder = MixEncoder()
    found = [
        reference(encoder, vectors[h], max_row_norm=space.max_row_norm, fallback=space.fallback) for h in rows.history
    ]
    return np.array([vector for vector, _ in found], dtype=np.float64)


def _recall(directions: Float64, rows: _Rows, index: Float64) -> float:
    """Share of cases whose item is among the ten best, of those that its user has not seen."""
    size, hits = max(1, _BLOCK_SCORES // len(index)), 0
    for start in range(0, len(directions), size):
        scores = directions[start : start + size] @ index.T
        targets = rows.target[start : start + size]
        for row, seen in enumerate(rows.seen[start : start + size]):
            scores[row, seen] = -np.inf
        own = scores[np.arange(len(scores)), targets][:, None]
        hits += int(((scores > own).sum(axis=1) < _TOP).sum())
    return hits / len(directions)
