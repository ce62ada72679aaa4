"""Histories of users, out of the changelog: each partition is read when one of its users is first asked for.

What was read lies in a temporary table on disk, for a partition may hold millions; later questions read on from there.
A worker is never asked.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from confluent_kafka import Message

from stream.config import Settings
from stream.core.history import History, joined
from stream.core.history_codec import HistoryCodec, stored_order
from stream.errors import ConfigError, UembError
from stream.kafka.log_reader import LogConsumer, open_consumer, read, whole
from stream.keys import CLAIM_KEY, partition_of
from stream.kv.rocksdb.scratch import Scratch
from stream.worker.claims import Claim, check_claim, later_claim

#: A read that does not end within this is left behind.
CLOSE_S: Final = 3.0
_CHUNK: Final = 2_000
_ENDS: Final = "the inspector ends"


@dataclass(frozen=True)
class Kept:
    """What the changelog keeps of a user.

    Attributes:
        history: the history; empty of one who was erased.
        epoch: the owner who wrote it last.
        partition: where.
    """

    history: History
    epoch: int
    partition: int


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
        self._scratch: Scratch | None = None
        self._next: dict[int, int] = {}
        self._claims: dict[int, bytes] = {}
        self._reading = threading.Lock()
        self._closed = threading.Event()

    def of(self, user: str, partitions: int) -> Kept | None:
        """What is kept of a user now; None of one who is not known.

        Raises:
            ConfigError: there is no changelog.
            StateMismatch: it was written for other settings.
            StateError: what it holds is damaged.
            DeliveryError: it can't be read.
            NotAllowed: it may not be read.
        """
        key = user.encode()
        partition = partition_of(key, partitions)
        with self._reading:
            if self._closed.is_set():
                raise UembError(_ENDS)
            try:
                scratch = self._read_on(partition)
            finally:
                self.progress = None
            if (claim := self._claims.get(partition)) is not None:
                check_claim(Claim.decode(claim), self._settings, partitions)
            (state,) = scratch.get([key])
        if state is None:
            return None
        history = History.decode(state, self._codec, self._settings.history_limit)
        return Kept(history, stored_order(state)[0], partition)

    def close(self) -> None:
        """Disconnect, and let go of what was read; a read that is under way ends with that."""
        self._closed.set()
        if not self._reading.acquire(timeout=CLOSE_S):  # it waits for brokers that do not answer
            if self._scratch is not None:
                self._scratch.remove()
            return
        try:
            if self._consumer is not None:
                self._consumer.close()
            if self._scratch is not None:
                self._scratch.__exit__(None, None, None)
        finally:
            self._reading.release()

    def _read_on(self, partition: int) -> Scratch:
        if self._consumer is None:
            self._consumer = open_consumer(self._settings, "inspect")
        scratch = self._scratch = self._scratch or Scratch()
        span = whole(self._consumer, self._settings.changelog_topic, partition)
        if span is None:
            msg = f"there is no topic {self._settings.changelog_topic}; start a worker first, it makes its topics"
            raise ConfigError(msg)
        span = span._replace(start=max(span.start, self._next.get(partition, 0)))
        messages = read(self._consumer, [span], self._tell)
        while chunk := list(islice(messages, _CHUNK)):
            self._add(partition, chunk, scratch)
        self._next[partition] = span.end
        return scratch

    def _tell(self, done: int, total: int | None) -> None:
        if self._closed.is_set():
            raise UembError(_ENDS)
        self.progress = done, total

    def _add(self, partition: int, messages: Iterable[Message], scratch: Scratch) -> None:
        states: dict[bytes, list[bytes | None]] = {}
        for message in messages:
            key, value = message.key(), message.value()
            if key == CLAIM_KEY and value is not None:
                self._claims[partition] = later_claim(self._claims.get(partition), value)
            elif key is not None:
                states.setdefault(key, []).append(value)
        entries: dict[bytes, bytes] = {}
        gone = []
        for (key, values), held in zip(states.items(), scratch.get(list(states)), strict=True):
            for value in values:
                held = None if value is None else joined(held, value, self._codec, self._settings.history_limit)
            if held is None:
                gone.append(key)
            else:
                entries[key] = held
        scratch.put(entries)
        scratch.delete(gone)
