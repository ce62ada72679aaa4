"""Dead letters: a rejected record as it goes to their topic, bytes untouched, and what its headers say of it there."""

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from stream.core.events import Reject, Unread

if TYPE_CHECKING:  # who only reads letters needs neither client of the worker
    from confluent_kafka import Message

    from stream.kafka.batch_sender import OutRecord
    from stream.kafka.delivery import RecordBatch

Headers = list[tuple[str, bytes | None]]


class Header(StrEnum):
    """Names of our headers, in the order in which a letter has them; they follow the record's own."""

    REASON = "dlq.reason"
    TOPIC = "dlq.topic"
    PARTITION = "dlq.partition"
    OFFSET = "dlq.offset"
    TIMESTAMP = "dlq.timestamp"
    DETAIL = "dlq.detail"
    #: Of a value that was left out.
    VALUE_SHA256 = "dlq.value_sha256"
    VALUE_SIZE = "dlq.value_size"
    #: On a record that was replayed: partition and offset of its letter.
    REPLAYED = "dlq.replayed"


_FIRST: Final = next(iter(Header))
_NUMBER: Final = re.compile(r"[0-9]{1,18}")


def dead_letter(batch: "RecordBatch", index: int, reject: Reject, max_bytes: int) -> "OutRecord":
    """A rejected record as it goes to the dead-letter topic: bytes untouched, the reason in headers.

    A value above `max_bytes` is left out and described by its hash and size; of one that was not read nothing is known.
    """
    record = batch.records[index]
    said = {
        Header.REASON: str(reject.reason),
        Header.TOPIC: batch.topic,
        Header.PARTITION: str(batch.partition),
        Header.OFFSET: str(record.offset),
        Header.TIMESTAMP: str(record.timestamp),
        Header.DETAIL: reject.detail,
    }
    value = None if isinstance(record.value, Unread) else record.value
    if value is not None and len(value) > max_bytes:
        said |= {Header.VALUE_SHA256: hashlib.sha256(value).hexdigest(), Header.VALUE_SIZE: str(len(value))}
        value = None
    return record.key, value, [*record.headers, *((name.value, text.encode()) for name, text in said.items())]


class Place(NamedTuple):
    """Where a record lies."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Letter:
    """A dead letter.

    Attributes:
        partition: of the dead-letter topic.
        offset: in that partition.
        timestamp_ms: when it was written.
        key: the rejected record's key, untouched.
        value: its value, untouched; None for a null value, or for a reference.
        headers: all of its headers, ours included.
    """

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers

    @classmethod
    def of(cls, message: "Message") -> "Letter":
        """A record of the dead-letter topic as a letter; whose it is, its headers tell."""
        try:
            headers = list(message.headers() or [])
        except (SystemError, UnicodeDecodeError):  # a name that is not UTF-8: none of our letters
            headers = []
        return cls(
            message.partition(),
            message.offset(),
            message.timestamp()[1],
            message.key(),
            message.value(),
            headers,
        )

    @property
    def _ours_at(self) -> int:
        """Where our headers begin: they follow the record's own, which may have any names."""
        return max((n for n, (name, _) in enumerate(self.headers) if name == _FIRST), default=len(self.headers))

    def text(self, name: Header) -> str:
        """Value of our header of that name; empty without one."""
        found = dict(self.headers[self._ours_at :]).get(name)
        return (found or b"").decode(errors="replace")

    @property
    def reason(self) -> str:
        """Why it was turned away."""
        return self.text(Header.REASON)

    @property
    def source(self) -> Place | None:
        """Where the rejected record lies, None for a letter that is not ours."""
        topic, partition, offset = map(self.text, (Header.TOPIC, Header.PARTITION, Header.OFFSET))
        if not (topic and _NUMBER.fullmatch(partition) and _NUMBER.fullmatch(offset)):
            return None
        return Place(topic, int(partition), int(offset))

    @property
    def value_size(self) -> int:
        """Bytes of the rejected record's value, also where the letter is only a reference to it."""
        size = self.text(Header.VALUE_SIZE)
        return int(size) if _NUMBER.fullmatch(size) else len(self.value or b"")

    @property
    def replay_headers(self) -> Headers:
        """Headers of the record when it is sent again: its own, and which letter it comes from."""
        own = [header for header in self.headers[: self._ours_at] if header[0] != Header.REPLAYED]
        return [*own, (Header.REPLAYED.value, f"{self.partition}:{self.offset}".encode())]
