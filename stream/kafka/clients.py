"""The one way of a worker's own clients to the brokers: what is refused for want of a grant is asked again for a while.

Grants are replaced by deleting and making them. That must stop a running worker no more than brokers that are away do,
wherever a request is on its way: fetching, producing, committing, in the group, in a new owner's empty transaction.
So the requests themselves are patient, below all that the clients make of an answer.

So is a client's first contact, which the library tries once: partitions are taken over at any time, also while a broker
closes connections or starts again.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import aiokafka
from aiokafka.errors import KafkaConnectionError, TopicAuthorizationFailedError

from stream.config import Settings
from stream.errors import ConfigError, DeliveryError, NotAllowed
from stream.kafka.client_internals import (
    connection_of,
    known_partitions,
    metadata_wait,
    read_password,
    set_metadata_wait,
    stop_whatever_fetches,
)
from stream.kafka.connection import aiokafka_config
from stream.kafka.grants import CLUSTER_REFUSED, GROUP_REFUSED, REFUSED, TOPIC_REFUSED, worker

log = logging.getLogger(__name__)

RETRY_S: Final = 0.25
#: A refusal that was not repeated for so long is over.
OVER_S: Final = 5.0

_PRODUCE, _FETCH, _OFFSETS, _METADATA, _COMMIT, _COMMITTED, _LEAVE, _TO_TRANSACTION = 0, 1, 2, 3, 8, 9, 13, 24
#: Where the answer to a request tells of each partition: the attribute, and the code's place in a partition's tuple.
_CODES: Final = {
    _PRODUCE: ("topics", 1),
    _FETCH: ("topics", 1),
    _OFFSETS: ("topics", 1),
    _COMMIT: ("topics", 1),
    _COMMITTED: ("topics", 3),
    _TO_TRANSACTION: ("errors", 1),
}
#: Of a topic, what must be allowed; for all else that is refused, whatever the worker does with the topic.
_OPERATIONS: Final = {_PRODUCE: "Write", _FETCH: "Read", _COMMIT: "Read", _TO_TRANSACTION: "Write"}


class Clients:
    """Makes clients of aiokafka that are patient at first contact, and in their requests once the worker runs.

    Args:
        settings: how to reach the brokers, and how long to wait for a grant.
        on_refusal: called once, from any thread, when a grant is missing for longer; nothing waits any more then.
    """

    def __init__(self, settings: Settings, on_refusal: Callable[[NotAllowed], None]) -> None:
        self._settings = settings
        self._on_refusal = on_refusal
        topics = [grant for grant in worker(settings) if grant.kind == "topic"]
        self._needed = {grant.name: "/".join(grant.operations) for grant in topics}
        self._patience_s = 0.0
        self._ended = False
        self._since: dict[str, tuple[float, float]] = {}  # what is missing: first and last refusal of the present ones
        self._lock = threading.Lock()

    def consumer(self, **config: Any) -> aiokafka.AIOKafkaConsumer:
        """A client that reads."""
        consumer = aiokafka.AIOKafkaConsumer(**{**config, **aiokafka_config(self._settings)})
        self._make_patient(connection_of(consumer))
        stop_whatever_fetches(consumer)
        return consumer

    def producer(self, **config: Any) -> aiokafka.AIOKafkaProducer:
        """A client that writes."""
        producer = aiokafka.AIOKafkaProducer(**{**config, **aiokafka_config(self._settings)})
        self._make_patient(producer.client)
        return producer

    def be_patient(self) -> None:
        """From here on wait for grants; a worker that only starts is better told at once."""
        self._patience_s = self._settings.delivery_timeout_s

    def end(self) -> None:
        """Wait for no grant any more."""
        self._ended = True

    @property
    def refusal(self) -> NotAllowed | None:
        """What is missing now, if anything is."""
        with self._lock:
            self._forget_what_is_over(time.monotonic())
            return NotAllowed(next(iter(self._since))) if self._since else None

    # -- patience -------------------------------------------------------------------------------------------------

    def _bear(self, missing: str) -> bool:
        """Take note of a refusal; return whether to ask again."""
        with self._lock:
            if self._ended:
                return False
            now_s = time.monotonic()
            self._forget_what_is_over(now_s)
            is_first = missing not in self._since
            first_s, _ = self._since.get(missing, (now_s, now_s))
            self._since[missing] = (first_s, now_s)
            self._ended = now_s - first_s >= self._patience_s
        if self._ended:
            self._on_refusal(NotAllowed(missing))
        elif is_first:
            log.warning("not allowed to %s; waiting up to %g s for the grant", missing, self._patience_s)
        return not self._ended

    def _allowed(self, missing: Iterable[str]) -> None:
        with self._lock:
            self._forget_what_is_over(time.monotonic())
            known = [self._since.pop(what, None) for what in missing]
            is_last = any(known) and not self._since
        if is_last and not self._ended:
            log.info("all is allowed again that was not")

    def _forget_what_is_over(self, now_s: float) -> None:
        self._since = {what: at for what, at in self._since.items() if now_s - at[1] < OVER_S}

    def _password(self) -> str | None:
        """The password that there is now; None where its file can't be read, and the one before stays."""
        try:
            return self._settings.secret("sasl_password")
        except ConfigError as exc:
            log.warning("the password for the brokers can't be read again, and the one before stays: %s", exc)
            return None

    def _make_patient(self, client: Any) -> None:
        if self._settings.sasl_password_file is not None:
            read_password(client, self._password)
        send, wait_on_metadata, cluster = client.send, metadata_wait(client), client.cluster
        bootstrap, update = client.bootstrap, cluster.update_metadata

        async def patient_bootstrap() -> None:
            patience_s = self._settings.delivery_timeout_s
            give_up_at, is_first = time.monotonic() + patience_s, True
            while True:
                try:
                    await bootstrap()
                except KafkaConnectionError as exc:
                    if self._ended or time.monotonic() >= give_up_at:
                        msg = (
                            f"no broker answers at {self._settings.bootstrap_servers}; restart the worker when they do"
                        )
                        raise DeliveryError(msg) from exc
                else:
                    return
                if is_first:
                    log.warning("no broker answers a new client; trying for up to %g s", patience_s)
                is_first = False
                await asyncio.sleep(RETRY_S)

        async def patient_send(node_id: Any, request: Any, **options: Any) -> Any:
            borne = set[str]()
            while True:
                response = await send(node_id, request, **options)
                missing = next(self._missing(response), None)
                if missing is None or not self._bear(missing):
                    break
                borne.add(missing)
                await asyncio.sleep(RETRY_S)
            if borne and missing is None:
                self._allowed(borne)
            return response

        async def patient_wait_on_metadata(topic: str) -> Any:
            missing = self._about_topic(topic, _METADATA)
            borne = False
            while True:
                try:
                    partitions = await wait_on_metadata(topic)
                except TopicAuthorizationFailedError:
                    if not self._bear(missing):
                        raise
                    borne = True
                    await asyncio.sleep(RETRY_S)
                else:
                    if borne:
                        self._allowed([missing])
                    return partitions

        def update_but_for_what_is_hidden(metadata: Any) -> None:
            """A topic that we may not see for a moment is as it was: the group would spread its partitions anew."""
            topics = []
            for code, topic, *rest in metadata.topics:
                if code == TOPIC_REFUSED:
                    if known := known_partitions(cluster, topic):
                        rest[-1] = known
                        topics.append((0, topic, *rest))
                        continue
                    self._bear(self._about_topic(topic, _METADATA))
                topics.append((code, topic, *rest))
            metadata.topics = topics
            update(metadata)

        client.bootstrap = patient_bootstrap
        client.send = patient_send
        set_metadata_wait(client, patient_wait_on_metadata)
        cluster.update_metadata = update_but_for_what_is_hidden

    # -- what is missing ------------------------------------------------------------------------------------------

    def _missing(self, response: Any) -> Iterator[str]:
        """What an answer says is not allowed."""
        api = response.API_KEY
        if api in _CODES:
            attribute, at = _CODES[api]
            for topic, partitions in getattr(response, attribute):
                for partition in partitions:
                    if partition[at] in REFUSED:
                        yield self._about(partition[at], topic, api)
        if api != _LEAVE and (code := getattr(response, "error_code", 0)) in REFUSED:
            yield self._about(code, "", api)

    def _about(self, code: int, topic: str, api: int) -> str:
        if code == TOPIC_REFUSED:
            return self._about_topic(topic, api)
        if code == GROUP_REFUSED:
            return f"Read group {self._settings.app_id}"
        if code == CLUSTER_REFUSED:
            return "Write any topic"
        return f"Write transactional id {self._settings.app_id}-*"

    def _about_topic(self, topic: str, api: int) -> str:
        return f"{_OPERATIONS.get(api) or self._needed.get(topic, 'Describe')} topic {topic}"
