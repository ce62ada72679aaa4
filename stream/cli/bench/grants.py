"""Whether the brokers allow what a run needs, found out in a second: some of it is used after minutes only."""

from collections.abc import Iterator
from typing import Final

from confluent_kafka import KafkaError, KafkaException, Producer, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient, NewTopic

from stream.config import Settings
from stream.errors import DeliveryError, NotAllowed
from stream.kafka.brokers import admin_client, producer
from stream.kafka.grants import BENCH_PREFIX, REFUSED, Grant, needed, single

#: Of a topic, a group and a transactional id, always the same: what may not be removed stays behind once.
_NAME: Final = f"{BENCH_PREFIX}grants"
_ANSWER_S: Final = 10.0


def check_grants(settings: Settings) -> None:
    """Try, and ask for, each of them; blocking.

    Raises:
        NotAllowed: all that is missing.
        DeliveryError: the brokers don't answer.
    """
    try:
        missing = [str(grant) for grant in _missing(settings)]
    except KafkaException as exc:
        msg = f"the brokers do not answer ({exc.args[0].str()}); see their logs, then try again"
        raise DeliveryError(msg) from exc
    if missing:
        raise NotAllowed(", ".join(missing))


def _missing(settings: Settings) -> Iterator[Grant]:
    admin = admin_client(settings)
    (made,) = admin.create_topics([NewTopic(_NAME, 1)], operation_timeout=_ANSWER_S).values()
    may = {"Create": _code(made.exception()) not in REFUSED, **_operations(admin)}
    for grant in single(needed("bench", settings)):
        (operation,) = grant.operations
        if grant.kind == "topic":
            is_there = may.get(operation, True)
        else:
            is_there = _group(admin) if grant.kind == "group" else _transactional_id(settings)
        if not is_there:
            yield grant
    for future in admin.delete_topics([_NAME], operation_timeout=_ANSWER_S).values():
        future.exception()


def _operations(admin: AdminClient) -> dict[str, bool]:
    """What may be done with the topic; empty where that is not told, as when it could not be made."""
    (asked,) = admin.describe_topics(TopicCollection([_NAME]), include_authorized_operations=True).values()
    error = asked.exception()
    if error is not None or (allowed := asked.result().authorized_operations) is None:
        return {}
    return {operation: AclOperation[operation.upper()] in allowed for operation in ("Delete", "Read", "Write")}


def _group(admin: AdminClient) -> bool:
    (asked,) = admin.describe_consumer_groups([_NAME], request_timeout=_ANSWER_S).values()
    return _code(asked.exception()) not in REFUSED


def _transactional_id(settings: Settings) -> bool:
    writer: Producer = producer(settings, {"transactional.id": _NAME})
    try:
        writer.init_transactions(_ANSWER_S)
    except KafkaException as exc:
        if _code(exc) not in REFUSED:
            raise
        return False
    return True


def _code(error: BaseException | None) -> int:
    return int(error.args[0].code()) if isinstance(error, KafkaException) else KafkaError.NO_ERROR
