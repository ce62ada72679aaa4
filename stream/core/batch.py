"""What goes into a step and what comes out of it: decoded records of one partition, and what they caused."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from typing import NamedTuple, Protocol

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


@dataclass
class Batch:
    """Decoded records: operations in log order, rejects with the index of their record, counters.

    Attributes:
        placed: how many valid records were on the partition of their key, those that cause nothing included.
    """

    ops: list[Op] = field(default_factory=list)
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    counts: dict[Counter, int] = field(default_factory=dict)
    placed: int = 0

    def count(self, counter: Counter, by: int = 1) -> None:
        """Add to a counter."""
        self.counts[counter] = self.counts.get(counter, 0) + by


@dataclass
class StepResult:
    """What a batch caused, in the order in which it must become durable.

    Attributes:
        states: new stored state by user, for the local table and the changelog.
        output: key and value of each record for the output topic, in order; a None value is a tombstone.
        entries: last entry of each key for the key-value store, prefix included.
        removals: keys to take out of the key-value store.
        forgotten: users to take out of the changelog, once their keys are out of the store.
        counts: what was counted.
        published: how many vectors were published, by user version, item version and `VectorStatus`.
        unknown_items: by user and item version, interactions that entered a history with items that the version lacks.
        cosines: of a few users, between the vector that is published now and the one before.
    """

    states: dict[bytes, bytes] = field(default_factory=dict)
    output: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    entries: dict[bytes, bytes] = field(default_factory=dict)
    removals: list[bytes] = field(default_factory=list)
    forgotten: list[bytes] = field(default_factory=list)
    counts: dict[Counter, int] = field(default_factory=dict)
    published: dict[tuple[str, str, int], int] = field(default_factory=dict)
    unknown_items: dict[tuple[str, str], int] = field(default_factory=dict)
    cosines: list[float] = field(default_factory=list)


class BatchDecoder:
    """Decodes the fetched batches of one partition.

    Args:
        events: decodes an event; may be shared with other partitions, so that its memo is held once.
        partition: number of this partition.
        partitions: how many there are.
        placed: users that are known to belong here; those of others are asked for all at once.
    """

    def __init__(self, events: EventDecoder, partition: int, partitions: int, placed: Container[bytes]) -> None:
        self._decode_event = events.decode
        source = events.rules.source
        self._exposure = None if source is None else Exposure(source, events.rules.own_sources, events.schemas)
        self._decode_deletion = DeletionDecoder(events.schemas).decode
        self._partition = partition
        self._partitions = partitions
        self._placed = placed

    def events(self, topic: str, records: Sequence[Record]) -> Batch:
        """Operations and rejects of a fetched batch of one event topic."""
        decode = self._decode_event
        return self._decode(
            records, lambda r: decode(topic, r.key, r.value, r.timestamp), Counter.IGNORED, self._exposure
        )

    def deletions(self, records: Sequence[Record]) -> Batch:
        """Operations and rejects of a fetched batch of the deletion topic."""
        decode = self._decode_deletion
        return self._decode(records, lambda r: decode(r.key, r.value, r.timestamp), Counter.WITHDRAWN)

    def _decode(
        self,
        records: Sequence[Record],
        decode: Callable[[Record], bytes | tuple[bytes, ...] | int | Reject | None],
        none_means: Counter,
        exposure: Exposure | None = None,
    ) -> Batch:
        batch = Batch()
        known, ops = self._placed, batch.ops
        placed = self._placed_among({record.key for record in records})
        for index, record in enumerate(records):
            what = decode(record)
            key = record.key
            if type(what) is Reject:
                batch.rejects.append((index, what))
            elif key is not None:
                if key not in known and key not in placed:
                    detail = "the key's murmur2 partition is another one"
                    batch.rejects.append((index, Reject(Reason.WRONG_PARTITION, detail)))
                    continue
                if what is None:
                    batch.count(none_means)
                else:
                    ops.append(Op(key, what))  # type: ignore[arg-type]
                    if exposure is not None and record.value is not None:
                        for counter in exposure.of(record.value):
                            batch.count(counter)
        batch.placed = len(ops) + batch.counts.get(none_means, 0)
        batch.count(Counter.REJECTED, len(batch.rejects))
        return batch

    def _placed_among(self, keys: set[bytes | None]) -> set[bytes]:
        """Those of some keys that aren't known and belong here."""
        unknown = [key for key in keys if key is not None and key not in self._placed]
        bounds = np.array([0, *accumulate(map(len, unknown))])
        data = np.frombuffer(b"".join(unknown), dtype=np.uint8)
        is_here = kernels.partitions_of(data, bounds, self._partitions) == self._partition
        return set(compress(unknown, is_here.tolist()))
