"""The embedded broker: a real socket that speaks Kafka's protocol, inside this process, for demos and tests."""

from types import TracebackType
from typing import Any, Final, Self

from confluent_kafka import KafkaException, Producer

from stream.errors import UembError

_START_TIMEOUT_S: Final = 10.0
_LOG_ERRORS_ONLY: Final = 3  # syslog level; the mock cluster announces itself at "notice"


class DevBroker:
    """librdkafka's mock cluster with one broker on the loopback interface; never for data that matters.

    Its limits:

    - a topic comes into being at its first use, always with 4 partitions;
    - a partition keeps about its last 5 MB and drops older records, so producers pace themselves by consumers' lag;
    - everything is in memory and gone at `close`;
    - it answers no admin requests (create, describe, alter), compacts nothing and asks for no credentials.

    Attributes:
        bootstrap: ``host:port`` for clients.
    """

    def __init__(self) -> None:
        config: dict[str, Any] = {
            "bootstrap.servers": "replaced-by-the-mock-cluster",
            "test.mock.num.brokers": 1,
            "log_level": _LOG_ERRORS_ONLY,
        }
        try:
            # The cluster lives as long as the client that configured it; this client sends nothing itself.
            self._owner: Producer | None = Producer(config)
            broker = next(iter(self._owner.list_topics(timeout=_START_TIMEOUT_S).brokers.values()))
        except KafkaException as exc:
            msg = f"the embedded broker did not start ({exc.args[0].str()})"
            raise UembError(msg) from exc
        self.bootstrap: Final = f"{broker.host}:{broker.port}"

    def close(self) -> None:
        """Stop the broker and drop all it holds; further calls do nothing."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
