"""Loops that numpy has no operation for, compiled by numba: what the batch step does for each interaction.

They see users as slots of arrays, and an interaction's item and type as a number: see `stream.core.kinds`.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit, types

from stream.core.history_codec import COUNT_AT, HEADER_BYTES, LAYOUT_VERSION, MAX_ORDER, MAX_TS_MS, TS_BYTES
from stream.keys import INT64_MAX

#: What is to be done to a user.
ADD: Final = 0
ERASE: Final = 1
SEND_AGAIN: Final = 2

#: What came of it.
APPLIED: Final = 0
DUPLICATE: Final = 1
TOO_OLD: Final = 2
ERASED: Final = 3
ERASURE: Final = 4
KNOWN: Final = 5  # an erasure that changed nothing, or a wish to be sent again

_FNV_START: Final = np.uint64(0xCBF29CE484222325)
_FNV_PRIME: Final = np.uint64(0x100000001B3)
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(32)
_IS_HASH: Final = np.uint64(1 << 63)
_SHORT_BYTES: Final = 7
_AHEAD: Final = 64
_PREFIX_BYTES: Final = 16
#: By how much a stored item and type may be longer than as text.
BODY_ROOM: Final = 8
_PLAIN_BYTES: Final = 14  # seven of a varint, and seven of a short body
_TIME_BYTES: Final = 7  # of a varint of `MAX_TS_MS`


def _array(of: Any, ndim: int, *, read_only: bool = False) -> Any:
    return types.Array(of, ndim, "C", readonly=read_only)


_INT = types.int64
_BYTES = _array(types.uint8, 1, read_only=True)
_U8, _U8_2 = (_array(types.uint8, n) for n in (1, 2))
_I8 = _array(types.int8, 1)
_I32, _I32_2 = (_array(types.int32, n) for n in (1, 2))
_I64, _I64_2 = (_array(_INT, n) for n in (1, 2))
_U64, _U64_2 = (_array(types.uint64, n) for n in (1, 2))
_F64, _F64_2, _F64_3 = (_array(types.float64, n) for n in (1, 2, 3))
_ROWS = _array(types.float32, 2, read_only=True)
_PAIR: Any = types.UniTuple(types.int64, 2)  # type: ignore[no-untyped-call]
_BLOCK: Any = types.Tuple((_U8, _I64))  # type: ignore[no-untyped-call]
_NUMBER: Any = types.Tuple((types.boolean, types.uint64))  # type: ignore[no-untyped-call]


def _compiled(signature: Any) -> Callable[[Any], Any]:
    def compile_it(function: Any) -> Any:
        try:
            return njit(signature, cache=True, boundscheck=False)(function)
        except RuntimeError:  # nowhere to keep what was compiled: once more at each start
            return njit(signature, boundscheck=False)(function)

    return compile_it


# -- keys ----------------------------------------------------------------------------------------------------------


@_compiled(_I64(_BYTES, _I64, _INT))
def partitions_of(data, bounds, partitions):  # type: ignore[no-untyped-def]
    """What `stream.keys.partition_of` says of keys that lie one behind the other [m].

    Args:
        data: the keys.
        bounds: where each begins and the last ends [m + 1].
        partitions: how many there are.
    """
    found = np.empty(bounds.shape[0] - 1, dtype=np.int64)
    factor = np.uint32(0x5BD1E995)
    for i in range(found.shape[0]):
        at, size = bounds[i], bounds[i + 1] - bounds[i]
        hashed = np.uint32(0x9747B28C) ^ np.uint32(size)
        while size >= 4:
            part = np.uint32(0)
            for n in range(4):
                part |= np.uint32(data[at + n]) << np.uint32(8 * n)
            part = np.uint32(part * factor)
            part ^= part >> np.uint32(24)
            hashed = np.uint32(hashed * factor) ^ np.uint32(part * factor)
            at += 4
            size -= 4
        if size:
            for n in range(size):
                hashed ^= np.uint32(data[at + n]) << np.uint32(8 * n)
            hashed = np.uint32(hashed * factor)
        hashed = np.uint32((hashed ^ (hashed >> np.uint32(13))) * factor)
        hashed ^= hashed >> np.uint32(15)
        found[i] = np.int64(hashed & np.uint32(0x7FFFFFFF)) % partitions
    return found


# -- kinds of interactions -----------------------------------------------------------------------------------------


@_compiled(types.uint64(_BYTES, _INT, _INT))
def word_of(data, at, size):  # type: ignore[no-untyped-def]
    """A number by which a body is found: its bytes if there are few of them, else a hash of them, the top bit set.

    No body begins with all of another, so that zeros may stand for what a short one lacks.
    """
    if size <= _SHORT_BYTES:
        word = np.uint64(0)
        for i in range(size):
            word |= np.uint64(data[at + i]) << np.uint64(8 * i)
        return word
    word = _FNV_START
    for i in range(at, at + size):
        word = (word ^ np.uint64(data[i])) * _FNV_PRIME
    return (word ^ (word >> _SHIFT)) | _IS_HASH


@_compiled(_INT(types.uint64, _BYTES, _INT, _INT, _U64_2, _U8, _I64))
def find(word, data, at, size, table, pool, pool_at):  # type: ignore[no-untyped-def]
    """Number of a body in an open hash table, or the free place for it as ``-1 - place``.

    Args:
        word: what `word_of` says of it.
        data: what it lies in.
        at: where.
        size: of it.
        table: of each place a word and one more than the number of the body that has it [power of two, 2].
        pool: the bodies by number.
        pool_at: where each begins and the last ends.
    """
    place = np.int64((word * _SPREAD) >> _SHIFT) & (table.shape[0] - 1)
    while True:
        number = np.int64(table[place, 1]) - 1
        if number < 0:
            return -1 - place
        if table[place, 0] == word:
            if word < _IS_HASH:
                return number
            start = pool_at[number]
            if pool_at[number + 1] - start == size:
                same = True
                for i in range(size):
                    if pool[start + i] != data[at + i]:
                        same = False
                        break
                if same:
                    return number
        place = (place + 1) & (table.shape[0] - 1)


@_compiled(_INT(_BYTES, _I64_2, _U64, _U64_2, _U8, _I64, _I32))
def find_all(data, spans, words, table, pool, pool_at, numbers):  # type: ignore[no-untyped-def]
    """Numbers of bodies; how many of them have none.

    A large table comes from memory, so places are read ahead of their use, some at a time, which need not wait for each
    other.

    Args:
        data: what they lie in.
        spans: start and size of each [n, 2].
        words: of each what `word_of` says [n].
        table: as of `find`.
        pool: as of `find`.
        pool_at: as of `find`.
        numbers: written, -1 where there is none [n].
    """
    missing, count = 0, words.shape[0]
    ahead = np.empty((_AHEAD, 2), dtype=np.uint64)
    for start in range(0, count, _AHEAD):
        some = min(_AHEAD, count - start)
        for i in range(some):
            place = np.int64((words[start + i] * _SPREAD) >> _SHIFT) & (table.shape[0] - 1)
            ahead[i, 0], ahead[i, 1] = table[place, 0], table[place, 1]
        for i in range(some):
            n, word = start + i, words[start + i]
            if ahead[i, 0] == word and ahead[i, 1] and word < _IS_HASH:
                numbers[n] = np.int32(ahead[i, 1]) - 1
                continue
            number = find(word, data, spans[n, 0], spans[n, 1], table, pool, pool_at)
            if number < 0:
                missing += 1
                number = np.int64(-1)
            numbers[n] = number
    return missing


@_compiled(_INT(_U64_2, _U8, _I64, _INT))
def fill(table, pool, pool_at, count):  # type: ignore[no-untyped-def]
    """Enter the first `count` bodies of a pool into an empty table."""
    for number in range(count):
        at, size = pool_at[number], pool_at[number + 1] - pool_at[number]
        word = word_of(pool, at, size)
        place = -1 - find(word, pool, at, size, table, pool, pool_at)
        table[place, 0], table[place, 1] = word, np.uint64(number + 1)
    return count


@_compiled(types.boolean(_U8, _I64, _INT, _INT))
def is_before(pool, pool_at, first, second):  # type: ignore[no-untyped-def]
    """Whether the first of two byte strings of a pool comes before the second."""
    a, b = pool_at[first], pool_at[second]
    a_size, b_size = pool_at[first + 1] - a, pool_at[second + 1] - b
    for i in range(min(a_size, b_size)):
        if pool[a + i] != pool[b + i]:
            return pool[a + i] < pool[b + i]
    return a_size < b_size


# -- stored states -------------------------------------------------------------------------------------------------


@_compiled(_INT(_BYTES, _INT, _INT))
def _big_endian(data, at, size):  # type: ignore[no-untyped-def]
    value = np.int64(0)
    for i in range(at, at + size):
        value = (value << 8) | np.int64(data[i])
    return value


@_compiled(types.void(_U8, _INT, _INT, _INT))
def _put_big_endian(data, at, size, value):  # type: ignore[no-untyped-def]
    for i in range(at + size - 1, at - 1, -1):
        data[i] = np.uint8(value & 0xFF)
        value >>= 8


@_compiled(_INT(_U8, _INT, _INT))
def _put_varint(data, at, value):  # type: ignore[no-untyped-def]
    """Write a number that is not negative, seven bits a byte; return the place after it."""
    while value > 0x7F:
        data[at] = np.uint8(value & 0x7F | 0x80)
        value >>= 7
        at += 1
    data[at] = np.uint8(value)
    return at + 1


@_compiled(_INT(_U8, _INT, types.uint64))
def _put_long(data, at, value):  # type: ignore[no-untyped-def]
    """Write a number of 64 bits, seven bits a byte; return the place after it."""
    while value > np.uint64(0x7F):
        data[at] = np.uint8(value & np.uint64(0x7F) | np.uint64(0x80))
        value >>= np.uint64(7)
        at += 1
    data[at] = np.uint8(value)
    return at + 1


@_compiled(_INT(_U8, _INT, _BYTES, _INT, _INT))
def _put(data, at, source, start, size):  # type: ignore[no-untyped-def]
    """Copy bytes; return the place after them.

    Over slices, whose indices can't be negative: only such a loop becomes wide instructions, fifty times as fast.
    """
    to, of = data[at : at + size], source[start : start + size]
    for i in range(size):
        to[i] = of[i]
    return at + size


@_compiled(_PAIR(_BYTES, _INT, _INT))
def _varint(data, at, end):  # type: ignore[no-untyped-def]
    """The number at a place, and the place after it, which is -1 if there is none as we write it before the end."""
    value, shift = np.int64(0), np.int64(0)
    while 0 <= at < end and shift < 70:
        byte = np.int64(data[at])
        at += 1
        if shift == 63 and byte > 1:  # beyond 64 bits; with 64 of them the number is negative here
            break
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, (at if byte or not shift else np.int64(-1))
        shift += 7
    return value, np.int64(-1)


@_compiled(_INT(_U8, _INT, types.uint64))
def _put_decimal(data, at, value):  # type: ignore[no-untyped-def]
    """Write a number in decimal digits; return the place after them."""
    end, rest = at + 1, value // np.uint64(10)
    while rest:
        end += 1
        rest //= np.uint64(10)
    for place in range(end - 1, at - 1, -1):
        data[place] = np.uint8(value % np.uint64(10) + np.uint64(48))
        value //= np.uint64(10)
    return end


@_compiled(_INT(_U8, _INT, _BYTES, _INT))
def _put_uuid(data, at, source, start):  # type: ignore[no-untyped-def]
    """Write a UUID as text; return the place after it."""
    for i in range(16):
        if i == 4 or i == 6 or i == 8 or i == 10:
            data[at] = 45
            at += 1
        for shift in (4, 0):
            digit = np.int64(source[start + i]) >> shift & 15
            data[at] = digit + (48 if digit < 10 else 87)
            at += 1
    return at


@_compiled(_NUMBER(_BYTES, _INT, _INT))
def _integer(data, start, end):  # type: ignore[no-untyped-def]
    """Whether an item is an integer of 64 bits as we write it, and this in zigzag."""
    nothing = np.uint64(0)
    is_negative = data[start] == 45
    at = start + is_negative
    if not 1 <= end - at <= 19 or (data[at] == 48 and end - start > 1):
        return False, nothing
    value = nothing
    for i in range(at, end):
        if not 48 <= data[i] <= 57:
            return False, nothing
        value = value * np.uint64(10) + np.uint64(data[i] - 48)
    sign = np.uint64(is_negative)
    if value > np.uint64(INT64_MAX) + sign:
        return False, nothing
    return True, (value << np.uint64(1)) - sign


@_compiled(types.boolean(_BYTES, _INT, _INT))
def _is_uuid(data, start, end):  # type: ignore[no-untyped-def]
    """Whether an item is a UUID as we write it."""
    if end - start != 36:
        return False
    for i in range(36):
        byte = data[start + i]
        if i == 8 or i == 13 or i == 18 or i == 23:
            if byte != 45:
                return False
        elif not (48 <= byte <= 57 or 97 <= byte <= 102):
            return False
    return True


@_compiled(types.boolean(_BYTES, _INT, _INT))
def _is_plain(data, start, end):  # type: ignore[no-untyped-def]
    """Whether an item is printable ASCII that surely is no integer and no UUID, which are not stored as text."""
    if not 1 <= end - start <= 256:
        return False
    is_number = True
    for at in range(start, end):
        if not 32 <= data[at] <= 126:
            return False
        is_number &= 48 <= data[at] <= 57 or data[at] == 45
    return not is_number and not (end - start == 36 and data[start + 8] == 45 and data[start + 23] == 45)


@_compiled(_INT(_BYTES, _I64, _I64, _BYTES, _I64, _I64, _U8, _I64_2, _U64))
def read_keys(data, bounds, codes, names, names_at, at_ms, bodies, spans, words):  # type: ignore[no-untyped-def]
    """Event times of sort keys, and item and type of each as they are stored.

    Args:
        data: the keys, one behind the other.
        bounds: where each begins and the last ends [n + 1].
        codes: of the types that there are [t].
        names: of these, one behind the other.
        names_at: where each begins and the last ends [t + 1].
        at_ms: written [n].
        bodies: written, one behind the other; it has room for `data` and `BODY_ROOM` more for each.
        spans: written, start and size of each body [n, 2].
        words: written, of each body what `word_of` says [n].

    Returns:
        The first key whose type isn't there, or -1.
    """
    to = np.int64(0)
    for n in range(at_ms.shape[0]):
        at, end = bounds[n] + TS_BYTES, bounds[n + 1]
        at_ms[n] = _big_endian(data, bounds[n], TS_BYTES)
        middle = at
        while data[middle]:
            middle += 1
        kind = 0
        while kind < codes.shape[0]:
            size = names_at[kind + 1] - names_at[kind]
            if size == end - middle - 1:
                same = True
                for i in range(size):
                    same &= names[names_at[kind] + i] == data[middle + 1 + i]
                if same:
                    break
            kind += 1
        if kind == codes.shape[0]:
            return n
        spans[n, 0], head = to, codes[kind] << 2
        is_number, value = _integer(data, at, middle)
        if is_number:
            to = _put_long(bodies, _put_varint(bodies, to, head), value)
        elif _is_uuid(data, at, middle):
            to = _put_varint(bodies, to, head | 1)
            digits = 0
            for i in range(at, middle):
                if data[i] == 45:
                    continue
                digit = data[i] - (48 if data[i] < 58 else 87)
                if digits & 1:
                    bodies[to] |= digit
                    to += 1
                else:
                    bodies[to] = digit << 4
                digits += 1
        else:
            to = _put_varint(bodies, _put_varint(bodies, to, head | 2), middle - at)
            to = _put(bodies, to, data, at, middle - at)
        spans[n, 1] = to - spans[n, 0]
        words[n] = word_of(bodies, spans[n, 0], spans[n, 1])
    return -1


@_compiled(_PAIR(_BYTES, _I64_2, _U64, _I64, _I32, _I64, _BYTES, _I64, _U64_2, _U8, _I64, _U8, _I64, _INT))
def learn(  # type: ignore[no-untyped-def]
    data, spans, words, some, numbers, codes, names, names_at, table, pool, pool_at, order, order_at, count
):
    """Number bodies: enter them into a table, a pool, and the pool of what they stand for.

    Text that isn't plainly one is left to `HistoryCodec.item_and_type`.

    Args:
        data: what they lie in.
        spans: start and size of each [n, 2].
        words: of each what `word_of` says [n].
        some: which of them [m].
        numbers: written where they are not left to others [n].
        codes: as of `read_keys`.
        names: as of `read_keys`.
        names_at: as of `read_keys`.
        table: as of `find`; it, and each of the pools, has room for m more.
        pool: the bodies.
        pool_at: where each begins and the last ends.
        order: item and type of each, a zero byte in between.
        order_at: where each begins and the last ends.
        count: how many there are so far.

    Returns:
        How many there are now, and the first that is no item and type, or -1.
    """
    for n in some:
        start, size = spans[n, 0], spans[n, 1]
        place = find(words[n], data, start, size, table, pool, pool_at)
        if place >= 0:  # more than one of them is the same
            numbers[n] = place
            continue
        end = start + size
        head, at = _varint(data, start, end)
        kind = 0
        while kind < codes.shape[0] and codes[kind] != head >> 2:
            kind += 1
        if kind == codes.shape[0]:
            return count, n
        to = order_at[count]
        if head & 3 == 0:
            value, shift = np.uint64(0), np.uint64(0)
            for i in range(at, end):
                if shift == 63 and data[i] > 1:  # beyond 64 bits
                    return count, n
                value |= np.uint64(data[i] & 0x7F) << shift
                shift += np.uint64(7)
            if value & np.uint64(1):
                order[to] = 45
                to += 1
            to = _put_decimal(order, to, (value >> np.uint64(1)) + (value & np.uint64(1)))
        elif head & 3 == 1:
            to = _put_uuid(order, to, data, at)
        else:
            _, at = _varint(data, at, end)
            if not _is_plain(data, at, end):
                continue
            to = _put(order, to, data, at, end - at)
        order[to] = 0
        order_at[count + 1] = _put(order, to + 1, names, names_at[kind], names_at[kind + 1] - names_at[kind])
        pool_at[count + 1] = _put(pool, pool_at[count], data, start, size)
        numbers[n] = count
        count += 1
        table[-1 - place, 0], table[-1 - place, 1] = words[n], np.uint64(count)
    return count, np.int64(-1)


@_compiled(_INT(_BYTES, _I64, _I64, _I64, _I64, _I64, _I64_2, _U64))
def read_states(data, bounds, base, times, revisions, erased_at, spans, words):  # type: ignore[no-untyped-def]
    """Headers of stored states, and where their entries lie.

    Args:
        data: the states, one behind the other, each at least a header.
        bounds: where each begins and the last ends [m + 1].
        base: in the columns the same [m + 1].
        times: written, event time of each entry (ms) [n].
        revisions: written, of each state [m].
        erased_at: written, of each state (ms) [m].
        spans: written, start and size of the body of each entry [n, 2].
        words: written, of each body what `word_of` says [n].

    Returns:
        The first state that is no such state, or -1.
    """
    for state in range(bounds.shape[0] - 1):
        epoch = _big_endian(data, bounds[state] + 1, 8)
        revisions[state] = _big_endian(data, bounds[state] + 9, 8)
        erased_at[state] = _big_endian(data, bounds[state] + 17, 8)
        if not (0 <= epoch <= MAX_ORDER and 0 <= revisions[state] <= MAX_ORDER and -1 <= erased_at[state] <= MAX_TS_MS):
            return state
        first = bounds[state] + HEADER_BYTES
        body = data[first : bounds[state + 1]]  # slices, whose indices can't be negative
        of_times, of_spans = times[base[state] : base[state + 1]], spans[base[state] : base[state + 1]]
        of_words, at, end, time, count = words[base[state] : base[state + 1]], 0, body.shape[0], np.int64(0), 0
        while at < end:
            begin, is_plain = at, False
            if (
                at <= end - _PLAIN_BYTES
            ):  # mostly an integer of few bytes, and then there is no need to look for the end
                byte = np.int64(body[at])
                since, shift = byte & 0x7F, 7
                at += 1
                while byte >= 0x80 and shift < 49:
                    byte = np.int64(body[at])
                    since |= (byte & 0x7F) << shift
                    shift += 7
                    at += 1
                is_plain = bool(byte < 0x80 and (byte > 0 or shift == 7))
                start, byte = at, np.int64(body[at])
                is_plain = bool(is_plain and byte & 0x83 == 0)
                word, shift = np.uint64(byte), 8
                at += 1
                byte = np.int64(0x80)
                while byte >= 0x80 and shift < 56:
                    byte = np.int64(body[at])
                    word |= np.uint64(byte) << np.uint64(shift)
                    shift += 8
                    at += 1
                is_plain = bool(is_plain and byte < 0x80 and (byte > 0 or shift == 16))
            if not is_plain:
                since, at = _varint(body, begin, end)
                start = at
                head, at = _varint(body, at, end)
                size, tag = np.int64(16), head & 3
                if tag != 1:
                    size, at = _varint(body, at, end)
                    size = size if tag else np.int64(0)
                if tag > 2 or at < 0 or not 0 <= size <= end - at:
                    return state
                at += size
                word = word_of(body, start, at - start)
            time += since
            if count >= of_times.shape[0] or not 0 <= since <= MAX_TS_MS or time > MAX_TS_MS:
                return state
            of_times[count], of_words[count] = time, word
            of_spans[count, 0], of_spans[count, 1] = first + start, at - start
            count += 1
        if count != of_times.shape[0]:
            return state
    return -1


@_compiled(_INT(_I64, _I64, _I32, _U8, _I64))
def first_disordered(base, times, numbers, order, order_at):  # type: ignore[no-untyped-def]
    """The first history whose interactions of one time are not in order, or -1; all lie one behind the other.

    Args:
        base: where each begins and the last ends [m + 1].
        times: event time of each interaction [n], ascending within a history.
        numbers: item and type of each [n].
        order: item and type by number, in which interactions of one time are ordered.
        order_at: where each begins and the last ends.
    """
    for state in range(base.shape[0] - 1):
        for entry in range(base[state] + 1, base[state + 1]):
            if times[entry] == times[entry - 1] and not is_before(
                order, order_at, np.int64(numbers[entry - 1]), np.int64(numbers[entry])
            ):
                return state
    return -1


@_compiled(_INT(_U8, _INT, _I64, _I32, _U8, _I64, _INT, _INT))
def _put_entries(data, at, times, numbers, pool, pool_at, first, end):  # type: ignore[no-untyped-def]
    """Write some interactions of a history; return the place after them."""
    before = times[first - 1] if first else np.int64(0)
    for entry in range(first, end):
        number = numbers[entry]
        at = _put_varint(data, at, times[entry] - before)
        at = _put(data, at, pool, pool_at[number], pool_at[number + 1] - pool_at[number])
        before = times[entry]
    return at


@_compiled(_PAIR(_BYTES, _INT, _INT, _INT))
def _skip_entries(data, at, end, count):  # type: ignore[no-untyped-def]
    """Time of the entry that comes after so many of a state, and where its body begins."""
    time = np.int64(0)
    for _ in range(count):
        since, at = _varint(data, at, end)
        time += since
        head, at = _varint(data, at, end)
        if head & 3 == 1:
            at += 16
        else:
            size, at = _varint(data, at, end)
            at += size if head & 3 == 2 else 0
    since, at = _varint(data, at, end)
    return time + since, at


@_compiled(_BLOCK(_I64, _I64, _BYTES, _I64, _I64, _I64_2, _I32_2, _I64, _I64, _I64, _U8, _I64))
def write_states(  # type: ignore[no-untyped-def]
    slots, epochs, before, before_at, appended, times, numbers, counts, revisions, erased_at, pool, pool_at
):
    """Stored states of some slots [m], one behind the other; where each begins and the last ends [m + 1].

    What a state has in common with the one before is copied: mostly all but its first interaction and its last.

    Args:
        slots: whose, distinct.
        epochs: under which they are written [m].
        before: stored states of before, one behind the other, empty where there was none.
        before_at: where each begins and the last ends [m + 1].
        appended: changed, how many interactions came to the new end of a slot since, -1 where it is all anew [S].
        times: event times by slot, oldest first [S, L].
        numbers: item and type of each [S, L].
        counts: how many a slot has [S].
        revisions: of each slot [S].
        erased_at: of each slot (ms) [S].
        pool: stored item and type by number.
        pool_at: where each begins and the last ends.
    """
    room = np.int64(0)
    for i in range(slots.shape[0]):
        slot, size = slots[i], before_at[i + 1] - before_at[i]
        first = counts[slot] - appended[slot]
        if not size or appended[slot] < 0 or first <= 0:
            appended[slot] = -1
            first, size = np.int64(0), np.int64(HEADER_BYTES)
        room += size + _TIME_BYTES
        for entry in range(first, counts[slot]):
            number = numbers[slot, entry]
            room += _TIME_BYTES + pool_at[number + 1] - pool_at[number]
    data, bounds = np.empty(room, dtype=np.uint8), np.zeros(slots.shape[0] + 1, dtype=np.int64)
    at = np.int64(0)
    for i in range(slots.shape[0]):
        slot, count = slots[i], counts[slots[i]]
        data[at] = LAYOUT_VERSION
        _put_big_endian(data, at + 1, 8, epochs[i])
        _put_big_endian(data, at + 9, 8, revisions[slot])
        _put_big_endian(data, at + 17, 8, erased_at[slot])
        _put_big_endian(data, at + COUNT_AT, 2, count)
        at += HEADER_BYTES
        first = np.int64(0)
        if appended[slot] >= 0:
            first = count - appended[slot]
            start, end = before_at[i], before_at[i + 1]
            gone = _big_endian(before, start + COUNT_AT, 2) - first
            time, start = _skip_entries(before, start + HEADER_BYTES, end, gone)
            at = _put_varint(data, at, time)
            at = _put(data, at, before, start, end - start)
        at = _put_entries(data, at, times[slot], numbers[slot], pool, pool_at, first, count)
        appended[slot] = 0
        bounds[i + 1] = at
    return data[:at], bounds


# -- histories in memory -------------------------------------------------------------------------------------------


@_compiled(types.void(_I64, _I64, _I64, _I32, _I64_2, _I32_2, _I64))
def place_histories(slots, base, from_times, from_numbers, times, numbers, counts):  # type: ignore[no-untyped-def]
    """Copy histories that lie one behind the other [m] to their slots."""
    for i in range(slots.shape[0]):
        slot, start = slots[i], base[i]
        counts[slot] = base[i + 1] - start
        some_times, some_numbers = from_times[start : base[i + 1]], from_numbers[start : base[i + 1]]
        for entry in range(counts[slot]):
            times[slot, entry] = some_times[entry]
            numbers[slot, entry] = some_numbers[entry]


@_compiled(
    types.void(
        _I64, _I8, _I64, _I32, _U8, _I64, _I64_2, _I32_2, _I64, _I64, _I64, _I64, _I8, _I64, _I64, _I64, _I64, _I64
    )
)
def fold(  # type: ignore[no-untyped-def]
    slots, what, at_ms, kinds, order, order_at, times, numbers, counts, revisions, erased_at, appended,
    outcomes, places, gone, lengths, as_of, revised,
):  # fmt: skip
    """Do to histories what is to be done, one after the other: the loop of `stream.core.history.History`.

    Args:
        slots: whose history [n].
        what: `ADD`, `ERASE` or `SEND_AGAIN` [n].
        at_ms: event time of what is added, or of the erasure [n].
        kinds: number of the item and type that are added [n].
        order: item and type by number, in which interactions of one time are ordered.
        order_at: where each begins and the last ends.
        times: changed, event times by slot, oldest first [S, L].
        numbers: changed, item and type of each [S, L].
        counts: changed [S].
        revisions: changed [S].
        erased_at: changed [S].
        appended: changed, how many came to the new end since the state was written, -1 once one came elsewhere [S].
        outcomes: written, what came of each [n].
        places: written, how many interactions are older than what was added [n].
        gone: written, how many left the old end [n].
        lengths: written, how long the history is then [n].
        as_of: written, when its newest interaction was, -1 without one [n].
        revised: written, its revision then [n].
    """
    limit = times.shape[1]
    for n in range(slots.shape[0]):
        slot, at, kind, count = slots[n], at_ms[n], kinds[n], counts[slots[n]]
        if what[n] == ADD:
            if at <= erased_at[slot]:
                outcomes[n] = ERASED
            else:
                place = count
                while place > 0:
                    other = numbers[slot, place - 1]
                    if times[slot, place - 1] < at or (
                        times[slot, place - 1] == at
                        and (other == kind or is_before(order, order_at, np.int64(other), np.int64(kind)))
                    ):
                        break
                    place -= 1
                if place > 0 and times[slot, place - 1] == at and numbers[slot, place - 1] == kind:
                    outcomes[n] = DUPLICATE
                elif place == 0 and count == limit:
                    outcomes[n] = TOO_OLD
                else:
                    if count == limit:
                        of_times, of_numbers = times[slot, :place], numbers[slot, :place]
                        for entry in range(1, place):
                            of_times[entry - 1] = of_times[entry]
                        for entry in range(1, place):
                            of_numbers[entry - 1] = of_numbers[entry]
                        place -= 1
                        gone[n] = 1
                    else:
                        for entry in range(count, place, -1):
                            times[slot, entry] = times[slot, entry - 1]
                            numbers[slot, entry] = numbers[slot, entry - 1]
                        count += 1
                    times[slot, place], numbers[slot, place] = at, kind
                    outcomes[n], places[n] = APPLIED, place
                    revisions[slot] += 1
                    appended[slot] = appended[slot] + 1 if appended[slot] >= 0 and place == count - 1 else -1
        elif what[n] == ERASE and at > erased_at[slot]:
            erased_at[slot] = at
            cut = 0
            while cut < count and times[slot, cut] <= at:
                cut += 1
            for entry in range(cut, count):
                times[slot, entry - cut] = times[slot, entry]
                numbers[slot, entry - cut] = numbers[slot, entry]
            count -= cut
            outcomes[n], gone[n] = ERASURE, cut
            revisions[slot] += 1
        else:
            outcomes[n] = KNOWN
        counts[slot] = count
        lengths[n], revised[n] = count, revisions[slot]
        as_of[n] = times[slot, count - 1] if count else -1


# -- sums of rows --------------------------------------------------------------------------------------------------


@_compiled(_PAIR(_I32_2, _F64_2, _I64_2, _INT, _INT, _INT, _F64, _F64_2, _ROWS, _F64_3, _F64_2, types.int64))
def sum_one(rows, weights, times, of, start, end, decays, powers, vectors, sums, totals, to):  # type: ignore[no-untyped-def]
    """Weighted sum of a history's known rows.

    Args:
        rows: of histories [m, n], oldest first, -1 where the space lacks the item.
        weights: of each [m, n], or none [m, 0]: all weigh 1.
        times: of each (ms) [m, n], where sums go by time, else none [m, 0].
        of: which of them.
        start: where it begins there.
        end: where it ends.
        decays: of each sum [K], per ms where they go by time.
        powers: ``exp(-decay_k · r)`` [K, ranks], where sums go by rank.
        vectors: rows of the space.
        sums: written [M, K, d].
        totals: written, sums of the weights [M, K].
        to: where in these.

    Returns:
        How many rows there are, and the time of the newest where sums go by time.
    """
    weighted, by_time, dim = weights.shape[1] > 0, times.shape[1] > 0, vectors.shape[1]
    known, count = np.empty(end - start, dtype=np.int64), np.int64(0)  # where they are, newest first
    for entry in range(end - 1, start - 1, -1):
        if rows[of, entry] >= 0:
            known[count] = entry
            count += 1
    newest_ms = times[of, known[0]] if by_time and count else np.int64(0)
    factors = np.empty(count, dtype=np.float64)
    for k in range(decays.shape[0]):
        total = 0.0
        for rank in range(count):
            entry = known[rank]
            factor = math.exp(-decays[k] * (newest_ms - times[of, entry])) if by_time else powers[k, rank]
            if weighted:
                factor *= weights[of, entry]
            factors[rank] = factor
            total += factor
        totals[to, k] = total
        summed = sums[to, k]
        for d in range(dim):
            summed[d] = 0.0
        done = np.int64(0)
        while done + 4 <= count:  # four at once, for the rows come from memory and the sum is written each time
            a, b = vectors[rows[of, known[done]]], vectors[rows[of, known[done + 1]]]
            c, e = vectors[rows[of, known[done + 2]]], vectors[rows[of, known[done + 3]]]
            for_a, for_b, for_c, for_e = factors[done], factors[done + 1], factors[done + 2], factors[done + 3]
            for d in range(dim):
                summed[d] = summed[d] + for_a * a[d] + for_b * b[d] + for_c * c[d] + for_e * e[d]
            done += 4
        while done < count:
            a, for_a = vectors[rows[of, known[done]]], factors[done]
            for d in range(dim):
                summed[d] += for_a * a[d]
            done += 1
    return count, newest_ms


@_compiled(types.void(_I32_2, _I64, _F64_2, _I64_2, _F64, _F64_2, _ROWS, _F64_3, _F64_2, _I64, _I64))
def sum_histories(rows, base, weights, times, decays, powers, vectors, sums, totals, known, newest_ms):  # type: ignore[no-untyped-def]
    """Weighted sums of whole histories that lie one behind the other: of each what `sum_one` says.

    Args:
        rows: as of `sum_one`, all in one [1, n].
        base: where each history begins and the last ends [m + 1].
        weights: as of `sum_one` [1, n] or [1, 0].
        times: as of `sum_one` [1, n] or [1, 0].
        decays: as of `sum_one`.
        powers: as of `sum_one`.
        vectors: as of `sum_one`.
        sums: written [m, K, d].
        totals: written [m, K].
        known: written, how many rows there are [m].
        newest_ms: written, time of the newest known item [m], where sums go by time.
    """
    for i in range(base.shape[0] - 1):
        known[i], newest_ms[i] = sum_one(
            rows, weights, times, 0, base[i], base[i + 1], decays, powers, vectors, sums, totals, i
        )


@_compiled(types.void(_I64, _I64, _I32, _F64, _I64, _I32_2, _F64_2, _I64_2, _I64))
def place_rows(slots, base, from_rows, from_weights, from_times, rows, weights, times, counts):  # type: ignore[no-untyped-def]
    """Copy rows, and weights and times where they count, that lie one behind the other [m] to their slots."""
    for i in range(slots.shape[0]):
        slot, start = slots[i], base[i]
        counts[slot] = base[i + 1] - start
        for entry in range(counts[slot]):
            rows[slot, entry] = from_rows[start + entry]
            if from_weights.shape[0]:
                weights[slot, entry] = from_weights[start + entry]
            if from_times.shape[0]:
                times[slot, entry] = from_times[start + entry]


@_compiled(
    types.void(
        _I64, _I32, _F64, _I64, _I64, _I64, _I64, _INT,
        _I32_2, _F64_2, _I64_2, _I64, _F64_3, _F64_2, _I64, _I64, _I64, _F64, _F64_2, _ROWS,
        _F64_3, _F64_2, _I64, _I64_2,
    )
)  # fmt: skip
def follow(  # type: ignore[no-untyped-def]
    slots, new_rows, new_weights, new_times, places, gone, shown, max_age,
    rows, weights, times, counts, sums, totals, known, newest_ms, ages, decays, powers, vectors,
    out_sums, out_totals, out_known, out_newest,
):  # fmt: skip
    """Have running sums follow what was done to histories, one after the other.

    What is newer than all that was there is added to the sums, and what leaves the old end taken from them; for
    anything else the history is summed afresh.

    Args:
        slots: whose history [n].
        new_rows: row of what was added [n], -1 where the space lacks it.
        new_weights: its weight [n], or none [0].
        new_times: when it was (ms) [n].
        places: how many interactions are older, -1 if nothing was added [n].
        gone: how many left the old end before [n].
        shown: where to write the state after it, or -1 [n].
        max_age: after so many additions sums are made afresh.
        rows: changed, by slot, oldest first [S, L].
        weights: changed, the same [S, L], or none [S, 0].
        times: changed, the same [S, L] where sums go by time, else none [S, 0].
        counts: changed, how many a slot has [S].
        sums: changed [S, K, d].
        totals: changed [S, K].
        known: changed, how many rows of a slot the space has [S].
        newest_ms: changed, time of the newest of these [S].
        ages: changed, how many additions ago sums were made afresh [S].
        decays: of each sum [K], per ms where they go by time.
        powers: ``exp(-decay_k · r)`` [K, ranks], where sums go by rank.
        vectors: rows of the space.
        out_sums: written [m, K, d].
        out_totals: written [m, K].
        out_known: written [m].
        out_newest: written, the newest known rows, newest first, -1 where there are fewer [m, M].
    """
    weighted, by_time, dim = weights.shape[1] > 0, times.shape[1] > 0, vectors.shape[1]
    for n in range(slots.shape[0]):
        slot, place, leaving, row = slots[n], places[n], gone[n], new_rows[n]
        count = counts[slot]
        afresh = ages[slot] >= max_age or leaving > 1 or (leaving and place < 0)
        weight = new_weights[n] if weighted and place >= 0 else 1.0
        if leaving == 1 and place >= 0:
            old = rows[slot, 0]
            old_weight = weights[slot, 0] if weighted else 1.0
            old_time = times[slot, 0] if by_time else np.int64(0)
        else:
            old, old_weight, old_time = np.int32(-1), 1.0, np.int64(0)
        if leaving == 1:  # as a rule: a loop whose step is known becomes one move of memory
            of_rows = rows[slot, :count]
            for entry in range(1, count):
                of_rows[entry - 1] = of_rows[entry]
        elif leaving:
            for entry in range(leaving, count):
                rows[slot, entry - leaving] = rows[slot, entry]
        for entry in range(leaving, count if leaving and (weighted or by_time) else 0):
            if weighted:
                weights[slot, entry - leaving] = weights[slot, entry]
            if by_time:
                times[slot, entry - leaving] = times[slot, entry]
        count -= leaving
        if place >= 0:
            afresh = afresh or place < count
            for entry in range(count, place, -1):
                rows[slot, entry] = rows[slot, entry - 1]
                if weighted:
                    weights[slot, entry] = weights[slot, entry - 1]
                if by_time:
                    times[slot, entry] = times[slot, entry - 1]
            rows[slot, place] = row
            if weighted:
                weights[slot, place] = weight
            if by_time:
                times[slot, place] = new_times[n]
            count += 1
        counts[slot] = count
        if afresh:
            ages[slot] = 0
            known[slot], newest_ms[slot] = sum_one(
                rows, weights, times, slot, 0, count, decays, powers, vectors, sums, totals, slot
            )
        elif place >= 0:
            ages[slot] += 1
            newest = newest_ms[slot]
            if by_time and row >= 0:
                newest = new_times[n]
            for k in range(decays.shape[0]):
                keep, loss = 1.0, 0.0
                if row >= 0 and known[slot]:
                    keep = math.exp(-decays[k] * (newest - newest_ms[slot])) if by_time else powers[k, 1]
                if old >= 0:
                    if by_time:
                        loss = old_weight * math.exp(-decays[k] * (newest - old_time))
                    else:
                        loss = old_weight * powers[k, known[slot] - 1 + (row >= 0)]
                summed = sums[slot, k]
                if row >= 0:
                    totals[slot, k] = totals[slot, k] * keep + weight
                    coming = vectors[row]
                    for d in range(dim):
                        summed[d] = summed[d] * keep + weight * coming[d]
                if old >= 0:
                    totals[slot, k] -= loss
                    going = vectors[old]
                    for d in range(dim):
                        summed[d] -= loss * going[d]
            newest_ms[slot] = newest
            known[slot] += np.int64(row >= 0) - np.int64(old >= 0)
        to, is_empty = shown[n], known[slot] == 0
        for k in range(decays.shape[0]):
            summed = sums[slot, k]
            if is_empty:  # no rounding residue either
                totals[slot, k] = 0.0
                for d in range(dim):
                    summed[d] = 0.0
            if to >= 0:
                out_totals[to, k] = totals[slot, k]
                shows = out_sums[to, k]
                for d in range(dim):
                    shows[d] = summed[d]
        if to >= 0:
            out_known[to] = known[slot]
            found = 0
            for entry in range(count - 1, -1, -1):
                if found == out_newest.shape[1]:
                    break
                if rows[slot, entry] >= 0:
                    out_newest[to, found] = rows[slot, entry]
                    found += 1


# -- records -------------------------------------------------------------------------------------------------------


@_compiled(_BLOCK(_BYTES, _I64, _I64, _I64, _I64, _I64, _I64, _I8, _BYTES, _I64, _BYTES, _BYTES, _BYTES, _U8_2, _U8_2))
def write_entries(  # type: ignore[no-untyped-def]
    users, users_at, epochs, revisions, lengths, unknown, as_of, status, flags, flags_at, header, versions, size,
    norms, vectors,
):  # fmt: skip
    """Key-value entries of some states, one behind the other; where each begins and the last ends [m + 1].

    Args:
        users: ids, one behind the other.
        users_at: where each begins and the last ends [m + 1].
        epochs: of each [m].
        revisions: of each [m].
        lengths: of each history [m]; of an empty one nothing follows the prefix.
        unknown: how many of its items the space lacks [m].
        as_of: time of its newest interaction (ms) [m].
        status: of each vector [m].
        flags: what Avro makes of each status and its reason, one behind the other.
        flags_at: where each begins and the last ends.
        header: marker and fingerprint of the schema.
        versions: what Avro makes of the versions and the dimension.
        size: what it makes of the size of a vector.
        norms: of each vector, as bytes [m, 8].
        vectors: as bytes [m, 4 d].
    """
    fixed = _PREFIX_BYTES + header.shape[0] + versions.shape[0] + 8 + size.shape[0] + vectors.shape[1] + 61
    room = np.int64(0)
    for i in range(lengths.shape[0]):
        of = np.int64(status[i])
        room += fixed + users_at[i + 1] - users_at[i] + flags_at[of + 1] - flags_at[of]
    data = np.empty(room, dtype=np.uint8)
    bounds = np.zeros(lengths.shape[0] + 1, dtype=np.int64)
    at = np.int64(0)
    for i in range(lengths.shape[0]):
        _put_big_endian(data, at, 8, epochs[i])
        _put_big_endian(data, at + 8, 8, revisions[i])
        at += _PREFIX_BYTES
        if lengths[i]:
            of = np.int64(status[i])
            at = _put(data, at, header, 0, header.shape[0])
            user = users_at[i + 1] - users_at[i]
            at = _put_varint(data, at, user << 1)
            at = _put(data, at, users, users_at[i], user)
            at = _put_varint(data, at, epochs[i] << 1)
            at = _put_varint(data, at, revisions[i] << 1)
            at = _put(data, at, flags, flags_at[of], flags_at[of + 1] - flags_at[of])
            at = _put_varint(data, at, lengths[i] << 1)
            at = _put_varint(data, at, unknown[i] << 1)
            data[at] = 2  # the union's long
            at = _put_varint(data, at + 1, as_of[i] << 1)
            at = _put(data, at, versions, 0, versions.shape[0])
            for n in range(8):
                data[at + n] = norms[i, n]
            at = _put(data, at + 8, size, 0, size.shape[0])
            for n in range(vectors.shape[1]):
                data[at + n] = vectors[i, n]
            at += vectors.shape[1]
        bounds[i + 1] = at
    return data, bounds
