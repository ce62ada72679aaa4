"""How well vectors find what users do next: methods side by side on anyone's events, and what a stale vector costs.

The events are split by time. Each later event whose item is new to its user is a case: from the history before it, all
items that the training part has are ranked, without those of the history. Nothing is learned from, or chosen by, the
later part. Vectors are made by the worker's own formulas, of item spaces as `stream.learning.build` saves them.

Three readings of the same events: **ordered** as they are; **shuffled**, where a user's events of one time are put in
random order, in training and cases, for their order is as a rule that of ids and can be learned; and **older**, the
same where histories hold only what is strictly older than the case.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from stream.core.encoders import AvgEncoder, Encoder, MadeFor, MixEncoder, TimeMixEncoder, reference
from stream.core.events import EventRow, event_order
from stream.core.formulas import Float64, decayed_mean, l2_normalize
from stream.core.learned_encoder import LearnedEncoder
from stream.errors import ConfigError, EncoderError, ItemSpaceError
from stream.items.space import ItemSpace
from stream.learning.cases import MIN_HISTORY, Cases, find_cases
from stream.learning.heads import FEATURES, Method, train_head
from stream.learning.histories import SHARE, Histories, Int64, by_user
from stream.learning.item_vectors import DIM, ItemVectors
from stream.learning.ppmi import ppmi_of
from stream.learning.two_tables import HEAD_ITEMS, Ease, two_tables_of
from stream.logs import OnProgress

Reading = Literal["ordered", "shuffled", "older"]
READINGS: Final[tuple[Reading, ...]] = ("ordered", "shuffled", "older")
#: The seed's mixture on one table, with which gains are measured.
BASE: Final = "mix (.01, .15), one table"
#: Two tables, and a mixture for them.
BEST: Final = "mix (.02, .3), two tables"
LEARNED: Final[Mapping[Method, str]] = {"ridge": "learned (ridge), two tables", "mlp": "learned (network), two tables"}
CASES: Final = 6_000
HISTORY: Final = 100
#: Age at which a cached vector is made anew, s; 0 makes one per event.
TTLS_S: Final = (0, 60, 600, 3_600, 21_600, 86_400)

_TOP: Final = 10
_TOP_WIDE: Final = 50
_RESAMPLES: Final = 1_000
_HEAD_SHARE: Final = 0.1
_NEIGHBOURS: Final = 200
_EASE_DECAY: Final = 0.1
_INTERESTS: Final = 3
_INTEREST_DECAY: Final = 0.1
_ROUNDS: Final = 5
_BLOCK_SCORES: Final = 4_000_000

Score = Callable[[Sequence[Int64], Sequence[Int64]], Float64]


@dataclass(frozen=True)
class Row:
    """One method's figures in one reading.

    Attributes:
        method: its name.
        reading: which.
        recall_10: share of cases whose item is among the first ten.
        low: lower end of its 95 % interval, users resampled.
        high: upper end.
        recall_50: the same among the first fifty.
        ndcg_10: with a discount by rank.
        coverage_10: share of all items that are among anybody's first ten.
        head_share_10: share of the first tens that goes to the tenth of the items that is most popular.
        gain: `recall_10` less that of `BASE`; of paired cases, as its interval.
        gain_low: lower end of its 95 % interval.
        gain_high: upper end.
    """

    method: str
    reading: Reading
    recall_10: float
    low: float
    high: float
    recall_50: float
    ndcg_10: float
    coverage_10: float
    head_share_10: float
    gain: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True)
class Stale:
    """Recall with a vector that is made anew at a user's first event after `ttl_s`; 0 is one per event."""

    method: str
    ttl_s: int
    recall_10: float


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        events: how many there were.
        users: of how many users.
        items: how many the training part has.
        cases: how many were ranked in each reading.
        rows: figures, by reading and method.
        stale: what old vectors find, in the shuffled reading.
        left_out: methods that were not run, and why.
    """

    events: int
    users: int
    items: int
    cases: dict[Reading, int]
    rows: list[Row]
    stale: list[Stale]
    left_out: dict[str, str]


def evaluate(
    events: Iterable[EventRow],
    *,
    dim: int = DIM,
    share: float = SHARE,
    cases: int = CASES,
    readings: Sequence[Reading] = READINGS,
    head_items: int = HEAD_ITEMS,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Report:
    """Compare methods on events.

    Args:
        events: interactions in any order.
        dim: dimension of the vectors.
        share: part of the events, by time, that is learned from.
        cases: how many are ranked; of more, a random part is taken.
        readings: which.
        head_items: methods that need a matrix of all items are left out where there are more.
        seed: of the order within one time, of the choice of cases, and of the resampling.
        on_progress: called with methods done and their total.

    Raises:
        ItemSpaceError: the training part is too small for vectors of this dimension.
        ValueError: there is nothing to rank, or an argument is out of its range.
    """
    if not 0 < share < 1 or cases < 1:
        msg = f"share must be above 0 and below 1 and cases at least 1, not {share} and {cases}"
        raise ValueError(msg)
    rows = sorted(events, key=event_order)
    cut_ms = rows[min(round(len(rows) * share), len(rows) - 1)].ts_ms if rows else 0
    found: list[Row] = []
    counts: dict[Reading, int] = {}
    stale: list[Stale] = []
    left_out: dict[str, str] = {}
    items = 0
    by_ties: dict[bool, _Prepared] = {}
    for reading in readings:
        shuffled = reading != "ordered"
        if shuffled not in by_ties:
            by_ties.clear()  # one at a time in memory
            by_ties[shuffled] = _Prepared(rows, cut_ms, seed if shuffled else None, dim, head_items, seed)
        prepared = by_ties[shuffled]
        chosen = find_cases(prepared.all, cut_ms, prepared.known, cases, seed, older=reading == "older")
        if not len(chosen.place):
            msg = "no later event has an item that is known and new to a user with a history of two; more events needed"
            raise ValueError(msg)
        counts[reading], items = len(chosen.place), int(prepared.known.sum())
        left_out |= prepared.left_out
        ranker = _Ranker(prepared, chosen, seed)
        for number, (name, score) in enumerate(prepared.methods.items(), 1):
            ranker.run(name, score)
            if on_progress is not None:
                done = len(counts) - 1
                on_progress(done * len(prepared.methods) + number, len(readings) * len(prepared.methods))
        found += ranker.rows(reading)
        if reading == "shuffled":
            stale = [
                Stale(name, ttl_s, ranker.recall(prepared.methods[name], refreshed(prepared.all, chosen, ttl_s)))
                for name in (BASE, BEST)
                for ttl_s in TTLS_S
            ]
    users = len({row.user_id for row in rows})
    return Report(len(rows), users, items, counts, found, stale, left_out)


def refreshed(histories: Histories, cases: Cases, ttl_s: int) -> Cases:
    """The same cases with the histories that a cached vector was made of.

    A user's vector is asked for at each event, and made anew by the first that finds it `ttl_s` old, of what is before
    that event; 0 is one per event.
    """
    if not ttl_s:
        return cases
    ends = cases.end.copy()
    wanted: dict[int, list[int]] = {}
    for n, start in enumerate(cases.start.tolist()):
        wanted.setdefault(start, []).append(n)
    for start, numbers in wanted.items():
        built_ms, built_of = -(1 << 62), start + MIN_HISTORY
        at = start + MIN_HISTORY
        for n in sorted(numbers, key=lambda n: int(cases.place[n])):
            place = int(cases.place[n])
            for ts_ms in histories.ts_ms[at : place + 1].tolist():
                if ts_ms - built_ms >= 1_000 * ttl_s:
                    built_ms, built_of = ts_ms, at
                at += 1
            ends[n] = built_of
    return cases._replace(end=np.minimum(ends, cases.end))


class _Prepared:
    """Everything that is learned from the training part in one order of ties, and the methods made of it."""

    def __init__(
        self, rows: Sequence[EventRow], cut_ms: int, ties: int | None, dim: int, head_items: int, seed: int
    ) -> None:
        self.all = by_user(rows, ties)
        self.train = _part(self.all, self.all.ts_ms < cut_ms)
        self.popularity = np.bincount(self.train.item, minlength=len(self.all.ids)).astype(np.float64)
        self.known: NDArray[np.bool_] = self.popularity > 0
        if not self.known.any():
            msg = "nothing is left to learn from: all events are of one time"
            raise ItemSpaceError(msg)
        self.left_out: dict[str, str] = {}
        one = self._space(ppmi_of(_dense(self.train), dim=dim, seed=seed))
        dense = _dense(self.train)
        two = self._space(two_tables_of(dense, dim=dim, head_items=head_items, seed=seed))
        plain = self._space(two_tables_of(dense, dim=dim, head_items=head_items, seed=seed, popularity_exponent=0.0))
        tuned = MixEncoder(alpha_short=0.5, decay_long=0.02, decay_short=0.3)
        self.methods: dict[str, Score] = {
            "popularity": lambda items, _: np.tile(self.popularity, (len(items), 1)),
            "last item, one table": self._vector(one, AvgEncoder(decay=50.0)),
            "mean, one table": self._vector(one, AvgEncoder(decay=0.0)),
            "avg (.05), one table": self._vector(one, AvgEncoder()),
            "avg (.3), one table": self._vector(one, AvgEncoder(decay=0.3)),
            BASE: self._vector(one, MixEncoder()),
            "mix_time (1 h, 3 min), two tables": self._vector(two, TimeMixEncoder(0.5, 1.0, 0.05)),
            "mix_time (720 h, 24 h), two tables": self._vector(two, TimeMixEncoder()),
            "mix (.01, .15), two tables": self._vector(two, MixEncoder()),
            BEST: self._vector(two, tuned),
            "long and short apart, two tables": self._interests(two, _long_and_short),
            "3 interests (k-means), two tables": self._interests(two, _clusters),
            f"{BEST}, popularity as it is": self._vector(plain, tuned),
        }
        for method, name in LEARNED.items():
            try:
                head, _ = train_head(self.train, two, method=method, history_limit=HISTORY, seed=seed)
                encoder = LearnedEncoder(head, "", MadeFor(two.version, two.sha256, two.dim), FEATURES)
                self.methods[name] = self._vector(two, encoder)
            except EncoderError:
                self.left_out[name] = "needs more events"
            except ConfigError:
                self.left_out[name] = "needs scikit-learn"
        if (n := int(self.known.sum())) > head_items:
            why = f"needs a matrix of {n:,} by {n:,} items"
            self.left_out |= dict.fromkeys(("ItemKNN, full matrix", "EASE, full matrix"), why)
            return
        weights = Ease(self.train, np.arange(len(self.all.ids)), np.arange(0)).weights
        self.methods |= {
            "ItemKNN, full matrix": self._full(_neighbours(self.train, len(self.all.ids)), 0.0),
            "EASE, full matrix": self._full(weights, 0.0),
            "EASE (.1), full matrix": self._full(weights, _EASE_DECAY),
        }

    def _space(self, made: ItemVectors) -> ItemSpace:
        """The vectors as a worker would load them."""
        with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
            return ItemSpace.save(
                Path(folder) / "v",
                "v",
                made.ids,
                made.vectors,
                metric=made.metric,
                popularity=made.popularity,
                history_vectors=made.history_vectors,
            )

    def _rows_of(self, space: ItemSpace) -> tuple[Int64, Float64]:
        """Row of each item [n], -1 for none; and index rows by item [n, d], zeros for none."""
        rows = space.rows(self.all.ids)
        index = np.zeros((len(rows), space.dim))
        index[rows >= 0] = space.vectors[rows[rows >= 0]]
        return rows, index

    def _vector(self, space: ItemSpace, encoder: Encoder) -> Score:
        rows_of, index = self._rows_of(space)
        absent = rows_of < 0

        def score(items: Sequence[Int64], times: Sequence[Int64]) -> Float64:
            users = np.zeros((len(items), space.dim))
            for n, (of_one, ts_ms) in enumerate(zip(items, times, strict=True)):
                rows = rows_of[of_one]
                known = rows >= 0
                ages = (ts_ms[known].max(initial=0) - ts_ms[known]).astype(np.float64)
                users[n], _ = reference(
                    encoder,
                    space.history_vectors[rows[known]],
                    None,
                    ages,
                    max_row_norm=space.max_row_norm,
                    fallback=space.fallback,
                )
            scores = users @ index.T
            scores[:, absent] = -np.inf
            return np.asarray(scores)

        return score

    def _interests(self, space: ItemSpace, split: Callable[[Float64], Float64]) -> Score:
        """Several vectors of a user, each a query; an item counts by the best of its scores: the same first ten."""
        rows_of, index = self._rows_of(space)
        absent = rows_of < 0

        def score(items: Sequence[Int64], _: Sequence[Int64]) -> Float64:
            scores = np.empty((len(items), len(index)))
            for n, of_one in enumerate(items):
                rows = rows_of[of_one]
                known = space.history_vectors[rows[rows >= 0]].astype(np.float64)
                users = split(known) if len(known) > 1 else space.fallback[None].astype(np.float64)
                scores[n] = (index @ l2_normalize(users).T).max(axis=1)
            scores[:, absent] = -np.inf
            return scores

        return score

    def _full(self, weights: Float64, decay: float) -> Score:
        def score(items: Sequence[Int64], _: Sequence[Int64]) -> Float64:
            lengths = [len(of_one) for of_one in items]
            powers = [np.exp(-decay * np.arange(length - 1, -1, -1.0)) for length in lengths]
            cases = np.repeat(np.arange(len(items)), lengths)
            entries = (np.concatenate(powers), (cases, np.concatenate(items)))
            return np.asarray(sparse.csr_array(entries, shape=(len(items), len(weights))) @ weights)

        return score


class _Ranker:
    """Ranks the cases of one reading by one method after another, and compares."""

    def __init__(self, prepared: _Prepared, cases: Cases, seed: int) -> None:
        self._of = prepared
        self._cases = cases
        self._ranks: dict[str, Float64] = {}
        self._shown: dict[str, Int64] = {}
        user = prepared.all.user[cases.place]
        _, self._user = np.unique(user, return_inverse=True)
        count = int(self._user.max()) + 1
        draws = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))
        self._weights = np.stack([np.bincount(draw, minlength=count) for draw in draws]).astype(np.float64)

    def run(self, name: str, score: Score) -> None:
        """Rank all cases by a method."""
        self._ranks[name], self._shown[name] = self._ranked(score, self._cases)

    def recall(self, score: Score, cases: Cases) -> float:
        """Recall of a method with other histories of the same cases."""
        return float((self._ranked(score, cases)[0] < _TOP).mean())

    def _ranked(self, score: Score, cases: Cases) -> tuple[Float64, Int64]:
        """Rank from 0 of each case's item [c], the middle one of those with its score; and the first ten [c, 10]."""
        item, ts_ms = self._of.all.item, self._of.all.ts_ms
        n = len(self._of.all.ids)
        top = min(_TOP, n)
        ranks, shown = np.empty(len(cases.place)), np.empty((len(cases.place), top), dtype=np.int64)
        size = max(1, _BLOCK_SCORES // n)
        for first in range(0, len(ranks), size):
            block = range(first, min(first + size, len(ranks)))
            seen = [slice(int(self._cases.start[c]), int(self._cases.end[c])) for c in block]
            read = [slice(max(int(cases.start[c]), int(cases.end[c]) - HISTORY), int(cases.end[c])) for c in block]
            scores = score([item[some] for some in read], [ts_ms[some] for some in read])
            scores[:, ~self._of.known] = -np.inf
            for row, some in enumerate(seen):
                scores[row, item[some]] = -np.inf
            targets = item[cases.place[first : first + size]]
            own = scores[np.arange(len(scores)), targets][:, None]
            ranks[first : first + size] = (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
            shown[first : first + size] = np.argpartition(-scores, top - 1, axis=1)[:, :top]
        return ranks, shown

    def rows(self, reading: Reading) -> list[Row]:
        """The figures of all methods."""
        popularity = self._of.popularity
        order = np.argsort(-popularity, kind="stable")
        head = np.zeros(len(popularity), dtype=np.bool_)
        head[order[: max(1, round(_HEAD_SHARE * int(self._of.known.sum())))]] = True
        base = self._ranks[BASE] < _TOP
        made = []
        for name, ranks in self._ranks.items():
            hits, shown = ranks < _TOP, self._shown[name]
            low, high = self._interval(hits.astype(np.float64))
            gain_low, gain_high = self._interval(hits.astype(np.float64) - base)
            discounted = np.where(hits, 1.0 / np.log2(ranks + 2.0), 0.0)
            made.append(
                Row(
                    method=name,
                    reading=reading,
                    recall_10=float(hits.mean()),
                    low=low,
                    high=high,
                    recall_50=float((ranks < _TOP_WIDE).mean()),
                    ndcg_10=float(discounted.mean()),
                    coverage_10=len(np.unique(shown)) / int(self._of.known.sum()),
                    head_share_10=float(head[shown].mean()),
                    gain=float(hits.mean() - base.mean()),
                    gain_low=gain_low,
                    gain_high=gain_high,
                )
            )
        return made

    def _interval(self, values: Float64) -> tuple[float, float]:
        """95 % interval of a mean over cases, users resampled; the same draws for every method."""
        sums = np.bincount(self._user, weights=values)
        counts = np.bincount(self._user).astype(np.float64)
        means = (self._weights @ sums) / (self._weights @ counts)
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)


def _long_and_short(rows: Float64) -> Float64:
    """The two averages of the tuned mixture, unmixed [2, d]."""
    return np.stack([decayed_mean(rows, decay) for decay in (0.02, 0.3)])


def _clusters(rows: Float64) -> Float64:
    """Recency-weighted mean of each of up to three clusters of a history's items [k, d]."""
    directions = l2_normalize(rows)
    centres = directions[[-1]]  # the newest first, then whatever is furthest from those that there are
    while len(centres) < min(_INTERESTS, len(rows)):
        centres = np.concatenate([centres, directions[[int(np.argmin((directions @ centres.T).max(axis=1)))]]])
    for _ in range(_ROUNDS):
        nearest = (directions @ centres.T).argmax(axis=1)
        there = np.unique(nearest)
        centres = np.stack([l2_normalize(directions[nearest == k].mean(axis=0)) for k in there])
        if len(there) < 2:
            break
    nearest = (directions @ centres.T).argmax(axis=1)
    weights = np.exp(-_INTEREST_DECAY * np.arange(len(rows) - 1, -1, -1.0))
    return np.stack([np.average(rows[nearest == k], axis=0, weights=weights[nearest == k]) for k in np.unique(nearest)])


def _part(histories: Histories, mask: NDArray[np.bool_]) -> Histories:
    """Some of the interactions; items keep their numbers."""
    return Histories(histories.ids, histories.item[mask], histories.user[mask], histories.ts_ms[mask])


def _dense(histories: Histories) -> Histories:
    """The same with only the items that occur, numbered anew."""
    there, item = np.unique(histories.item, return_inverse=True)
    return histories._replace(ids=[histories.ids[n] for n in there.tolist()], item=item)


def _neighbours(histories: Histories, n: int) -> Float64:
    """Cosine of the users of two items [n, n], the `_NEIGHBOURS` nearest of each."""
    users = int(histories.user.max()) + 1
    seen = sparse.csr_array((np.ones(len(histories.item)), (histories.user, histories.item)), shape=(users, n))
    seen.data[:] = 1.0
    together = (seen.T @ seen).toarray()
    own = np.sqrt(np.maximum(np.diag(together), 1.0))
    cosine: Any = together / own / own[:, None]
    np.fill_diagonal(cosine, 0.0)
    if n > _NEIGHBOURS:
        least = np.partition(cosine, n - _NEIGHBOURS, axis=0)[n - _NEIGHBOURS]
        cosine[cosine < least] = 0.0
    return np.asarray(cosine)
