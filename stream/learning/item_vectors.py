"""Item vectors out of interactions alone: PPMI of items that occur near each other in histories, then truncated SVD.

Levy and Goldberg (2014) for PPMI against word2vec, Levy, Goldberg and Dagan (2015) for context smoothing and the square
root of the singular values, Pantel and Lin (2002) for the discount of rare pairs.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import ArpackError, svds

from stream.core.events import EventRow, event_order
from stream.core.formulas import Float64
from stream.errors import ItemSpaceError
from stream.items.space import ItemSpace
from stream.logs import OnProgress

DIM: Final = 48
SHARE: Final = 0.8
#: Neighbours looked at on either side; as many as a history retains by default.
WINDOW: Final = 100
#: A pair seen c times keeps c / (c + DISCOUNT) of its PPMI: chance pairs of rare items are PPMI's known weakness.
DISCOUNT: Final = 20.0
CONTEXT_SMOOTHING: Final = 0.75

#: Up to here a dense SVD is as quick, and exact for ranks that ARPACK can't handle.
_DENSE_ITEMS: Final = 400
_BLOCK_PAIRS: Final = 2_000_000
#: A row this much shorter than the longest is rounding noise, without a direction of its own.
_NO_DIRECTION: Final = 1e-6

log = logging.getLogger(__name__)

Note = Callable[[str], None]


class ItemVectors(NamedTuple):
    """Item `ids` in row order, their `vectors` float64 [n, d], and how often each was interacted with, float64 [n]."""

    ids: list[str]
    vectors: Float64
    popularity: Float64


def split_by_time(events: Iterable[EventRow], share: float = SHARE) -> tuple[list[EventRow], list[EventRow]]:
    """The first `share` of the events in the order of `event_order`, and the rest.

    Raises:
        ValueError: `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        msg = f"share must be above 0 and at most 1, not {share}"
        raise ValueError(msg)
    ordered = sorted(events, key=event_order)
    cut = round(len(ordered) * share)
    return ordered[:cut], ordered[cut:]


def build_item_vectors(
    events: Iterable[EventRow],
    *,
    dim: int = DIM,
    share: float = SHARE,
    window: int = WINDOW,
    discount: float = DISCOUNT,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    on_note: Note | None = None,
) -> ItemVectors:
    """Vectors of the items in the first `share` of `events` by time; the same input gives the same vectors.

    Items that never occur near another one in that part are left out: they are unknown to this version.
    Time grows with `window` times the number of events.

    Args:
        events: interactions in any order.
        dim: dimension d.
        share: part of the events, by time, that the vectors are made from.
        window: two items co-occur when at most this many interactions apart in one user's history.
        discount: how often a pair must be seen for its PPMI to count half; 0 trusts every pair.
        seed: of the start vector of the SVD.
        on_progress: called with steps done and their total.
        on_note: called with one line about what was left out, if anything was.

    Raises:
        ItemSpaceError: these events can't fill `dim` dimensions.
        ValueError: an argument is out of its range.
    """
    if dim < 1 or window < 1 or discount < 0:
        msg = f"dim and window must be at least 1 and discount at least 0, not {dim}, {window} and {discount}"
        raise ValueError(msg)
    train, _ = split_by_time(events, share)
    ids, item, user = _by_user(train)
    longest = int(np.bincount(user).max(initial=1))
    steps = min(window, longest - 1)
    report = on_progress or (lambda done, total: None)
    counts = _cooccurrences(item, user, len(ids), steps, lambda step: report(step, steps + 1))
    paired = np.flatnonzero(np.diff(counts.indptr))
    if dim > len(paired):
        msg = f"{dim} dimensions need at least {dim} items that co-occur, there are {len(paired)}; lower the dimension"
        raise ItemSpaceError(msg)
    vectors = np.zeros((len(ids), dim))
    vectors[paired] = _factors(_ppmi(counts[paired][:, paired], discount), dim, seed)
    norms = np.linalg.norm(vectors, axis=1)
    kept = np.flatnonzero(norms > _NO_DIRECTION * norms.max())
    report(steps + 1, steps + 1)
    if len(kept) < len(ids):
        text = f"{len(ids) - len(kept)} of {len(ids)} items have no co-occurrence to learn from and are left out"
        log.info(text)
        if on_note is not None:
            on_note(text)
    popularity = np.bincount(item, minlength=len(ids)).astype(np.float64)
    return ItemVectors([ids[i] for i in kept], vectors[kept], popularity[kept])


def build_space(events: Iterable[EventRow], path: str | Path, version: str, **kwargs: Any) -> ItemSpace:
    """Build item vectors (arguments of `build_item_vectors`) and save them as a new folder, metric cosine.

    Raises:
        ItemSpaceError: the events can't fill the dimensions, or the folder exists.
    """
    ids, vectors, popularity = build_item_vectors(events, **kwargs)
    return ItemSpace.save(path, version, ids, vectors, metric="cosine", popularity=popularity)


def _by_user(rows: Sequence[EventRow]) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Distinct item ids in ascending order, and item row and user number per event, users together, in time order."""
    ids = sorted({row.item_id for row in rows})
    row_of = {item: n for n, item in enumerate(ids)}
    number_of: dict[str, int] = {}
    item = np.array([row_of[row.item_id] for row in rows], dtype=np.int64)
    user = np.array([number_of.setdefault(row.user_id, len(number_of)) for row in rows], dtype=np.int64)
    order = np.argsort(user, kind="stable")
    return ids, item[order], user[order]


def _cooccurrences(
    item: NDArray[np.int64], user: NDArray[np.int64], n: int, steps: int, done: Callable[[int], None]
) -> sparse.csr_array[Any]:
    """Symmetric counts [n, n] of pairs at most `steps` apart within a history, none of an item with itself."""
    counts = sparse.csr_array((n, n), dtype=np.float64)
    block: list[NDArray[np.int64]] = []
    size = 0
    for step in range(1, steps + 1):
        near = (user[step:] == user[:-step]) & (item[step:] != item[:-step])
        pairs = np.stack([item[:-step][near], item[step:][near]])
        block.append(pairs)
        size += pairs.shape[1]
        if size >= _BLOCK_PAIRS or step == steps:  # memory stays at one block, whatever the window
            a, b = np.concatenate(block, axis=1)
            counts = counts + sparse.coo_array((np.ones(size), (a, b)), shape=(n, n)).tocsr()
            block, size = [], 0
        done(step)
    counts = sparse.csr_array(counts + counts.T)
    counts.sort_indices()
    return counts


def _ppmi(counts: sparse.csr_array[Any], discount: float) -> sparse.csr_array[Any]:
    """Positive pointwise mutual information with a smoothed context distribution and discounted rare pairs."""
    pairs = counts.tocoo()
    occurs = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    context = occurs**CONTEXT_SMOOTHING
    context /= context.sum()
    pmi = np.log(pairs.data / (occurs[pairs.row] * context[pairs.col]))
    positive = pmi > 0
    value = (pmi * pairs.data / (pairs.data + discount))[positive]
    return sparse.coo_array((value, (pairs.row[positive], pairs.col[positive])), shape=counts.shape).tocsr()


def _factors(ppmi: sparse.csr_array[Any], dim: int, seed: int) -> Float64:
    """Left singular vectors times the roots of the singular values [n, dim], strongest first, signs fixed."""
    n = ppmi.shape[0]
    if n <= _DENSE_ITEMS or dim >= n - 1:
        u, s, _ = np.linalg.svd(ppmi.toarray(), full_matrices=False)
    else:
        v0 = np.random.default_rng(seed).uniform(-1.0, 1.0, n)  # ARPACK's own start is random
        try:
            u, s, _ = svds(ppmi, k=dim, v0=v0)
        except ArpackError as exc:
            msg = f"the SVD found no {dim} dimensions in these interactions; lower the dimension"
            raise ItemSpaceError(msg) from exc
    strongest = np.argsort(-s, kind="stable")[:dim]
    u, s = u[:, strongest], s[strongest]
    # The sign of a singular vector is free; the largest entry is made positive, so that every build agrees.
    u = u * np.where(u[np.abs(u).argmax(axis=0), np.arange(dim)] < 0, -1.0, 1.0)
    s = np.where(s > s.max() * n * np.finfo(np.float64).eps, s, 0.0)
    return np.asarray(u * np.sqrt(s))
