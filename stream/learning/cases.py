"""What is to be found: events whose item is new to a user with a history."""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.learning.histories import Histories, Int64

MIN_HISTORY: Final = 2


class Cases(NamedTuple):
    """What is to be found.

    Attributes:
        place: number of each case's event in the histories [c].
        start: number of its user's first event [c].
        end: number after the last event of its history [c].
    """

    place: Int64
    start: Int64
    end: Int64


def find_cases(
    histories: Histories, cut_ms: int, known: NDArray[np.bool_], most: int, seed: int, *, older: bool
) -> Cases:
    """Events from `cut_ms` on whose item is known and new to its user, after a history of two or more.

    Args:
        histories: all events.
        cut_ms: where the later part begins.
        known: whether the training part has each item [n].
        most: of more, a random part is taken.
        seed: of that.
        older: histories hold only what is strictly older than the case.
    """
    item, user, ts_ms = histories.item, histories.user, histories.ts_ms
    starts = np.flatnonzero(np.append(True, user[1:] != user[:-1]))[user] if len(user) else user
    pairs = user * len(histories.ids) + item
    first = np.zeros(len(item), dtype=np.bool_)
    first[np.unique(pairs, return_index=True)[1]] = True  # users lie together, oldest first
    ends = np.arange(len(item))
    later = (ts_ms >= cut_ms) & first & known[item] & (ends - starts >= MIN_HISTORY)
    places = np.flatnonzero(later)
    if len(places) > most:
        places = np.sort(np.random.default_rng(seed).choice(places, most, replace=False))
    ends = places.copy()
    if older:
        while (same := (ends > starts[places]) & (ts_ms[ends - 1] == ts_ms[places])).any():
            ends = ends - same
        enough = ends - starts[places] >= MIN_HISTORY
        places, ends = places[enough], ends[enough]
    return Cases(places, starts[places], ends)
