"""Dead letters sent again to where they came from, once the cause is mended."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from confluent_kafka import KafkaException, Message, Producer

from stream.config import Settings
from stream.dlq import Letter, Place
from stream.errors import DeliveryError
from stream.topic_reader import TIMEOUT_S, Span, open_consumer, read, whole

REPLAYED_HEADER: Final = "dlq.replayed"
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
        self._producer = Producer(
            {
                **settings.librdkafka_client,
                "partitioner": "murmur2_random",
                "acks": "all",
                "enable.idempotence": True,
                "compression.type": "lz4",
                "message.max.bytes": min(settings.dlq_max_bytes + (1 << 20), 1_000_000_000),
                "log_level": 2,
            }
        )
        self._failure = ""
        self.report = ReplayReport()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._originals.close()
        self._producer.purge()
        self._producer.close()

    def replay(self, letters: Iterable[Letter]) -> ReplayReport:
        """Send letters again and wait until all are acknowledged.

        Raises:
            DeliveryError: Kafka refused a record, or a reference can't be read; what was acknowledged stays sent.
        """
        for number, letter in enumerate(letters):
            if left := self._send(letter):
                self.report.left[left] += 1
            if number % _ROWS_PER_POLL == 0:
                self._producer.poll(0)
            if self._failure:
                break
        self._producer.flush()
        if self._failure:
            msg = (
                f"a record was not acknowledged ({self._failure}); replay again, what arrives twice changes no history"
            )
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
        if value is None and letter.text("value_sha256"):
            value = self._original(source, letter.text("value_sha256"))
            if value is None:
                return "gone"
        if self._dry_run:
            self.report.sent += 1
            return ""
        headers = [header for header in letter.own_headers if header[0] != REPLAYED_HEADER]
        headers.append((REPLAYED_HEADER, f"{letter.partition}:{letter.offset}".encode()))
        while True:
            try:
                self._producer.produce(source.topic, value, letter.key, headers=headers, on_delivery=self._delivered)
            except BufferError:
                self._producer.poll(_POLL_S)
            except KafkaException as exc:
                self._failure = self._failure or exc.args[0].str()
                return ""
            else:
                return ""

    def _delivered(self, error: Any, _: Message) -> None:
        if error is None:
            self.report.sent += 1
        else:
            self._failure = self._failure or error.str()

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
