"""A worker's clients at their first contact with the real Kafka, while connections are closed before an answer."""

import asyncio

import pytest
from half_open import HalfOpenProxy
from kafka_broker import KafkaBroker
from kv_entries import eventually

from stream.config import load_settings
from stream.errors import DeliveryError, NotAllowed
from stream.kafka.clients import Clients

pytestmark = pytest.mark.kafka


def clients_at(port: int, patience_s: float) -> Clients:
    def unexpected(missing: NotAllowed) -> None:
        raise AssertionError(missing)

    settings = load_settings(bootstrap_servers=f"127.0.0.1:{port}", delivery_timeout_s=patience_s)
    return Clients(settings, unexpected)


@pytest.mark.parametrize("kind", ["consumer", "producer"])
def test_a_client_outlasts_connections_that_are_closed(kind: str, kafka: KafkaBroker) -> None:
    async def start() -> None:
        with HalfOpenProxy(int(kafka.bootstrap.rpartition(":")[2])) as proxy:
            proxy.hang_up_on = 3
            client = getattr(clients_at(proxy.port, 60), kind)()
            await client.start()
            assert (proxy.hang_up_on, proxy.accepted) == (0, 1)
            await (client.topics() if kind == "consumer" else client.client.force_metadata_update())
            await client.stop()

    asyncio.run(start())


@pytest.mark.parametrize("ended", [False, True])
def test_a_client_gives_up_after_as_long_as_a_delivery_takes_or_when_the_worker_ends(
    ended: bool, kafka: KafkaBroker
) -> None:
    async def start() -> None:
        with HalfOpenProxy(int(kafka.bootstrap.rpartition(":")[2])) as proxy:
            proxy.hang_up_on = 1_000_000
            clients = clients_at(proxy.port, 600 if ended else 1)
            client = clients.consumer()
            starting = asyncio.create_task(client.start())
            if ended:
                await asyncio.to_thread(eventually, lambda: proxy.hang_up_on < 1_000_000)
                clients.end()
            with pytest.raises(DeliveryError, match="no broker answers"):
                await starting
            await client.stop()

    asyncio.run(start())
