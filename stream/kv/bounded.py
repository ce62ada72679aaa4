"""Lookups with a deadline: whatever the store does, the caller has an answer or a reason in time."""

import logging
import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Final, NamedTuple

from stream.errors import StoreError
from stream.keys import partition_of
from stream.kv.base import KVReader

DOWN_S: Final = 1.0  # for so long after a failure lookups are answered at once
_READ_THREADS: Final = 4
_HELD_UP_S: Final = 0.002
_OUTAGE: Final = 5  # timeouts that a read may take before its store counts as down for the whole of `DOWN_S`
_WHOLE_STORE: Final = -1

log = logging.getLogger(__name__)


class Trouble(NamedTuple):
    """Stands for an entry that was not read."""

    reason: str


Lookup = tuple[bytes, bytes]
Found = bytes | Trouble | None

STORE_DOWN: Final = Trouble("store_down")
TIMEOUT: Final = Trouble("timeout")


class _Job:
    __slots__ = ("abandoned", "done", "found", "lookups", "store")

    def __init__(self, store: KVReader, lookups: Sequence[Lookup]) -> None:
        self.store = store
        self.lookups = lookups
        self.found: list[bytes | None] | Trouble = STORE_DOWN
        self.abandoned = False
        self.done = threading.Lock()
        self.done.acquire()


class BoundedLookups:
    """Lookups that wait no longer than agreed; after a failure, a second of none at all.

    What fails counts as down: the partition when it can't be read, the whole store when it is slow (until the read
    comes back after all, if that is soon).
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._down: dict[int, tuple[float, Trouble]] = {}
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = False
        for number in range(_READ_THREADS):
            # Daemons: a read that hangs must not keep the process from ending.
            threading.Thread(target=self._work, name=f"uemb-lookup-{number}", daemon=True).start()

    def find(self, store: KVReader, lookups: Sequence[Lookup], partitions: int) -> list[Found]:
        """What the store has under each of `lookups`, or why that is not known."""
        if not lookups:
            return []
        deadline = time.monotonic() + self._timeout_s
        if not self._down_now():
            found = self._read(store, lookups, deadline)
            if not isinstance(found, Trouble):
                return list(found)
            if found is TIMEOUT:
                return [found] * len(lookups)
            if len(lookups) == 1:
                self._mark(partition_of(lookups[0][0], partitions), found)
        return self._find_by_partition(store, lookups, partitions, deadline)

    def close(self) -> None:
        """Answer nothing more."""
        self._closed = True
        for _ in range(_READ_THREADS):
            self._jobs.put(None)

    def _find_by_partition(
        self, store: KVReader, lookups: Sequence[Lookup], partitions: int, deadline: float
    ) -> list[Found]:
        """One partition that can't be read must not cost the users of the others their vectors."""
        places: dict[int, list[int]] = {}
        for place, (user_id, _) in enumerate(lookups):
            places.setdefault(partition_of(user_id, partitions), []).append(place)
        out: list[Found] = [None] * len(lookups)
        for partition, at in places.items():
            down = self._down_now()
            found: list[bytes | None] | Trouble | None = down.get(_WHOLE_STORE) or down.get(partition)
            if found is None:
                found = self._read(store, [lookups[place] for place in at], deadline)
                if found is STORE_DOWN:
                    self._mark(partition, found)
            for n, place in enumerate(at):
                out[place] = found if isinstance(found, Trouble) else found[n]
        return out

    def _down_now(self) -> dict[int, Trouble]:
        if not self._down:
            return {}
        now = time.monotonic()
        marks = list(self._down.items())
        for key, mark in marks:
            if mark[0] <= now and self._down.get(key) is mark:
                self._down.pop(key, None)
        return {key: trouble for key, (until, trouble) in marks if until > now}

    def _mark(self, key: int, trouble: Trouble) -> None:
        self._down[key] = (time.monotonic() + DOWN_S, trouble)

    def _read(self, store: KVReader, lookups: Sequence[Lookup], deadline: float) -> list[bytes | None] | Trouble:
        if self._closed:
            return STORE_DOWN
        job = _Job(store, lookups)
        self._jobs.put(job)
        if job.done.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return job.found
        # Woken late, this process was held up (other threads had the interpreter), which says nothing about the store.
        if time.monotonic() - deadline > _HELD_UP_S and job.done.acquire(timeout=self._timeout_s):
            return job.found
        self._mark(_WHOLE_STORE, TIMEOUT)
        job.abandoned = True
        if job.done.acquire(blocking=False):  # done before it could see that it was abandoned
            self._down.pop(_WHOLE_STORE, None)
            return job.found
        return TIMEOUT

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            took_s = 0.0
            if not job.abandoned:
                began = time.monotonic()
                try:
                    found = job.store.get(job.lookups)
                    job.found = found if len(found) == len(job.lookups) else STORE_DOWN
                except StoreError:
                    pass  # what a job holds from the start
                except Exception:
                    log.exception("a lookup failed in an unexpected way")
                took_s = time.monotonic() - began
                job.done.release()
            if job.abandoned and took_s < _OUTAGE * self._timeout_s:
                self._down.pop(_WHOLE_STORE, None)  # it came, if late: a busy process or store, not one that is down
