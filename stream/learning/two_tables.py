"""Item vectors of two sides: what an item says of what comes next, and what it takes for it to be next.

A full linear model M [n, n], the score of item j after a history being the sum of the decayed M[i, j] of its items, is
learned in two ways and blended: from what users have in common (EASE: Steck 2019, "Embarrassingly shallow
autoencoders"), and from what followed what (ridge regression of the next item on the decayed history). Its truncated
SVD gives two tables: M ≈ P @ Q.T. An item in a history counts as its row of P, the index holds the rows of Q, and the
score is an inner product. So one streamed vector of d numbers stands for n scores.

Both models need a dense matrix of items by items. It is that of the most popular ones, the head. Every other item is
learned as if it alone were added to the head, by the block inverse, and put into the head's tables by least squares.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from stream.core.events import EventRow
from stream.core.formulas import Float64
from stream.errors import ItemSpaceError
from stream.learning.factors import factorise
from stream.learning.histories import SHARE, Histories, Int64, by_user, split_by_time
from stream.learning.item_vectors import DIM, ItemVectors, Note
from stream.logs import OnProgress

# What follows was chosen within the training part of MovieLens-100K (`uemb evaluate --validation`), on a plateau: half
# or twice the ridges change recall@10 there by less than 0.003.
#: Regularisation of the two models: in users, and in cases.
EASE_RIDGE: Final = 400.0
NEXT_RIDGE: Final = 500.0
#: How a history's items fade in the second model, newest first; and how many of them it looks at.
NEXT_DECAY: Final = 0.3
_DEPTH: Final = 50
#: Weights of the two models, each in units of its length.
SHARES: Final = (0.6, 0.4)
#: Rows of the index are shortened by their popularity to this power: what is found is less of what everybody has.
POPULARITY_EXPONENT: Final = 0.35
#: Items of the dense part: 10,000 need 5 GB for two minutes on 2 cores (tests/bench/bench_learning.py).
HEAD_ITEMS: Final = 10_000
#: So many next items are enough to learn from; of more, a random part is taken.
MAX_CASES: Final = 2_000_000

_BLOCK_CASES: Final = 50_000
_BLOCK_ITEMS: Final = 2_000
_NO_DIRECTION: Final = 1e-6
_STEPS: Final = 5

log = logging.getLogger(__name__)

Csr = sparse.csr_array


class _Linear(Protocol):
    """One of the two models.

    Attributes:
        weights: weights [h, h] of the head's items in a history (rows) for what is next (columns).
    """

    weights: Float64

    def beside(self, some: slice) -> tuple[Float64, Float64]:
        """Weights [h, b] of the head for b items of the tail, and [b, h] of these for the head."""
        ...


def two_table_vectors(
    events: Iterable[EventRow],
    *,
    dim: int = DIM,
    share: float = SHARE,
    head_items: int = HEAD_ITEMS,
    popularity_exponent: float = POPULARITY_EXPONENT,
    history_exponent: float = 0.0,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    on_note: Note | None = None,
) -> ItemVectors:
    """Vectors of the items in the first `share` of `events` by time; the same input gives the same vectors.

    Items that say nothing of others, nor others of them, are left out: they are unknown to this version. Time grows
    with the third power of `head_items` (and less of them, where there are fewer items), memory with the second.

    Args:
        events: interactions in any order.
        dim: dimension d.
        share: part of the events, by time, that the vectors are made from.
        head_items: how many items are learned together; the others are learned beside them, one by one.
        popularity_exponent: rows of the index are divided by ``(1 + count) ** popularity_exponent``: what is found.
        history_exponent: the same for rows of the history side: what a popular item says of its user.
        seed: of the order of interactions of one time, and of the SVD's start vector.
        on_progress: called with steps done and their total.
        on_note: called with one line about items that were learned beside the head, and about those left out.

    Raises:
        ItemSpaceError: these events can't fill `dim` dimensions.
        ValueError: an argument is out of its range.
    """
    if dim < 1 or head_items < 1 or min(popularity_exponent, history_exponent) < 0:
        msg = (
            "dim and head_items must be at least 1 and exponents of popularity at least 0, not "
            f"{dim}, {head_items}, {popularity_exponent} and {history_exponent}"
        )
        raise ValueError(msg)
    train, _ = split_by_time(events, share)
    return two_tables_of(
        by_user(train, ties=seed),
        dim=dim,
        head_items=head_items,
        popularity_exponent=popularity_exponent,
        history_exponent=history_exponent,
        seed=seed,
        on_progress=on_progress,
        on_note=on_note,
    )


def two_tables_of(
    histories: Histories,
    *,
    dim: int = DIM,
    head_items: int = HEAD_ITEMS,
    popularity_exponent: float = POPULARITY_EXPONENT,
    history_exponent: float = 0.0,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    on_note: Note | None = None,
) -> ItemVectors:
    """The same from histories, all of which are learned from; arguments and errors are those of `two_table_vectors`."""
    report = on_progress or (lambda done, total: None)

    def note(text: str) -> None:
        log.info(text)
        if on_note is not None:
            on_note(text)

    ids = histories.ids
    popularity = np.bincount(histories.item, minlength=len(ids)).astype(np.float64)
    by_count = np.argsort(-popularity, kind="stable")
    head, tail = np.sort(by_count[:head_items]), np.sort(by_count[head_items:])
    if dim > len(head):
        msg = f"{dim} dimensions need at least {dim} items, there are {len(head)}; lower the dimension"
        raise ItemSpaceError(msg)
    if len(tail):
        note(f"{len(head):,} items are learned together, the other {len(tail):,} beside them, one by one")
    models: list[_Linear] = []
    for model in (Ease, NextItem):
        models.append(model(histories, head, tail, seed))
        report(len(models), _STEPS)
    factors = factorise(_blend(models, [model.weights for model in models]), dim, seed)
    report(3, _STEPS)
    index, history = np.zeros((len(ids), dim)), np.zeros((len(ids), dim))
    roots = np.sqrt(factors.values)
    history[head], index[head] = factors.left * roots, factors.right * roots
    shrink = np.divide(1.0, roots, out=np.zeros(dim), where=roots > 0)
    for start in range(0, len(tail), _BLOCK_ITEMS):
        some = slice(start, start + _BLOCK_ITEMS)
        to_tail, from_tail = zip(*(model.beside(some) for model in models), strict=True)
        history[tail[some]] = (_blend(models, from_tail) @ factors.right) * shrink
        index[tail[some]] = (_blend(models, to_tail).T @ factors.left) * shrink
    report(4, _STEPS)
    index /= ((1.0 + popularity) ** popularity_exponent)[:, None]
    history /= ((1.0 + popularity) ** history_exponent)[:, None]
    kept = np.flatnonzero(_has_direction(index) & _has_direction(history))
    report(_STEPS, _STEPS)
    if len(kept) < dim:
        msg = f"{dim} dimensions need at least {dim} items that others occur with, there are {len(kept)}; lower it"
        raise ItemSpaceError(msg)
    if len(kept) < len(ids):
        note(f"{len(ids) - len(kept)} of {len(ids)} items occur with no others to learn from and are left out")
    return ItemVectors([ids[i] for i in kept], index[kept], popularity[kept], "dot", history[kept])


class Ease:
    """Weights of what users have in common: ridge regression of each item on all others, none on itself.

    Args:
        histories: what is learned from.
        head: items that are learned together [h].
        tail: items that are learned beside them [t].
        seed: of nothing here.
        ridge: regularisation, in users.
    """

    def __init__(
        self, histories: Histories, head: Int64, tail: Int64, seed: int = 0, ridge: float = EASE_RIDGE
    ) -> None:
        pairs = (np.ones(len(histories.item)), (histories.user, histories.item))
        users = int(histories.user.max(initial=-1)) + 1
        seen: Csr[Any] = Csr(pairs, shape=(users, len(histories.ids)))
        seen.data[:] = 1.0  # once or often is the same
        ours, others = seen[:, head], seen[:, tail]
        self._inverse = _inverse((ours.T @ ours).toarray(), ridge)
        self._diagonal = np.diag(self._inverse).copy()
        self._cross = (ours.T @ others).tocsc()
        self._own = np.asarray(others.sum(axis=0)).ravel() + ridge
        self.weights: Float64 = self._inverse / -self._diagonal
        np.fill_diagonal(self.weights, 0.0)

    def beside(self, some: slice) -> tuple[Float64, Float64]:
        """See `_Linear`."""
        cross = self._cross[:, some].toarray()
        to_tail = self._inverse @ cross
        scale = 1.0 / (self._own[some] - np.einsum("hb,hb->b", cross, to_tail))
        return to_tail, (to_tail * scale).T / (self._diagonal + (to_tail**2 * scale).T)


class NextItem:
    """Weights of what follows what: ridge regression of the next item on the decayed history before it.

    Args:
        histories: what is learned from.
        head: items that are learned together [h].
        tail: items that are learned beside them [t].
        seed: of the choice of cases, where there are too many.
        ridge: regularisation, in cases.
        decay: how items of the history fade, newest first.
    """

    def __init__(
        self,
        histories: Histories,
        head: Int64,
        tail: Int64,
        seed: int = 0,
        ridge: float = NEXT_RIDGE,
        decay: float = NEXT_DECAY,
    ) -> None:
        n = len(histories.ids)
        gram: Float64 = np.zeros((len(head), len(head)))
        own: Float64 = np.zeros(n)
        follows: Csr[Any] = Csr((n, n))
        cross: Csr[Any] = Csr((len(head), len(tail)))
        for before, item in _cases(histories, seed, decay):
            after = Csr((np.ones(len(item)), (np.arange(len(item)), item)), shape=before.shape)
            ours, others = before[:, head], before[:, tail]
            gram += (ours.T @ ours).toarray()
            follows = follows + before.T @ after
            cross = cross + ours.T @ others
            own += np.asarray(before.multiply(before).sum(axis=0)).ravel()
        self._factor = linalg.cho_factor(gram + ridge * np.eye(len(head)), overwrite_a=True)
        self.weights: Float64 = self._solved(follows[head][:, head].toarray())
        self._cross = cross.tocsc()
        self._own = own[tail] + ridge
        self._into_tail, self._out_of_tail = follows[head][:, tail].tocsc(), follows[tail][:, head]

    def _solved(self, right: Float64) -> Float64:
        return np.asarray(linalg.cho_solve(self._factor, right))

    def beside(self, some: slice) -> tuple[Float64, Float64]:
        """See `_Linear`."""
        cross = self._cross[:, some].toarray()
        scale = 1.0 / (self._own[some] - np.einsum("hb,hb->b", cross, self._solved(cross)))
        from_tail = scale[:, None] * (self._out_of_tail[some].toarray() - cross.T @ self.weights)
        return self._solved(self._into_tail[:, some].toarray()), from_tail


def _cases(histories: Histories, seed: int, decay: float) -> Iterable[tuple["Csr[Any]", Int64]]:
    """Blocks of decayed histories [b, n], and the item that came next in each [b]."""
    item, user = histories.item, histories.user
    places = np.flatnonzero(user[1:] == user[:-1]) + 1  # whatever has something before it
    if len(places) > MAX_CASES:
        places = np.sort(np.random.default_rng(seed).choice(places, MAX_CASES, replace=False))
    for start in range(0, len(places), _BLOCK_CASES):
        some = places[start : start + _BLOCK_CASES]
        rows, columns, weights = [], [], []
        for age in range(1, _DEPTH + 1):
            there = np.flatnonzero(user[np.maximum(some - age, 0)] == user[some])
            there = there[some[there] >= age]
            rows.append(there)
            columns.append(item[some[there] - age])
            weights.append(np.full(len(there), np.exp(-decay * (age - 1))))
        entries = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
        yield Csr(entries, shape=(len(some), len(histories.ids))), item[some]


def _inverse(gram: Float64, ridge: float) -> Float64:
    """Inverse of a Gram matrix with a ridge, by Cholesky."""
    gram[np.diag_indices_from(gram)] += ridge
    return np.asarray(linalg.cho_solve(linalg.cho_factor(gram, overwrite_a=True), np.eye(len(gram)), overwrite_b=True))


def _blend(models: Sequence[_Linear], weights: Sequence[Float64]) -> Float64:
    """Some weights of each model, in units of the length of its head's, added up in their shares."""
    each = zip(SHARES, models, weights, strict=True)
    return np.asarray(sum(share * some / np.linalg.norm(model.weights) for share, model, some in each))


def _has_direction(rows: Float64) -> NDArray[np.bool_]:
    """Which rows are more than rounding noise."""
    norms = np.linalg.norm(rows, axis=1)
    return np.asarray(norms > _NO_DIRECTION * norms.max(initial=0.0))
