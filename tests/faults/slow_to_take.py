"""A worker that holds its first assignment back, before it takes a partition, until a file is there."""

import asyncio
import logging
import sys
import time
from pathlib import Path

from stream.config import load_settings
from stream.logs import setup_logging
from stream.worker.app import EmbeddingApp
from stream.worker.run import main

go = Path(sys.argv[1])
log = logging.getLogger("stream.slow_to_take")


def until_there(file: Path) -> None:
    """Wait for a file."""
    while not file.exists():
        time.sleep(0.02)


class SlowToTake(EmbeddingApp):
    """See the module."""

    is_held = False

    async def _say_on_status_topic(self, key: bytes, value: bytes) -> None:
        if not self.is_held:
            self.is_held = True
            log.info("held back")
            await asyncio.to_thread(until_there, go)
        await super()._say_on_status_topic(key, value)


setup_logging("info")
main(SlowToTake(load_settings()))
