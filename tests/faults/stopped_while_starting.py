"""A worker that is told to stop while it begins to read the control topics, and goes on once its client has stopped."""

import asyncio
import os
import signal

import aiokafka

from stream.config import load_settings
from stream.logs import setup_logging
from stream.worker.app import EmbeddingApp
from stream.worker.run import main


async def overtaken(consumer: aiokafka.AIOKafkaConsumer, *_: object) -> None:
    """Be answered when everything was stopped."""
    os.kill(os.getpid(), signal.SIGTERM)
    while not consumer._closed:  # noqa: ASYNC110 - nothing else tells
        await asyncio.sleep(0.01)


aiokafka.AIOKafkaConsumer.seek_to_beginning = overtaken
setup_logging("info")
main(EmbeddingApp(load_settings()))
