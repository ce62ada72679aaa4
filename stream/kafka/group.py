"""The consumer group as the broker shows it: a worker that reads other topics must not join."""

import logging
from typing import Final

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient

from stream.config import Settings
from stream.errors import ConfigError, NotAllowed, OwnershipError
from stream.kafka.brokers import admin_client
from stream.kafka.grants import GROUP_REFUSED

log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 3.0
_OFFSETS_TOPIC: Final = "__consumer_offsets"


def check_group(settings: Settings) -> None:
    """Refuse to join a running group whose workers read other topics; blocking.

    One user's topics and history would go to several owners. A worker that joins in spite of it (two start at the same
    moment, or the broker does not let us look) is found by `Consumer.check_assignment`, which can only stop them all.

    Raises:
        ConfigError: the group's workers read other topics.
        OwnershipError: so do some that may have ended: the group waits for them, as they have names of their own there.
        NotAllowed: this worker may not join the group.
    """
    admin = admin_client(settings)
    try:
        if _is_unused(admin):
            return
        asked = admin.describe_consumer_groups(
            [settings.app_id], include_authorized_operations=True, request_timeout=_TIMEOUT_S
        )
        group = asked[settings.app_id].result()
    except KafkaException as exc:
        if exc.args[0].code() == GROUP_REFUSED:
            raise NotAllowed(settings.app_id, to="Read group") from exc
        if exc.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:  # nobody has ever joined it
            return
        log.info("the group's workers can't be listed (%s): their topics are not compared", exc.args[0].str())
        return
    if group.authorized_operations is not None and AclOperation.READ not in group.authorized_operations:
        raise NotAllowed(settings.app_id, to="Read group")
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


def _is_unused(admin: AdminClient) -> bool:
    """Whether nobody has ever joined any group here: the broker would not answer questions about one."""
    asked = admin.describe_topics(TopicCollection([_OFFSETS_TOPIC]), request_timeout=_TIMEOUT_S)
    try:
        asked[_OFFSETS_TOPIC].result()
    except KafkaException as exc:
        return bool(exc.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART)  # it may be hidden from this client
    return False


def _listed(topics: set[str]) -> str:
    return ", ".join(sorted(topics))
