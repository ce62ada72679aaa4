"""A seeded, plausible stream of interactions, for machines without network."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from stream.core.events import EventRow, event_order
from stream.feed.dataset import Dataset

_TOPICS: Final = ("jazz", "chess", "hiking", "baking", "sailing", "opera", "robots", "gardens", "history", "running")
_SYNTHETIC_START_S: Final = 1_700_000_000  # fixed, and in the past: a stream is the same whenever it is made
_SYNTHETIC_SPAN_S: Final = 42 * 86_400
_SESSION_EVENTS: Final = 15


def synthetic(seed: int = 7, users: int = 1000, items: int = 1500, events: int = 100_000) -> Dataset:
    """A made-up stream that behaves like a real one; the same arguments give the same stream.

    Items fall into topics and follow Zipf's law within them. A user's taste drifts from one mixture of topics to
    another over six weeks; sessions bring several interactions within the same second, as MovieLens does. No
    interaction occurs twice.

    Raises:
        ValueError: a count is below 1.
    """
    if min(users, items, events) < 1:
        msg = "a synthetic stream needs at least one user, one item and one event"
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    topics = min(len(_TOPICS), items)
    topic_of = rng.permutation(np.arange(items) % topics)  # every topic has an item

    activity = rng.lognormal(0.0, 1.0, users)
    user = np.sort(rng.choice(users, events, p=activity / activity.sum()))
    sessions = 1 + np.bincount(user, minlength=users) // _SESSION_EVENTS
    session = (np.cumsum(sessions) - sessions)[user] + rng.integers(0, sessions[user])
    session.sort()  # users own ascending ranges of sessions, so this keeps `user` aligned
    start = rng.random(int(sessions.sum()))[session]  # as a share of the span

    early, late = rng.dirichlet(np.full(topics, 0.2), (2, users))
    taste = (1 - start)[:, None] * early[user] + start[:, None] * late[user]  # [events, topics]
    topic = np.minimum((taste.cumsum(axis=1) < rng.random(events)[:, None]).sum(axis=1), topics - 1)
    liked = rng.random(events) < 0.2 + 0.5 * taste[np.arange(events), topic]
    item = np.empty(events, dtype=np.int64)
    for t in range(topics):
        members = np.flatnonzero(topic_of == t)
        weight = 1.0 / np.arange(1, len(members) + 1)
        item[topic == t] = rng.choice(members, int((topic == t).sum()), p=weight / weight.sum())

    gap = rng.geometric(0.25, events) - 1  # seconds since the session's previous interaction, often none
    elapsed = np.cumsum(gap)
    first = np.r_[True, session[1:] != session[:-1]]
    elapsed -= np.maximum.accumulate(np.where(first, elapsed, 0))
    ts_s = _SYNTHETIC_START_S + (start * _SYNTHETIC_SPAN_S).astype(np.int64) + elapsed
    while len(again := _repeats(user, item, ts_s)):
        ts_s[again] += 1

    types = np.where(liked, "like", "view").tolist()
    columns = zip((user + 1).tolist(), (item + 1).tolist(), types, (ts_s * 1000).tolist(), strict=True)
    rows = sorted((EventRow(str(u), str(i), kind, ts) for u, i, kind, ts in columns), key=event_order)
    titles = {str(i + 1): f"Item {i + 1} ({_TOPICS[t]})" for i, t in enumerate(topic_of.tolist())}
    return Dataset("synthetic stream", rows, titles, synthetic=True)


def _repeats(*columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of rows that equal an earlier one."""
    first = np.unique(np.stack(columns, axis=1), axis=0, return_index=True)[1]
    return np.setdiff1d(np.arange(len(columns[0])), first)
