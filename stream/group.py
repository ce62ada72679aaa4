"""The consumer group as the broker shows it: a worker that reads other topics must not join."""

import logging
from typing import Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from stream.config import Settings
from stream.errors import OwnershipError

log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 3.0
_OFFSETS_TOPIC: Final = "__consumer_offsets"


def check_group(settings: Settings) -> None:
    """Refuse to join a running group whose workers read other topics; blocking.

    One user's topics and history would go to several owners. A worker that joins in spite of it (two start at the same
    moment, or the broker does not let us look) is found by `Consumer.check_assignment`, which can only stop them all.

    Raises:
        OwnershipError: the group's workers read other topics.
    """
    admin = AdminClient({**settings.librdkafka_client, "log_level": 0})
    try:
        if _OFFSETS_TOPIC not in admin.list_topics(timeout=_TIMEOUT_S).topics:
            return  # nobody has ever joined any group here, and the broker would not answer
        asked = admin.describe_consumer_groups([settings.app_id], request_timeout=_TIMEOUT_S)
        members = asked[settings.app_id].result().members
    except KafkaException as exc:
        if exc.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:  # nobody has ever joined it
            return
        log.info("the group's workers can't be listed (%s): their topics are not compared", exc.args[0].str())
        return
    theirs = {tp.topic for member in members if member.assignment for tp in member.assignment.topic_partitions}
    ours = {*settings.event_topics, settings.deletion_topic}
    theirs.discard(settings.changelog_topic)
    if theirs and theirs != ours:
        msg = (
            f"the workers of group {settings.app_id} read {_listed(theirs)}, this one {_listed(ours)}; all must read "
            "the same: stop all of them and start them with equal UEMB_EVENT_TOPICS and UEMB_DELETION_TOPIC"
        )
        raise OwnershipError(msg)


def _listed(topics: set[str]) -> str:
    return ", ".join(sorted(topics))
