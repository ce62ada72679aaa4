"""Interactions as arrays, users together and each in time order: what item vectors are learned from."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.core.events import EventRow, event_order

SHARE: Final = 0.8

Int64 = NDArray[np.int64]


class Histories(NamedTuple):
    """Interactions of all users.

    Attributes:
        ids: distinct item ids, ascending.
        item: number of each interaction's item in `ids` [n].
        user: number of its user [n]; a user's interactions lie together, oldest first.
        ts_ms: its event time [n].
    """

    ids: list[str]
    item: Int64
    user: Int64
    ts_ms: Int64


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


def by_user(rows: Sequence[EventRow], ties: int | None = None) -> Histories:
    """The histories of rows in the order of `event_order`.

    Args:
        rows: interactions.
        ties: seed of a random order among a user's interactions of one time, whose order says nothing, for it is that
            of their ids; None keeps it.
    """
    ids = sorted({row.item_id for row in rows})
    row_of = {item: n for n, item in enumerate(ids)}
    number_of: dict[str, int] = {}
    item = np.array([row_of[row.item_id] for row in rows], dtype=np.int64)
    user = np.array([number_of.setdefault(row.user_id, len(number_of)) for row in rows], dtype=np.int64)
    ts_ms = np.array([row.ts_ms for row in rows], dtype=np.int64)
    if ties is None:
        order = np.argsort(user, kind="stable")
    else:
        order = np.lexsort((np.random.default_rng(ties).random(len(rows)), ts_ms, user))
    return Histories(ids, item[order], user[order], ts_ms[order])
