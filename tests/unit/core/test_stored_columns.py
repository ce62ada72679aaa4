"""Stored states as columns: what decoding each interaction would say, read by either way, however full the memo is."""

import gc
import weakref
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import TYPES, ids, random_space

from stream.core import stored_columns
from stream.core.history import History
from stream.core.history_codec import TS_BYTES, HistoryCodec, key_ts_ms, sort_key
from stream.core.stored_columns import Columns, SharedColumns
from stream.errors import StateError
from stream.keys import canonical_id

LIMIT = 5
WAYS = pytest.mark.parametrize("compiled", [False, True])

#: Few times, so that many interactions share one; ids of every kind and length.
entries = st.tuples(
    st.sampled_from([0, 1, 255, 1 << 40]),
    ids.map(lambda item: canonical_id(str(item))) | st.sampled_from(["x" * 200, "7", "-7"]),
    st.sampled_from([*TYPES]),
)
histories = st.lists(st.lists(entries, max_size=LIMIT, unique=True), max_size=4)


def states_of(codec: HistoryCodec, some: Sequence[Sequence[tuple[int, str, str]]]) -> list[bytes]:
    keys = [sorted(sort_key(ts, item.encode(), kind.encode()) for ts, item, kind in one) for one in some]
    return [History(codec, LIMIT, of_one, revision=n).encode(9) for n, of_one in enumerate(keys)]


def parts(columns: Columns, values: Sequence[object]) -> list[list[object]]:
    bounds = columns.base.tolist()
    return [list(values[start:end]) for start, end in pairwise(bounds)]


@WAYS
@pytest.mark.parametrize("memo_limit", [1, 3, 1 << 18])
@given(batches=st.lists(histories, max_size=3))
def test_columns_say_what_decoding_each_history_says(
    compiled: bool, memo_limit: int, batches: list[list[list[tuple[int, str, str]]]]
) -> None:
    space, codec = random_space("v1", 4), HistoryCodec(TYPES)
    shared = SharedColumns(codec, compiled=compiled)
    rows, weights = shared.rows_of(space), shared.weights_of({"like": 2.5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_columns, "_MEMO_LIMIT", memo_limit)
        for some in batches:
            states = states_of(codec, some)
            read, columns = shared.reader.read(states, LIMIT, times=True)
            decoded = [History.decode(state, codec, LIMIT) for state in states]
            keys = [history.keys for history in decoded]
            assert [(h.count, h.newest, h.revision, h.erased_at) for h in read] == [
                (h.count, h.newest, h.revision, h.erased_at) for h in decoded
            ]
            assert [h.encode(9) for h in read] == states
            assert columns.times is not None
            assert parts(columns, columns.times.tolist()) == [[key_ts_ms(key) for key in one] for one in keys]
            names = [[key[TS_BYTES:].split(b"\0") for key in one] for one in keys]
            found = rows.of(columns.numbers).tolist()
            assert parts(columns, found) == [[space.row(item, -1) for item, _ in one] for one in names]
            found = weights.of(columns.numbers).tolist()
            assert parts(columns, found) == [[2.5 if kind == b"like" else 1.0 for _, kind in one] for one in names]
            assert shared.reader.read(states, LIMIT, times=False)[1].times is None


@WAYS
@given(one=st.lists(entries, min_size=1, max_size=LIMIT, unique=True), data=st.data())
def test_damage_is_found_as_decoding_finds_it(
    compiled: bool, one: list[tuple[int, str, str]], data: st.DataObject
) -> None:
    codec = HistoryCodec(TYPES)
    state = bytearray(states_of(codec, [one])[0])
    for _ in range(data.draw(st.integers(1, 2))):
        state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(state[: data.draw(st.integers(0, len(state)))]) if data.draw(st.booleans()) else bytes(state)
    sound = states_of(codec, [one])[0]
    reader = SharedColumns(codec, compiled=compiled).reader
    try:
        want = History.decode(damaged, codec, LIMIT)
        is_ordered = want.keys == sorted(set(want.keys)) and want.count <= LIMIT
    except StateError:
        is_ordered = False
    if is_ordered:
        read, _ = reader.read([sound, damaged], LIMIT, times=False)
        assert read[1].keys == want.keys
    else:
        with pytest.raises(StateError):
            reader.read([sound, damaged], LIMIT, times=False)


@WAYS
def test_interactions_of_one_time_are_in_the_order_of_their_items_and_types(compiled: bool) -> None:
    codec = HistoryCodec(TYPES)
    sound = states_of(codec, [[(7, "10", "view"), (7, "9", "view")]])[0]
    first, second = (states_of(codec, [[entry]])[0][27:] for entry in ((7, "10", "view"), (7, "9", "view")))
    assert sound[27:] == first + second
    reader = SharedColumns(codec, compiled=compiled).reader
    for _ in range(2):  # with its parts not known yet, and known
        for wrong in (second + first, first + first):
            with pytest.raises(StateError):
                reader.read([sound[:27] + wrong], LIMIT, times=False)
        reader.read([sound], LIMIT, times=False)


@WAYS
def test_more_interactions_than_the_limit_are_refused(compiled: bool) -> None:
    codec = HistoryCodec(TYPES)
    states = states_of(codec, [[(7, "10", "view"), (7, "9", "view")]])
    with pytest.raises(StateError):
        SharedColumns(codec, compiled=compiled).reader.read(states, 1, times=False)


@WAYS
def test_many_kinds_of_interactions_keep_their_numbers_apart(compiled: bool) -> None:
    codec = HistoryCodec(TYPES)
    shared = SharedColumns(codec, compiled=compiled)
    for first in range(0, 3_000, 500):
        some = [[(n, str(n // 2), "view" if n % 2 else "like")] for n in range(first, first + 1_000)]
        _, columns = shared.reader.read(states_of(codec, some), LIMIT, times=False)
        suffixes = [shared.reader.suffixes[number] for number in columns.numbers.tolist()]
        assert suffixes == [f"{n // 2}\0{'view' if n % 2 else 'like'}".encode() for n in range(first, first + 1_000)]
    assert len(set(shared.reader.suffixes)) == len(shared.reader.suffixes) == 3_500


@WAYS
def test_nothing_is_read_of_nothing_and_empty_histories_may_follow(compiled: bool) -> None:
    reader = SharedColumns(HistoryCodec(TYPES), compiled=compiled).reader
    read, columns = reader.read([], LIMIT, times=True)
    assert not read
    assert columns.base.tolist() == [0]
    assert columns.followed_by(0) is columns
    assert columns.followed_by(2).base.tolist() == [0, 0, 0]


def test_partitions_share_what_is_remembered_until_their_version_is_retired() -> None:
    shared = SharedColumns(HistoryCodec(TYPES))
    first, second = random_space("v1", 4), random_space("v2", 4)
    rows, weights = shared.rows_of(first), shared.weights_of({"like": 2.0, "view": 0.5})
    assert shared.rows_of(first) is rows
    assert shared.rows_of(second) is not rows
    assert shared.weights_of({"view": 0.5, "like": 2.0}) is weights
    assert shared.weights_of({"view": 0.5}) is not weights
    gone = weakref.ref(rows), weakref.ref(weights)
    del rows, weights
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@WAYS
def test_the_plain_way_is_taken_where_nothing_is_compiled(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_columns.fast, "kernels", lambda: None)
    shared = SharedColumns(HistoryCodec(TYPES), compiled=compiled)
    assert shared.kernels is None
    assert type(shared.reader) is stored_columns.PlainReader
    assert np.array_equal(shared.rows_of(random_space("v1", 4)).of(np.zeros(0, dtype=np.int32)), [])


def test_loops_are_compiled_at_each_start_where_there_is_no_place_to_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = stored_columns.fast.kernels()
    assert kernels is not None
    njit, asked = kernels.njit, []

    def without_a_place(signature: object, **how: object) -> object:
        asked.append(how.get("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(signature, **how)

    monkeypatch.setattr(kernels, "njit", without_a_place)
    twice = kernels._compiled(kernels.types.int64(kernels.types.int64))(lambda n: 2 * n)
    assert (twice(21), asked) == (42, [True, False])
