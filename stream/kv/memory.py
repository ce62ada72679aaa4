"""A store in this process's memory: the fake for tests of what reads vectors, and the smallest example of a backend.

`MemoryStore` is the store, and what a test says to it. `MemoryWriter` and `MemoryReader` are the two protocols of
`stream.kv.protocol`; a store may have any number of both, in any threads.
"""

import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final
from weakref import WeakSet, WeakValueDictionary

from numpy.typing import ArrayLike

from stream.core.formulas import unit_vector
from stream.core.records import PREFIX_BYTES, EmbeddingRecord, encode, kv_entry, kv_prefix
from stream.core.watermark import Watermark
from stream.errors import ConfigError, StoreError
from stream.keys import (
    canonical_id,
    check_version_name,
    epoch_key,
    fallback_key,
    partition_of,
    user_cache_key,
    watermark_key,
)
from stream.kv.protocol import Meta, Serving, fenced, user_of
from stream.kv.urls import parse_kv_url

_EPOCH_BYTES: Final = 8
_NEVER_SILENT_MS: Final = 1 << 53  # a heartbeat that no clock overtakes: a slow test must not make vectors stale

_living: "WeakValueDictionary[str, MemoryStore]" = WeakValueDictionary()
_naming = threading.Lock()


class MemoryStore:
    """A store that a test fills by hand. It lives as long as somebody holds it, or a reader or writer of it.

    >>> from stream import EmbeddingReader, MemoryStore
    >>> store = MemoryStore("films_v1", "mix-1", fallback=[0.6, 0.8])
    >>> store.put(42, [3.0, 0.0])
    >>> with EmbeddingReader.open(store.url, timeout_s=5) as reader:  # patient: a busy machine is no slow store
    ...     reader.get(42).status, reader.get(42).vector.tolist(), reader.get(7).reason
    ...     store.erase(42)
    ...     reader.get(42).reason
    ...     store.down = True
    ...     reader.get(42).reason
    ('ok', [1.0, 0.0], 'missing')
    'erased'
    'store_down'

    No other process can read it. The child of a fork has a copy of its own, which hears of nothing that follows.

    Args:
        item_version: the item version that is served.
        user_version: the user-embedding version that is served.
        fallback: vector [d] of users without one; it is scaled to length 1.
        name: what the URL calls it; None makes a name up.
        partitions: how many it has.

    Attributes:
        url: where the readers and writers of this process find it.
        down: while it is True, every call of a reader or writer fails. An `EmbeddingReader` that met a failure asks
            again after a second, as it does with any store.
        lag_s: how far behind the pipeline is, to readers, where no writer has put a watermark; with None it is silent,
            and vectors are ``stale``.

    Raises:
        ConfigError: a version's name, the fallback or the name can't be right, or a living store has the name.
    """

    def __init__(
        self, item_version: str, user_version: str, *, fallback: ArrayLike, name: str | None = None, partitions: int = 1
    ) -> None:
        name = uuid.uuid4().hex if name is None else name
        self.url = f"memory://{name}"
        self.down = False
        self.lag_s: float | None = 0.0
        self._lock = threading.Lock()
        self._places: defaultdict[int, dict[bytes, bytes]] = defaultdict(dict)  # entries by partition
        self._requests: dict[int, bytes] = {}
        self._writers: WeakSet[MemoryWriter] = WeakSet()
        parse_kv_url(self.url)  # refuses what is no name
        try:
            self._nobody = EmbeddingRecord(
                user_id="",
                epoch=0,
                revision=0,
                status="fallback",
                reason="no_known_items",
                history_len=0,
                unknown_items=0,
                as_of=None,
                user_embedding_version=check_version_name(user_version),
                item_embedding_version=check_version_name(item_version),
                vector=unit_vector(fallback),
                norm=1.0,
            )
            if partitions < 1:
                msg = "it needs a partition"
                raise ValueError(msg)
        except (TypeError, ValueError) as exc:
            msg = f"no store can be made of this: {exc}"
            raise ConfigError(msg) from exc
        self._meta = Meta(
            partitions=partitions,
            current=Serving(user_version, item_version, -1),
            fallbacks={fallback_key(item_version, user_version): encode(self._nobody)},
        )
        with _naming:
            if _living.setdefault(name, self) is not self:
                msg = f"there is a store at {self.url} already; choose another name"
                raise ConfigError(msg)

    def put(
        self,
        user_id: int | str,
        vector: ArrayLike,
        *,
        reason: str = "",
        history_len: int = 2,
        as_of: int | None = None,
    ) -> None:
        """Store a user's vector [d], scaled to length 1; each call is a change of the user's state.

        Args:
            user_id: whose vector.
            vector: what has a direction: finite, not zero, of the fallback's dimension.
            reason: why it is a ``fallback``; empty: it is ``ok``.
            history_len: interactions retained.
            as_of: event time of the newest interaction in epoch ms.

        Raises:
            ValueError: the id or the vector is none.
        """
        record = replace(
            self._nobody,
            user_id=canonical_id(user_id),
            vector=unit_vector(vector),
            status="fallback" if reason else "ok",
            reason=reason,
            history_len=history_len,
            as_of=as_of,
        )
        if len(record.vector) != len(self._nobody.vector):
            msg = f"the vector has dimension {len(record.vector)}, the fallback has {len(self._nobody.vector)}"
            raise ValueError(msg)
        self._change(record.user_id, record)

    def erase(self, user_id: int | str) -> None:
        """Leave of a user what an erasure leaves: a deletion. Raises ``ValueError`` for what is no id."""
        self._change(canonical_id(user_id), None)

    def _change(self, user: str, record: EmbeddingRecord | None) -> None:
        """Write a user's next revision, under the newest claim; None is a deletion."""
        versions = self._nobody.item_embedding_version, self._nobody.user_embedding_version
        key = user_cache_key(user, *versions).encode()
        with self._lock:
            partition = self._partition_of(user.encode())
            place = self._places[partition]
            claim = kv_entry(place.get(epoch_key(partition).encode(), kv_prefix(1, 0)))[0]
            epoch, revision, _ = kv_entry(place.get(key, kv_prefix(0, 0)))
            epoch, revision = max(epoch, claim), revision + 1
            body = b"" if record is None else encode(replace(record, epoch=epoch, revision=revision))
            self._write(partition, {key: kv_prefix(epoch, revision) + body})

    def _partition_of(self, user: bytes) -> int:
        return partition_of(user, self._meta.partitions or 1)

    @contextmanager
    def _up(self) -> Iterator[None]:
        """One step of a reader or writer, with nothing in between."""
        with self._lock:
            if self.down:
                msg = f"the store at {self.url} is down, as its `down` says"
                raise StoreError(msg)
            yield

    def _write(self, partition: int, entries: Mapping[bytes, bytes]) -> int:
        """Law 7; the lock is held. All is compared before anything is written."""
        place = self._places[partition]
        claim = place.get(epoch_key(partition).encode(), b"")
        newer = {}
        for key, entry in entries.items():
            # Big-endian, so bytes compare as (epoch, revision).
            old = place.get(key, b"")
            highest = max(claim[:_EPOCH_BYTES], old[:_EPOCH_BYTES])
            if highest > entry[:_EPOCH_BYTES]:
                raise fenced(partition, highest, entry[:_EPOCH_BYTES])
            if old[:PREFIX_BYTES] <= entry[:PREFIX_BYTES]:
                newer[key] = entry
        place.update(newer)
        return len(entries) - len(newer)

    def _misplaced(self, partitions: int) -> list[tuple[int, int, bytes, bytes]]:
        """Place, right place, key and entry of each vector that is not its user's place among `partitions`."""
        return [
            (place, right, key, entry)
            for place, entries in self._places.items()
            for key, entry in entries.items()
            if (user := user_of(key)) is not None and (right := partition_of(user, partitions)) != place
        ]


class MemoryWriter:
    """A worker's hold on a store in memory; see `stream.kv.protocol.KVWriter`.

    Nobody is locked out of a partition: the newest claim fences all others.
    """

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._open: set[int] = set()
        with store._lock:
            store._writers.add(self)

    async def update_meta(self, change: Callable[[Meta], Meta]) -> Meta:
        """Read, change and replace the shared record as one step; an exception of `change` leaves it as it was."""
        with self._store._up():
            self._store._meta = change(self._store._meta)
            return self._store._meta

    async def open_partition(self, partition: int) -> None:
        """Take the partition for writing; harmless when it is open."""
        with self._store._up():
            self._open.add(partition)

    async def close_partition(self, partition: int) -> None:
        """Give the partition up; harmless when it is not open."""
        self._open.discard(partition)

    async def get(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """Entries as stored, in the order of `keys`."""
        with self._place(partition) as place:
            return [place.get(key) for key in keys]

    async def put(self, partition: int, entries: Mapping[bytes, bytes], *, ordered: bool = False) -> int:
        """Write each entry unless a stored one has a greater ``(epoch, revision)``; return how many were refused."""
        if any(len(entry) < PREFIX_BYTES for entry in entries.values()):
            msg = f"a key-value entry needs a prefix of {PREFIX_BYTES} bytes"
            raise ValueError(msg)
        with self._place(partition):
            return self._store._write(partition, entries)

    async def remove(self, partition: int, keys: Sequence[bytes], epoch: int) -> None:
        """Remove keys, but for entries of a higher epoch than `epoch`."""
        with self._place(partition) as place:
            for key in keys:
                if kv_entry(place.get(key, kv_prefix(0, 0)))[0] <= epoch:
                    place.pop(key, None)

    async def ask_rebuild(self, partition: int) -> None:
        """Ask the partition's owner, present or next, to write it anew from the histories."""
        with self._store._up():
            self._store._requests[partition] = uuid.uuid4().bytes

    async def rebuild_request(self, partition: int) -> bytes | None:
        """Mark of the newest request, None without one."""
        with self._store._up():
            return self._store._requests.get(partition)

    async def rebuild_done(self, partition: int, request: bytes) -> None:
        """Answer a request; one that came later stays."""
        with self._store._up():
            if self._store._requests.get(partition) == request:
                del self._store._requests[partition]

    async def is_owned(self, partition: int) -> bool:
        """Whether another writer has the partition open; in memory there is no other process."""
        with self._store._up():
            return any(partition in writer._open for writer in self._store._writers if writer is not self)

    async def move(self, partitions: int) -> int:
        """Copy each user's entries to its place among `partitions`, which stay where they were; return how many."""
        with self._store._up():
            misplaced = self._store._misplaced(partitions)
            for _, right, key, entry in misplaced:
                place = self._store._places[right]
                place[key] = max(place.get(key, b""), entry, key=lambda either: either[:PREFIX_BYTES])
            return len(misplaced)

    async def sweep(self, partitions: int) -> None:
        """Take entries out of places that are not their users' among `partitions`."""
        with self._store._up():
            for place, _, key, _ in self._store._misplaced(partitions):
                del self._store._places[place][key]

    async def close(self) -> None:
        """Give everything up."""
        self._open.clear()

    @contextmanager
    def _place(self, partition: int) -> Iterator[dict[bytes, bytes]]:
        with self._store._up():
            if partition not in self._open:
                msg = f"partition {partition} of the store at {self._store.url} is not open for writing"
                raise StoreError(msg)
            yield self._store._places[partition]


class MemoryReader:
    """Retrieval's hold on a store in memory; see `stream.kv.protocol.KVReader`. What is written is seen at once."""

    def __init__(self, store: MemoryStore) -> None:
        with store._up():
            self._store = store
        self._closed = False

    def meta(self) -> Meta:
        """The shared record; cheap."""
        return self._store._meta

    def get(self, lookups: Sequence[tuple[bytes, bytes]]) -> list[bytes | None]:
        """Entries for pairs of (canonical user id in UTF-8, key), in their order."""
        if self._closed:
            msg = f"this reader of the store at {self._store.url} is closed"
            raise StoreError(msg)
        store = self._store
        with store._up():
            return [store._places.get(store._partition_of(user), {}).get(key) for user, key in lookups]

    def watermark(self, user_id: bytes) -> bytes | None:
        """Progress record of the partition that owns `user_id`; without one, what the store's `lag_s` says."""
        partition, lag_s = self._store._partition_of(user_id), self._store.lag_s
        stored = self._store._places.get(partition, {}).get(watermark_key(partition).encode())
        if stored is not None or lag_s is None:
            return stored
        return Watermark(lag_ms=round(lag_s * 1000), heartbeat_ms=_NEVER_SILENT_MS).entry(0, 0)

    def close(self) -> None:
        """Let go of the store."""
        self._closed = True


def living_store(name: str) -> MemoryStore:
    """The store of this name in this process; raises `StoreError` where none lives."""
    store = _living.get(name)
    if store is None:
        msg = f"no store at memory://{name}: make a MemoryStore of this name first, in this process"
        raise StoreError(msg)
    return store
