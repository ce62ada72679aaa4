"""Rows and weights of stored interactions: what decoding each of them would say, however full the memo is."""

import gc
import weakref

import pytest
from strategies import TYPES, random_space

from stream.core import item_rows as stored_rows
from stream.core.history import History
from stream.core.history_codec import HistoryCodec, sort_key
from stream.core.item_rows import SharedRows
from stream.errors import StateError

ITEMS = ["3", "unknown", "7", "3", "-12", "4"]


def bodies_of(codec: HistoryCodec) -> list[bytes]:
    keys = [sort_key(n, item.encode(), b"like" if n % 2 else b"view") for n, item in enumerate(ITEMS)]
    _, bodies = History.read(History(codec, 100, keys).encode(1), codec, 100)
    return bodies


@pytest.mark.parametrize("limit", [1, 2, 1 << 18])
def test_each_interaction_has_the_row_and_the_weight_of_its_item_and_type(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_rows, "_MEMO_LIMIT", limit)
    space, codec = random_space("v1", 4), HistoryCodec(TYPES)
    bodies = bodies_of(codec)
    shared = SharedRows(codec)
    rows, weights = shared.rows_of(space), shared.weights_of({"like": 2.5})
    for _ in range(2):
        assert rows.rows(bodies) == [space.row(item.encode(), -1) for item in ITEMS]
        assert weights.weights(bodies) == [2.5 if n % 2 else 1.0 for n in range(len(ITEMS))]
    assert rows.rows([]) == weights.weights([]) == []


def test_partitions_share_what_is_remembered_until_their_version_is_retired() -> None:
    shared = SharedRows(HistoryCodec(TYPES))
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


def test_what_no_worker_writes_is_refused() -> None:
    with pytest.raises(StateError):
        SharedRows(HistoryCodec(TYPES)).rows_of(random_space("v1", 4)).rows([b"\x63\x00\x01"])
