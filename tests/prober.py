"""A reader that looks at a Redis store all the while: law 7 as anybody outside would see it broken."""

import threading

from redis_server import RedisServer


class Prober:
    """Reads users all the while, and notes any whose ``(epoch, revision)`` goes back in a store that was not wiped."""

    def __init__(self, redis: RedisServer) -> None:
        self._redis = redis
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.back: list[bytes] = []
        self.looks = 0

    def __enter__(self) -> "Prober":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        last: dict[bytes, bytes] = {}
        while not self._ended.wait(0.02):
            try:
                with self._redis.client() as client:
                    keys = client.keys("uemb:*:*:*")
                    found = dict(zip(keys, client.mget(keys), strict=True)) if keys else {}
            except Exception:
                continue
            self.looks += 1
            for key, entry in found.items():
                if entry is not None:
                    if entry[:16] < last.get(key, b""):
                        self.back.append(key)
                    last[key] = entry[:16]
