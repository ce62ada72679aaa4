"""Readers that look at a store all the while: what anybody outside would see of a promise that is broken."""

import threading
from types import TracebackType
from typing import Self

from redis_server import RedisServer


class Prober:
    """Looks again and again, in a thread of its own, while a block runs.

    Attributes:
        looks: how many were taken.
    """

    pause_s = 0.02

    def __init__(self) -> None:
        self.looks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def look(self) -> None:
        """Look once; called by that thread alone."""
        raise NotImplementedError

    def close(self) -> None:
        """Called after the last look."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self.close()

    def _run(self) -> None:
        while not self._ended.wait(self.pause_s):
            self.look()


class RedisProber(Prober):
    """Reads the users of a Redis, and notes any whose ``(epoch, revision)`` goes back: law 7, in a store not wiped."""

    def __init__(self, redis: RedisServer) -> None:
        super().__init__()
        self.back: list[bytes] = []
        self._redis = redis
        self._last: dict[bytes, bytes] = {}

    def look(self) -> None:
        """See `Prober`."""
        try:
            with self._redis.client() as client:
                keys = client.keys("uemb:*:*:*")
                found = dict(zip(keys, client.mget(keys), strict=True)) if keys else {}
        except Exception:
            return
        self.looks += 1
        for key, entry in found.items():
            if entry is not None:
                if entry[:16] < self._last.get(key, b""):
                    self.back.append(key)
                self._last[key] = entry[:16]
