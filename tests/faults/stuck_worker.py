"""A worker of which a part never comes to an end, once events flow: the event loop, the agent, or the lane."""

import asyncio
import sys
import threading

from stream.config import load_settings
from stream.logs import setup_logging
from stream.pipeline.lane import Lane, Work
from stream.pipeline.processor import BatchProcessor
from stream.worker.app import EmbeddingApp
from stream.worker.run import main

part = sys.argv[1]


def hold(stage: str, work: Work) -> None:
    """Never return to the event loop."""
    if part == "loop" and stage == "kv" and work.taken:
        threading.Event().wait()


async def for_ever(*_: object) -> None:
    """Wait for nothing."""
    await asyncio.Event().wait()


if part == "agent":
    BatchProcessor.step = for_ever
if part == "lane":
    Lane._make_durable = for_ever
setup_logging("info")
main(EmbeddingApp(load_settings(), on_stage=hold))
