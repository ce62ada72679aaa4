"""`UserMatrix` against a dictionary: whatever order, repeats and tombstones come in."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_store import DIM, ITEMS, OLD_ITEMS, USER, key, record, unit
from strategies import examples

from stream.core.records import CorruptRecord, EmbeddingRecord, encode, framed
from stream.keys import partition_of
from stream.retrieval import user_matrix
from stream.retrieval.user_matrix import UserMatrix

USERS = ("1", "2", "a:b", "é")


def matrix() -> UserMatrix:
    return UserMatrix(DIM, ITEMS, USER)


def check(users: UserMatrix, want: dict[str, np.ndarray]) -> None:
    """Exactly these users have a row, with exactly these vectors; what is free is zero."""
    assert len(users) == len(want) == len(users.live)
    assert {user for user in users.ids if user is not None} == want.keys()
    assert users.vectors.shape == (len(users.ids), DIM)
    assert users.vectors.dtype == np.float32
    for row, user in enumerate(users.ids):
        if user is None:
            assert not users.vectors[row].any()
            assert row not in users.live
        else:
            assert users.row(user) == row
            assert row in users.live
            np.testing.assert_array_equal(users.vectors[row], want[user])


steps = st.tuples(
    st.sampled_from(USERS),
    st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 5), st.booleans())),
    st.sampled_from([ITEMS, ITEMS, ITEMS, OLD_ITEMS]),
)


@settings(max_examples=examples(150))
@given(st.lists(steps, max_size=60))
def test_it_holds_what_a_dictionary_holds(sequence: list[tuple[str, tuple[int, int, bool] | None, str]]) -> None:
    users, model, others = matrix(), dict[str, EmbeddingRecord](), 0
    rows: dict[str, int] = {}
    for user, state, version in sequence:
        value = None
        if state is not None:
            epoch, revision, ok = state
            vector = unit(100 * epoch + revision)
            status = ("ok", "") if ok else ("fallback", "too_short_history")
            value = record(
                user, version, epoch=epoch, revision=revision, vector=vector, status=status[0], reason=status[1]
            )
        changed = users.apply(key(user, version), None if value is None else encode(value))
        before = model.get(user)
        if version != ITEMS:
            others += 1
        elif value is None:
            model.pop(user, None)
        elif before is None or (value.epoch, value.revision) >= (before.epoch, before.revision):
            model[user] = value
        want = {name: r.vector for name, r in model.items() if r.status == "ok"}
        check(users, want)
        assert users.others == others
        for name in rows.keys() & want.keys():
            assert users.row(name) == rows[name], "a row stays with its user"
        if changed is not None:
            assert users.ids[changed] in (user, None)
        elif user in want:
            assert user in rows, "a new row was not told"
        else:
            assert user not in rows, "a freed row was not told"
        rows = {name: row for name in want if (row := users.row(name)) is not None}
    assert len(users.ids) <= len(USERS), "free rows are used again"


@settings(max_examples=examples(60))
@given(st.data())
def test_a_log_replayed_from_anywhere_ends_in_the_same_state(data: st.DataObject) -> None:
    """Partitions interleave as they like, and each may be read again from an earlier place."""
    logs: list[list[tuple[bytes, bytes | None]]] = [[], []]
    state: dict[str, tuple[int, int]] = {}
    for user in data.draw(st.lists(st.sampled_from(USERS), max_size=20)):
        epoch, revision = state.get(user, (1, 0))
        state[user] = (epoch + data.draw(st.integers(0, 1)), revision + data.draw(st.integers(0, 1)))
        what = record(user, epoch=state[user][0], revision=state[user][1], vector=unit(state[user][1]))
        gone = data.draw(st.booleans()) and data.draw(st.booleans())
        logs[partition_of(user.encode(), 2)].append((key(user), None if gone else encode(what)))
    straight, replayed = matrix(), matrix()
    for entry in (*logs[0], *logs[1]):
        straight.apply(*entry)
    places = [0, 0]
    for _ in range(data.draw(st.integers(0, 60))):
        number = data.draw(st.integers(0, 1))
        if places[number] < len(logs[number]):
            replayed.apply(*logs[number][places[number]])
            places[number] += 1
        if data.draw(st.integers(0, 9)) == 0:
            places[number] = data.draw(st.integers(0, places[number]))
    for number in (0, 1):
        for entry in logs[number][places[number] :]:
            replayed.apply(*entry)
    want = {user: straight.vectors[row].copy() for user in USERS if (row := straight.row(user)) is not None}
    check(replayed, want)


def test_records_in_the_framing_of_a_schema_registry_are_the_same() -> None:
    plain, registered = matrix(), matrix()
    value = encode(record("1"))
    plain.apply(key("1"), value)
    registered.apply(key("1"), framed(value, 7))
    np.testing.assert_array_equal(registered.vectors, plain.vectors)
    assert registered.apply(key("1"), value) is None


def test_it_grows_and_keeps_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_matrix, "_FIRST_ROWS", 2)
    users = matrix()
    want = {str(n): unit(n) for n in range(9)}
    for user, vector in want.items():
        users.apply(key(user), encode(record(user, vector=vector)))
        check(users, {name: want[name] for name in list(want)[: int(user) + 1]})
    assert users.vectors.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        users.vectors[0] = 0


def test_a_row_is_told_once_and_a_freed_one_goes_to_the_next_user() -> None:
    users = matrix()
    value = encode(record("1"))
    assert users.apply(key("1"), value) == 0
    assert users.apply(key("1"), value) is None, "the same state again"
    assert users.apply(key("2"), encode(record("2"))) == 1
    assert users.apply(key("1"), encode(record("1", revision=16))) is None, "an older one"
    assert users.apply(key("1"), None) == 0
    assert users.apply(key("1"), None) is None
    assert users.ids == [None, "2"]
    assert users.row(1) is None
    assert users.apply(key("3"), encode(record("3"))) == 0
    assert users.row(3) == 0


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{}",
        encode(record("1"))[:-1],
        encode(record("2")),
        encode(record("1", OLD_ITEMS)),
        encode(record("1", user_embedding_version="other")),
        encode(record("1", vector=unit(1, DIM + 1))),
    ],
    ids=["empty", "json", "cut", "another user", "another item version", "another user version", "another dimension"],
)
def test_what_is_not_what_its_key_says_is_refused_and_changes_nothing(value: bytes) -> None:
    users = matrix()
    users.apply(key("1"), encode(record("1")))
    with pytest.raises(CorruptRecord):
        users.apply(key("1"), value)
    check(users, {"1": record("1").vector})


@pytest.mark.parametrize("other", [None, b"", b"\xff", b"uemb:", b"u:1", key("1", OLD_ITEMS), b"uemb:x:items_v1:1"])
def test_other_keys_are_counted_and_left_alone(other: bytes | None) -> None:
    users = matrix()
    assert users.apply(other, b"whatever") is None
    assert users.apply(other, None) is None
    assert (users.others, len(users)) == (2, 0)


def test_what_lies_where_a_user_was_before_the_topic_grew_is_left_alone() -> None:
    """Users are written to their new partitions and taken away from their old ones; these are read in any order."""
    users = UserMatrix(DIM, ITEMS, USER, partitions=6)
    values = {user: encode(record(user)) for user in USERS}
    place = {user: partition_of(user.encode(), 6) for user in USERS}
    before = {user: partition_of(user.encode(), 4) for user in USERS}
    moved = [user for user in USERS if place[user] != before[user]]
    assert moved
    for user in USERS:
        users.apply(key(user), values[user], place[user])
    for user in moved:
        assert users.apply(key(user), values[user], before[user]) is None
        assert users.apply(key(user), None, before[user]) is None
    check(users, {user: record(user).vector for user in USERS})
    assert users.others == 2 * len(moved)
    assert users.apply(key(moved[0]), None, place[moved[0]]) is not None


@pytest.mark.parametrize("arguments", [(0, ITEMS, USER), (8, "a b", USER), (8, ITEMS, "current"), (8, ITEMS, USER, 0)])
def test_arguments_that_can_not_be_right(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        UserMatrix(*arguments)
