"""The oracle: what the input topics add up to, compared with changelog, output topic and store, user by user.

One partition at a time is folded with the pure core into a temporary table. A running system has no snapshot across
its stores; so offsets committed before they are read say which users must be in order already, and the others are
looked at again until they are, or until patience ends.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Final, TypeVar

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, TopicPartition

from stream.cli.verify.fold import PartitionFold
from stream.cli.verify.rules import Rules
from stream.config import Settings
from stream.core.space_engine import Pair
from stream.errors import ConfigError, NotAllowed
from stream.kafka.brokers import admin_client
from stream.kafka.grants import GROUP_REFUSED
from stream.kafka.log_reader import TIMEOUT_S, Span, open_consumer, read, unreadable, whole
from stream.kafka.schema_registry import open_registry
from stream.kafka.topics import topic_partitions
from stream.kv.protocol import KVReader
from stream.kv.rocksdb.scratch import Scratch
from stream.logs import OnProgress
from stream.worker.claims import Claim, check_claim

PATIENCE_S: Final = 10.0
_PAUSE_S: Final = 0.3
_LOOKS: Final = 4  # a store that is read from memory may be some milliseconds behind
_CHUNK: Final = 2_000
_OPEN: Final = b"p"  # users that are not in order, in the temporary table
_T = TypeVar("_T")


@dataclass(frozen=True)
class Difference:
    """What is wrong with a user, or with a rejected record (named by its place)."""

    partition: int
    who: str
    what: str


@dataclass
class Report:
    """What was checked.

    Attributes:
        users: all that are known to any store.
        whole: of these, checked against all of their input.
        partial: checked against their state and what is left of their input.
        busy: had input that was not committed yet, and were not in order.
        differ: are not in order.
        rejected: records that must have a dead letter; `letters_checked` says whether they were looked for.
        letterless: of these, without one.
        other_versions: output records of other versions' keys, which are not looked at.
        differences: the first of all differences.
    """

    users: int = 0
    whole: int = 0
    partial: int = 0
    busy: int = 0
    differ: int = 0
    rejected: int = 0
    letterless: int = 0
    letters_checked: bool = True
    other_versions: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not (self.differ or self.letterless)


class Verifier:
    """Checks partitions one after another.

    Args:
        settings: the worker's own.
        pair: the encoder and the item space whose vectors are looked at.
        store: reads the key-value store, None to leave it out.
        patience_s: how long to look again, for each partition, at users that are not in order.
        keep: how many differences to report in full.

    Raises:
        ConfigError: no broker answers, or a topic is missing.
    """

    def __init__(
        self,
        settings: Settings,
        pair: Pair,
        store: KVReader | None,
        *,
        patience_s: float = PATIENCE_S,
        keep: int = 20,
    ) -> None:
        self._settings = settings
        self._admin = admin_client(settings)
        self._registry = open_registry(settings)
        self._store = store
        self._patience_s = patience_s
        self._keep = keep
        self._pair = pair
        kept_ms = settings.erasure_marker_retention_ms
        self._rules = Rules(
            pair.space,
            pair.encoder,
            json_output=settings.output_format == "json",
            ended_ms=None if kept_ms is None else time.time_ns() // 1_000_000 - kept_ms,
            is_output_id=None if self._registry is None else self._registry.is_output_id,
        )
        self._inputs = (*settings.event_topics, settings.deletion_topic)
        partitions = topic_partitions(settings, to="Read")
        letters = topic_partitions(settings, settings.dlq_topic, to="Read")
        if partitions is None:
            msg = f"there is no topic {settings.event_topics[0]}; set UEMB_EVENT_TOPICS"
            raise ConfigError(msg)
        self.partitions = partitions
        self._letter_partitions = letters or 1
        self.report = Report()

    def run(self, partitions: Sequence[int] = (), on_progress: OnProgress | None = None) -> Report:
        """Check `partitions`, by default all.

        Raises:
            StateError: the changelog was written for other settings.
            RegistryError: the schema registry is away.
            DeliveryError: a topic can't be read to its end.
        """
        chosen = partitions or range(self.partitions)
        consumer = open_consumer(self._settings, "verify")
        try:
            for number, partition in enumerate(chosen):

                def scaled(done: int, total: int | None, number: int = number) -> None:
                    if on_progress is not None and total:
                        on_progress(number * 1000 + 1000 * done // total, len(chosen) * 1000)

                with Scratch() as scratch:
                    self._partition(partition, scratch, consumer, scaled)
        finally:
            consumer.close()
            if self._registry is not None:
                self._registry.close()
        return self.report

    def _partition(self, partition: int, scratch: Scratch, consumer: Consumer, on_progress: OnProgress) -> None:
        fold = PartitionFold(self._settings, self._pair.versions, partition, self.partitions, scratch, self._registry)
        at: dict[tuple[str, int], int] = {}
        deadline = time.monotonic() + self._patience_s
        users: Iterable[bytes] = fold.users()
        whole_input = True
        for look in count(1):
            committed = self._committed(partition)
            spans = self._spans(consumer, partition)
            whole_input &= all(span.start == 0 for span in spans if span.topic in self._settings.event_topics)
            letters = [span for span in spans if span.topic == self._settings.dlq_topic]
            self._fold(fold, consumer, letters, at)  # first: they tell which records were not read at all
            self._fold(fold, consumer, [span for span in spans if span.topic == self._settings.changelog_topic], at)
            if fold.claim is not None:
                claim = Claim.decode(fold.claim)
                check_claim(claim, self._settings, self.partitions)
                whole_input &= claim.since is None  # what is before was read for other users, and theirs elsewhere
                for topic, offset in (claim.since or {}).items():
                    at.setdefault((topic, partition), offset)
            self._fold(fold, consumer, spans, at, on_progress)
            for some in _chunks(users):
                self._check(some, fold, scratch, whole_input=whole_input, first=look == 1)
            # what came while the stores were read, which is what excuses a user
            inputs = [span for span in self._spans(consumer, partition) if span.topic in self._inputs]
            self._fold(fold, consumer, inputs, at)
            busy = [fold.is_busy(user, committed) for user, _ in scratch.under(_OPEN)]
            if not busy or time.monotonic() > deadline or (look >= _LOOKS and not any(busy)):
                break
            time.sleep(_PAUSE_S)
            users = [user for user, _ in scratch.under(_OPEN)]
        for user, text in scratch.under(_OPEN):
            if fold.is_busy(user, committed):
                self.report.busy += 1
            else:
                self.report.differ += 1
                self._note(partition, f"user {user.decode(errors='replace')}", text.decode())
        self.report.other_versions += fold.other_versions
        self._check_letters(partition, fold, committed)

    def _fold(
        self,
        fold: PartitionFold,
        consumer: Consumer,
        spans: Sequence[Span],
        at: dict[tuple[str, int], int],
        on_progress: OnProgress | None = None,
    ) -> None:
        """Add the records of `spans` that were not read yet; `at` says how far each was."""
        rest = [span._replace(start=max(span.start, at.get(span[:2], 0))) for span in spans]
        for messages in _chunks(read(consumer, rest, on_progress, on_unreadable=fold.unreadable)):
            fold.add(messages)
        at.update({span[:2]: max(span.end, at.get(span[:2], 0)) for span in spans})

    def _check(
        self, users: Sequence[bytes], fold: PartitionFold, scratch: Scratch, *, whole_input: bool, first: bool
    ) -> None:
        """Keep the users that are not in order open, each with what is wrong."""
        stored: Sequence[bytes | None] = [None] * len(users)
        if self._store is not None:
            stored = self._store.get([(user, fold.cache_key(user)) for user in users])
        wrong: dict[bytes, bytes] = {}
        for user, found, entry in zip(users, fold.found(users), stored, strict=True):
            whole = whole_input and self._rules.is_whole(found)
            what = self._rules.differences(
                user.decode(), replace(found, stored=entry), whole=whole, with_store=self._store is not None
            )
            if what:
                wrong[_OPEN + user] = "; ".join(what).encode()
            if first:
                self.report.users += 1
                self.report.whole += whole
                self.report.partial += not whole
        scratch.delete([_OPEN + user for user in users])
        scratch.put(wrong)

    def _check_letters(self, partition: int, fold: PartitionFold, committed: Mapping[str, int]) -> None:
        def wrong(topic: str, offset: int, reason: str) -> None:
            self.report.letterless += 1
            self._note(partition, f"record {topic}:{partition}:{offset}", f"{reason}, and no dead letter says so")

        if self.report.letters_checked:
            self.report.rejected += fold.letterless(committed, wrong)

    def _note(self, partition: int, who: str, what: str) -> None:
        if len(self.report.differences) < self._keep:
            self.report.differences.append(Difference(partition, who, what))

    def _committed(self, partition: int) -> dict[str, int]:
        name = self._settings.app_id
        places = [TopicPartition(topic, partition) for topic in self._inputs]
        asked = self._admin.list_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(name, places)], request_timeout=TIMEOUT_S
        )
        try:
            found = asked[name].result().topic_partitions
        except KafkaException as exc:
            if exc.args[0].code() == GROUP_REFUSED:
                raise NotAllowed(name, to="Describe group") from exc
            group = f"group {name}"
            raise unreadable(group, exc.args[0].str()) from exc
        return {place.topic: place.offset for place in found if place.offset >= 0}

    def _spans(self, consumer: Consumer, partition: int) -> list[Span]:
        """All that the partition's topics hold now; the log and the output after the input, dead letters last."""
        settings = self._settings
        spans = []
        for topic in (*self._inputs, settings.changelog_topic, settings.output_topic):
            if (span := whole(consumer, topic, partition)) is None:
                msg = f"there is no topic {topic} with a partition {partition}; has a worker ever run here?"
                raise ConfigError(msg)
            spans.append(span)
        letters = whole(consumer, settings.dlq_topic, partition % self._letter_partitions)
        if letters is not None and letters.start == 0:
            spans.append(letters)
        else:  # retention took some
            self.report.letters_checked = False
        return spans


def _chunks(things: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(things)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
