"""The users who are in memory: their histories as arrays, one slot a user."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, islice, pairwise, repeat
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.core import kernels
from stream.core.batch import Batch
from stream.core.history_codec import NEVER
from stream.core.kinds import Columns, Int32, Int64, Kinds
from stream.core.sums import grown

_FIRST_SLOTS: Final = 1024


class Folded(NamedTuple):
    """What operations did to histories, one after the other; an operation for each interaction of an event.

    Attributes:
        users: whose, one for each of n.
        events: number of the operation among those given [n]: the interactions of one are shown as one.
        slots: of the users [n].
        numbers: kind of what was to be added [n].
        at_ms: event time of what was to be added, or time of the erasure [n].
        outcomes: see `stream.core.kernels` [n].
        places: how many interactions are older than what was added, -1 where nothing was [n].
        gone: how many left the old end [n].
        lengths: how long the history is then [n].
        as_of: when its newest interaction was in ms, -1 without one [n].
        revisions: its revision then [n].
        ends: where the operations of each batch end among these.
    """

    users: list[bytes]
    events: Int64
    slots: Int64
    numbers: Int32
    at_ms: Int64
    outcomes: NDArray[np.int8]
    places: Int64
    gone: Int64
    lengths: Int64
    as_of: Int64
    revisions: Int64
    ends: Int64


class HotUsers:
    """Histories by slot.

    Args:
        kinds: what numbers kinds of interactions.
        limit: L, how many interactions a history has at most.
        at_most: how many users of a partition are kept between steps.

    Attributes:
        at_most: see above.
        slots: by partition and user, least recently used first. Whoever has a slot belongs to that partition.
    """

    def __init__(self, kinds: Kinds, limit: int, at_most: int) -> None:
        self.at_most = at_most
        self.slots: dict[int, dict[bytes, int]] = {}
        self._kinds = kinds
        self._capacity = min(at_most, _FIRST_SLOTS)
        self._free = list(range(self._capacity))
        self._times = np.zeros((self._capacity, limit), dtype=np.int64)
        self._numbers = np.zeros((self._capacity, limit), dtype=np.int32)
        self._counts, self._revisions, self._erased_at, self._appended = (
            np.zeros(self._capacity, dtype=np.int64) for _ in range(4)
        )
        self._stored = [b""] * self._capacity  # state of each as it was read or written last

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return self._capacity

    def load(self, groups: Sequence[tuple[int, Sequence[bytes]]], columns: Columns) -> Int64:
        """Take users into memory, groups of one partition each, whose histories are in this order in the columns.

        Returns:
            Their slots.
        """
        count = sum(len(users) for _, users in groups)
        if count > len(self._free):
            self._grow(count - len(self._free))
        first = len(self._free) - count
        taken = self._free[first:]
        del self._free[first:]
        rest = iter(taken)
        for partition, users in groups:
            self.slots.setdefault(partition, {}).update(zip(users, rest, strict=False))  # the rest is the next ones'
        slots = np.array(taken, dtype=np.int64)
        kernels.place_histories(
            slots, columns.base, columns.times, columns.numbers, self._times, self._numbers, self._counts
        )
        self._revisions[slots], self._erased_at[slots], self._appended[slots] = columns.revisions, columns.erased_at, 0
        self._keep(taken, columns.states)
        return slots

    def _grow(self, more: int) -> None:
        capacity = max(2 * self._capacity, self._capacity + more)
        for name in ("times", "numbers", "counts", "revisions", "erased_at", "appended"):
            setattr(self, f"_{name}", grown(getattr(self, f"_{name}"), capacity))
        self._stored += [b""] * (capacity - self._capacity)
        self._free += range(self._capacity, capacity)
        self._capacity = capacity

    def fold(self, batches: Iterable[Batch]) -> Folded:
        """Do what is to be done to users who are in memory; they are the most recently used then."""
        users: list[bytes] = []
        events: list[int] = []
        slots: list[int] = []
        what: list[int] = []
        at_ms: list[int] = []
        keys: list[bytes] = []
        ends: list[int] = []
        before = 0
        for batch in batches:
            slots_of = self.slots.get(batch.partition, {})
            size = len(batch.ops)
            whose, wants = [user for user, _ in batch.ops], [wanted for _, wanted in batch.ops]
            if {*map(type, wants)} == {bytes}:  # as a rule: an interaction each
                users += whose
                events += range(before, before + size)
                slots += [slots_of.setdefault(user, slots_of.pop(user)) for user in whose]
                what += [kernels.ADD] * size
                at_ms += [0] * size
                keys += wants  # type: ignore[arg-type]
            else:
                for event, (user, wanted) in enumerate(batch.ops, before):
                    slot = slots_of[user] = slots_of.pop(user)
                    for one in wanted if type(wanted) is tuple else (wanted,):
                        users.append(user)
                        events.append(event)
                        slots.append(slot)
                        if type(one) is bytes:
                            what.append(kernels.ADD)
                            at_ms.append(0)
                            keys.append(one)
                        elif type(one) is int:
                            what.append(kernels.ERASE)
                            at_ms.append(one)
                        else:
                            what.append(kernels.SEND_AGAIN)
                            at_ms.append(0)
            before += size
            ends.append(len(users))
        count = len(users)
        whats, at = np.array(what, dtype=np.int8), np.array(at_ms, dtype=np.int64)
        numbers, outcomes = np.full(count, -1, dtype=np.int32), np.zeros(count, dtype=np.int8)
        is_added = whats == kernels.ADD
        at[is_added], numbers[is_added] = self._kinds.of_keys(keys)
        places, gone, lengths, as_of, revisions = np.zeros((5, count), dtype=np.int64)
        places[:] = -1
        folded = Folded(
            users, np.array(events, dtype=np.int64), np.array(slots, dtype=np.int64), numbers, at, outcomes, places,
            gone, lengths, as_of, revisions, np.array(ends, dtype=np.int64),
        )  # fmt: skip
        pool = self._kinds.order
        kernels.fold(
            folded.slots, whats, at, numbers, pool.data, pool.at, self._times, self._numbers, self._counts,
            self._revisions, self._erased_at, self._appended, outcomes, places, gone, lengths, as_of, revisions,
        )  # fmt: skip
        return folded

    def exist(self, slots: Int64) -> NDArray[np.bool_]:
        """Whether there is anything to say of some users [n]: they have a history, or were erased."""
        return np.asarray((self._counts[slots] > 0) | (self._erased_at[slots] != NEVER))

    def states(self, slots: Int64, epochs: Int64) -> list[bytes]:
        """What is to be stored of distinct users [n], under the epochs [n]."""
        pool, whose = self._kinds.bodies, slots.tolist()
        before = [self._stored[slot] for slot in whose]
        before_at = np.array([0, *accumulate(map(len, before))])
        data, bounds = kernels.write_states(
            slots, epochs, np.frombuffer(b"".join(before), dtype=np.uint8), before_at, self._appended, self._times,
            self._numbers, self._counts, self._revisions, self._erased_at, pool.data, pool.at,
        )  # fmt: skip
        block, at = data.tobytes(), bounds.tolist()
        states = [block[start:end] for start, end in pairwise(at)]
        self._keep(whose, states)
        return states

    def _keep(self, slots: Iterable[int], states: Iterable[bytes]) -> None:
        for slot, state in zip(slots, states, strict=True):
            self._stored[slot] = state

    def forget(self, partition: int, users: Iterable[bytes]) -> None:
        """Drop users of a partition from memory; what is stored has all of them."""
        slots_of = self.slots.get(partition, {})
        slots = [slot for user in users if (slot := slots_of.pop(user, None)) is not None]
        self._keep(slots, repeat(b"", len(slots)))
        self._free += slots

    def forget_all(self) -> None:
        """Drop everybody."""
        for partition, users in self.slots.items():
            self.forget(partition, list(users))

    def evict(self, partition: int) -> None:
        """Drop those of a partition who were not used for longest, as far as there are too many."""
        users = self.slots.get(partition, {})
        excess = len(users) - self.at_most
        if excess > 0:
            self.forget(partition, list(islice(users, excess)))
