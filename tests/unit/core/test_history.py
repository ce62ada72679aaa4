"""The bounded history and its stored layout."""

import uuid

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import T0, TYPES, ids, interactions

from stream.core.history import History, Interaction, Outcome
from stream.core.history_codec import (
    MAX_ORDER,
    MAX_TS_MS,
    NEVER,
    HistoryCodec,
    key_ts_ms,
    max_state_bytes,
    sort_key,
    split_key,
    stored_order,
)
from stream.core.kinds import Kinds
from stream.errors import StateError
from stream.keys import INT64_MAX, INT64_MIN

UUID_TEXT = "0f0e0d0c-0b0a-0908-0706-050403020100"


def history_of(*parts, limit=100, erased_at=NEVER, codec=None):
    history = History(codec or HistoryCodec(TYPES), limit)
    for ts, item, kind in parts:
        history.add(sort_key(ts, str(item).encode(), kind.encode()))
    history.erase(erased_at)
    return history


def state(history):
    return history.keys, history.revision, history.erased_at


# -- order --------------------------------------------------------------------------------------------------------

close = interactions | st.tuples(
    st.integers(0, 3),
    st.sampled_from(["a", "ab", "a ", "a\u0301", "á", "é", "z", "\U00010000", "\uffee", "-1", "1", "10", "2"]),
    st.sampled_from(["a", "ab", "b", "é", "like", "view"]),
)


@given(st.lists(close, max_size=20))
def test_sort_keys_order_as_time_then_item_bytes_then_type_bytes(parts):
    as_tuples = sorted(parts, key=lambda p: (p[0], p[1].encode(), p[2].encode()))
    as_bytes = sorted(sort_key(ts, item.encode(), kind.encode()) for ts, item, kind in parts)
    assert as_bytes == [sort_key(ts, item.encode(), kind.encode()) for ts, item, kind in as_tuples]


@given(close)
def test_sort_keys_can_be_taken_apart(part):
    ts, item, kind = part
    key = sort_key(ts, item.encode(), kind.encode())
    assert split_key(key) == (ts, item.encode(), kind.encode())
    assert key_ts_ms(key) == ts


@pytest.mark.parametrize("ts", [0, 1, 255, 256, T0, MAX_TS_MS])
def test_every_time_in_range_has_a_key(ts):
    assert key_ts_ms(sort_key(ts, b"a", b"view")) == ts
    assert MAX_TS_MS == 2**48 - 1


# -- the set ------------------------------------------------------------------------------------------------------


def test_the_oldest_falls_out_of_a_full_history():
    history = history_of((1, "a", "view"), (2, "b", "view"), limit=2)
    assert history.add(sort_key(3, b"c", b"view")) == (Outcome.APPLIED, sort_key(1, b"a", b"view"))
    assert history.add(sort_key(1, b"a", b"view")) == (Outcome.TOO_OLD, None)
    late = sort_key(2, b"bb", b"view")
    assert history.add(late) == (Outcome.APPLIED, sort_key(2, b"b", b"view"))
    assert history.interactions() == [Interaction(2, "bb", "view"), Interaction(3, "c", "view")]
    assert history.revision == 4


def test_interactions_that_differ_in_any_part_are_different():
    history = history_of((1, "a", "view"), (1, "a", "like"), (1, "b", "view"), (2, "a", "view"), (1, "a", "view"))
    assert len(history.keys) == history.revision == 4
    assert history.as_of_ms == 2
    assert history_of().as_of_ms is None


def test_an_erasure_is_a_change_even_when_nothing_was_there():
    history = history_of()
    assert history.erase(T0) == (True, [])
    assert history.revision == 1
    assert history.erase(T0) == (False, [])
    assert history.revision == 1


@pytest.mark.parametrize("erased_at", [0, MAX_TS_MS])
def test_erasure_times_at_the_ends_of_the_range(erased_at):
    history = history_of((0, "\U0010ffff", "view"), (1, "a", "view"), (MAX_TS_MS, "\U0010ffff", "view"))
    history.erase(erased_at)
    assert [i.ts_ms for i in history.interactions()] == [ts for ts in (0, 1, MAX_TS_MS) if ts > erased_at]
    assert history.add(sort_key(erased_at, b"a", b"view"))[0] is Outcome.ERASED


# -- the stored layout --------------------------------------------------------------------------------------------

#: What is on disk and in changelogs today, and what was before: these bytes must be readable for ever, and what is
#: written must not change unnoticed.
HEADER = (
    "0000000000000007"  # epoch
    "0000000000000006"  # revision: five additions, one erasure
    "0000018bcfe56400"  # erased_at
    "0005"  # interactions
)
FROZEN = bytes.fromhex(
    f"02 {HEADER}"  # layout 2
    "80d095ffbc31 08 d704"  # T0 since 1970; code 2, integer; zigzag of -300
    "00 04 0a"  # the same time; code 1, integer; zigzag of 5
    "01 05 0f0e0d0c0b0a09080706050403020100"  # 1 ms later; code 1, a UUID as 16 bytes
    "01 06 02 c3a9"  # code 1, text of 2 bytes, UTF-8
    "fdafea80c3ce3f 0a 02 3035"  # code 2, text that only looks like an integer, at the last time there is
)
FROZEN_1 = bytes.fromhex(
    f"01 {HEADER}"  # layout 1
    "018bcfe56800 04 02 00 d704"  # T0, then 4 bytes: code 2, integer, zigzag of -300
    "018bcfe56800 03 01 00 0a"  # T0, then 3 bytes: code 1, integer, zigzag of 5
    "018bcfe56801 12 01 01 0f0e0d0c0b0a09080706050403020100"  # a UUID as 16 bytes
    "018bcfe56802 04 01 02 c3a9"  # text, UTF-8
    "ffffffffffff 04 02 02 3035"  # text that only looks like an integer, at the last time there is
)
LAYOUTS = pytest.mark.parametrize("frozen", [FROZEN, FROZEN_1], ids=["layout 2", "layout 1"])
FROZEN_PARTS = [
    (T0, "-300", "like"),
    (T0, "5", "view"),
    (T0 + 1, UUID_TEXT, "view"),
    (T0 + 2, "é", "view"),
    (MAX_TS_MS, "05", "like"),
]


def test_the_stored_layout_is_frozen():
    history = history_of(*reversed(FROZEN_PARTS), erased_at=T0 - 1024)
    assert history.encode(7).hex() == FROZEN.hex()


@LAYOUTS
def test_the_frozen_layouts_are_read(frozen):
    codec = HistoryCodec(TYPES)
    history = History.decode(frozen, codec, 100)
    assert [tuple(i) for i in history.interactions()] == FROZEN_PARTS
    assert (history.revision, history.erased_at) == (6, T0 - 1024)
    assert stored_order(frozen) == (7, 6)
    assert codec.as_written_now(frozen) == FROZEN
    kinds = Kinds(codec)
    columns = kinds.read([frozen, FROZEN], 100)
    suffixes = [f"{item}\0{kind}".encode() for _, item, kind in FROZEN_PARTS]
    assert [kinds.order[number] for number in columns.numbers.tolist()] == 2 * suffixes
    assert columns.times.tolist() == 2 * [ts for ts, _, _ in FROZEN_PARTS]


def test_a_user_who_was_never_erased_and_one_with_nothing_are_frozen_too():
    assert history_of((0, 0, "view")).encode(0).hex() == "02" + 8 * "00" + 7 * "00" + "01" + 8 * "ff" + (
        "0001" + "00" + "04" + "00"
    )
    empty = history_of((0, 0, "view"), erased_at=9)
    assert empty.encode(2**63).hex() == "02" + "80" + 7 * "00" + 7 * "00" + "02" + 7 * "00" + "09" + "0000"


@pytest.mark.parametrize(
    "item",
    [
        *("0", "-1", "1", "63", "64", "-64", "-65", str(INT64_MAX), str(INT64_MIN)),
        *(str(INT64_MAX + 1), str(INT64_MIN - 1), "-0", "00", "+1", "1.0", " 1", "1 ", "\N{ARABIC-INDIC DIGIT THREE}"),
        *(UUID_TEXT, UUID_TEXT.upper(), UUID_TEXT.replace("-", ""), f"{{{UUID_TEXT}}}", str(uuid.UUID(int=0))),
        *("x" * 256, "é" * 128, "x" * 125, "x" * 126, "\U0010ffff"),
    ],
)
def test_every_form_of_item_id_comes_back_as_it_was(item):
    history = history_of((T0, item, "like"), (T0 + 1, "after", "view"))
    again = History.decode(history.encode(1), HistoryCodec(TYPES), 100)
    assert [i.item_id for i in again.interactions()] == [item, "after"]
    assert state(again) == state(history)


def test_integers_and_uuids_are_stored_short():
    size = len(history_of().encode(0))
    assert len(history_of((T0, 1682, "view")).encode(0)) - size == 6 + 1 + 2
    assert len(history_of((T0, uuid.UUID(int=1), "view")).encode(0)) - size == 6 + 1 + 16


@given(st.lists(interactions, max_size=12), st.integers(1, 12), st.integers(NEVER, 30), st.integers(0, MAX_ORDER))
def test_the_layout_round_trips(parts, limit, erased, epoch):
    history = history_of(*parts, limit=limit, erased_at=T0 + erased * 60_000 if erased >= 0 else NEVER)
    stored = history.encode(epoch)
    again = History.decode(stored, HistoryCodec(TYPES), limit)
    assert state(again) == state(history)
    assert again.encode(epoch) == stored
    assert stored_order(stored) == (epoch, history.revision)
    assert len(stored) <= max_state_bytes(limit)


@given(st.lists(st.tuples(interactions, st.booleans()), max_size=25), st.integers(1, 6))
def test_bytes_kept_from_before_equal_bytes_made_afresh(parts, limit):
    """`encode` is incremental: whatever happened between two of them, the bytes are those of the keys."""
    history = History(HistoryCodec(TYPES), limit)
    for n, ((ts, item, kind), erase) in enumerate(parts):
        if erase and n % 5 == 4:
            history.erase(ts)
        history.add(sort_key(ts, item.encode(), kind.encode()))
        afresh = History(
            HistoryCodec(TYPES), limit, list(history.keys), revision=history.revision, erased_at=history.erased_at
        )
        assert history.encode(n) == afresh.encode(n)
        if erase:
            history = History.decode(history.encode(n), history.codec, limit)


@given(st.lists(ids, min_size=1, max_size=5))
def test_a_codec_has_no_memory_that_matters(items):
    used = HistoryCodec(TYPES)
    for item in items:
        for kind in TYPES:
            one = history_of((T0, item, kind), codec=used).encode(1)
            assert one == history_of((T0, item, kind)).encode(1)
            assert History.decode(one, used, 5).keys == History.decode(one, HistoryCodec(TYPES), 5).keys


def test_appended_codes_leave_what_is_stored_alone():
    stored = history_of((T0, 1, "view"), (T0, 1, "like")).encode(1)
    wider = HistoryCodec({**TYPES, "buy": 3, "rare": 16_383})
    assert (
        History.decode(stored, wider, 100).interactions()
        == History.decode(stored, HistoryCodec(TYPES), 100).interactions()
    )
    rare = history_of((T0, 1, "rare"), codec=wider)
    assert History.decode(rare.encode(1), wider, 100).keys == rare.keys
    with pytest.raises(StateError):
        History.decode(rare.encode(1), HistoryCodec(TYPES), 100)


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_the_largest_state_is_within_its_bound(limit):
    codec = HistoryCodec({"view": 16_383})
    history = history_of(*((MAX_TS_MS - n, f"{n:0256}"[:256], "view") for n in range(limit)), limit=limit, codec=codec)
    assert len(history.keys) == limit
    assert len(history.encode(2**63)) <= max_state_bytes(limit)


# -- damage -------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_bytes_cut_short_anywhere_are_an_error(frozen):
    """Between two entries as well: a state that lost its newest interactions must not pass for a shorter history."""
    for length in range(len(frozen)):
        with pytest.raises(StateError):
            History.decode(frozen[:length], HistoryCodec(TYPES), 100)
        with pytest.raises(StateError):
            Kinds(HistoryCodec(TYPES)).read([frozen, frozen[:length]], 100)


@pytest.mark.parametrize("layout", [0, 3, 255])
def test_another_layout_is_an_error_that_says_what_to_do(layout):
    with pytest.raises(StateError, match="upgrade") as caught:
        History.decode(bytes([layout]) + FROZEN[1:], HistoryCodec(TYPES), 100)
    assert "\n" not in str(caught.value)


@LAYOUTS
@given(flips=st.lists(st.tuples(st.integers(0, len(FROZEN) - 1), st.integers(1, 255)), min_size=1, max_size=4))
@example(flips=[(27 + 6, 0x80)])
def test_flipped_bytes_are_read_or_are_a_state_error(frozen, flips):
    data = bytearray(frozen)
    for at, mask in flips:
        data[at] ^= mask
    try:
        history = History.decode(bytes(data), HistoryCodec(TYPES), 100)
    except StateError:
        return
    history.encode(1)
    history.add(sort_key(T0 + 5, b"a", b"view"))
    assert history.as_of_ms is not None


@pytest.mark.parametrize(
    ("layout", "count", "entries"),
    [
        (1, 1, "018bcfe56800 03 01 03 00"),  # a tag that there is none of
        (1, 1, "018bcfe56800 03 09 00 0a"),  # a type code that there is none of
        (1, 1, "018bcfe56800 04 01 01 0102"),  # a UUID of two bytes
        (1, 1, "018bcfe56800 00"),  # no body
        (1, 1, "018bcfe56800 01 01"),  # no tag
        (1, 1, "018bcfe56800 03 01 00 80"),  # an endless varint
        (1, 1, "018bcfe56800 04 01 02 ff41"),  # no UTF-8
        (1, 1, "018bcfe56800 04 01 02 0041"),  # a control character, which no id has
        (1, 1, "018bcfe56800 03 01 02 35"),  # an integer as text
        (1, 1, "018bcfe56800 02 01 02"),  # an empty id
        (1, 2, "018bcfe56800 03 01 00 0a  018bcfe56800 03 01 00 0a"),  # one interaction twice
        (1, 2, "018bcfe56801 03 01 00 0a  018bcfe56800 03 01 00 0a"),  # out of order
        (1, 1, "018bcfe56800 04 01 00 0aff"),  # more than an integer
        (2, 1, "05 07 00"),  # a tag that there is none of
        (2, 1, "05 24 0a"),  # a type code that there is none of
        (2, 1, "05 05 0102"),  # a UUID of two bytes
        (2, 1, "05"),  # no body
        (2, 1, "05 04"),  # no item
        (2, 1, "05 04 80"),  # an endless varint
        (2, 1, "05 04 8000"),  # a varint that is longer than it must be
        (2, 1, "8500 04 0a"),  # the same of a time
        (2, 1, "ffffffffffffff7f 04 0a"),  # a time that there is none of
        (2, 1, "ffffffffffffffffffff7f 04 0a"),  # the same, beyond all numbers
        (2, 2, "ffffffffffff3f 04 0a 01 04 0a"),  # the same, after the last time there is
        (2, 1, "05 06 02 ff41"),  # no UTF-8
        (2, 1, "05 06 02 0041"),  # a control character, which no id has
        (2, 1, "05 06 01 35"),  # an integer as text
        (2, 1, "05 06 00"),  # an empty id
        (2, 1, "05 06 8100 41"),  # a length that is longer than it must be
        (2, 1, "05 06 03 4141"),  # more than there is
        (2, 1, "05 06 ffffffffffffffff7f 4141"),  # the same, beyond all numbers
        (2, 2, "05 04 0a 00 04 0a"),  # one interaction twice
        (2, 2, "05 04 0e 00 04 0a"),  # out of order
        (2, 1, "05 04 0a 01 04 0a"),  # more than there should be
        (2, 2, "05 04 0a"),  # fewer
    ],
)
def test_entries_that_no_worker_writes_are_a_state_error(layout, count, entries):
    def state_of(count, entries):
        return bytes([layout]) + FROZEN[1:17] + b"\xff" * 8 + count.to_bytes(2, "big") + bytes.fromhex(entries)

    sound = state_of(1, "018bcfe56800 03 01 00 0a" if layout == 1 else "05 04 0a")
    assert History.decode(sound, HistoryCodec(TYPES), 100).keys
    with pytest.raises(StateError):
        History.decode(state_of(count, entries), HistoryCodec(TYPES), 100)
    with pytest.raises(StateError):  # by the batch step
        Kinds(HistoryCodec(TYPES)).read([sound, state_of(count, entries)], 100)


def test_more_interactions_than_the_limit_are_a_state_error():
    """Another L is another application state: the start check should have refused it."""
    with pytest.raises(StateError):
        History.decode(FROZEN, HistoryCodec(TYPES), 3)


def test_errors_hold_no_payload():
    damaged = FROZEN.replace(b"05", b"\xff\xff") + b"\0"
    with pytest.raises(StateError) as caught:
        History.decode(damaged, HistoryCodec(TYPES), 100)
    assert "05" not in str(caught.value)
    assert "\n" not in str(caught.value)
