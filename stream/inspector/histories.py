"""Histories of users, out of the changelog: each partition is read when one of its users is first asked for.

What was read lies in a temporary table on disk, for a partition may hold millions; later questions read on from there.
A worker is never asked.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from confluent_kafka import Message

from stream.config import Settings
from stream.core.history import History, joined
from stream.core.history_codec import HistoryCodec, stored_order
from stream.errors import ConfigError, DeliveryError, UembError
from stream.kafka.log_reader import LogConsumer, open_consumer, read, whole
from stream.keys import CLAIM_KEY, partition_of
from stream.kv.rocksdb.scratch import Scratch
from stream.worker.claims import Claim, check_claim, later_claim

#: Partitions of which what was read is kept; of the one that nobody asked about for longest it goes first.
KEPT_PARTITIONS: Final = 8
#: While brokers do not answer, they are not asked again for so long: each question waits for them.
_AWAY_S: Final = 10.0
_CHUNK: Final = 2_000
_ENDS: Final = "the inspector ends"


@dataclass(frozen=True)
class Kept:
    """What the changelog keeps of a user.

    Attributes:
        history: the history; empty of one who was erased.
        epoch: the owner who wrote it last.
        partition: where.
        age_s: how long ago that was the end of the log: more than a moment where it can't be read now.
    """

    history: History
    epoch: int
    partition: int
    age_s: float


@dataclass
class _Partition:
    """What was read of one.

    Attributes:
        states: newest of each user.
        next: offset to read on from.
        claim: the newest claim.
        read_s: when all was read (monotonic s).
    """

    states: Scratch = field(default_factory=Scratch)
    next: int = 0
    claim: bytes | None = None
    read_s: float = -float("inf")


class Histories:
    """Reads the changelog of one application; any thread may ask, one at a time is answered.

    Args:
        settings: the worker's own.

    Attributes:
        progress: records read and to be read, while a partition is read; None otherwise.
    """

    def __init__(self, settings: Settings) -> None:
        self.progress: tuple[int, int | None] | None = None
        self._settings = settings
        self._codec = HistoryCodec(settings.event_types)
        self._consumer: LogConsumer | None = None
        self._read: dict[int, _Partition] = {}  # the one that was asked for last is last
        self._away_s = -float("inf")
        self._reading = threading.Lock()
        self._closed = threading.Event()

    def of(self, user: str, partitions: int) -> Kept | None:
        """What is kept of a user now; None of one who is not known.

        Raises:
            ConfigError: there is no changelog.
            StateMismatch: it was written for other settings.
            StateError: what it holds is damaged.
            DeliveryError: it can't be read, and was not read before.
            NotAllowed: it may not be read.
        """
        key = user.encode()
        number = partition_of(key, partitions)
        with self._reading:
            if self._closed.is_set():
                raise UembError(_ENDS)
            try:
                found = self._up_to_date(number)
            finally:
                self.progress = None
            if found.claim is not None:
                check_claim(Claim.decode(found.claim), self._settings, partitions)
            (state,) = found.states.get([key])
            age_s = time.monotonic() - found.read_s
        if state is None:
            return None
        history = History.decode(state, self._codec, self._settings.history_limit)
        return Kept(history, stored_order(state)[0], number, age_s)

    def close(self, until_s: float) -> None:
        """Disconnect, and let go of what was read; a read that does not end until then (monotonic s) is left behind."""
        self._closed.set()
        if not self._reading.acquire(timeout=max(0.01, until_s - time.monotonic())):
            for partition in list(self._read.values()):
                partition.states.remove()
            return
        try:
            if self._consumer is not None:
                self._consumer.close()
            for number in list(self._read):
                self._drop(number)
        finally:
            self._reading.release()

    def _up_to_date(self, number: int) -> _Partition:
        """All that the log holds of a partition, or held when it could be read last."""
        before = self._read.pop(number, None)
        if before is not None:
            self._read[number] = before
        is_whole = before is not None and before.read_s > -float("inf")
        if is_whole and time.monotonic() - self._away_s < _AWAY_S:
            return self._read[number]
        try:
            return self._read_on(number)
        except DeliveryError:
            self._away_s = time.monotonic()
            if not is_whole:  # users who were not read yet would be taken for missing
                raise
            return self._read[number]

    def _read_on(self, number: int) -> _Partition:
        if self._consumer is None:
            self._consumer = open_consumer(self._settings, "inspect")
        began_s = time.monotonic()
        span = whole(self._consumer, self._settings.changelog_topic, number)
        if span is None:
            msg = f"there is no topic {self._settings.changelog_topic}; start a worker first, it makes its topics"
            raise ConfigError(msg)
        if number in self._read and span.end < self._read[number].next:  # the topic was made anew
            self._drop(number)
        if number not in self._read:
            while len(self._read) >= KEPT_PARTITIONS:
                self._drop(next(iter(self._read)))
            self._read[number] = _Partition()
        partition = self._read[number]
        messages = read(self._consumer, [span._replace(start=max(span.start, partition.next))], self._tell)
        while chunk := list(islice(messages, _CHUNK)):
            self._add(partition, chunk)
        partition.next, partition.read_s = span.end, began_s
        return partition

    def _drop(self, number: int) -> None:
        self._read.pop(number).states.__exit__(None, None, None)

    def _tell(self, done: int, total: int | None) -> None:
        if self._closed.is_set():
            raise UembError(_ENDS)
        self.progress = done, total

    def _add(self, partition: _Partition, messages: Iterable[Message]) -> None:
        states: dict[bytes, list[bytes | None]] = {}
        for message in messages:
            key, value = message.key(), message.value()
            if key == CLAIM_KEY and value is not None:
                partition.claim = later_claim(partition.claim, value)
            elif key is not None:
                states.setdefault(key, []).append(value)
        entries: dict[bytes, bytes] = {}
        gone = []
        for (key, values), held in zip(states.items(), partition.states.get(list(states)), strict=True):
            for value in values:
                held = None if value is None else joined(held, value, self._codec, self._settings.history_limit)
            if held is None:
                gone.append(key)
            else:
                entries[key] = held
        partition.states.put(entries)
        partition.states.delete(gone)
