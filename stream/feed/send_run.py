"""One run of the feeder: every place where it waits, and how far the records before are all acknowledged."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from stream.kafka.grants import TOPIC_REFUSED

_CHUNK_RECORDS: Final = 200
_CHUNK_S: Final = 0.5
_SLACK_S: Final = 0.005  # a rate is kept in bursts of this length, as short as the producer's linger
_CATCH_UP_S: Final = 0.1  # a stall is made up for by at most this much of the rate
_PACE_POLL_S: Final = 0.02
_WAIT_S: Final = 0.1  # longest wait between two looks at `stop`
_STOP_PATIENCE_S: Final = 2.0
_RETRY_S: Final = 0.25  # between two looks whether what was refused is allowed by now
_ANSWER_S: Final = 5.0

log = logging.getLogger(__name__)


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
            self._run.allowed.add(message.topic())
        elif not self._run.bears(error, message.topic()):
            self._run.fail(error, message.topic())
        else:
            self._run.refused.append(_Refused(message.topic(), message.key(), message.value(), self))


class _Refused(NamedTuple):
    """A record that the brokers did not let in."""

    topic: str
    key: bytes
    value: bytes
    chunk: _Chunk


class Run:
    """One `Feeder.send`: its counters, and every place where it waits.

    Grants are replaced by deleting and making them. So what a topic refuses that let records in before is sent again
    for a while, and nothing new meanwhile.

    Args:
        producer: the client.
        patience_s: how long to wait for a grant.
        stop: set by another thread to end early.
        report: called now and then with how many records are acknowledged.
        on_acknowledged: called with the position of a record when that and all before it are acknowledged.
    """

    def __init__(
        self,
        producer: Producer,
        patience_s: float,
        stop: threading.Event,
        report: Callable[[int], object],
        on_acknowledged: Callable[[Any], object] | None,
    ) -> None:
        self._producer = producer
        self._patience_s = patience_s
        self._stop = stop
        self._report = report
        self._on_acknowledged = on_acknowledged
        self._due = time.monotonic()
        self._allowed = 0
        self._chunk = _Chunk(self)
        self._chunk_due = self._due + _CHUNK_S
        self._closed: deque[_Chunk] = deque()
        self.topic = ""  # of the last record
        self.allowed: set[str] = set()  # topics that have taken a record
        self.refused: deque[_Refused] = deque()
        self._refused_since: float | None = None
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
        self._await_grants()
        if not self._hand_over(record.topic, record.key, record.value, chunk):
            return False
        self.produced += 1
        chunk.produced += 1
        chunk.position = record.position
        if chunk.produced == _CHUNK_RECORDS:
            self._producer.poll(0)
            self._close_chunk()
        return True

    def bears(self, error: KafkaError, topic: str) -> bool:
        """Whether what was not taken shall be sent again."""
        if error.code() != TOPIC_REFUSED or topic not in self.allowed:
            return False
        now_s = time.monotonic()
        if self._refused_since is None:
            log.warning("not allowed to Write topic %s; waiting up to %g s for the grant", topic, self._patience_s)
            self._refused_since = now_s
        return now_s - self._refused_since < self._patience_s

    def _await_grants(self) -> None:
        """Wait until the brokers let in again what they refused, and hand that over."""
        while self.refused and not self.ended:
            topic = self.refused[0].topic
            self._stop.wait(_RETRY_S)
            if not self._lets_in(topic):
                continue
            for _ in range(len(self.refused)):
                self._hand_over(*self.refused.popleft())
            self._flush()
            if not self.refused:
                self._refused_since = None

    def _lets_in(self, topic: str) -> bool:
        """Whether a topic's grant seems to be back: the client asks the brokers anew, and would not by itself."""
        try:
            error = self._producer.list_topics(topic, timeout=_ANSWER_S).topics[topic].error
        except KafkaException as exc:
            error = exc.args[0]
        if error is not None and error.code() == TOPIC_REFUSED and not self.bears(error, topic):
            self.fail(error, topic)
        return error is None

    def _hand_over(self, topic: str, key: bytes, value: bytes, chunk: _Chunk) -> bool:
        while not self.ended:
            try:
                self._producer.produce(topic, value, key, on_delivery=chunk.delivered)
            except BufferError:
                self._producer.poll(_WAIT_S)
            except KafkaException as exc:  # the client itself is broken, or knows that the topic is closed to it
                if self.bears(exc.args[0], topic):
                    self.refused.append(_Refused(topic, key, value, chunk))
                    return True
                self.fail(exc.args[0], topic)
            else:
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
        self._flush()
        self._await_grants()

    def _flush(self) -> None:
        give_up = None
        while self._producer.flush(_WAIT_S):
            self._report_progress()
            if self.stopped:
                give_up = give_up or time.monotonic() + _STOP_PATIENCE_S
                if time.monotonic() > give_up:
                    return
