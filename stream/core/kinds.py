"""Kinds of interactions, that is item and type, by number; and stored histories as columns of such numbers.

What a kind is to an item space or an encoder is one look into an array, instead of decoding the interaction.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from stream.core import kernels
from stream.core.history_codec import COUNT_AT, DAMAGED, HistoryCodec
from stream.core.space import Space
from stream.errors import StateError

#: Kinds that are remembered; when there are more, all are forgotten, and users in memory with them. So many take
#: 260 MB, a quarter 70.
_MEMO_LIMIT: Final = 1 << 20
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
    """

    base: Int64
    numbers: Int32
    times: Int64
    revisions: Int64
    erased_at: Int64

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
        self._count = 0

    def add(self, text: bytes) -> None:
        """Give the next number to some bytes."""
        start = int(self.at[self._count])
        end = start + len(text)
        if end > len(self.data):
            self.data = np.resize(self.data, 2 * end)
        if self._count + 2 > len(self.at):
            self.at = np.resize(self.at, 2 * len(self.at))
        self.data[start:end] = np.frombuffer(text, dtype=np.uint8)
        self._count += 1
        self.at[self._count] = end


class Kinds:
    """The numbers, and what they are to spaces and encoders; one for all partitions of a worker.

    Args:
        codec: what stores interactions.

    Attributes:
        suffixes: item and type, a zero byte in between, by number.
        bodies: stored item and type by number.
        order: the suffixes for the compiled loops, which order interactions of one time by them.
        forgotten: how often the numbers began anew.
    """

    def __init__(self, codec: HistoryCodec) -> None:
        self.codec = codec
        self.forgotten = 0
        self._rows: WeakValueDictionary[str, ByNumber] = WeakValueDictionary()  # those of a retired version go
        self._weights: WeakValueDictionary[tuple[tuple[str, float], ...], ByNumber] = WeakValueDictionary()
        self._begin()

    def _begin(self) -> None:
        self.suffixes: list[bytes] = []
        self.bodies, self.order = Pool(), Pool()
        self._numbers: dict[bytes, int] = {}
        self._table = np.full(1 << 7, -1, dtype=np.int32)

    def make_room(self) -> None:
        """Forget all where they are too many: to be called while nobody is about to use a number."""
        if len(self.suffixes) >= _MEMO_LIMIT:
            self.forgotten += 1
            self._begin()

    def numbers(self, suffixes: Sequence[bytes]) -> list[int]:
        """Number of each kind, given as item and type with a zero byte in between."""
        found = list(map(self._numbers.get, suffixes))
        if None in found:
            return [self._number(suffix) for suffix in suffixes]
        return found  # type: ignore[return-value]

    def _number(self, suffix: bytes) -> int:
        number = self._numbers.get(suffix)
        return self._learn(self.codec.body(suffix), suffix) if number is None else number

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
        times, numbers = np.zeros(base[-1], dtype=np.int64), np.zeros(base[-1], dtype=np.int32)
        revisions, erased_at = np.zeros((2, len(states)), dtype=np.int64)
        unknown = np.zeros((base[-1], 2), dtype=np.int64)
        while True:
            bodies, order = self.bodies, self.order
            bad, missing = kernels.read_states(
                data, bounds, base, self._table, bodies.data, bodies.at, order.data, order.at, times, numbers,
                revisions, erased_at, unknown,
            )  # fmt: skip
            if bad >= 0:
                raise StateError(DAMAGED)
            if not missing:
                return Columns(base, numbers, times, revisions, erased_at)
            for body in dict.fromkeys(data[at : at + size].tobytes() for at, size in unknown[:missing].tolist()):
                self._learn(body, self.codec.item_and_type(body))

    def _learn(self, body: bytes, suffix: bytes) -> int:
        number = self._numbers[suffix] = len(self.suffixes)
        self.suffixes.append(suffix)
        self.bodies.add(body)
        self.order.add(suffix)
        pool, count = self.bodies, number + 1
        if 2 * count > len(self._table):
            self._table = np.full(4 * len(self._table), -1, dtype=np.int32)
            kernels.fill(self._table, pool.data, pool.at, count)
        else:
            at, size = int(pool.at[number]), len(body)
            hashed = kernels.hash_of(pool.data, at, size)
            place = kernels.find(pool.data, at, size, hashed, self._table, pool.data, pool.at)
            self._table[-1 - place] = number
        return number

    def rows_of(self, space: Space) -> "ByNumber":
        """Row of each kind's item in a space, -1 where it has none."""
        rows = self._rows.get(space.version)
        if rows is None:
            row_of = space.row
            rows = ByNumber(self, lambda suffix: row_of(suffix[: suffix.index(b"\0")], -1), np.int32)
            self._rows[space.version] = rows
        return rows

    def weights_of(self, type_weights: Mapping[str, float]) -> "ByNumber":
        """Weight of each kind's type, one for all encoders that weigh types alike."""
        of = tuple(sorted(type_weights.items()))
        weights = self._weights.get(of)
        if weights is None:
            by_name = {name.encode(): weight for name, weight in type_weights.items()}
            weights = ByNumber(self, lambda suffix: by_name.get(suffix[suffix.index(b"\0") + 1 :], 1.0), np.float64)
            self._weights[of] = weights
        return weights


class ByNumber:
    """What kinds are to something, by their numbers: asked once for each.

    Args:
        kinds: what gives the numbers.
        ask: called with item and type, a zero byte in between.
        dtype: of the answers, none of which is -2.
    """

    def __init__(self, kinds: Kinds, ask: Callable[[bytes], float], dtype: type[np.number[Any]]) -> None:
        self._kinds = kinds
        self._ask = ask
        self._forgotten = kinds.forgotten
        self._answers: NDArray[Any] = np.full(1 << 6, _NOT_YET, dtype=dtype)

    def of(self, numbers: Int32) -> NDArray[Any]:
        """The answer for each number [n]."""
        answers, suffixes = self._answers, self._kinds.suffixes
        if self._forgotten != self._kinds.forgotten:
            self._forgotten = self._kinds.forgotten
            answers.fill(_NOT_YET)
        if len(suffixes) > len(answers):
            self._answers = np.full(2 * len(suffixes), _NOT_YET, dtype=answers.dtype)
            self._answers[: len(answers)] = answers
            answers = self._answers
        found = answers[numbers]
        if (missing := found == _NOT_YET).any():
            for number in np.unique(numbers[missing]).tolist():
                answers[number] = self._ask(suffixes[number])
            found = answers[numbers]
        return found
