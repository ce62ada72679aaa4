"""Item vectors out of interactions alone: PPMI of items that occur near each other in histories, then truncated SVD.

Levy and Goldberg (2014) for PPMI against word2vec, Levy, Goldberg and Dagan (2015) for context smoothing and the square
root of the singular values, Pantel and Lin (2002) for the discount of rare pairs.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from stream.core.events import EventRow
from stream.errors import ItemSpaceError
from stream.learning.factors import factorise
from stream.learning.histories import SHARE, Histories, by_user, split_by_time
from stream.learning.item_vectors import DIM, ItemVectors, Note
from stream.logs import OnProgress

#: Neighbours looked at on either side; as many as a history retains by default.
WINDOW: Final = 100
#: A pair seen c times keeps c / (c + DISCOUNT) of its PPMI: chance pairs of rare items are PPMI's known weakness.
DISCOUNT: Final = 20.0
CONTEXT_SMOOTHING: Final = 0.75

_BLOCK_PAIRS: Final = 2_000_000
#: A row this much shorter than the longest is rounding noise, without a direction of its own.
_NO_DIRECTION: Final = 1e-6

log = logging.getLogger(__name__)


def ppmi_vectors(
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
    return ppmi_of(
        by_user(train),
        dim=dim,
        window=window,
        discount=discount,
        seed=seed,
        on_progress=on_progress,
        on_note=on_note,
    )


def ppmi_of(
    histories: Histories,
    *,
    dim: int = DIM,
    window: int = WINDOW,
    discount: float = DISCOUNT,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    on_note: Note | None = None,
) -> ItemVectors:
    """The same from histories, all of which are learned from; arguments and errors are those of `ppmi_vectors`."""
    ids, item, user, _ = histories
    longest = int(np.bincount(user).max(initial=1))
    steps = min(window, longest - 1)
    report = on_progress or (lambda done, total: None)
    counts = _cooccurrences(item, user, len(ids), steps, lambda step: report(step, steps + 1))
    paired = np.flatnonzero(np.diff(counts.indptr))
    if dim > len(paired):
        msg = f"{dim} dimensions need at least {dim} items that co-occur, there are {len(paired)}; lower the dimension"
        raise ItemSpaceError(msg)
    vectors = np.zeros((len(ids), dim))
    factors = factorise(_ppmi(counts[paired][:, paired], discount), dim, seed)
    vectors[paired] = factors.left * np.sqrt(factors.values)
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
