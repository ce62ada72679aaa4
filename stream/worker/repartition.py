"""More partitions for an application whose workers are stopped: all that lies in one moves to where it belongs then.

Kafka adds partitions and takes none back, and a user's key belongs to another one afterwards. So the states of the
changelog, the records of the output and the entries of the store move; of the input, what was processed stays where it
is, and what was not is turned away by the workers that come (``wrong_partition``) and can be replayed. Erasures alone
are sent to their new place here: they must not wait for somebody.

Every step looks at what is there, not at what an earlier run did: a run that was cut short is simply made again.
Nothing is taken away from its old place before it is acknowledged in its new one. The store's count comes late, for
readers go by it; the claims come last, and let workers start again. No earlier owner can write any more by then, for
the transactional ids of all partitions were taken over first.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final
from uuid import uuid4

import aiokafka
import msgspec
from aiokafka.errors import KafkaError as ClientError
from aiokafka.errors import TopicAuthorizationFailedError, TransactionalIdAuthorizationFailed
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import NewPartitions

from stream.config import Settings
from stream.core.history import joined
from stream.core.history_codec import HistoryCodec, stored_order
from stream.errors import ConfigError, DeliveryError, NotAllowed
from stream.kafka.brokers import admin_client, list_topics, producer, write_all
from stream.kafka.connection import aiokafka_config
from stream.kafka.grants import REFUSED
from stream.kafka.log_reader import TIMEOUT_S, open_consumer, read, whole
from stream.kafka.producer import fence
from stream.kafka.topics import topic_partitions
from stream.keys import CLAIM_KEY, epoch_key, partition_of
from stream.kv.protocol import KVWriter, user_of
from stream.kv.rocksdb.scratch import Scratch
from stream.kv.stores import open_writer
from stream.worker.claims import Claim, check_claim, claimed_in_store, next_epoch

Note = Callable[[str], None]
_CHUNK: Final = 1_000
_FLUSH_S: Final = 60.0
_AGAIN: Final = "see the brokers, then run this again"
_SETTLE_S: Final = 0.1


@dataclass
class Moved:
    """What was out of place."""

    states: int = 0
    records: int = 0
    erasures: int = 0
    entries: int = 0


@dataclass
class _Seen:
    """What the changelog says of its partitions' owners."""

    claims: dict[int, Claim] = field(default_factory=dict)
    epoch: int = 0

    def add(self, partition: int, key: bytes, value: bytes | None) -> None:
        if value is None:
            return
        if key != CLAIM_KEY:
            self.epoch = max(self.epoch, stored_order(value)[0])
            return
        claim = Claim.decode(value)
        self.epoch = max(self.epoch, claim.epoch)
        if partition not in self.claims or claim.epoch >= self.claims[partition].epoch:
            self.claims[partition] = claim


class Repartition:
    """One run of it.

    Args:
        settings: the workers' own.
        partitions: how many there shall be.
        note: told of each step.

    Raises:
        ConfigError: that can't be, or a worker runs.
    """

    def __init__(self, settings: Settings, partitions: int, note: Note = lambda _: None) -> None:
        self._settings = settings
        self._partitions = partitions
        self._note = note
        self._admin = admin_client(settings)
        self._inputs = (*settings.event_topics, settings.deletion_topic)
        self._topics = (*self._inputs, settings.changelog_topic, settings.output_topic)
        self.counts = self._check()
        asyncio.run(self._check_store())
        self.moved = Moved()

    @property
    def grown(self) -> dict[str, int]:
        """Topics that have fewer partitions than they shall have, and how many."""
        return {topic: count for topic, count in self.counts.items() if count < self._partitions}

    def run(self) -> Moved:
        """Do it; after an interruption, run another.

        Raises:
            DeliveryError: the brokers don't answer, or refuse.
            StateError: the changelog is another application's, of other settings, or of another release.
        """
        self._note("shutting out earlier owners")
        asyncio.run(self._fence())
        for topic in self.grown:
            self._note(f"{topic}: {self.counts[topic]} → {self._partitions} partitions")
        self._grow()
        committed = self._committed()
        consumer = open_consumer(self._settings, "repartition")
        writer = producer(
            self._settings, {"acks": "all", "enable.idempotence": True, "linger.ms": 20, "compression.type": "lz4"}
        )
        try:
            seen = self._move_states(consumer, writer)
            self._move_output(consumer, writer)
            self._send_erasures(consumer, writer, committed)
            asyncio.run(self._finish(writer, seen, committed))
        finally:
            consumer.close()
        return self.moved

    # -- before anything is touched -------------------------------------------------------------------------------

    def _check(self) -> dict[str, int]:
        metadata = list_topics(self._admin, self._settings)
        if metadata.controller_id not in metadata.brokers:
            msg = "the embedded broker keeps nothing: start it anew with another UEMB_PARTITIONS"
            raise ConfigError(msg)
        known = {name: len(topic.partitions) for name, topic in metadata.topics.items() if topic.error is None}
        for topic in self._topics:
            if topic not in known and topic_partitions(self._settings, topic, to="Alter") is None:
                msg = f"there is no topic {topic}; an application that has none yet starts with UEMB_PARTITIONS"
                raise ConfigError(msg)
            if known[topic] > self._partitions:
                msg = f"{topic} has {known[topic]} partitions, and Kafka takes none back; choose at least as many"
                raise ConfigError(msg)
        if members := self._members():
            msg = f"{members} workers of group {self._settings.app_id} run; stop all of them first"
            raise ConfigError(msg)
        return {topic: known[topic] for topic in self._topics}

    async def _check_store(self) -> None:
        store = open_writer(self._settings.kv_url, lock_patience_s=self._settings.kv_lock_patience_s)
        try:
            meta = await store.update_meta(lambda meta: meta)
        finally:
            await store.close()
        if meta.app not in (None, self._settings.app_id):
            msg = f"the key-value store belongs to application {meta.app!r}; set UEMB_KV_URL as the workers have it"
            raise ConfigError(msg)

    def _members(self) -> int:
        name = self._settings.app_id
        try:
            asked = self._admin.describe_consumer_groups([name], request_timeout=TIMEOUT_S)
            return len(asked[name].result().members)
        except KafkaException as exc:
            if exc.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return 0
            raise _refused(name, exc, "Describe group") from exc

    # -- steps ----------------------------------------------------------------------------------------------------

    async def _fence(self) -> None:
        """Take over the transactional id of every partition: what an earlier owner still sends is refused."""
        for partition in range(max(self.counts.values())):
            name = f"{self._settings.app_id}-{partition}"
            client = aiokafka.AIOKafkaProducer(**aiokafka_config(self._settings), transactional_id=name)
            topics = (self._settings.changelog_topic, self._settings.output_topic)
            try:
                await client.start()
                await fence(client, partition, [topic for topic in topics if partition < self.counts[topic]])
            except TransactionalIdAuthorizationFailed as exc:
                every = f"{self._settings.app_id}-*"
                raise NotAllowed(every, to="Write transactional id") from exc
            except TopicAuthorizationFailedError as exc:
                refused = sorted(exc.args[0]) if exc.args else topics
                raise NotAllowed(" and ".join(refused), to="Write topic") from exc
            except ClientError as exc:
                msg = f"transactional id {name}: {type(exc).__name__}; see the brokers, then run this again"
                raise DeliveryError(msg) from exc
            finally:
                await client.stop()

    def _grow(self) -> None:
        if not self.grown:
            return
        more = [NewPartitions(topic, self._partitions) for topic in self.grown]
        for topic, future in self._admin.create_partitions(more, request_timeout=TIMEOUT_S).items():
            try:
                future.result()
            except KafkaException as exc:
                raise _refused(topic, exc, "Alter topic") from exc
        deadline = time.monotonic() + _FLUSH_S
        while any(self._count(topic) < self._partitions for topic in self._topics):
            if time.monotonic() > deadline:
                msg = "the brokers don't show the new partitions; see their logs, then run this again"
                raise DeliveryError(msg)
            time.sleep(_SETTLE_S)
        self.counts = dict.fromkeys(self._topics, self._partitions)

    def _count(self, topic: str) -> int:
        return len(list_topics(self._admin, self._settings, topic).topics[topic].partitions)

    def _committed(self) -> dict[tuple[str, int], int]:
        """Up to where each input partition was processed."""
        name = self._settings.app_id
        places = [TopicPartition(topic, p) for topic in self._inputs for p in range(self._partitions)]
        asked = self._admin.list_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(name, places)], request_timeout=TIMEOUT_S
        )
        try:
            found = asked[name].result().topic_partitions
        except KafkaException as exc:
            raise _refused(name, exc, "Describe group") from exc
        return {(place.topic, place.partition): max(0, place.offset) for place in found}

    def _move_states(self, consumer: Consumer, writer: Producer) -> _Seen:
        topic, seen = self._settings.changelog_topic, _Seen()
        codec, limit = HistoryCodec(self._settings.event_types), self._settings.history_limit
        for partition in range(self._partitions):
            self._note(f"{topic}-{partition}")
            with Scratch() as scratch:
                for messages in self._messages(consumer, topic, partition):
                    keys = list({key for message in messages if (key := message.key()) is not None})
                    state = dict(zip(keys, scratch.get(keys), strict=True))
                    for message in messages:
                        key, value = message.key(), message.value()
                        if key is None:
                            continue
                        seen.add(partition, key, value)
                        if key != CLAIM_KEY:
                            state[key] = None if value is None else joined(state[key], value, codec, limit)
                    state.pop(CLAIM_KEY, None)
                    _keep(scratch, state)
                if (claim := seen.claims.get(partition)) is not None:  # before anything of it is moved
                    check_claim(claim, self._settings, claim.partitions)
                elsewhere = ((user, partition_of(user, self._partitions), v) for user, v in scratch.under(b""))
                self.moved.states += self._move(writer, topic, partition, elsewhere)
        return seen

    def _move_output(self, consumer: Consumer, writer: Producer) -> None:
        topic = self._settings.output_topic
        for partition in range(self._partitions):
            self._note(f"{topic}-{partition}")
            with Scratch() as scratch:
                for messages in self._messages(consumer, topic, partition):
                    _keep(scratch, {key: message.value() for message in messages if (key := message.key())})
                elsewhere = (
                    (key, partition_of(user, self._partitions), value)
                    for key, value in scratch.under(b"")
                    if (user := user_of(key)) is not None
                )
                self.moved.records += self._move(writer, topic, partition, elsewhere)

    def _messages(self, consumer: Consumer, topic: str, partition: int) -> Iterator[list[Message]]:
        span = whole(consumer, topic, partition)
        messages = iter(read(consumer, [span] if span else []))
        while some := list(islice(messages, _CHUNK)):
            yield some

    def _move(self, writer: Producer, topic: str, partition: int, records: Iterable[tuple[bytes, int, bytes]]) -> int:
        """Write (key, partition, value) where they belong, and then take them out of `partition`."""
        moved = 0
        wrong = ((key, to, value) for key, to, value in records if to != partition)
        while some := list(islice(wrong, _CHUNK)):
            write_all(writer, topic, some, _FLUSH_S, _AGAIN)
            write_all(writer, topic, [(key, partition, None) for key, _, _ in some], _FLUSH_S, _AGAIN)
            moved += len(some)
        return moved

    def _send_erasures(self, consumer: Consumer, writer: Producer, committed: Mapping[tuple[str, int], int]) -> None:
        """Send erasures that no worker has seen to where the user's partition is now; a second copy changes nothing."""
        topic = self._settings.deletion_topic
        for partition in range(self._partitions):
            if (span := whole(consumer, topic, partition)) is None:
                continue
            unread = span._replace(start=max(span.start, committed[topic, partition]))
            some = [
                (key, to, message.value())
                for message in read(consumer, [unread])
                if (key := message.key()) is not None and (to := partition_of(key, self._partitions)) != partition
            ]
            write_all(writer, topic, some, _FLUSH_S, _AGAIN)
            self.moved.erasures += len(some)

    async def _finish(self, writer: Producer, seen: _Seen, committed: Mapping[tuple[str, int], int]) -> None:
        """Move the store's entries, claim all partitions, and let workers start."""
        settings = self._settings
        store = open_writer(settings.kv_url, lock_patience_s=settings.kv_lock_patience_s)
        try:
            self._note("the store")
            self.moved.entries = await store.move(self._partitions)
            await store.update_meta(lambda meta: replace(meta, partitions=self._partitions))
            await store.sweep(self._partitions)
            highest = max(seen.epoch, await self._highest_in(store))
            epoch = next_epoch(highest, f"{self._settings.changelog_topic} or the store")
            self._claim(writer, seen.claims, epoch, committed)
        finally:
            await store.close()

    def _claim(
        self, writer: Producer, claims: Mapping[int, Claim], epoch: int, committed: Mapping[tuple[str, int], int]
    ) -> None:
        """Claim all partitions for this count, above all that is there, unless they are; what was processed counts."""
        wanted = range(self._partitions)
        known = next(iter(claims.values()), None)
        if known is None or all(p in claims and claims[p].partitions == self._partitions for p in wanted):
            return
        made = []
        for partition in wanted:
            since = {topic: committed[topic, partition] for topic in self._inputs}
            claim = msgspec.structs.replace(
                claims.get(partition, known),
                epoch=epoch,
                partitions=self._partitions,
                nonce=uuid4().hex,
                since=since,
            )
            made.append((CLAIM_KEY, partition, claim.encode()))
        write_all(writer, self._settings.changelog_topic, made, _FLUSH_S, _AGAIN)

    async def _highest_in(self, store: KVWriter) -> int:
        """The greatest claim that the store knows, 0 without one."""
        highest = 0
        for partition in range(self._partitions):
            await store.open_partition(partition)
            (entry,) = await store.get(partition, [epoch_key(partition).encode()])
            highest = max(highest, claimed_in_store(entry, partition))
        return highest


def _keep(scratch: Scratch, found: Mapping[bytes, bytes | None]) -> None:
    """Keep the last value of each key."""
    scratch.put({key: value for key, value in found.items() if value is not None})
    scratch.delete([key for key, value in found.items() if value is None])


def _refused(what: str, exc: KafkaException, to: str) -> DeliveryError | NotAllowed:
    if exc.args[0].code() in REFUSED:
        return NotAllowed(what, to=to)
    return DeliveryError(f"{what}: {exc.args[0].str()}; {_AGAIN}")
