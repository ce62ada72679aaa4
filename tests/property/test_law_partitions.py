"""A step takes batches of any partitions at once: what it causes in each is what it would cause there alone."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import DELETIONS, T0, TYPES, Event, Operation, message, random_space, streams, topic_of

from stream.core.batch import Batch, Effects
from stream.core.encoders import MixEncoder, VersionedEncoder
from stream.core.engine import Engine
from stream.core.events import EventRules
from stream.core.space_engine import Pair
from stream.keys import partition_of

PARTITIONS = 3
USERS = ("u", "v", 7, 8, "é", "x", "y")
EPOCHS = (3, 1 << 40, 1)
SPACES = [random_space("items_v1", 5, known=["a", "b", 3]), random_space("items_v2", 2, known=["a", "é"])]


class Worker:
    """An engine, and what is stored of its partitions."""

    def __init__(self, partitions: Sequence[int], *, hot_users: int, publish_latest: bool) -> None:
        pairs = [Pair(VersionedEncoder(MixEncoder(), 4), space) for space in SPACES]
        self._engine = Engine(
            pairs, EventRules(TYPES), partitions=PARTITIONS, hot_users=hot_users, publish_latest=publish_latest
        )
        self.stored: dict[int, dict[bytes, bytes]] = {partition: {} for partition in partitions}
        for partition in partitions:
            self._engine.claim(partition, EPOCHS[partition])

    def step(self, fetched: Sequence[tuple[int, str, list[Operation]]]) -> tuple[dict[int, Effects], list[Batch]]:
        """What one step causes by partition, and its batches, both of this worker's partitions only."""
        batches = [self._decode(*batch) for batch in fetched if batch[0] in self.stored]
        stored = {
            partition: {user: self.stored[partition].get(user) for user in users}
            for partition, users in self._engine.missing(batches).items()
        }
        effects = self._engine.apply(batches, stored).effects
        for partition, of_one in effects.items():
            self.stored[partition].update(of_one.states)
        return effects, batches

    def _decode(self, partition: int, topic: str, operations: Sequence[Operation]) -> Batch:
        records = [message(operation) for operation in operations]
        if topic == DELETIONS:
            return self._engine.decode_deletions(partition, records)
        return self._engine.decode_events(topic, partition, records)


@st.composite
def fetches(draw: st.DrawFn) -> list[list[tuple[int, str, list[Operation]]]]:
    """Batches by partition and topic, as they are fetched together, some records on a wrong partition."""
    out = []
    for _ in range(draw(st.integers(1, 4))):
        batches: dict[tuple[int, str], list[Operation]] = {}
        for operation in draw(streams(users=USERS, max_size=12)):
            home = partition_of(str(operation.user).encode(), PARTITIONS)
            partition = draw(st.sampled_from([home, home, home, home, (home + 1) % PARTITIONS]))
            batches.setdefault((partition, topic_of(operation)), []).append(operation)
        order = draw(st.permutations(list(batches)))
        out.append([(*place, batches[place]) for place in order])
    return out


@given(fetches(), st.sampled_from([1, 2, 100]), st.booleans())
def test_each_partition_gets_what_it_would_get_alone(
    fetched: list[list[tuple[int, str, list[Operation]]]], hot_users: int, publish_latest: bool
) -> None:
    together = Worker(range(PARTITIONS), hot_users=hot_users, publish_latest=publish_latest)
    alone = [Worker([n], hot_users=hot_users, publish_latest=publish_latest) for n in range(PARTITIONS)]
    for batches in fetched:
        effects, decoded = together.step(batches)
        assert effects.keys() == {partition for partition, _, _ in batches}
        for partition, one in enumerate(alone):
            of_one, decoded_alone = one.step(batches)
            assert effects.get(partition) == of_one.get(partition)
            assert [batch for batch in decoded if batch.partition == partition] == decoded_alone
    for partition, one in enumerate(alone):
        assert together.stored[partition] == one.stored[partition]


def test_no_user_is_taken_for_one_of_another_partition_who_is_in_memory() -> None:
    """A key on a wrong partition is turned away there, though its user is in memory on the right one."""
    worker = Worker(range(PARTITIONS), hot_users=100, publish_latest=False)
    events = [operation for user in USERS for operation in _views(user)]
    for _ in range(2):
        for partition in range(PARTITIONS):
            effects, (batch,) = worker.step([(partition, topic_of(events[0]), events)])
            here = {str(user).encode() for user in USERS if partition_of(str(user).encode(), PARTITIONS) == partition}
            assert {op.user for op in batch.ops} == here
            assert effects[partition].states.keys() == here
    assert sum(map(len, worker.stored.values())) == len(USERS)
    assert len({*np.concatenate([list(users.values()) for users in worker._engine._users.slots.values()])}) == 7


def _views(user: int | str) -> list[Operation]:
    return [Event(user, item, "view", T0) for item in ("a", "b")]
