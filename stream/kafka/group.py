"""The consumer group as the broker shows it: a worker that reads other topics must not join."""

import asyncio
import logging
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient

from stream.config import Settings
from stream.errors import ConfigError, NotAllowed, OwnershipError
from stream.kafka.brokers import admin_client
from stream.kafka.connection import aiokafka_config
from stream.kafka.grants import GROUP_REFUSED, TOPIC_REFUSED

log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 3.0
_OFFSETS_TOPIC: Final = "__consumer_offsets"


def check_group(settings: Settings, operation: str = "Read") -> int | None:
    """Refuse to join a running group whose workers read other topics; blocking.

    Returns the number of workers in it, None where that is not told, as before anybody has ever joined a group.

    One user's topics and history would go to several owners. A worker that joins in spite of it (two start at the same
    moment, or the broker does not let us look) is found by `Consumer.check_assignment`, which can only stop them all.

    Args:
        settings: topics and group.
        operation: what must be allowed: a worker's, or that of who only looks (``Describe``).

    Raises:
        ConfigError: the group's workers read other topics.
        OwnershipError: so do some that may have ended: the group waits for them, as they have names of their own there.
        NotAllowed: this worker may not join the group.
    """
    admin = admin_client(settings)
    try:
        if _is_unused(admin):
            return None
        asked = admin.describe_consumer_groups(
            [settings.app_id], include_authorized_operations=True, request_timeout=_TIMEOUT_S
        )
        group = asked[settings.app_id].result()
    except KafkaException as exc:
        if exc.args[0].code() == GROUP_REFUSED:
            raise NotAllowed(settings.app_id, to=f"{operation} group") from exc
        if exc.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:  # nobody has ever joined it
            return 0
        log.info("the group's workers can't be listed (%s): their topics are not compared", exc.args[0].str())
        return None
    allowed = group.authorized_operations
    if allowed is not None and AclOperation[operation.upper()] not in allowed:
        raise NotAllowed(settings.app_id, to=f"{operation} group")
    ours = {*settings.event_topics, settings.deletion_topic}
    is_static = all(member.group_instance_id for member in group.members)
    theirs = {tp.topic for member in group.members if member.assignment for tp in member.assignment.topic_partitions}
    theirs.discard(settings.changelog_topic)
    if theirs and theirs != ours:
        msg = (
            f"the workers of group {settings.app_id} read {_listed(theirs)}, this one {_listed(ours)}; all must read "
            "the same: stop all of them and start them with equal UEMB_EVENT_TOPICS and UEMB_DELETION_TOPIC"
        )
        if is_static:
            msg = f"{msg}, not before the group has given them up, UEMB_SESSION_TIMEOUT_S after their end"
            raise OwnershipError(msg)
        raise ConfigError(msg)
    return len(group.members)


def look_at_group(settings: Settings, operation: str = "Read") -> int | None:
    """As `check_group`, for who is not about to join, and leaves no trace; blocking.

    Who asks for the coordinator of a group first has the brokers make the topic of all groups' offsets.
    Where that topic is hidden from this client, and the group too, some broker is asked that need not be the
    coordinator: it tells no more than whether the client may ask.

    Raises:
        ConfigError: see `check_group`.
        NotAllowed: see `check_group`.
    """
    admin = admin_client(settings)
    if _offsets_topic_error(admin) == TOPIC_REFUSED:
        groups = admin.list_consumer_groups(request_timeout=_TIMEOUT_S).result().valid
        if settings.app_id not in {group.group_id for group in groups}:
            if asyncio.run(_answer_of_some_broker(settings)) == GROUP_REFUSED:
                raise NotAllowed(settings.app_id, to=f"{operation} group")
            return None
    return check_group(settings, operation)


async def _answer_of_some_broker(settings: Settings) -> int:
    """Error code with which a question about the group is answered."""
    client = AIOKafkaAdminClient(**aiokafka_config(settings), request_timeout_ms=int(1000 * _TIMEOUT_S))
    await client.start()
    try:
        broker = (await client.describe_cluster())["brokers"][0]["node_id"]
        (answer,) = await client.describe_consumer_groups([settings.app_id], group_coordinator_id=broker)
        return int(answer.groups[0][0])
    finally:
        await client.close()


def _is_unused(admin: AdminClient) -> bool:
    """Whether nobody has ever joined any group here: the broker would not answer questions about one."""
    return bool(_offsets_topic_error(admin) == KafkaError.UNKNOWN_TOPIC_OR_PART)  # it may be hidden from this client


def _offsets_topic_error(admin: AdminClient) -> int | None:
    """Error code with which a question about the topic of the groups' offsets is answered, None for none."""
    asked = admin.describe_topics(TopicCollection([_OFFSETS_TOPIC]), request_timeout=_TIMEOUT_S)
    try:
        asked[_OFFSETS_TOPIC].result()
    except KafkaException as exc:
        return int(exc.args[0].code())
    return None


def _listed(topics: set[str]) -> str:
    return ", ".join(sorted(topics))
