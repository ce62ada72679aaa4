"""Ids in a mapped file are found as a dictionary finds them, without an object for each."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.items import ids as item_ids
from stream.items.ids import BadIds, ItemIds, RepeatedIds
from stream.items.space import ItemSpace
from stream.keys import canonical_id


def is_id(text: str) -> bool:
    try:
        canonical_id(text)
    except ValueError:
        return False
    return True


texts = st.one_of(
    st.text(min_size=1, max_size=40).filter(is_id),
    st.uuids().map(str),
    st.integers(-(1 << 63), (1 << 63) - 1).map(str),
    st.sampled_from(["a", "aa", "aaa", "é", "é" * 128, "x" * 256]),
)


@pytest.mark.parametrize("limit", [3, 1 << 18])
@given(some=st.lists(texts, min_size=1, max_size=30, unique=True), others=st.lists(texts, max_size=10))
def test_they_are_found_as_in_a_dictionary(limit: int, some: list[str], others: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_ids, "_MEMO_LIMIT", limit)
        names = [text.encode() for text in some]
        ids = ItemIds.of(names)
        rows = {name: row for row, name in enumerate(names)}
        asked = [*names, *names, *(text.encode() for text in others)]
        for name in asked:
            assert ids.row(name, -1) == rows.get(name, -1)
            assert ids.row(name, -7) == rows.get(name, -7)
        assert ids.rows(asked).tolist() == [rows.get(name, -1) for name in asked]
        assert ids.rows([]).tolist() == []
        assert ids == names
        assert [ids[n] for n in range(-len(names), len(names))] == names * 2
        assert ids[1:3] == names[1:3]
        assert len(ids) == len(names)
        with pytest.raises(IndexError):
            ids[len(names)]


def test_many_are_found_across_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(item_ids, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(item_ids, "_MEMO_LIMIT", 100)
    names = [f"item-{n * 7919}".encode() for n in range(20_000)]
    file = tmp_path / "ids.txt"
    file.write_bytes(b"".join(name + b"\n" for name in names))
    ids = ItemIds.load(file, len(names))
    assert list(ids) == names
    assert [ids.row(name, -1) for name in names] == list(range(len(names)))
    assert [ids.row(name + b"x", -1) for name in names[:500]] == [-1] * 500
    assert ids.rows([*names[::-1], b"x", b""]).tolist() == [*range(len(names) - 1, -1, -1), -1, -1]
    assert len(ids._index._recent) + len(ids._index._before) <= 100


def test_what_is_asked_for_again_is_remembered_among_what_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_ids, "_MEMO_LIMIT", 20)
    names = [str(n).encode() for n in range(1000)]
    ids = ItemIds.of(names)
    searched: list[bytes] = []
    search = ids._index.search
    monkeypatch.setattr(ids._index, "search", lambda item: (searched.append(item), search(item))[1])
    for n, name in enumerate(names):  # a hot id in a stream of others, known and unknown
        assert [ids.row(item, -1) for item in (b"7", name, name + b"x", name + b"y")] == [7, n, -1, -1]
    assert searched.count(b"7") == 1
    assert len(ids._index._recent) + len(ids._index._before) <= 20


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "1 to 256"),
        (b"x" * 257, "1 to 256"),
        (b"a\x01b", "control"),
        (b"a\x7f", "control"),
        ("a\u0085".encode(), "control"),
        ("\u009f".encode(), "control"),
        (b"a\r", "control"),
        (b"\xff", "utf-8"),
        (b"\xed\xa0\x80", "utf-8"),
    ],
)
@pytest.mark.parametrize("chunk", [8 << 20, 64])
def test_a_line_that_is_no_id_is_named(line: bytes, why: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_ids, "_CHUNK_BYTES", chunk)
    names = [f"item-{n}".encode() for n in range(100)]
    with pytest.raises(BadIds, match=f"line 78: .*{why}"):
        ItemIds.of([*names[:77], line, *names[78:]])


@pytest.mark.parametrize("fine", ["\u00a0", "\u0100\u0085".replace("\u0085", "ą"), "Â¢", "\u2028x", "日本"])
def test_bytes_that_only_look_like_controls_are_fine(fine: str) -> None:
    assert ItemIds.of([fine.encode()]).row(fine.encode(), -1) == 0


def test_a_repeated_id_is_named_by_its_first_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(n).encode() for n in range(1000)]
    with pytest.raises(BadIds, match="row 600 repeats"):
        ItemIds.of([*names[:600], b"5", *names[601:], b"5"])
    with pytest.raises(RepeatedIds) as caught:
        ItemIds.of([*names, b"5", b"new", b"5", b"999", b"0"])
    assert caught.value.rows.tolist() == [1000, 1002, 1003, 1004]
    # ids whose hashes are equal are two ids all the same
    monkeypatch.setattr(item_ids, "hash", lambda _: 5, raising=False)
    ids = ItemIds.of(names)
    assert [ids._index.search(name) for name in names[:50]] == list(range(50))
    assert ids._index.search_all(names[:50]).tolist() == list(range(50))
    with pytest.raises(BadIds, match="row 3 repeats"):
        ItemIds.of([b"a", b"b", b"c", b"a"])


def test_the_price_of_equal_ids_grows_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    line = item_ids._Lines.__getitem__
    monkeypatch.setattr(item_ids._Lines, "__getitem__", lambda ids, row: (compared.append(row), line(ids, row))[1])
    with pytest.raises(RepeatedIds) as caught:
        ItemIds.of([b"same"] * 4000)
    assert caught.value.rows.tolist() == list(range(1, 4000))
    assert len(compared) <= 8000


def test_ids_that_nobody_holds_are_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_ids, "_MEMO_LIMIT", 1)
    ids = ItemIds.of([b"a", b"b"])
    gone = weakref.ref(ids._lines)
    gc.disable()  # a cycle would keep as much memory as the ids of ten million items take
    try:
        del ids
        assert gone() is None
    finally:
        gc.enable()


def test_ids_that_are_no_text_are_unknown(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "v", "v", ["a", 5], np.eye(2))
    assert space.rows(["a", "\ud800", "5", 5, "b"]).tolist() == [0, -1, 1, 1, -1]
