"""What a key-value store must do: the worker's side, the reader's side, and the application's shared record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stream.errors import Fenced
from stream.keys import RESERVED_WORDS


@dataclass(frozen=True, slots=True)
class Serving:
    """The pair of versions that readers follow, and the control record's offset that set it (-1: ``UEMB_ITEMS``)."""

    user_version: str
    item_version: str
    offset: int


@dataclass(frozen=True)
class Meta:
    """The reserved keys that belong to no partition.

    Attributes:
        app: id of the application that owns the store (``uemb:app``).
        partitions: number of partitions, which `uemb repartition` alone changes.
        current: the serving pair (``uemb:current``).
        fallbacks: fallback records, Avro, by their key (``uemb:fallback:{user_version}:{item_version}``).
        encoders: full hash by key (``uemb:encoder:{user_version}``).
    """

    app: str | None = None
    partitions: int | None = None
    current: Serving | None = None
    fallbacks: Mapping[str, bytes] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)


def user_of(key: bytes) -> bytes | None:
    """The user of a vector's key; None for keys of another kind."""
    parts = key.split(b":", 3)
    if len(parts) < 4 or parts[0] != b"uemb" or parts[1].decode(errors="replace") in RESERVED_WORDS:
        return None
    return parts[3]


def fenced(partition: int, stored: bytes, ours: bytes) -> Fenced:
    """The error of a writer whose epoch (big-endian) is below a stored one."""
    theirs, mine = int.from_bytes(stored, "big"), int.from_bytes(ours, "big")
    return Fenced(
        f"partition {partition} has a newer owner (epoch {theirs}, ours is {mine}); this worker has lost it and stops"
    )


class KVWriter(Protocol):
    """A worker's hold on the store. Entries are ``epoch ‖ revision ‖ body`` and never go backward (law 7)."""

    async def update_meta(self, change: Callable[[Meta], Meta]) -> Meta:
        """Read, change and replace the shared record as one step; an exception of `change` leaves it as it was."""
        ...

    async def open_partition(self, partition: int) -> None:
        """Take the partition for writing. A store without locks lets several have it: the newest claim fences.

        Raises:
            StoreLocked: another process holds it, and went on to do so for the whole patience of the store.
        """
        ...

    async def close_partition(self, partition: int) -> None:
        """Give the partition up; harmless when it is not open."""
        ...

    async def get(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """Entries as stored, in the order of `keys`."""
        ...

    async def put(self, partition: int, entries: Mapping[bytes, bytes], *, ordered: bool = False) -> int:
        """Write each entry unless a stored one has a greater ``(epoch, revision)``; return how many were refused.

        Args:
            partition: its number.
            entries: by key.
            ordered: they are of the caller's own claim, under which it has written each key's entries in the order of
                their revisions; a store that nobody else can write to need not compare them with what it holds.

        Raises:
            Fenced: a claim or a stored entry has a higher epoch than the one written: the partition has a newer owner.
                Nothing of the batch was written; of one that the store takes in several chunks, nothing from that
                chunk on.
            StateError: a key holds what can't be an entry.
            StoreLost: the store no longer holds what this writer wrote; claim the partition again and rebuild it.
            StoreError: the partition is not open, or the store failed; what became of the batch is not known.
            ValueError: an entry is shorter than its prefix; nothing was written.
        """
        ...

    async def remove(self, partition: int, keys: Sequence[bytes], epoch: int) -> None:
        """Remove keys, but for entries of a higher epoch than `epoch`, whose owner has written them since.

        Not for erasures, which leave a prefix behind: for versions that nobody publishes in any more.

        Raises:
            StoreError: as for `put`.
        """
        ...

    async def ask_rebuild(self, partition: int) -> None:
        """Ask the partition's owner, present or next, to write it anew from the histories; for who doesn't own it."""
        ...

    async def rebuild_request(self, partition: int) -> bytes | None:
        """Mark of the newest request that `rebuild_done` has not answered, None without one; cheap."""
        ...

    async def rebuild_done(self, partition: int, request: bytes) -> None:
        """Answer a request; one that came later stays."""
        ...

    async def is_owned(self, partition: int) -> bool:
        """Whether another process has taken the partition."""
        ...

    async def move(self, partitions: int) -> int:
        """Copy each user's entries to its place among `partitions`, which stay where they were; return how many.

        For a store that no worker writes to; repeating it changes nothing.
        """
        ...

    async def sweep(self, partitions: int) -> None:
        """Take entries out of places that are not their users' among `partitions`."""
        ...

    async def close(self) -> None:
        """Give everything up."""
        ...


class KVReader(Protocol):
    """Retrieval's hold on the store; safe to use from several threads."""

    def meta(self) -> Meta:
        """The shared record as last seen; cheap."""
        ...

    def get(self, lookups: Sequence[tuple[bytes, bytes]]) -> list[bytes | None]:
        """Entries for pairs of (canonical user id in UTF-8, key), in their order; may wait for the store.

        Raises:
            StorePartlyDown: some of the entries, or all, can't be read, of whatever partitions, which says nothing of
                further ones; the error has the others.
            StoreError: the store, or the partition of one of the users, can't be read. Who wants the users of the other
                partitions nevertheless asks for them apart.
        """
        ...

    def watermark(self, user_id: bytes) -> bytes | None:
        """Watermark of the partition that owns `user_id`, as last seen, None without one; cheap."""
        ...

    def close(self) -> None:
        """Stop background work and let go of the store."""
        ...
