"""Our producer: partitions are taken before they are written to, and refusals say what to do."""

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from aiokafka.errors import (
    InvalidProducerEpoch,
    InvalidTimestampError,
    MessageSizeTooLargeError,
    UnknownTopicOrPartitionError,
)

from stream.errors import DeliveryError, Fenced, OwnershipError, RecordTooLarge, UembError
from stream.kafka.producer import Producer, acknowledged


def producer() -> Producer:
    made = Producer.__new__(Producer)  # its service, and the transport it belongs to, have no part in this
    made.app = SimpleNamespace(settings=SimpleNamespace(delivery_timeout_s=0.02))
    made._writers, made._sender = {}, None
    return made


@pytest.mark.parametrize(
    ("error", "ours", "said"),
    [
        (InvalidProducerEpoch(), Fenced, "newer owner"),
        (UnknownTopicOrPartitionError(), DeliveryError, "UnknownTopicOrPartitionError"),
        (InvalidTimestampError(), DeliveryError, r"clock.*message\.timestamp\.after\.max\.ms"),
        (MessageSizeTooLargeError(), RecordTooLarge, r"max\.message\.bytes"),
        (DeliveryError("changelog: no acknowledgement"), DeliveryError, "no acknowledgement"),
    ],
)
async def test_a_refusal_is_said_in_our_words(error: Exception, ours: type[UembError], said: str) -> None:
    refused: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    refused.set_exception(error)
    with pytest.raises(ours, match=rf"^changelog: .*{said}"):
        await acknowledged([refused], "changelog")


async def test_nothing_to_wait_for_is_acknowledged() -> None:
    assert await acknowledged([], "changelog") == -1


async def test_a_partition_that_was_not_taken_is_not_written_to() -> None:
    with pytest.raises(OwnershipError, match="partition 3 is not taken"):
        producer().send_records("changelog", 3, [])
    with pytest.raises(OwnershipError, match="not started"):
        producer().send_unfenced("letters", 3, [])


class Starting:
    """A client that the metadata names no broker to, `times` times."""

    times = 0
    made: ClassVar[list["Starting"]] = []

    def __init__(self, **_: Any) -> None:
        self.stopped = False
        Starting.made.append(self)

    async def start(self) -> None:
        if Starting.times:
            Starting.times -= 1
            raise AssertionError("Did we not perform bootstrap?")

    async def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize(("times", "patience_s", "taken"), [(2, 60, True), (2, 0, False)])
async def test_brokers_that_list_none_of_them_are_waited_for(
    times: int, patience_s: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a starved machine do for a moment."""
    monkeypatch.setattr("stream.kafka.producer.NO_BROKER_RETRY_S", 0)
    monkeypatch.setattr(Producer, "_settings_default", lambda _: {})
    Starting.times = times
    Starting.made.clear()
    made = producer()
    made.app.conf, made.app.clients = SimpleNamespace(id="films"), SimpleNamespace(producer=Starting)
    made.app.settings.delivery_timeout_s = patience_s
    if taken:
        assert (await made._open_client(3)) is Starting.made[-1]
        assert not Starting.made[-1].stopped
    else:
        with pytest.raises(DeliveryError, match="list none of them as up"):
            await made._open_client(3)
        assert all(client.stopped for client in Starting.made)
