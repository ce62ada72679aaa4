"""The client of the schema registry where no registry is needed; the others are in `tests/integration`."""

import asyncio

import pytest
from kafka_broker import free_ports

from stream.config import Settings
from stream.errors import RegistryError
from stream.kafka.schema_registry import SchemaRegistry


async def test_who_waits_for_a_registry_while_the_worker_stops_waits_until_cancelled() -> None:
    (port,) = free_ports(1)
    registry = SchemaRegistry(Settings(schema_registry_url=f"http://127.0.0.1:{port}", delivery_timeout_s=60.0))
    with pytest.raises(RegistryError, match="no schema registry answers"):
        registry.load([1])
    waiting = asyncio.create_task(registry.fetch([1]))
    registry.close()
    with pytest.raises(RegistryError, match="isn't asked any more"):
        registry.load([1])
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
