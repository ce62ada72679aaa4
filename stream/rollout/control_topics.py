"""Following the control and status topics: every worker reads both whole, outside the group, and goes on reading."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiokafka.errors import ConsumerStoppedError, OffsetOutOfRangeError
from aiokafka.structs import TopicPartition

from stream.config import Settings
from stream.errors import DeliveryError, OwnershipError
from stream.kafka.clients import Clients
from stream.kafka.topic_owners import KEY
from stream.rollout.records import NOTHING_SAID, BadRecord, Coverage, Status

log = logging.getLogger(__name__)

STALL_S: Final = 30.0
_POLL_MS: Final = 200


class ControlTopics:
    """What the control and status topics say, kept current.

    Args:
        settings: the topics.
        clients: read them.
        on_change: called after each look that found something new.
        on_error: called with a fault that ends the following.
    """

    def __init__(
        self,
        settings: Settings,
        clients: Clients,
        on_change: Callable[[], None],
        on_error: Callable[[BaseException], Awaitable[None]],
    ) -> None:
        self.catalogue = NOTHING_SAID
        self.coverage = Coverage()
        self._clients = clients
        self._on_change = on_change
        self._on_error = on_error
        self._control = TopicPartition(settings.item_versions_topic, 0)
        self._status = TopicPartition(settings.item_status_topic, 0)
        self._consumer: Any = None
        self._task: asyncio.Task[None] | None = None
        self._moved = asyncio.Condition()
        self._ended = False
        self._stopping = False

    async def start(self) -> None:
        """Read both topics to their present ends, and follow them from there.

        Raises:
            DeliveryError: they can't be read.
        """
        self._consumer = self._clients.consumer(auto_offset_reset="none", fetch_max_wait_ms=_POLL_MS)
        await self._consumer.start()
        tps = [self._control, self._status]
        self._consumer.assign(tps)
        await self._consumer.seek_to_beginning(*tps)
        self._task = asyncio.create_task(self._follow(), name="control-topics")
        await self.catch_up()

    async def stop(self) -> None:
        """Stop following; also while `start` is under way, which then fails."""
        self._stopping = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self._consumer is not None:
            await self._consumer.stop()

    async def catch_up(self) -> None:
        """Wait until all that is on both topics now has been taken in.

        Raises:
            DeliveryError: that did not come to pass.
        """
        ends = await self._consumer.end_offsets([self._control, self._status])

        async def there() -> bool:
            return all([await self._consumer.position(tp) >= end for tp, end in ends.items()])

        try:
            async with asyncio.timeout(STALL_S), self._moved:
                while not await there():
                    if self._ended:
                        msg = f"{self._control.topic} and {self._status.topic} are not followed any more"
                        raise DeliveryError(msg)
                    await self._moved.wait()
        except TimeoutError as exc:
            msg = f"{self._control.topic} and {self._status.topic} can't be read to their ends; see the brokers' logs"
            raise DeliveryError(msg) from exc

    @property
    def topic(self) -> str:
        """Name of the control topic."""
        return str(self._control.topic)

    async def end(self) -> int:
        """Offset of the next record on the control topic."""
        return int((await self._consumer.end_offsets([self._control]))[self._control])

    async def _follow(self) -> None:
        try:
            while True:
                fetched = await self._consumer.getmany(timeout_ms=_POLL_MS)
                for tp, records in fetched.items():
                    for record in records:
                        self._take_in(tp, record)
                async with self._moved:
                    self._moved.notify_all()
                if fetched:
                    self._on_change()
        except OffsetOutOfRangeError as exc:
            topics = " and ".join(sorted(tp.topic for tp in exc.args[0]))
            await self._on_error(OwnershipError(f"{topics}: made anew, or cut, under this worker; start it again"))
        except ConsumerStoppedError as exc:
            if not self._stopping:  # else this was begun by a start that was overtaken
                await self._on_error(exc)
        except Exception as exc:  # noqa: BLE001 - a worker that no longer hears of versions must not go on
            await self._on_error(exc)
        finally:
            async with self._moved:  # whoever waits for what is to come would do so in vain
                self._ended = True
                self._moved.notify_all()

    def _take_in(self, tp: TopicPartition, record: Any) -> None:
        try:
            if tp == self._control:
                self.catalogue = self.catalogue.after(record.offset, record.key, record.value)
            elif record.value is not None and record.key != KEY:
                self.coverage.add(Status.decode(record.value))
        except BadRecord as exc:
            log.warning("%s, offset %s: %s; it is passed over", tp.topic, record.offset, exc)
