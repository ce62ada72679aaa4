"""What our parts of Faust (transport, producer, tables) ask of the application that they belong to."""

from collections.abc import Sequence
from typing import Any, Protocol

from stream.config import Settings
from stream.kafka.clients import Clients
from stream.kafka.delivery import DurableMarks


class Host(Protocol):
    """The application, as its consumer, producer and table know it.

    Attributes:
        settings: what it was told from outside.
        clients: makes the clients of its brokers.
        marks: what may be committed.
        conf: Faust's settings.
        assignor: Faust's.
        monitor: Faust's.
        should_stop: whether it is being stopped.
    """

    settings: Settings
    clients: Clients
    marks: DurableMarks
    conf: Any
    assignor: Any
    monitor: Any

    @property
    def should_stop(self) -> bool: ...  # noqa: D102 - see above

    async def crash(self, reason: BaseException) -> None:
        """Stop the worker, for a reason that its last line tells."""
        ...

    async def take_partitions(self, partitions: Sequence[int], standbys: Sequence[int]) -> None:
        """Take what the group assigned; returns when events may flow."""
        ...

    async def drain(self) -> None:
        """Wait until what is under way is durable, within bounds."""
        ...
