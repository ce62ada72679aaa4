"""Loops that numpy has no operation for, compiled by numba: stored histories to columns, and sums of whole histories.

Without numba the step takes the plain ways of `stored_columns` and `sums`, which say the same.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit, types

from stream.core.history_codec import HEADER_BYTES, TS_BYTES

_FNV_START: Final = np.uint64(0xCBF29CE484222325)
_FNV_PRIME: Final = np.uint64(0x100000001B3)
_SHIFT: Final = np.uint64(32)


def _array(of: Any, ndim: int, *, read_only: bool = False) -> Any:
    return types.Array(of, ndim, "C", readonly=read_only)


_BYTES = _array(types.uint8, 1, read_only=True)
_U8 = _array(types.uint8, 1)
_I64, _I64_2 = (_array(types.int64, n) for n in (1, 2))
_PAIR: Any = types.UniTuple(types.int64, 2)  # type: ignore[no-untyped-call]
_I32 = _array(types.int32, 1)
_F64, _F64_2, _F64_3 = (_array(types.float64, n) for n in (1, 2, 3))
_ROWS = _array(types.float32, 2, read_only=True)


def _compiled(signature: Any) -> Callable[[Any], Any]:
    def compile_it(function: Any) -> Any:
        try:
            return njit(signature, cache=True, boundscheck=False)(function)
        except RuntimeError:  # nowhere to keep what was compiled: once more at each start
            return njit(signature, boundscheck=False)(function)

    return compile_it


@_compiled(types.uint64(_BYTES, types.int64, types.int64))
def hash_of(data, at, size):  # type: ignore[no-untyped-def]
    """FNV-1a of some bytes, its halves folded so that low bits depend on all."""
    found = _FNV_START
    for i in range(at, at + size):
        found = (found ^ np.uint64(data[i])) * _FNV_PRIME
    return found ^ (found >> _SHIFT)


@_compiled(types.int64(_BYTES, types.int64, types.int64, types.uint64, _I32, _U8, _I64))
def find(data, at, size, hashed, table, pool, pool_at):  # type: ignore[no-untyped-def]
    """Number of some bytes in an open hash table [power of two], or the free place for them as ``-1 - place``."""
    mask = table.shape[0] - 1
    place = np.int64(hashed) & mask
    while True:
        number = table[place]
        if number < 0:
            return -1 - place
        start = pool_at[number]
        if pool_at[number + 1] - start == size:
            same = True
            for i in range(size):
                if pool[start + i] != data[at + i]:
                    same = False
                    break
            if same:
                return np.int64(number)
        place = (place + 1) & mask


@_compiled(types.int64(_I32, _U8, _I64, types.int64))
def fill(table, pool, pool_at, count):  # type: ignore[no-untyped-def]
    """Enter the first `count` bodies of a pool into an empty table."""
    for number in range(count):
        at, size = pool_at[number], pool_at[number + 1] - pool_at[number]
        place = -1 - find(pool, at, size, hash_of(pool, at, size), table, pool, pool_at)
        table[place] = number
    return count


@_compiled(types.boolean(_U8, _I64, types.int64, types.int64))
def is_before(pool, pool_at, first, second):  # type: ignore[no-untyped-def]
    """Whether the first of two byte strings of a pool comes before the second."""
    a, b = pool_at[first], pool_at[second]
    a_size, b_size = pool_at[first + 1] - a, pool_at[second + 1] - b
    for i in range(min(a_size, b_size)):
        if pool[a + i] != pool[b + i]:
            return pool[a + i] < pool[b + i]
    return a_size < b_size


@_compiled(_PAIR(_BYTES, _I64, _I64, _I32, _U8, _I64, _U8, _I64, _I64, _I32, _I64, _I64_2))
def read_states(  # type: ignore[no-untyped-def]
    data, bounds, base, table, pool, pool_at, order, order_at, times, numbers, newest, unknown
):
    """Entries of stored states.

    Args:
        data: the states, one behind the other, each at least a header.
        bounds: where each begins and the last ends [m + 1].
        base: in the columns the same [m + 1].
        table: hash table of the bodies in `pool`.
        pool: known bodies.
        pool_at: where each begins and the last ends.
        order: item and type of each known body, in which entries of one time are ordered.
        order_at: where each begins and the last ends.
        times: written, event time of each entry (ms) [n].
        numbers: written, number of each entry's body [n], -1 where it isn't known.
        newest: written, where each state's newest entry begins [m].
        unknown: written, start and size of the bodies that are not known [n, 2].

    Returns:
        The first state that is no such state, or -1; how many bodies are not known.
    """
    missing = 0
    for state in range(bounds.shape[0] - 1):
        at, end = bounds[state] + HEADER_BYTES, bounds[state + 1]
        entry, last = base[state], base[state + 1]
        before = np.int64(-1)
        while at < end:
            if entry >= last or at + TS_BYTES + 1 > end:
                return state, missing
            newest[state] = at
            time = np.int64(0)
            for i in range(TS_BYTES):
                time = (time << 8) | np.int64(data[at + i])
            size = np.int64(data[at + TS_BYTES])
            at += TS_BYTES + 1
            if size > 0x7F:
                if at >= end or data[at] > 0x7F:  # no id is that long
                    return state, missing
                size = (size & 0x7F) | (np.int64(data[at]) << 7)
                at += 1
            if at + size > end or time < before:
                return state, missing
            number = find(data, at, size, hash_of(data, at, size), table, pool, pool_at)
            if number < 0:
                unknown[missing, 0], unknown[missing, 1] = at, size
                missing += 1
                number = np.int64(-1)
            elif (
                time == before
                and numbers[entry - 1] >= 0
                and not is_before(order, order_at, np.int64(numbers[entry - 1]), number)
            ):
                return state, missing
            times[entry], numbers[entry] = time, np.int32(number)
            before = time
            at += size
            entry += 1
        if entry != last:
            return state, missing
    return -1, missing


@_compiled(types.void(_I32, _I64, _F64, _I64, _F64, _F64_2, _ROWS, _F64_3, _F64_2, _I64, _I64))
def sum_states(rows, base, weights, times, decays, powers, vectors, sums, totals, known, newest_ms):  # type: ignore[no-untyped-def]
    """Weighted sums of whole histories.

    Args:
        rows: of each entry, oldest first [n], -1 where the space lacks the item.
        base: where each history begins and the last ends [m + 1].
        weights: of each entry [n], or none [0]: all weigh 1.
        times: of each entry (ms) [n], where sums go by time, else none [0].
        decays: of each sum [K], per ms where they go by time.
        powers: ``exp(-decay_k · r)`` [K, ranks], where sums go by rank.
        vectors: rows of the space.
        sums: written [m, K, d].
        totals: written, sums of the weights [m, K].
        known: written, how many rows there are [m].
        newest_ms: written, time of the newest known item [m], where sums go by time.
    """
    by_time = times.shape[0] > 0
    for state in range(base.shape[0] - 1):
        rank = 0
        for entry in range(base[state + 1] - 1, base[state] - 1, -1):
            row = rows[entry]
            if row < 0:
                continue
            if by_time and rank == 0:
                newest_ms[state] = times[entry]
            for k in range(decays.shape[0]):
                factor = math.exp(-decays[k] * (newest_ms[state] - times[entry])) if by_time else powers[k, rank]
                if weights.shape[0]:
                    factor *= weights[entry]
                totals[state, k] += factor
                for d in range(vectors.shape[1]):
                    sums[state, k, d] += factor * vectors[row, d]
            rank += 1
        known[state] = rank
