"""One run of the feeder: every place where it waits, and how far the records before are all acknowledged."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

_CHUNK_RECORDS: Final = 200
_CHUNK_S: Final = 0.5
_SLACK_S: Final = 0.005  # a rate is kept in bursts of this length, as short as the producer's linger
_CATCH_UP_S: Final = 0.1  # a stall is made up for by at most this much of the rate
_PACE_POLL_S: Final = 0.02
_WAIT_S: Final = 0.1  # longest wait between two looks at `stop`
_STOP_PATIENCE_S: Final = 2.0


class Outgoing(NamedTuple):
    """What goes to Kafka, and a position that is handed back once this and all before it is acknowledged."""

    topic: str
    key: bytes
    value: bytes
    position: Any


class _Chunk:
    """Records produced one after another, whose acknowledgements are counted together."""

    __slots__ = ("_run", "acknowledged", "position", "produced")

    def __init__(self, run: "Run") -> None:
        self._run = run
        self.produced = 0
        self.acknowledged = 0
        self.position: Any = None

    def delivered(self, error: KafkaError | None, message: Message) -> None:
        """Called by the client, from within its `poll` and `flush`."""
        if error is None:
            self.acknowledged += 1
            self._run.sent += 1
        else:
            self._run.fail(error, message.topic())


class Run:
    """One `Feeder.send`: its counters, and every place where it waits.

    Args:
        producer: the client.
        stop: set by another thread to end early.
        report: called now and then with how many records are acknowledged.
        on_acknowledged: called with the position of a record when that and all before it are acknowledged.
    """

    def __init__(
        self,
        producer: Producer,
        stop: threading.Event,
        report: Callable[[int], object],
        on_acknowledged: Callable[[Any], object] | None,
    ) -> None:
        self._producer = producer
        self._stop = stop
        self._report = report
        self._on_acknowledged = on_acknowledged
        self._due = time.monotonic()
        self._allowed = 0
        self._chunk = _Chunk(self)
        self._chunk_due = self._due + _CHUNK_S
        self._closed: deque[_Chunk] = deque()
        self.topic = ""  # of the last record
        self.produced = 0
        self.sent = 0
        self.failed = 0
        self.first_failure: tuple[KafkaError, str] | None = None

    @property
    def stopped(self) -> bool:
        """Whether the caller wants no more."""
        return self._stop.is_set()

    @property
    def ended(self) -> bool:
        """Whether nothing more shall be produced."""
        return self.failed > 0 or self._stop.is_set()

    def await_turn(self, rate: float | None, pace: Callable[[], int] | None) -> None:
        """Wait until one more record may be produced, or the run has ended."""
        if pace is not None and self.produced == self._allowed:
            self._await_acknowledgements()
            self._close_chunk()
            while not self.ended and self.produced == self._allowed:
                self._allowed += max(pace(), 0)
                if self.produced == self._allowed:
                    self._stop.wait(_PACE_POLL_S)
        if rate is not None:
            while not self.ended and (early := self._due - time.monotonic()) > _SLACK_S:
                self._producer.poll(min(early, _WAIT_S))
            now = time.monotonic()
            self._due = max(self._due, now - _CATCH_UP_S) + 1.0 / rate
            if now >= self._chunk_due:
                self._close_chunk()
                self._chunk_due = now + _CHUNK_S

    def produce(self, record: Outgoing) -> bool:
        """Hand one record to the client, waiting while its queue is full; False if the run ended instead."""
        chunk, self.topic = self._chunk, record.topic
        while not self.ended:
            try:
                self._producer.produce(record.topic, record.value, record.key, on_delivery=chunk.delivered)
            except BufferError:
                self._producer.poll(_WAIT_S)
            except KafkaException as exc:  # the client itself is broken, say by a fatal error
                self.fail(exc.args[0], record.topic)
            else:
                self.produced += 1
                chunk.produced += 1
                chunk.position = record.position
                if chunk.produced == _CHUNK_RECORDS:
                    self._producer.poll(0)
                    self._close_chunk()
                return True
        return False

    def drain(self) -> None:
        """Wait for every acknowledgement; the client's own timeout bounds it, and shorter patience when stopped."""
        self._await_acknowledgements()
        if len(self._producer):
            self._producer.purge()
            self._producer.flush(_WAIT_S)
        self._close_chunk()

    def fail(self, error: KafkaError, topic: str | None) -> None:
        """Note a record that was not acknowledged; its chunk never becomes whole."""
        self.failed += 1
        self.first_failure = self.first_failure or (error, topic or "")

    def _close_chunk(self) -> None:
        """Begin another chunk, and report how far all is acknowledged."""
        if self._chunk.produced:
            self._closed.append(self._chunk)
            self._chunk = _Chunk(self)
        self._report_progress()

    def _report_progress(self) -> None:
        whole = None
        while self._closed and self._closed[0].acknowledged == self._closed[0].produced:
            whole = self._closed.popleft()
        if whole is not None and self._on_acknowledged is not None:
            self._on_acknowledged(whole.position)
        self._report(self.sent)

    def _await_acknowledgements(self) -> None:
        give_up = None
        while self._producer.flush(_WAIT_S):
            self._report_progress()
            if self.stopped:
                give_up = give_up or time.monotonic() + _STOP_PATIENCE_S
                if time.monotonic() > give_up:
                    return
