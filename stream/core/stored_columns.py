"""Stored histories of a batch's users as columns: times, and a number for each interaction's item and type.

What such a number is to an item space or an encoder is one look into an array, instead of decoding the interaction.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from stream.core import fast
from stream.core.history import History
from stream.core.history_codec import (
    COUNT_AT,
    DAMAGED,
    TS_BYTES,
    HistoryCodec,
    check_layout,
    stored_times,
)
from stream.core.space import Space
from stream.errors import StateError

#: Kinds of interactions that are remembered; when there are more, all are forgotten. So many take 226 MB, a
#: quarter 65; a user from disk costs 103 us with 400,000 items, which fit, and 655 with items that don't.
_MEMO_LIMIT: Final = 1 << 20
_NOT_YET: Final = -2

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Columns(NamedTuple):
    """The interactions of some histories, one history behind the other, each oldest first.

    Attributes:
        base: where each history begins and the last ends [m + 1].
        numbers: of each interaction [n] the number of its item and type; good until the next are read.
        times: of each interaction its event time in ms [n]; None where nobody asked for them.
    """

    base: Int64
    numbers: Int32
    times: Int64 | None

    def followed_by(self, count: int) -> "Columns":
        """The same, and so many empty histories."""
        return self._replace(base=np.append(self.base, np.full(count, self.base[-1]))) if count else self


class StoredReader(ABC):
    """Reads stored states.

    Args:
        codec: what wrote them.

    Attributes:
        suffixes: item and type, a zero byte in between, by number.
        forgotten: how often the numbers began anew.
    """

    def __init__(self, codec: HistoryCodec) -> None:
        self.codec = codec
        self.suffixes: list[bytes] = []
        self.forgotten = 0

    def read(self, states: Sequence[bytes], limit: int, *, times: bool) -> tuple[list[History], Columns]:
        """Histories of stored states that have at most `limit` interactions each, and their columns.

        Raises:
            StateError: unknown layout, or bytes that can't be such a state.
        """
        if len(self.suffixes) >= _MEMO_LIMIT:
            self.forgotten += 1
            self.suffixes.clear()
            self._forget()
        for state in states:
            check_layout(state)
        return self._read(states, limit, times=times)

    @abstractmethod
    def _forget(self) -> None:
        """Numbers begin anew."""

    @abstractmethod
    def _read(self, states: Sequence[bytes], limit: int, *, times: bool) -> tuple[list[History], Columns]:
        """See `read`."""


class PlainReader(StoredReader):
    """Reads one entry after the other."""

    def __init__(self, codec: HistoryCodec) -> None:
        super().__init__(codec)
        self._numbers: dict[bytes, int] = {}

    def _forget(self) -> None:
        self._numbers.clear()

    def _read(self, states: Sequence[bytes], limit: int, *, times: bool) -> tuple[list[History], Columns]:
        histories, numbers, stamps = [], [], []
        for state in states:
            history, bodies = History.read(state, self.codec, limit)
            histories.append(history)
            found = list(map(self._numbers.get, bodies))
            if None in found:
                found = [self._learn(body) for body in bodies]
            numbers += found
            if times:
                stamps.append(stored_times(state, bodies))
        base = np.array([0, *accumulate(history.count for history in histories)])
        none = np.zeros(0, dtype=np.int64)
        return histories, Columns(
            base, np.array(numbers, dtype=np.int32), np.concatenate([none, *stamps]) if times else None
        )

    def _learn(self, body: bytes) -> int:
        number = self._numbers.get(body)
        if number is None:
            suffix = self.codec.item_and_type(body)
            number = self._numbers[body] = len(self.suffixes)
            self.suffixes.append(suffix)
        return number


class _Pool:
    """Byte strings by number, one behind the other."""

    def __init__(self) -> None:
        self.data = np.zeros(1 << 10, dtype=np.uint8)
        self.at = np.zeros(1 << 6, dtype=np.int64)
        self.count = 0

    def add(self, text: bytes) -> None:
        start = int(self.at[self.count])
        end = start + len(text)
        if end > len(self.data):
            self.data = np.resize(self.data, 2 * end)
        if self.count + 2 > len(self.at):
            self.at = np.resize(self.at, 2 * len(self.at))
        self.data[start:end] = np.frombuffer(text, dtype=np.uint8)
        self.count += 1
        self.at[self.count] = end


class CompiledReader(StoredReader):
    """Reads all entries in one loop of `stream.core.kernels`."""

    def __init__(self, codec: HistoryCodec, kernels: Any) -> None:
        super().__init__(codec)
        self._kernels = kernels
        self._forget()

    def _forget(self) -> None:
        self._bodies, self._order = _Pool(), _Pool()
        self._table = np.full(1 << 7, -1, dtype=np.int32)

    def _read(self, states: Sequence[bytes], limit: int, *, times: bool) -> tuple[list[History], Columns]:
        data = np.frombuffer(b"".join(states), dtype=np.uint8)
        bounds = np.array([0, *accumulate(map(len, states))])
        heads = bounds[:-1] + COUNT_AT
        counts = (data[heads].astype(np.int64) << 8) + data[heads + 1]
        if counts.max(initial=0) > limit:
            raise StateError(DAMAGED)
        base = np.zeros(len(states) + 1, dtype=np.int64)
        np.cumsum(counts, out=base[1:])
        stamps, numbers = np.zeros(base[-1], dtype=np.int64), np.zeros(base[-1], dtype=np.int32)
        newest, unknown = np.zeros(len(states), dtype=np.int64), np.zeros((base[-1], 2), dtype=np.int64)
        while True:
            bodies, order = self._bodies, self._order
            bad, missing = self._kernels.read_states(
                data, bounds, base, self._table, bodies.data, bodies.at, order.data, order.at, stamps, numbers, newest,
                unknown,
            )  # fmt: skip
            if bad >= 0:
                raise StateError(DAMAGED)
            if not missing:
                break
            for body in dict.fromkeys(data[at : at + size].tobytes() for at, size in unknown[:missing].tolist()):
                self._learn(body)
        histories = [
            History.of_bytes(state, self.codec, limit, count, self._sort_key(state, at - start, last - 1, numbers))
            for state, count, at, start, last in zip(
                states, counts.tolist(), newest.tolist(), bounds.tolist(), base[1:].tolist(), strict=False
            )
        ]
        return histories, Columns(base, numbers, stamps if times else None)

    def _sort_key(self, state: bytes, at: int, entry: int, numbers: Int32) -> bytes:
        """Sort key of a state's newest entry, empty where there is none."""
        return state[at : at + TS_BYTES] + self.suffixes[numbers[entry]] if at > 0 else b""

    def _learn(self, body: bytes) -> None:
        suffix = self.codec.item_and_type(body)
        self._bodies.add(body)
        self._order.add(suffix)
        self.suffixes.append(suffix)
        pool, count = self._bodies, len(self.suffixes)
        if 2 * count > len(self._table):
            self._table = np.full(4 * len(self._table), -1, dtype=np.int32)
            self._kernels.fill(self._table, pool.data, pool.at, count)
        else:
            at, size = int(pool.at[count - 1]), len(body)
            hashed = self._kernels.hash_of(pool.data, at, size)
            place = self._kernels.find(pool.data, at, size, hashed, self._table, pool.data, pool.at)
            self._table[-1 - place] = count - 1


class ByNumber:
    """What interactions are to something, by their numbers: asked once for each kind.

    Args:
        reader: what gives the numbers.
        ask: called with item and type, a zero byte in between.
        dtype: of the answers, none of which is -2.
    """

    def __init__(self, reader: StoredReader, ask: Callable[[bytes], float], dtype: type[np.number[Any]]) -> None:
        self._reader = reader
        self._ask = ask
        self._forgotten = reader.forgotten
        self._answers: NDArray[Any] = np.full(1 << 6, _NOT_YET, dtype=dtype)

    def of(self, numbers: Int32) -> NDArray[Any]:
        """The answer for each number [n]."""
        answers, suffixes = self._answers, self._reader.suffixes
        if self._forgotten != self._reader.forgotten:
            self._forgotten = self._reader.forgotten
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


class SharedColumns:
    """One reader, and answers by what they are of, so that the partitions of a worker remember each interaction once.

    Args:
        codec: what wrote the interactions.
        compiled: read by the compiled loops, where they are installed.
    """

    def __init__(self, codec: HistoryCodec, *, compiled: bool = True) -> None:
        self.codec = codec
        kernels = fast.kernels() if compiled else None
        self.kernels = kernels
        self.reader = PlainReader(codec) if kernels is None else CompiledReader(codec, kernels)
        self._rows: WeakValueDictionary[str, ByNumber] = WeakValueDictionary()  # those of a retired version go
        self._weights: WeakValueDictionary[tuple[tuple[str, float], ...], ByNumber] = WeakValueDictionary()

    def rows_of(self, space: Space) -> ByNumber:
        """Row of each interaction's item in a space, -1 where it has none."""
        rows = self._rows.get(space.version)
        if rows is None:
            row_of = space.row
            rows = ByNumber(self.reader, lambda suffix: row_of(suffix[: suffix.index(b"\0")], -1), np.int32)
            self._rows[space.version] = rows
        return rows

    def weights_of(self, type_weights: Mapping[str, float]) -> ByNumber:
        """Weight of each interaction's type, one for all encoders that weigh types alike."""
        of = tuple(sorted(type_weights.items()))
        weights = self._weights.get(of)
        if weights is None:
            by_name = {name.encode(): weight for name, weight in type_weights.items()}
            weights = ByNumber(
                self.reader, lambda suffix: by_name.get(suffix[suffix.index(b"\0") + 1 :], 1.0), np.float64
            )
            self._weights[of] = weights
        return weights
