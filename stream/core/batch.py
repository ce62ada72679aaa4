"""What goes into a step and what comes out of it: decoded records, and what they caused in each partition."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, compress
from typing import Final, NamedTuple, Protocol

import numpy as np

from stream.core import kernels
from stream.core.counters import Counter
from stream.core.events import DeletionDecoder, EventDecoder, Reason, Reject
from stream.core.exposure import Exposure


class Record(Protocol):
    """What the step reads of a Kafka record."""

    key: bytes | None
    value: bytes | None
    timestamp: int


class Op(NamedTuple):
    """One thing to do to one user.

    Attributes:
        user: canonical id in UTF-8.
        what: add an interaction (its sort key) or those of one event, erase up to a time, or only send again (None).
    """

    user: bytes
    what: bytes | tuple[bytes, ...] | int | None


#: Makes an `Op` in a third of the time that its own constructor takes, which is once for each event.
_new: Final = tuple.__new__


@dataclass
class Batch:
    """Decoded records of one partition: operations in log order, rejects with the index of their record, counters.

    Attributes:
        partition: theirs.
        placed: how many valid records were on the partition of their key, those that cause nothing included.
    """

    partition: int
    ops: list[Op] = field(default_factory=list)
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    counts: dict[Counter, int] = field(default_factory=dict)
    placed: int = 0

    def count(self, counter: Counter, by: int = 1) -> None:
        """Add to a counter."""
        self.counts[counter] = self.counts.get(counter, 0) + by


@dataclass
class Effects:
    """What a step caused in one partition, in the order in which it must become durable.

    Attributes:
        states: new stored state by user, for the local table and the changelog.
        output: key and value of each record for the output topic, in order; a None value is a tombstone.
        entries: last entry of each key for the key-value store, prefix included.
        removals: keys to take out of the key-value store.
        forgotten: users to take out of the changelog, once their keys are out of the store.
    """

    states: dict[bytes, bytes] = field(default_factory=dict)
    output: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    entries: dict[bytes, bytes] = field(default_factory=dict)
    removals: list[bytes] = field(default_factory=list)
    forgotten: list[bytes] = field(default_factory=list)

    def follow(self, later: "Effects") -> None:
        """Take in what a later step caused: of a user that is in both, the last state and entries are what counts."""
        self.states.update(later.states)
        self.output += later.output
        self.entries.update(later.entries)
        self.removals += later.removals
        self.forgotten += later.forgotten


@dataclass
class StepResult:
    """What a step caused.

    Attributes:
        effects: by partition.
        counts: what was counted beside what the batches themselves count.
        published: how many vectors were published, by user version, item version and `VectorStatus`.
        unknown_items: by user and item version, interactions that entered a history with items that the version lacks.
        cosines: of a few users, between the vector that is published now and the one before.
    """

    effects: dict[int, Effects] = field(default_factory=dict)
    counts: dict[Counter, int] = field(default_factory=dict)
    published: dict[tuple[str, str, int], int] = field(default_factory=dict)
    unknown_items: dict[tuple[str, str], int] = field(default_factory=dict)
    cosines: list[float] = field(default_factory=list)

    def of(self, partition: int) -> Effects:
        """What it caused there; to be added to."""
        return self.effects.setdefault(partition, Effects())


class BatchDecoder:
    """Decodes fetched batches.

    Args:
        events: decodes an event.
        partitions: how many there are.
    """

    def __init__(self, events: EventDecoder, partitions: int) -> None:
        self._decode_event = events.decode
        source = events.rules.source
        self._exposure = None if source is None else Exposure(source, events.rules.own_sources, events.schemas)
        self._decode_deletion = DeletionDecoder(events.schemas).decode
        self._partitions = partitions

    def events(self, topic: str, partition: int, records: Sequence[Record], placed: Iterable[bytes]) -> Batch:
        """Operations and rejects of a fetched batch of one event topic.

        Args:
            topic: its name.
            partition: where the records were.
            records: in log order.
            placed: users that are known to belong there; those of others are asked for all at once.
        """
        decode = partial(self._decode_event, topic)
        return self._decode(partition, records, placed, decode, Counter.IGNORED, self._exposure)

    def deletions(self, partition: int, records: Sequence[Record], placed: Iterable[bytes]) -> Batch:
        """Operations and rejects of a fetched batch of the deletion topic; arguments are those of `events`."""
        return self._decode(partition, records, placed, self._decode_deletion, Counter.WITHDRAWN)

    def _decode(
        self,
        partition: int,
        records: Sequence[Record],
        known: Iterable[bytes],
        decode: Callable[[bytes | None, bytes | None, int], bytes | tuple[bytes, ...] | int | Reject | None],
        none_means: Counter,
        exposure: Exposure | None = None,
    ) -> Batch:
        batch = Batch(partition)
        ops = batch.ops
        unknown = [key for key in {record.key for record in records}.difference(known) if key is not None]
        misplaced = self._misplaced_among(partition, unknown)
        for index, record in enumerate(records):
            key = record.key
            what = decode(key, record.value, record.timestamp)
            if type(what) is Reject:
                batch.rejects.append((index, what))
            elif key is not None:
                if key in misplaced:
                    detail = "the key's murmur2 partition is another one"
                    batch.rejects.append((index, Reject(Reason.WRONG_PARTITION, detail)))
                    continue
                if what is None:
                    batch.count(none_means)
                else:
                    ops.append(_new(Op, (key, what)))
                    if exposure is not None and record.value is not None:
                        for counter in exposure.of(record.value):
                            batch.count(counter)
        batch.placed = len(ops) + batch.counts.get(none_means, 0)
        batch.count(Counter.REJECTED, len(batch.rejects))
        return batch

    def _misplaced_among(self, partition: int, users: Sequence[bytes]) -> set[bytes]:
        """Those of some users that don't belong to a partition."""
        if not users:  # as a rule, where all are in memory
            return set()
        bounds = np.array([0, *accumulate(map(len, users))])
        data = np.frombuffer(b"".join(users), dtype=np.uint8)
        is_elsewhere = kernels.partitions_of(data, bounds, self._partitions) != partition
        return set(compress(users, is_elsewhere.tolist()))
