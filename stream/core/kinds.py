"""Kinds of interactions, that is item and type, by number; and stored histories as columns of such numbers.

What a kind is to an item space or an encoder is one look into an array, instead of decoding the interaction.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream.core import kernels
from stream.core.history_codec import COUNT_AT, DAMAGED, HistoryCodec
from stream.core.space import Space
from stream.core.sums import grown
from stream.errors import StateError

#: Kinds that are remembered; when there are more, all are forgotten, and users in memory with them. So many take
#: 310 MB where items are integers, 450 where they are texts of twenty letters.
_MEMO_LIMIT: Final = 1 << 22
#: So many are learned at once, or as many as there are: room is made for each, and often the same come again and again.
_LEARNED_AT_ONCE: Final = 1 << 12
#: Of an item's text, that is no text in what is stored.
_LONGEST_ITEM: Final = 36
_NOT_YET: Final = -2

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Columns(NamedTuple):
    """The interactions of some histories, one history behind the other, each oldest first.

    Attributes:
        base: where each history begins and the last ends [m + 1].
        numbers: of each interaction [n] the number of its kind; good until kinds are forgotten.
        times: of each interaction its event time in ms [n].
        revisions: of each history [m].
        erased_at: of each history in ms [m].
        states: each as it is stored [m], empty where nothing is.
    """

    base: Int64
    numbers: Int32
    times: Int64
    revisions: Int64
    erased_at: Int64
    states: list[bytes]

    @property
    def lengths(self) -> Int64:
        """How many interactions each history has [m]."""
        return np.diff(self.base)

    @property
    def as_of(self) -> Int64:
        """When the newest interaction of each was, in ms [m]; -1 without one."""
        return np.where(self.lengths > 0, np.append(self.times, -1)[self.base[1:] - 1], -1)

    def followed_by(self, count: int, revision: int, erased_at: int) -> "Columns":
        """The same, and so many empty histories."""
        if not count:
            return self
        return self._replace(
            base=np.append(self.base, np.full(count, self.base[-1])),
            revisions=np.append(self.revisions, np.full(count, revision)),
            erased_at=np.append(self.erased_at, np.full(count, erased_at)),
            states=self.states + [b""] * count,
        )


class Pool:
    """Byte strings by number, one behind the other.

    Attributes:
        data: the bytes.
        at: where each begins and the last ends.
    """

    def __init__(self) -> None:
        self.data = np.zeros(1 << 10, dtype=np.uint8)
        self.at = np.zeros(1 << 6, dtype=np.int64)

    def reserve(self, count: int, more: int, size: int) -> None:
        """Make room for some more texts of so many bytes together, beside the `count` that there are."""
        end = int(self.at[count]) + size
        if end > len(self.data):
            self.data = grown(self.data, 2 * end)
        if count + more >= len(self.at):
            self.at = grown(self.at, 2 * (count + more))

    def __getitem__(self, number: int) -> bytes:
        return self.data[self.at[number] : self.at[number + 1]].tobytes()


class Kinds:
    """The numbers, and what they are to spaces and encoders; one for all partitions of a worker.

    Args:
        codec: what stores interactions.

    Attributes:
        bodies: stored item and type by number.
        order: item and type by number, a zero byte in between: interactions of one time are in the order of these.
        forgotten: how often the numbers began anew.
    """

    def __init__(self, codec: HistoryCodec) -> None:
        self.codec = codec
        self.forgotten = 0
        self._rows: WeakValueDictionary[str, ByNumber] = WeakValueDictionary()  # those of a retired version go
        self._weights: WeakValueDictionary[tuple[tuple[str, float], ...], ByNumber] = WeakValueDictionary()
        names = {name.encode(): code for name, code in codec.type_codes.items()}
        self._codes = np.array(list(names.values()), dtype=np.int64)
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._names_at = np.array([0, *accumulate(map(len, names))])
        self._longest_name = max(map(len, names), default=0)
        self._begin()

    def _begin(self) -> None:
        self._count = 0
        self.bodies, self.order = Pool(), Pool()
        self._make_table(1 << 7)

    def _make_table(self, size: int) -> None:
        self._table = np.zeros((size, 2), dtype=np.uint64)
        kernels.fill(self._table, self.bodies.data, self.bodies.at, self._count)

    def __len__(self) -> int:
        return self._count

    def make_room(self) -> None:
        """Forget all where they are too many: to be called while nobody is about to use a number."""
        if self._count >= _MEMO_LIMIT:
            self.forgotten += 1
            self._begin()

    def of_keys(self, keys: Sequence[bytes]) -> tuple[Int64, Int32]:
        """Event time in ms [n], and number of item and type [n], of interactions given by their sort keys."""
        count, data = len(keys), np.frombuffer(b"".join(keys), dtype=np.uint8)
        bounds = np.array([0, *accumulate(map(len, keys))])
        at_ms, spans, words = _room(count)
        bodies = np.empty(len(data) + count * kernels.BODY_ROOM, dtype=np.uint8)
        bad = kernels.read_keys(
            data, bounds, self._codes, self._names, self._names_at, at_ms, bodies, spans, words
        )  # fmt: skip
        if bad >= 0:
            msg = "an interaction has a type without a code"
            raise ValueError(msg)
        return at_ms, self._numbers(bodies, spans, words)

    def read(self, states: Sequence[bytes], limit: int) -> Columns:
        """Columns of stored states that have at most `limit` interactions each.

        Raises:
            StateError: unknown layout, or bytes that can't be such a state.
        """
        states = [self.codec.as_written_now(state) for state in states]
        data = np.frombuffer(b"".join(states), dtype=np.uint8)
        bounds = np.array([0, *accumulate(map(len, states))])
        heads = bounds[:-1] + COUNT_AT
        counts = (data[heads].astype(np.int64) << 8) + data[heads + 1]
        if counts.max(initial=0) > limit:
            raise StateError(DAMAGED)
        base = np.zeros(len(states) + 1, dtype=np.int64)
        np.cumsum(counts, out=base[1:])
        times, spans, words = _room(int(base[-1]))
        revisions, erased_at = np.zeros((2, len(states)), dtype=np.int64)
        bad = kernels.read_states(data, bounds, base, times, revisions, erased_at, spans, words)
        if bad >= 0:
            raise StateError(DAMAGED)
        numbers = self._numbers(data, spans, words)
        if kernels.first_disordered(base, times, numbers, self.order.data, self.order.at) >= 0:
            raise StateError(DAMAGED)
        return Columns(base, numbers, times, revisions, erased_at, states)

    def _numbers(self, data: NDArray[np.uint8], spans: Int64, words: NDArray[np.uint64]) -> Int32:
        """Number of each body [n], given by start and size [n, 2] and by what `kernels.word_of` says [n]."""
        numbers = np.empty(len(words), dtype=np.int32)
        if kernels.find_all(data, spans, words, self._table, self.bodies.data, self.bodies.at, numbers):
            new = np.flatnonzero(numbers < 0)
            while len(new):
                at_once = max(_LEARNED_AT_ONCE, self._count)
                self._learn_some(data, spans, words, new[:at_once], numbers)
                new = new[at_once:]
        return numbers

    def _learn_some(
        self, data: NDArray[np.uint8], spans: Int64, words: NDArray[np.uint64], some: Int64, numbers: Int32
    ) -> None:
        """Learn some bodies [m] of all [n], and write their numbers."""
        size = int(spans[some, 1].sum())
        self._reserve(len(some), size, size + len(some) * (_LONGEST_ITEM + 1 + self._longest_name))
        bodies, order = self.bodies, self.order
        self._count, bad = kernels.learn(
            data, spans, words, some, numbers, self._codes, self._names, self._names_at, self._table, bodies.data,
            bodies.at, order.data, order.at, self._count,
        )  # fmt: skip
        if bad >= 0:
            raise StateError(DAMAGED)
        for place in some[numbers[some] < 0].tolist():
            at, size = spans[place].tolist()
            body = data[at : at + size].tobytes()
            numbers[place] = self._learn(body, self.codec.item_and_type(body))

    def _learn(self, body: bytes, suffix: bytes) -> int:
        """Number of a body, which means a suffix; a new one if it has none yet."""
        self._reserve(1, len(body), len(suffix))
        data, pool, count = np.frombuffer(body, dtype=np.uint8), self.bodies, self._count
        word = kernels.word_of(data, 0, len(body))
        place = kernels.find(word, data, 0, len(body), self._table, pool.data, pool.at)
        if place >= 0:
            return int(place)
        for texts, text in ((pool, body), (self.order, suffix)):
            start = texts.at[count]
            texts.at[count + 1] = end = start + len(text)
            texts.data[start:end] = np.frombuffer(text, dtype=np.uint8)
        self._count += 1
        self._table[-1 - place] = word, self._count
        return count

    def _reserve(self, more: int, body_bytes: int, suffix_bytes: int) -> None:
        count = self._count
        self.bodies.reserve(count, more, body_bytes)
        self.order.reserve(count, more, suffix_bytes)
        if 3 * (count + more) > 2 * len(self._table):  # two thirds full
            self._make_table(1 << (3 * (count + more) // 2).bit_length())

    def rows_of(self, space: Space) -> "ByNumber":
        """Row of each kind's item in a space, -1 where it has none."""
        rows = self._rows.get(space.version)
        if rows is None:
            of_items = space.rows_of
            rows = ByNumber(self, lambda kinds: of_items([item for item, _ in kinds]), np.int32)
            self._rows[space.version] = rows
        return rows

    def weights_of(self, type_weights: Mapping[str, float]) -> "ByNumber":
        """Weight of each kind's type, one for all encoders that weigh types alike."""
        of = tuple(sorted(type_weights.items()))
        weights = self._weights.get(of)
        if weights is None:
            by_name = {name.encode(): weight for name, weight in type_weights.items()}
            weights = ByNumber(self, lambda kinds: [by_name.get(kind, 1.0) for _, kind in kinds], np.float64)
            self._weights[of] = weights
        return weights


class ByNumber:
    """What kinds are to something, by their numbers: asked once for each.

    Args:
        kinds: what gives the numbers.
        ask: called with items and types; none of its answers is -2.
        dtype: of the answers.
    """

    def __init__(
        self, kinds: Kinds, ask: Callable[[list[tuple[bytes, bytes]]], ArrayLike], dtype: type[np.number[Any]]
    ) -> None:
        self._kinds = kinds
        self._ask = ask
        self._forgotten = kinds.forgotten
        self._answers: NDArray[Any] = np.full(1 << 6, _NOT_YET, dtype=dtype)

    def of(self, numbers: Int32) -> NDArray[Any]:
        """The answer for each number [n]."""
        answers, kinds = self._answers, self._kinds
        if self._forgotten != kinds.forgotten:
            self._forgotten = kinds.forgotten
            answers.fill(_NOT_YET)
        if len(kinds) > len(answers):
            self._answers = np.full(2 * len(kinds), _NOT_YET, dtype=answers.dtype)
            self._answers[: len(answers)] = answers
            answers = self._answers
        found = answers[numbers]
        if (missing := found == _NOT_YET).any():
            wanted = np.unique(numbers[missing])
            answers[wanted] = self._ask([_item_and_type(kinds.order[number]) for number in wanted.tolist()])
            found = answers[numbers]
        return found


def _room(count: int) -> tuple[Int64, Int64, NDArray[np.uint64]]:
    """Of so many interactions: times [n], start and size of bodies [n, 2], and what `kernels.word_of` says [n]."""
    times, spans = np.empty(count, dtype=np.int64), np.empty((count, 2), dtype=np.int64)
    return times, spans, np.empty(count, dtype=np.uint64)


def _item_and_type(suffix: bytes) -> tuple[bytes, bytes]:
    item, _, name = suffix.partition(b"\0")
    return item, name
