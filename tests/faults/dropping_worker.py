"""A worker that loses batches on their way from the client to the agent, at a given place, a given number of times."""

import logging
import sys
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

from stream.config import load_settings
from stream.logs import setup_logging
from stream.worker.app import EmbeddingApp
from stream.worker.run import main

#: One of so many is lost; the first is not, so that both beginnings and later batches of runs are among the lost.
EVERY = 3


class DroppingApp(EmbeddingApp):
    """The worker, whose consumer loses at `place` what `losses` says."""

    place = sys.argv[1]
    losses: Iterator[bool] = chain((n % EVERY == EVERY - 1 for n in range(EVERY * int(sys.argv[2]))), repeat(False))

    def _new_consumer(self) -> Any:
        consumer = super()._new_consumer()
        callback, wait_next_records = consumer.callback, consumer._wait_next_records

        async def deliver(message: Any) -> None:
            """Lose the delivery, as Faust abandons it, or what waits for the agent, as Faust empties its buffers."""
            lost = self.loses()
            if not (lost and self.place == "delivery"):
                await callback(message)
            if lost and self.place == "buffer":
                self.flow_control.clear()
            if lost and self.place == "fetcher":
                consumer.add_future(self.restart_fetcher())

        async def fetch(timeout: float) -> Any:
            """Lose what the client gave out, as a task that is ended while it waits for it does."""
            fetched, active = await wait_next_records(timeout)
            return ({}, active) if fetched and self.loses() else (fetched, active)

        if self.place == "fetch":
            consumer._wait_next_records = fetch
        else:
            consumer.callback = deliver
        return consumer

    def loses(self) -> bool:
        """Whether this one is lost."""
        lost = next(self.losses)
        if lost:
            logging.getLogger("stream").warning("lost at %s", self.place)
        return lost

    async def restart_fetcher(self) -> None:
        """End the fetcher with whatever it holds, and begin it anew."""
        await self._stop_fetcher()
        await self._fetcher.maybe_start()


setup_logging("info")
main(DroppingApp(load_settings()))
