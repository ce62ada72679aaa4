"""Lookups with a deadline: whatever the store does, the caller has an answer or a reason in time.

A lookup runs in a thread of ours, for no store can be trusted to keep a deadline itself: a file system hangs, a peer
vanishes without a word, a name server is slow. The caller waits for the thread, blocking or in an event loop.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final, NamedTuple

from stream.errors import StoreError, StorePartlyDown
from stream.keys import partition_of
from stream.kv.outages import Outages
from stream.kv.protocol import KVReader
from stream.logs import OncePerMinute

_READ_THREADS: Final = 4
_MERGED: Final = 64  # lookups of several callers that may become one read
_BACKLOG: Final = 100_000  # lookups that may wait for a thread while all of them hang
_HELD_UP_S: Final = 0.002
_GRACE_S: Final = 0.001
_OUTAGE: Final = 5  # timeouts that a read may take before its store counts as down for the whole second
_WHOLE_STORE: Final = -1

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())


class Trouble(NamedTuple):
    """Stands for an entry that was not read."""

    reason: str


Lookup = tuple[bytes, bytes]
Entry = bytes | Trouble | None
_Read = Sequence[Entry] | Trouble

STORE_DOWN: Final = Trouble("store_down")
TIMEOUT: Final = Trouble("timeout")


class _Job:
    """One read; `finished` is set before `wake` is called, `abandoned` by a caller that waits no longer."""

    __slots__ = ("abandoned", "begun", "finished", "found", "lookups", "store", "wake")

    def __init__(self, store: KVReader, lookups: Sequence[Lookup], wake: Callable[[], object]) -> None:
        self.store = store
        self.lookups = lookups
        self.wake = wake
        self.found: _Read = STORE_DOWN
        self.abandoned = False
        self.begun = False
        self.finished = False


class BoundedLookups:
    """Lookups that wait no longer than agreed; after a failure, a second of none at all.

    What fails counts as down: the partition when it can't be read, the whole store when it is slow (until the read
    comes back after all, if that is soon: then store or process were busy, not down). After the second one caller tries
    again, and the others are answered at once until it knows.

    Args:
        timeout_s: the longest wait of one call.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._outages = Outages()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._reading: set[int] = set()  # numbers of threads that wait for a store
        self._closed = False
        for number in range(_READ_THREADS):
            # Daemons: a read that hangs must not keep the process from ending.
            threading.Thread(target=self._work, args=(number,), name=f"uemb-lookup-{number}", daemon=True).start()

    def find(self, store: KVReader, lookups: Sequence[Lookup], partitions: int) -> list[Entry]:
        """What the store has under each of `lookups`, or why that is not known; blocks until the deadline at most."""
        deadline = time.monotonic() + self._timeout_s
        steps = self._steps(lookups, partitions)
        found: _Read | None = None
        while True:
            try:
                batch = next(steps) if found is None else steps.send(found)
            except StopIteration as end:
                return list(end.value)
            found = self._read(store, batch, deadline)

    async def find_async(self, store: KVReader, lookups: Sequence[Lookup], partitions: int) -> list[Entry]:
        """The same, leaving the event loop to others meanwhile."""
        deadline = time.monotonic() + self._timeout_s
        steps = self._steps(lookups, partitions)
        found: _Read | None = None
        while True:
            try:
                batch = next(steps) if found is None else steps.send(found)
            except StopIteration as end:
                return list(end.value)
            found = await self._read_async(store, batch, deadline)

    def close(self) -> None:
        """Answer nothing more; any number of times."""
        if not self._closed:
            self._closed = True
            for _ in range(_READ_THREADS):
                self._jobs.put(None)

    def after_fork(self) -> None:
        """Answer nothing more in a child process: the threads stayed behind, and so did whoever held a lock."""
        self._closed = True
        self._outages = Outages()

    def _steps(self, lookups: Sequence[Lookup], partitions: int) -> Generator[Sequence[Lookup], _Read, Sequence[Entry]]:
        """Yield what to read, be sent what was found, return the whole; knows nothing of waiting."""
        if not lookups:
            return []
        if not self._outages:
            found = yield lookups
            if not isinstance(found, Trouble):
                return found
            if found is TIMEOUT:
                return [found] * len(lookups)
            if len(lookups) == 1:
                self._outages.failed(partition_of(lookups[0][0], partitions))
                return [found]
        elif not self._outages.admits(_WHOLE_STORE):
            return [STORE_DOWN] * len(lookups)
        return (yield from self._steps_by_partition(lookups, partitions))

    def _steps_by_partition(
        self, lookups: Sequence[Lookup], partitions: int
    ) -> Generator[Sequence[Lookup], _Read, list[Entry]]:
        """One partition that can't be read must not cost the users of the others their vectors."""
        places: dict[int, list[int]] = {}
        for place, (user_id, _) in enumerate(lookups):
            places.setdefault(partition_of(user_id, partitions), []).append(place)
        out: list[Entry] = [TIMEOUT] * len(lookups)
        asked = False
        for partition, at in places.items():
            found: _Read = STORE_DOWN
            if self._outages.admits(partition):
                asked = True
                found = yield [lookups[place] for place in at]
                if found is TIMEOUT:  # the time of the whole call is used up
                    break
                self._outages.answered(_WHOLE_STORE)
                (self._outages.failed if found is STORE_DOWN else self._outages.answered)(partition)
            for n, place in enumerate(at):
                out[place] = found if isinstance(found, Trouble) else found[n]
        if not asked:
            self._outages.untried(_WHOLE_STORE)
        return out

    def _read(self, store: KVReader, lookups: Sequence[Lookup], deadline: float) -> _Read:
        done = threading.Lock()
        done.acquire()
        job = _Job(store, lookups, done.release)
        if not self._submitted(job):
            return STORE_DOWN
        if done.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return job.found
        # Woken late, this process was held up: other threads had the interpreter, perhaps also before the read.
        if time.monotonic() - deadline > _HELD_UP_S and done.acquire(timeout=_GRACE_S):
            return job.found
        return self._overdue(job)

    async def _read_async(self, store: KVReader, lookups: Sequence[Lookup], deadline: float) -> _Read:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        job = _Job(store, lookups, lambda: loop.call_soon_threadsafe(_resolve, waiter))
        if not self._submitted(job):
            return STORE_DOWN
        timer = loop.call_later(max(0.0, deadline - time.monotonic()), _resolve, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            job.abandoned = True  # the caller is gone, which says nothing about the store
            raise
        finally:
            timer.cancel()
        return job.found if job.finished else self._overdue(job)

    def _submitted(self, job: _Job) -> bool:
        if self._closed or self._jobs.qsize() >= _BACKLOG:
            return False
        self._jobs.put(job)
        return True

    def _overdue(self, job: _Job) -> _Read:
        """Give a read up; its store counts as down until it comes back after all."""
        if not job.begun and len(self._reading) < _READ_THREADS:  # the process was held up, the store never asked
            job.abandoned = True
            return TIMEOUT
        self._outages.failed(_WHOLE_STORE)
        job.abandoned = True
        if job.finished:  # before it could see that it was abandoned
            self._outages.answered(_WHOLE_STORE)
            return job.found
        return TIMEOUT

    def _work(self, number: int) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job for job in (job, *self._waiting_beside(job)) if not job.abandoned]
            if not jobs:  # never read, so it says nothing about the store
                continue
            self._reading.add(number)
            for one in jobs:
                one.begun = True
            began = time.monotonic()
            if len(jobs) == 1 or not _read_as_one(jobs):
                for one in jobs:
                    one.found = _found(one.store, one.lookups)
            self._reading.discard(number)
            took_s = time.monotonic() - began
            for one in jobs:
                one.finished = True
                try:
                    one.wake()
                except RuntimeError:
                    log.debug("the event loop was closed while a lookup was under way")
                if one.abandoned and _not_down(one.found, soon=took_s < _OUTAGE * self._timeout_s):
                    self._outages.answered(_WHOLE_STORE)

    def _waiting_beside(self, job: _Job) -> list[_Job]:
        """Take more that wait for the same store: the busier the readers, the fewer round trips for each."""
        beside: list[_Job] = []
        room = _MERGED - len(job.lookups)
        with suppress(Empty):
            while room > 0:
                other = self._jobs.get_nowait()
                if other is None or other.store is not job.store or len(other.lookups) > room:
                    self._jobs.put(other)  # a large one is another thread's: nobody shall wait for it who need not
                    break
                beside.append(other)
                room -= len(other.lookups)
        return beside


def _read_as_one(jobs: Sequence[_Job]) -> bool:
    """Read for several callers at once; one whose partition can't be read must not cost the others theirs."""
    found = _found(jobs[0].store, [lookup for job in jobs for lookup in job.lookups])
    if isinstance(found, Trouble):
        return False
    at = 0
    for job in jobs:
        job.found = found[at : at + len(job.lookups)]
        at += len(job.lookups)
    return True


def _found(store: KVReader, lookups: Sequence[Lookup]) -> _Read:
    try:
        found: Sequence[Entry] = store.get(lookups)
    except StorePartlyDown as exc:
        log.warning("lookups of some users fail: %s", exc)
        return [STORE_DOWN if n in exc.unread else entry for n, entry in enumerate(exc.found)]
    except StoreError as exc:
        log.warning("lookups fail: %s", exc)
        return STORE_DOWN
    except Exception:
        log.exception("a lookup failed in an unexpected way")
        return STORE_DOWN
    return found if len(found) == len(lookups) else STORE_DOWN


def _not_down(found: _Read, *, soon: bool) -> bool:
    """Whether a read that came too late shows that its store is well, but for what it names itself."""
    if isinstance(found, Trouble):
        return False
    return soon or STORE_DOWN in found  # busy; or of several servers one hung, which is left out from now on


def _resolve(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
