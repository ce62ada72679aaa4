"""Stored states as columns: what decoding each interaction would say, however full the memo is."""

import gc
import weakref
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import TYPES, ids, random_space

from stream.core import kernels, kinds
from stream.core.history import History
from stream.core.history_codec import TS_BYTES, HistoryCodec, key_ts_ms, sort_key
from stream.core.kinds import Columns, Kinds
from stream.errors import StateError
from stream.keys import canonical_id

LIMIT = 5

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


@pytest.mark.parametrize("memo_limit", [1, 3, 1 << 18])
@given(batches=st.lists(histories, max_size=3))
def test_columns_say_what_decoding_each_history_says(
    memo_limit: int, batches: list[list[list[tuple[int, str, str]]]]
) -> None:
    space, codec = random_space("v1", 4), HistoryCodec(TYPES)
    shared = Kinds(codec)
    rows, weights = shared.rows_of(space), shared.weights_of({"like": 2.5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "_MEMO_LIMIT", memo_limit)
        for some in batches:
            shared.make_room()
            states = states_of(codec, some)
            columns = shared.read(states, LIMIT)
            decoded = [History.decode(state, codec, LIMIT) for state in states]
            keys = [history.keys for history in decoded]
            assert columns.lengths.tolist() == [history.count for history in decoded]
            assert columns.revisions.tolist() == [history.revision for history in decoded]
            assert columns.erased_at.tolist() == [history.erased_at for history in decoded]
            newest = [-1 if history.as_of_ms is None else history.as_of_ms for history in decoded]
            assert columns.as_of.tolist() == newest
            assert parts(columns, columns.times.tolist()) == [[key_ts_ms(key) for key in one] for one in keys]
            names = [[key[TS_BYTES:].split(b"\0") for key in one] for one in keys]
            found = rows.of(columns.numbers).tolist()
            assert parts(columns, found) == [[space.row(item, -1) for item, _ in one] for one in names]
            found = weights.of(columns.numbers).tolist()
            assert parts(columns, found) == [[2.5 if kind == b"like" else 1.0 for _, kind in one] for one in names]
            at_ms, numbers = shared.of_keys([key for one in keys for key in one])
            assert numbers.tolist() == columns.numbers.tolist()
            assert at_ms.tolist() == columns.times.tolist()
            assert columns.states == states


@given(one=st.lists(entries, min_size=1, max_size=LIMIT, unique=True), data=st.data())
def test_damage_is_found_as_decoding_finds_it(one: list[tuple[int, str, str]], data: st.DataObject) -> None:
    codec = HistoryCodec(TYPES)
    state = bytearray(states_of(codec, [one])[0])
    for _ in range(data.draw(st.integers(1, 2))):
        state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(state[: data.draw(st.integers(0, len(state)))]) if data.draw(st.booleans()) else bytes(state)
    sound = states_of(codec, [one])[0]
    reader = Kinds(codec)
    try:
        want = History.decode(damaged, codec, LIMIT)
        is_ordered = want.keys == sorted(set(want.keys)) and want.count <= LIMIT
    except StateError:
        is_ordered = False
    if is_ordered:
        columns = reader.read([sound, damaged], LIMIT)
        suffixes = [reader.order[number] for number in columns.numbers.tolist()][columns.base[1] :]
        assert suffixes == [key[TS_BYTES:] for key in want.keys]
        assert columns.times.tolist()[columns.base[1] :] == [key_ts_ms(key) for key in want.keys]
    else:
        with pytest.raises(StateError):
            reader.read([sound, damaged], LIMIT)


def test_interactions_of_one_time_are_in_the_order_of_their_items_and_types() -> None:
    codec = HistoryCodec(TYPES)
    sound = states_of(codec, [[(7, "10", "view"), (7, "9", "view")]])[0]
    ten, nine = (codec.body(item + b"\0view") for item in (b"10", b"9"))
    assert sound[27:] == b"\x07" + ten + b"\0" + nine
    reader = Kinds(codec)
    for _ in range(2):  # with its parts not known yet, and known
        for first, second in ((nine, ten), (ten, ten)):
            with pytest.raises(StateError):
                reader.read([sound[:27] + b"\x07" + first + b"\0" + second], LIMIT)
        reader.read([sound], LIMIT)


def test_more_interactions_than_the_limit_are_refused() -> None:
    codec = HistoryCodec(TYPES)
    states = states_of(codec, [[(7, "10", "view"), (7, "9", "view")]])
    with pytest.raises(StateError):
        Kinds(codec).read(states, 1)


def test_many_kinds_of_interactions_keep_their_numbers_apart() -> None:
    codec = HistoryCodec(TYPES)
    shared = Kinds(codec)
    for first in range(0, 3_000, 500):
        some = [[(n, str(n // 2), "view" if n % 2 else "like")] for n in range(first, first + 1_000)]
        columns = shared.read(states_of(codec, some), LIMIT)
        suffixes = [shared.order[number] for number in columns.numbers.tolist()]
        assert suffixes == [f"{n // 2}\0{'view' if n % 2 else 'like'}".encode() for n in range(first, first + 1_000)]
    assert len({shared.order[number] for number in range(len(shared))}) == len(shared) == 3_500


@pytest.mark.parametrize(
    "item",
    [
        "0", "-0", "-1", "007", "9223372036854775807", "9223372036854775808", "-9223372036854775808",
        "-9223372036854775809", "4611686018427387904", "-", "1-2", "12345678901234567890123", " 7", "x", "~" * 256,
        "00112233-4455-6677-8899-aabbccddeeff", "00112233-4455-6677-8899-AABBCCDDEEFF",
        "0011223344556-77-8899-aabbccddeeffgg", "sku-00000001-blue-xl", "süß", "日本", "a\u00a0b",
    ],
)  # fmt: skip
def test_items_of_every_form_are_learned_as_they_were_stored(item: str) -> None:
    codec, space = HistoryCodec(TYPES), random_space("v1", 4)
    reader = Kinds(codec)
    columns = reader.read(states_of(codec, [[(7, item, "view"), (8, item, "like")], [(9, item, "view")]]), LIMIT)
    suffixes = [f"{item}\0{kind}".encode() for kind in ("view", "like", "view")]
    assert [reader.order[number] for number in columns.numbers.tolist()] == suffixes
    sort_keys = [sort_key(ts, item.encode(), kind.encode()) for ts, kind in ((7, "view"), (8, "like"), (9, "view"))]
    for of_keys in (reader, Kinds(codec)):  # with all of them known, and none
        at_ms, numbers = of_keys.of_keys(sort_keys)
        assert at_ms.tolist() == [7, 8, 9]
        assert [of_keys.bodies[number] for number in numbers.tolist()] == [codec.body(one) for one in suffixes]
        assert [of_keys.order[number] for number in numbers.tolist()] == suffixes
        assert len(of_keys) == 2
    assert reader.rows_of(space).of(columns.numbers).tolist() == [space.row(item.encode(), -1)] * 3


@pytest.mark.parametrize(
    "body",
    [
        "00",
        "0400",
        "04ffffffffffffffffff02",
        "048000",
        "05" + "00" * 15,
        "06" + "00",
        "0601" + "07",
        "060131",
        "fc01" + "02",
    ],
)
def test_bodies_that_no_worker_writes_are_refused(body: str) -> None:
    codec = HistoryCodec({"view": 1})
    sound = states_of(codec, [[(7, "10", "view")]])[0]
    state = sound[:27] + b"\x07" + bytes.fromhex(body)
    try:
        History.decode(state, codec, LIMIT)
        is_sound = True
    except StateError:
        is_sound = False
    if is_sound:
        Kinds(codec).read([state], LIMIT)
    else:
        with pytest.raises(StateError):
            Kinds(codec).read([state], LIMIT)


def test_what_was_learned_before_damage_was_met_keeps_its_number() -> None:
    codec = HistoryCodec({"view": 1})
    reader = Kinds(codec)
    head = states_of(codec, [[(7, "10", "view"), (8, "11", "view")]])[0][:27]
    ten, other_type = codec.body(b"10\0view"), bytes.fromhex("fc0102")
    with pytest.raises(StateError):
        reader.read([head + b"\x07" + ten + b"\x01" + other_type], LIMIT)
    _, numbers = reader.of_keys([sort_key(9, item, b"view") for item in (b"11", b"10", b"x")])
    assert [reader.order[number] for number in numbers.tolist()] == [b"11\0view", b"10\0view", b"x\0view"]


def test_a_type_without_a_code_is_refused() -> None:
    reader = Kinds(HistoryCodec({"view": 1, "like": 2}))
    for name in (b"viev", b"views", b"", b"likes"):
        with pytest.raises(ValueError, match="without a code"):
            reader.of_keys([sort_key(9, b"10", b"view"), sort_key(9, b"10", name)])


def test_nothing_is_read_of_nothing_and_empty_histories_may_follow() -> None:
    columns = Kinds(HistoryCodec(TYPES)).read([], LIMIT)
    assert columns.base.tolist() == [0]
    assert columns.followed_by(0, 7, -1) is columns
    followed = columns.followed_by(2, 7, -1)
    assert [list(part) for part in followed] == [[0, 0, 0], [], [], [7, 7], [-1, -1], [b"", b""]]
    assert followed.as_of.tolist() == [-1, -1]


def test_partitions_share_what_is_remembered_until_their_version_is_retired() -> None:
    shared = Kinds(HistoryCodec(TYPES))
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


def test_loops_are_compiled_at_each_start_where_there_is_no_place_to_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    njit, asked = kernels.njit, []

    def without_a_place(signature: object, **how: object) -> object:
        asked.append(how.get("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(signature, **how)

    monkeypatch.setattr(kernels, "njit", without_a_place)
    twice = kernels._compiled(kernels.types.int64(kernels.types.int64))(lambda n: 2 * n)
    assert (twice(21), asked) == (42, [True, False])
