"""Dead letters sent again to where they came from, once the cause is mended."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from confluent_kafka import KafkaError, KafkaException, Message

from stream.config import Settings
from stream.errors import DeliveryError
from stream.kafka.brokers import check_allowed, producer, writing
from stream.kafka.dead_letters import Header, Letter, Place
from stream.kafka.log_reader import TIMEOUT_S, Span, open_consumer, read, whole

_POLL_S: Final = 0.5
_ROWS_PER_POLL: Final = 200


@dataclass
class ReplayReport:
    """What became of the letters: sent again, or left where they are, by cause.

    Attributes:
        sent: acknowledged by Kafka.
        left: ``foreign`` (not a letter of these input topics), ``keyless`` (a null key belongs to no partition),
            ``gone`` (a reference whose record the topic no longer holds).
    """

    sent: int = 0
    left: Counter[str] = field(default_factory=Counter)


class Replayer:
    """Sends rejected records to their topics again: same key, value and headers, on the partition of their key.

    Records carry the time of now, so that retention keeps them and an event that was ahead of its time may be due.
    What was processed meanwhile changes nobody's history when it is sent again (law 1); what is still at fault is
    turned away again, with a letter of its own.

    Args:
        settings: topics; a letter that names any other topic is left alone.
        dry_run: only count.
    """

    def __init__(self, settings: Settings, *, dry_run: bool = False) -> None:
        self._topics = {*settings.event_topics, settings.deletion_topic}
        self._dry_run = dry_run
        self._originals = open_consumer(settings, "dlq")
        self._producer = producer(
            settings,
            {
                "partitioner": "murmur2_random",
                "acks": "all",
                "enable.idempotence": True,
                "compression.type": "lz4",
                "message.max.bytes": min(settings.dlq_max_bytes + (1 << 20), 1_000_000_000),
            },
        )
        self._failure: tuple[KafkaError, str] | None = None
        self.report = ReplayReport()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._originals.close()
        with contextlib.suppress(KafkaException):  # it has said before why it can do nothing
            self._producer.purge()
            self._producer.close()

    def replay(self, letters: Iterable[Letter]) -> ReplayReport:
        """Send letters again and wait until all are acknowledged.

        Raises:
            DeliveryError: Kafka refused a record, or a reference can't be read; what was acknowledged stays sent.
            NotAllowed: a topic may not be written to, or not be read.
        """
        with writing(lambda: ", ".join(sorted(self._topics))):
            for number, letter in enumerate(letters):
                if left := self._send(letter):
                    self.report.left[left] += 1
                if number % _ROWS_PER_POLL == 0:
                    self._producer.poll(0)
                if self._failure:
                    break
            self._producer.flush()
        if self._failure:
            check_allowed(*self._failure)
            said = self._failure[0].str()
            msg = f"a record was not acknowledged ({said}); replay again, what arrives twice changes no history"
            raise DeliveryError(msg)
        return self.report

    def _send(self, letter: Letter) -> str:
        """Send one letter; return why it was left, empty when it was not."""
        source = letter.source
        if source is None or source.topic not in self._topics:
            return "foreign"
        if letter.key is None:
            return "keyless"
        value = letter.value
        if value is None and (sha256 := letter.text(Header.VALUE_SHA256)):
            value = self._original(source, sha256)
            if value is None:
                return "gone"
        if self._dry_run:
            self.report.sent += 1
            return ""
        headers = letter.replay_headers
        while True:
            try:
                self._producer.produce(source.topic, value, letter.key, headers=headers, on_delivery=self._delivered)
            except BufferError:
                self._producer.poll(_POLL_S)
            except KafkaException as exc:
                self._failure = self._failure or (exc.args[0], source.topic)
                return ""
            else:
                return ""

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self.report.sent += 1
        else:
            self._failure = self._failure or (error, message.topic())

    def _original(self, source: Place, sha256: str) -> bytes | None:
        """Value of the record that a reference stands for; None when its topic no longer holds it."""
        there = whole(self._originals, source.topic, source.partition)
        if there is None or not there.start <= source.offset < there.end:
            return None
        span = Span(source.topic, source.partition, source.offset, source.offset + 1)
        for message in read(self._originals, [span], stall_s=TIMEOUT_S):
            value: bytes | None = message.value()
            if value is not None and hashlib.sha256(value).hexdigest() == sha256:
                return value
        return None
