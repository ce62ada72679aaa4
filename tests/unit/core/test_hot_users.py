"""Histories as arrays: what `History` does, for many users at once."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import TYPES, ids

from stream.core import kernels
from stream.core.batch import Batch, Op
from stream.core.history import History, Outcome
from stream.core.history_codec import NEVER, HistoryCodec, sort_key
from stream.core.hot_users import HotUsers
from stream.core.kinds import Kinds
from stream.keys import canonical_id, partition_of

USERS = (b"u", b"v", b"w")
#: Few times, so that many interactions share one, in the order of their items and types then.
keys = st.builds(
    sort_key,
    st.sampled_from([0, 1, 2, 255, 1 << 40]),
    (st.sampled_from(["9", "10", "a", "x" * 200]) | ids.map(lambda item: canonical_id(str(item)))).map(str.encode),
    st.sampled_from(sorted(TYPES)).map(str.encode),
)
operations = st.builds(
    Op,
    st.sampled_from(USERS),
    keys | keys | keys | st.lists(keys, max_size=3).map(tuple) | st.integers(0, 3) | st.none(),
)
OF_HISTORY = {
    kernels.APPLIED: Outcome.APPLIED,
    kernels.DUPLICATE: Outcome.DUPLICATE,
    kernels.TOO_OLD: Outcome.TOO_OLD,
    kernels.ERASED: Outcome.ERASED,
}


@given(st.integers(1, 6), st.lists(st.lists(operations, min_size=1, max_size=12), max_size=4), st.data())
def test_arrays_do_what_a_history_does(limit: int, batches: list[list[Op]], data: st.DataObject) -> None:
    codec = HistoryCodec(TYPES)
    users = HotUsers(Kinds(codec), limit, at_most=2)
    kinds, stored = users._kinds, {user: History(codec, limit, revision=7) for user in USERS}
    for ops in batches:
        absent = [user for user in USERS if user not in users.slots.get(0, {})]
        users.load([(0, absent)], kinds.read([stored[user].encode(0) for user in absent], limit))
        folded = users.fold([Batch(0, ops)])
        slots = users.slots[0]
        of_ops = iter(range(len(folded.users)))
        for event, (user, what) in enumerate(ops):
            history = stored[user]
            for one in what if isinstance(what, tuple) else (what,):
                n = next(of_ops)
                assert (folded.users[n], folded.events[n]) == (user, event)
                before, outcome = list(history.keys), int(folded.outcomes[n])
                if isinstance(one, bytes):
                    want, evicted = history.add(one)
                    assert OF_HISTORY[outcome] is want
                    assert folded.gone[n] == (evicted is not None)
                    assert folded.places[n] == (history.keys.index(one) if want is Outcome.APPLIED else -1)
                elif one is not None:
                    news, gone = history.erase(one)
                    assert (outcome, folded.gone[n]) == ((kernels.ERASURE, len(gone)) if news else (kernels.KNOWN, 0))
                else:
                    assert (outcome, folded.gone[n], history.keys) == (kernels.KNOWN, 0, before)
                newest = -1 if history.as_of_ms is None else history.as_of_ms
                said = (folded.lengths[n], folded.as_of[n], folded.revisions[n])
                assert said == (history.count, newest, history.revision)
        assert folded.ends.tolist() == [len(folded.users)]
        touched = list(dict.fromkeys(op.user for op in ops))
        states = users.states(np.array([slots[user] for user in touched]), np.arange(9, 9 + len(touched)))
        assert states == [stored[user].encode(epoch) for epoch, user in enumerate(touched, 9)]
        exist = users.exist(folded.slots).tolist()
        assert exist == [stored[u].count > 0 or stored[u].erased_at != NEVER for u in folded.users]
        users.evict(0)
        assert ops[-1].user in slots
        assert len(slots) == 2
        if data.draw(st.booleans()):
            users.forget(0, [b"nobody", *slots])


def test_who_was_not_used_for_longest_leaves_first() -> None:
    kinds = Kinds(HistoryCodec(TYPES))
    users = HotUsers(kinds, 2, at_most=2)
    none = kinds.read([], 2)
    users.load([(0, [b"a", b"b", b"c"]), (1, [b"a", b"b", b"c"])], none.followed_by(6, 0, NEVER))
    assert len({*users.slots[0].values(), *users.slots[1].values()}) == 6
    users.fold([Batch(0, [Op(b"a", None)])])
    users.evict(0)
    assert {partition: list(some) for partition, some in users.slots.items()} == {
        0: [b"c", b"a"],
        1: [b"a", b"b", b"c"],
    }


@pytest.mark.parametrize("at_most", [1, 5_000])
def test_slots_are_used_again_and_made_when_they_are_needed(at_most: int) -> None:
    kinds = Kinds(HistoryCodec(TYPES))
    users = HotUsers(kinds, 2, at_most)
    for start in range(0, 30_000, 3_000):
        names = [b"%d" % n for n in range(start, start + 3_000)]
        slots = users.load([(0, names)], kinds.read([], 2).followed_by(len(names), 0, NEVER))
        assert len(set(slots.tolist())) == len(names)
        assert len(set(users.slots[0].values())) == len(users.slots[0])
        users.evict(0)
    assert users.load([], kinds.read([], 2)).tolist() == []
    assert users.capacity <= 16_000


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 10_000))
def test_partitions_of_many_keys_are_those_of_each(some: list[bytes], partitions: int) -> None:
    bounds = np.array([0, *accumulate(map(len, some))])
    found = kernels.partitions_of(np.frombuffer(b"".join(some), dtype=np.uint8), bounds, partitions)
    assert found.tolist() == [partition_of(key, partitions) for key in some]
