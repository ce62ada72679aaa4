"""A producer of whatever records a test wants, well or badly formed, each with its own acknowledgement."""

from typing import Any

from confluent_kafka import Producer


class Sender:
    """Sends anything anywhere, by default to the partition of its key."""

    def __init__(self, bootstrap: str) -> None:
        config = {"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "message.max.bytes": 5_000_000}
        self._producer = Producer(config)

    def __call__(self, topic: str, key: bytes | str | None, value: bytes | None, **more: Any) -> None:
        def delivered(error: object, _: object) -> None:
            assert error is None, error

        self._producer.produce(topic, value, key, on_delivery=delivered, **more)

    def flush(self) -> None:
        assert self._producer.flush(60) == 0
