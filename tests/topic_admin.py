"""Topics as faults treat them: their settings changed under a worker, removed, made anew."""

import time
from collections.abc import Mapping

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions, NewTopic

_PATIENCE_S = 120


def _client(bootstrap: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})


def set_config(bootstrap: str, topic: str, **settings: object) -> None:
    """Change settings of a topic, with ``_`` for ``.`` in their names."""
    entries = [
        ConfigEntry(name.replace("_", "."), str(value), incremental_operation=AlterConfigOpType.SET)
        for name, value in settings.items()
    ]
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=entries)
    client = _client(bootstrap)  # its answers end with it
    for future in client.incremental_alter_configs([resource]).values():
        future.result()


def create_topic(bootstrap: str, topic: str, partitions: int) -> None:
    """Make a topic."""
    client = _client(bootstrap)
    client.create_topics([NewTopic(topic, partitions, 1)])[topic].result()


def delete_topic(bootstrap: str, topic: str) -> None:
    """Delete a topic, and wait until the broker knows it no more."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        client = _client(bootstrap)  # one that was paused may keep a request, and all behind it, for a minute
        try:
            if topic not in client.list_topics(timeout=10).topics:
                return
            client.delete_topics([topic], operation_timeout=10, request_timeout=10)[topic].result()
        except KafkaException as exc:
            if exc.args[0].code() not in (
                KafkaError.UNKNOWN_TOPIC_OR_PART,
                KafkaError._TIMED_OUT,
                KafkaError._TRANSPORT,
            ):
                raise
        assert time.monotonic() < deadline
        time.sleep(0.1)


def recreate_topic(bootstrap: str, topic: str, partitions: int, cleanup: str = "delete") -> None:
    """Delete a topic and make it anew, empty, as soon as the broker lets us."""
    client = _client(bootstrap)
    client.delete_topics([topic], operation_timeout=60)[topic].result()
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            client.create_topics([NewTopic(topic, partitions, 1, config={"cleanup.policy": cleanup})])[topic].result()
        except KafkaException:  # the deletion takes a moment
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            return


def delete_records(bootstrap: str, topic: str, before: Mapping[int, int]) -> None:
    """Delete all records of some partitions below an offset each, as retention does."""
    client = _client(bootstrap)
    for future in client.delete_records([TopicPartition(topic, p, at) for p, at in before.items()]).values():
        future.result()


def add_partitions(bootstrap: str, topic: str, partitions: int) -> None:
    """Raise a topic's number of partitions."""
    client = _client(bootstrap)
    client.create_partitions([NewPartitions(topic, partitions)])[topic].result()
