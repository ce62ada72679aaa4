"""A store that may be away for a while: what fails is tried again until patience ends, so that nothing is skipped."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

from stream.errors import StoreError, StoreLocked, StoreLost, StoreRefused, UembError
from stream.kv.protocol import KVWriter, Meta

log = logging.getLogger(__name__)

#: Kinds of errors, as they are counted: another process holds the database, it lost what it had, and all others.
LOCKED, LOST, FAILED = KINDS = ("locked", "lost", "failed")
_PAUSES_S: Final = (0.05, 1.0)
_T = TypeVar("_T")


class PatientKV:
    """A `KVWriter` in front of another one. All that it repeats may be repeated: equal entries are accepted (law 7).

    Args:
        store: the store itself.
        patience_s: how long one call may keep failing.

    Attributes:
        errors: answers that were errors, by kind.
    """

    def __init__(self, store: KVWriter, patience_s: float) -> None:
        self._store = store
        self._patience_s = patience_s
        self._away_since: float | None = None
        self._calls: dict[object, float] = {}
        self._awaits_grants = False
        self.errors = dict.fromkeys(KINDS, 0)

    def be_patient(self) -> None:
        """From here on a refusal is waited out, too: access lists are replaced; who only starts is told at once."""
        self._awaits_grants = True

    @property
    def is_away(self) -> bool:
        """Whether its last answer was an error."""
        return self._away_since is not None

    @property
    def waits_since_s(self) -> float | None:
        """Since when a call is without an answer (monotonic s), of all that are; None without one."""
        return min(list(self._calls.values()), default=None)

    async def update_meta(self, change: Callable[[Meta], Meta]) -> Meta:
        """See `KVWriter`."""
        return await self._insist(lambda: self._store.update_meta(change))

    async def open_partition(self, partition: int) -> None:
        """See `KVWriter`."""
        await self._insist(lambda: self._store.open_partition(partition))

    async def close_partition(self, partition: int) -> None:
        """See `KVWriter`."""
        await self._store.close_partition(partition)

    async def get(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `KVWriter`."""
        return await self._insist(lambda: self._store.get(partition, keys))

    async def put(self, partition: int, entries: Mapping[bytes, bytes], *, ordered: bool = False) -> int:
        """See `KVWriter`."""
        return await self._insist(lambda: self._store.put(partition, entries, ordered=ordered))

    async def remove(self, partition: int, keys: Sequence[bytes], epoch: int) -> None:
        """See `KVWriter`."""
        await self._insist(lambda: self._store.remove(partition, keys, epoch))

    async def ask_rebuild(self, partition: int) -> None:
        """See `KVWriter`."""
        await self._insist(lambda: self._store.ask_rebuild(partition))

    async def rebuild_request(self, partition: int) -> bytes | None:
        """See `KVWriter`."""
        return await self._insist(lambda: self._store.rebuild_request(partition))

    async def rebuild_done(self, partition: int, request: bytes) -> None:
        """See `KVWriter`."""
        await self._insist(lambda: self._store.rebuild_done(partition, request))

    async def is_owned(self, partition: int) -> bool:
        """See `KVWriter`."""
        return await self._insist(lambda: self._store.is_owned(partition))

    async def move(self, partitions: int) -> int:
        """See `KVWriter`."""
        return await self._insist(lambda: self._store.move(partitions))

    async def sweep(self, partitions: int) -> None:
        """See `KVWriter`."""
        await self._insist(lambda: self._store.sweep(partitions))

    async def close(self) -> None:
        """See `KVWriter`."""
        await self._store.close()

    async def _insist(self, call: Callable[[], Awaitable[_T]]) -> _T:
        call_id = object()
        self._calls[call_id] = time.monotonic()
        try:
            return await self._insist_on(call)
        finally:
            del self._calls[call_id]

    async def _insist_on(self, call: Callable[[], Awaitable[_T]]) -> _T:
        clock = asyncio.get_running_loop().time
        give_up_at, pause_s = clock() + self._patience_s, _PAUSES_S[0]
        while True:
            try:
                result = await call()
            except (StoreError, StoreRefused) as exc:
                self.errors[_kind(exc)] += 1
                may_pass = self._awaits_grants if isinstance(exc, StoreRefused) else exc.retriable
                if not may_pass or clock() >= give_up_at:
                    raise
                if self._away_since is None:
                    self._away_since = clock()
                    log.warning("%s; trying again for %g s, nothing is committed meanwhile", exc, self._patience_s)
            else:
                if self._away_since is not None:
                    log.info("the key-value store answers again after %.1f s", clock() - self._away_since)
                    self._away_since = None
                return result
            await asyncio.sleep(min(pause_s, max(0.0, give_up_at - clock())))
            pause_s = min(2 * pause_s, _PAUSES_S[1])


def _kind(exc: UembError) -> str:
    return LOCKED if isinstance(exc, StoreLocked) else LOST if isinstance(exc, StoreLost) else FAILED
