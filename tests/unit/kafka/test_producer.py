"""Our producer around a client that does not answer: bounded waits, and errors that say what to do."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import InvalidProducerEpoch, InvalidTimestampError, UnknownTopicOrPartitionError

from stream.errors import DeliveryError, Fenced, UembError
from stream.kafka.producer import Producer, acknowledged

RECORD = (b"42", b"state", [])


class Batch:
    def append(self, **_: object) -> object:
        return self

    def record_count(self) -> int:
        return 1


class Client:
    """Queues nothing: it waits for ever, or raises `error`; `topics` are those that it knows."""

    def __init__(self, topics: dict[str, set[int]], error: Exception | None = None) -> None:
        self.client = SimpleNamespace(cluster=SimpleNamespace(partitions_for_topic=topics.get))
        self._error = error

    def create_batch(self) -> Batch:
        return Batch()

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> Any:
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()


def producer(client: Client) -> Producer:
    made = Producer.__new__(Producer)  # its service, and the transport it belongs to, have no part in this
    made.app = SimpleNamespace(settings=SimpleNamespace(delivery_timeout_s=0.02))
    made._owned, made._letters = {3: client}, client
    return made


@pytest.mark.parametrize("send", [Producer.send_records, Producer.send_dead_letters])
async def test_a_topic_that_is_gone_is_not_waited_for_longer_than_a_delivery(send: Any) -> None:
    with pytest.raises(DeliveryError, match=r"changelog: .*no acknowledgement for 0.02 s; .*have this topic"):
        await send(producer(Client({})), "changelog", 3, [RECORD])


async def test_brokers_that_make_no_room_are_not_waited_for_either() -> None:
    with pytest.raises(DeliveryError, match=r"changelog: no acknowledgement for 0.02 s; see whether the brokers"):
        await producer(Client({"changelog": {3}})).send_records("changelog", 3, [RECORD])


@pytest.mark.parametrize(
    ("error", "ours", "said"),
    [
        (InvalidProducerEpoch(), Fenced, "newer owner"),
        (UnknownTopicOrPartitionError(), DeliveryError, "UnknownTopicOrPartitionError"),
    ],
)
async def test_what_the_client_raises_at_once_is_said_in_our_words(
    error: Exception, ours: type[UembError], said: str
) -> None:
    with pytest.raises(ours, match=rf"^changelog: .*{said}"):
        await producer(Client({}, error)).send_records("changelog", 3, [RECORD])


async def test_a_refusal_of_our_clock_names_the_clock_and_the_setting() -> None:
    refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    refused.set_exception(InvalidTimestampError())
    with pytest.raises(DeliveryError, match=r"^output: .*clock.*message\.timestamp\.after\.max\.ms"):
        await acknowledged([refused], 1, "output")


class Starting:
    """A client that the metadata names no broker to, `times` times."""

    times = 0

    def __init__(self, **_: Any) -> None:
        self.stopped = False

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
    made = producer(Client({}))
    made.app.conf, made.app.clients = SimpleNamespace(id="films"), SimpleNamespace(producer=Starting)
    made.app.settings.delivery_timeout_s = patience_s
    if taken:
        assert await made._open_client(3) is made._owned[3]
    else:
        with pytest.raises(DeliveryError, match="list none of them as up"):
            await made._open_client(3)
        assert made._owned[3].stopped
