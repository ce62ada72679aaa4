"""A producer that is neither ours nor librdkafka: sends the JSON lines of its input, each ``[topic, key, value]``."""

import asyncio
import json
import sys

from aiokafka import AIOKafkaProducer


async def send(bootstrap: str) -> None:
    """Send all, and wait until each is acknowledged."""
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all") as producer:
        lines = [json.loads(line) for line in sys.stdin]
        await asyncio.gather(*[await producer.send(topic, value.encode(), key.encode()) for topic, key, value in lines])


asyncio.run(send(sys.argv[1]))
