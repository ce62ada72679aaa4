"""The engine of `uemb send`: interactions into Kafka by the contract, at a rate, paced, and all acknowledged."""

import contextlib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self

import msgspec
from confluent_kafka import KafkaError, KafkaException, Producer

from stream.errors import ConfigError, DeliveryError
from stream.feed.send_run import Outgoing, Run
from stream.kafka.brokers import SILENT, check_allowed, writing
from stream.keys import canonical_id
from stream.logs import OnProgress

TOPIC_PREFIX: Final = "user-events."
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")

#: May be overridden by the caller. The log would go to stderr; what matters in it arrives through `error_cb` as well.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "linger.ms": 5,
    "compression.type": "lz4",
    "message.timeout.ms": 30_000,
    "log_level": 2,
}
#: May not: the partitioner decides who owns a user, the others what "acknowledged" means.
_FIXED: Final[Mapping[str, Any]] = {"partitioner": "murmur2_random", "acks": "all", "enable.idempotence": True}

log = logging.getLogger(__name__)


class EventLike(Protocol):
    """What is sent: `stream.core.events.EventRow`, or anything with the same attributes; integer ids stay integers."""

    @property
    def user_id(self) -> int | str: ...  # noqa: D102
    @property
    def item_id(self) -> int | str: ...  # noqa: D102
    @property
    def type(self) -> str: ...  # noqa: D102
    @property
    def ts_ms(self) -> int: ...  # noqa: D102


class SendReport(NamedTuple):
    """How many records Kafka acknowledged, and the seconds from the first call to the last acknowledgement."""

    sent: int
    seconds: float


class Feeder:
    """Produces interactions as JSON, keyed by the canonical user id, each to the topic of its type.

    Records carry the time of sending, never the event time: a topic with ``retention.ms`` would drop an old event at
    once. A feeder serves one `send` at a time, any number in turn.

    Args:
        bootstrap: ``host:port``, comma separated.
        topic_of: topic by interaction type, as a mapping or a function; what a mapping lacks goes to
            ``user-events.{type}``.
        client_config: further librdkafka settings; partitioner, acks and idempotence stay ours.

    Raises:
        ConfigError: librdkafka refuses a setting.
    """

    def __init__(
        self,
        bootstrap: str,
        topic_of: Mapping[str, str] | Callable[[str], str] | None = None,
        *,
        client_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._bootstrap = bootstrap
        self._topic_of = topic_of if topic_of is not None else {}
        self._topics: dict[str, str] = {}
        self._trouble = ""
        self._allowed: set[str] = set()
        config = {**_DEFAULTS, **(client_config or {}), **_FIXED, "bootstrap.servers": bootstrap}
        self._patience_s = float(config["message.timeout.ms"]) / 1000 or math.inf
        try:
            self._producer = Producer({**config, "error_cb": self._on_trouble, "logger": SILENT})
        except KafkaException as exc:
            msg = f"the Kafka client refuses its settings: {exc.args[0].str()}"
            raise ConfigError(msg) from exc

    def send(
        self,
        rows: Iterable[EventLike],
        *,
        rate: float | None = None,
        pace: Callable[[], int] | None = None,
        stop: threading.Event | None = None,
        on_progress: OnProgress | None = None,
    ) -> SendReport:
        """Produce `rows` in their order and wait until all are acknowledged.

        Args:
            rows: interactions; an iterator is consumed as it is sent.
            rate: records per second; None is as fast as the broker takes them.
            pace: how many more may be outstanding now. Asked once those allowed before are all acknowledged, so that a
                lag it measures lacks nothing; while it answers 0 or less, it is asked again every 20 ms.
            stop: set by another thread to end early; what was produced is still awaited, two seconds at most.
            on_progress: called with records acknowledged and their total, where `rows` has a length.

        Raises:
            DeliveryError: Kafka did not acknowledge a record; nothing is produced after the first failure.
            NotAllowed: a topic may not be written to.
            ConfigError: an id, or a type's topic name, is not acceptable; what came before it was sent.
        """
        total = len(rows) if isinstance(rows, Sized) else None
        report = None if on_progress is None else lambda sent, _: on_progress(sent, total)
        records = (self._record(row, number) for number, row in enumerate(rows, 1))
        return self.send_records(records, rate=rate, pace=pace, stop=stop, on_progress=report)

    def send_records(
        self,
        records: Iterable[Outgoing],
        *,
        rate: float | None = None,
        pace: Callable[[], int] | None = None,
        stop: threading.Event | None = None,
        on_progress: OnProgress | None = None,
        on_acknowledged: Callable[[Any], object] | None = None,
    ) -> SendReport:
        """The same for records that are made already.

        Args:
            records: what to produce.
            rate: as in `send`.
            pace: as in `send`.
            stop: as in `send`.
            on_progress: as in `send`; the total is not known.
            on_acknowledged: called with the position of a record when that and all before it are acknowledged; not for
                every record, but for the last one where all went well.

        Raises:
            DeliveryError: as in `send`.
            NotAllowed: as in `send`.
            ConfigError: the rate is not above 0.
        """
        if rate is not None and not rate > 0:
            msg = f"rate must be above 0 records a second, not {rate}"
            raise ConfigError(msg)
        started = time.monotonic()
        self._trouble = ""
        run = Run(
            self._producer,
            self._patience_s,
            stop or threading.Event(),
            lambda sent: on_progress and on_progress(sent, None),
            on_acknowledged,
        )
        run.allowed = self._allowed
        with writing(lambda: run.topic):
            try:
                for record in records:
                    run.await_turn(rate, pace)
                    if run.ended or not run.produce(record):
                        break
            except Exception:  # a bad row, or the caller's own code; what came before it is on its way and counts
                run.drain()
                raise
            run.drain()
        if run.first_failure is not None and not run.stopped:
            error, topic = run.first_failure
            check_allowed(error, topic)
            msg = (
                f"{run.failed} of {run.produced} records were not acknowledged ({error.str()} on {topic}"
                f"{self._trouble and f'; {self._trouble}'}); check {self._bootstrap} and send all again, events that "
                "arrive twice change nothing"
            )
            raise DeliveryError(msg)
        return SendReport(run.sent, time.monotonic() - started)

    def close(self) -> None:
        """Drop what an interrupted `send` left behind, and disconnect."""
        with contextlib.suppress(KafkaException):  # it has said before why it can do nothing
            self._producer.purge()
            self._producer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, row: EventLike, number: int) -> Outgoing:
        fields = {"user_id": row.user_id, "item_id": row.item_id, "type": row.type, "ts": row.ts_ms}
        try:
            topic = self._topics.get(row.type) or self._topic(row.type)
            return Outgoing(topic, canonical_id(row.user_id).encode(), msgspec.json.encode(fields), number)
        except ValueError as exc:
            msg = f"event {number}: {exc}"
            raise ConfigError(msg) from exc

    def _topic(self, kind: str) -> str:
        if isinstance(self._topic_of, Mapping):
            topic = self._topic_of.get(kind, TOPIC_PREFIX + kind)
        else:
            topic = self._topic_of(kind)
        if not _TOPIC.fullmatch(topic):
            msg = (
                f"its type leads to the topic name {topic[:80]!r}, which Kafka does not allow; map the type to a topic"
            )
            raise ValueError(msg)
        return self._topics.setdefault(kind, topic)

    def _on_trouble(self, error: KafkaError) -> None:
        """Keep what the client says about its connections; it repeats itself every few hundred milliseconds."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN:  # follows from what was said before
            return
        if not self._trouble:
            log.warning("Kafka client: %s", error.str())
        self._trouble = error.str()
