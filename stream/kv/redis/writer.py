"""The networked store: one Redis or Valkey server for workers on any number of hosts; epochs fence instead of locks.

Beside the keys of users, ``uemb:epoch:{p}`` and ``uemb:watermark:{p}`` it holds ``uemb:meta`` (the shared record as
JSON, its parts written through to ``uemb:app``, ``uemb:current``, ``uemb:fallback:…`` and ``uemb:encoder:…`` for other
clients) and ``uemb:rebuild:{p}`` (there while somebody asks for a rebuild). No key ever expires (law 8).
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from stream.core.records import PREFIX_BYTES
from stream.core.watermark import decode_watermark
from stream.errors import StoreError, StoreLost
from stream.keys import APP_KEY, CURRENT_KEY, META_KEY, epoch_key, rebuild_key, watermark_key
from stream.kv.meta import decode_meta, encode_meta, encode_serving
from stream.kv.protocol import Meta, fenced
from stream.kv.redis.async_client import async_client
from stream.kv.redis.client import REPAIR, check_kind, connection_arguments, translated, warn_of_eviction
from stream.kv.redis.scripts import FENCED, LOST, PUT, REMOVE, REMOVE_IF, REPLACE_META, Script
from stream.kv.urls import RedisAddress

#: Entries that one script call writes. The server does nothing else meanwhile, for about 3 ms; Lua's stack has room for
#: some thousands.
CHUNK: Final = 1000
#: A heartbeat is written every second, by the worker's clock; the server's may differ by some seconds.
OWNED_S: Final = 5.0
EPOCH_BYTES: Final = 8
_META_ATTEMPTS: Final = 1000


@dataclass(slots=True)
class Held:
    """A partition that is open here: what this writer knows to be stored, empty where it has written none."""

    claim: bytes = b""
    watermark: bytes = b""


class RedisKV:
    """A worker's hold on the networked store; see `stream.kv.protocol.KVWriter`.

    Several writers may have one partition open: who claimed it last, with the highest epoch under ``uemb:epoch:{p}``,
    is its owner, and any other is `Fenced` by its next write. A batch is written in chunks of `CHUNK` entries, in its
    order; a chunk is written whole or not at all.

    A call that fails with a retriable `StoreError` may be repeated: what it wrote already is accepted again. The client
    itself tries again once, at once, when a connection turns out to have been dropped.

    Args:
        address: the server.
        timeout_s: longest wait for one answer.

    Raises:
        ConfigError: the CA file of the address is missing.
    """

    def __init__(self, address: RedisAddress, *, timeout_s: float = 5.0) -> None:
        self._address = address
        self._arguments = connection_arguments(address, timeout_s)
        self._open: Any = None
        self._checked = False
        self._partitions: dict[int, Held] = {}

    async def update_meta(self, change: Callable[[Meta], Meta]) -> Meta:
        """Read, change and replace the shared record as one step; an exception of `change` leaves it as it was.

        Its first call also looks at the server: a replica or a cluster is refused, one that may evict keys warned of.

        Raises:
            ConfigError: the server refuses the login, or is part of a cluster.
            StateError: the record is damaged or of an unknown format.
            StoreError: the server can't be reached, or is a replica.
        """
        await self._check_server()
        for _ in range(_META_ATTEMPTS):
            stored = await self._command("GET", META_KEY)
            before = Meta() if stored is None else decode_meta(stored, f"{META_KEY} of {self._address}", REPAIR)
            after = change(before)
            if stored is not None and after == before:
                return after
            if await self._replace_meta(stored or b"", before, after):
                return after
        msg = f"{META_KEY} of {self._address} is changed by others again and again; check what else uses the store"
        raise StoreError(msg)

    async def open_partition(self, partition: int) -> None:
        """Take the partition for writing; harmless when it is open. Nobody is locked out: a claim's epoch fences."""
        self._partitions.setdefault(partition, Held())

    async def close_partition(self, partition: int) -> None:
        """Give the partition up; harmless when it is not open."""
        self._partitions.pop(partition, None)

    async def get(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """Entries as stored, in the order of `keys`."""
        self._held(partition)
        found: list[bytes | None] = []
        for start in range(0, len(keys), CHUNK):
            with translated(self._address):
                found += await self._client.mget(keys[start : start + CHUNK])
        return found

    async def put(self, partition: int, entries: Mapping[bytes, bytes], *, ordered: bool = False) -> int:
        """Write each entry unless a stored one has a greater ``(epoch, revision)``; return how many were refused.

        A batch with the partition's epoch key is its claim. From then on this writer insists on finding that claim, and
        the newest watermark that it wrote, before it writes anything else.

        Raises:
            Fenced: a claim or a stored entry has a higher epoch than the one written; nothing of its chunk was written.
            StateError: a key holds something that is no string; nothing of its chunk was written.
            StoreLost: the store was wiped or set back since the claim; nothing was written.
            StoreError: the server can't be reached or refused; what became of the batch is not known.
            ValueError: an entry is shorter than its prefix; nothing was written.
        """
        held = self._held(partition)
        check_prefixes(entries)
        claim_key = epoch_key(partition).encode()
        items = sorted(entries.items(), key=lambda item: item[0] != claim_key)  # stable: the claim, then the rest
        refused = 0
        for start in range(0, len(items), CHUNK):
            refused += await self._put_chunk(partition, held, dict(items[start : start + CHUNK]))
        return refused

    async def remove(self, partition: int, keys: Sequence[bytes], epoch: int) -> None:
        """Remove keys, but for entries of a higher epoch than `epoch`."""
        self._held(partition)
        for start in range(0, len(keys), CHUNK):
            await self._run(REMOVE, keys[start : start + CHUNK], [epoch.to_bytes(EPOCH_BYTES, "big")])

    async def ask_rebuild(self, partition: int) -> None:
        """Ask the partition's owner, present or next, to write it anew from the histories."""
        await self._command("SET", rebuild_key(partition), uuid.uuid4().bytes)

    async def rebuild_request(self, partition: int) -> bytes | None:
        """Mark of the newest request, None without one."""
        stored: bytes | None = await self._command("GET", rebuild_key(partition))
        return stored

    async def rebuild_done(self, partition: int, request: bytes) -> None:
        """Answer a request; one that came later stays."""
        await self._run(REMOVE_IF, [rebuild_key(partition)], [request])

    async def is_owned(self, partition: int) -> bool:
        """Whether a worker has written the partition's heartbeat in the last 5 s.

        The heartbeat is the worker's clock, "now" the server's; each may be off by up to 4 s. Beyond that, and for the
        first 5 s after a worker has ended, the answer is wrong, which costs its callers time and nothing else.
        """
        (seconds, micros), watermark = await self._time_and_get(watermark_key(partition))
        found = decode_watermark(watermark)
        return found is not None and abs(seconds + micros / 1e6 - found.heartbeat_ms / 1e3) < OWNED_S

    async def move(self, partitions: int) -> int:
        """A user's keys are in the same place whatever the partition."""
        return 0

    async def sweep(self, partitions: int) -> None:
        """There is nothing to take away, then."""

    async def close(self) -> None:
        """Give everything up and disconnect; the next use connects again, if need be in another event loop."""
        self._partitions.clear()
        client, self._open, self._checked = self._open, None, False
        if client is not None:
            with suppress(RedisError, OSError):  # of a connection that is broken nothing is left to close
                await client.aclose()

    @property
    def _client(self) -> Any:  # the library's own types know only the texts that it could decode, not bytes
        if self._open is None:  # its connections belong to the running loop
            self._open = async_client(self._arguments)
        return self._open

    def _held(self, partition: int) -> Held:
        held = self._partitions.get(partition)
        if held is None:
            msg = f"partition {partition} of the store at {self._address} is not open for writing"
            raise StoreError(msg)
        return held

    async def _put_chunk(self, partition: int, held: Held, chunk: Mapping[bytes, bytes]) -> int:
        claim_key, mark_key = epoch_key(partition).encode(), watermark_key(partition).encode()
        claim, watermark = chunk.get(claim_key), chunk.get(mark_key)
        lowest = min(chunk.values())[:EPOCH_BYTES]
        known = [held.claim, held.watermark] if claim is None else [b"", b""]
        answer = await self._run(PUT, [claim_key, mark_key, *chunk], [lowest, *known, *chunk.values()])
        if answer[0] == FENCED:
            raise fenced(partition, answer[1], lowest)
        if answer[0] == LOST:
            msg = (
                f"the store at {self._address} lost what was written to partition {partition} (it was wiped, set back "
                "to an older copy, or failed over)"
            )
            raise StoreLost(msg)
        if claim is not None:
            held.claim, held.watermark = claim[:EPOCH_BYTES], b""
        if watermark is not None:
            held.watermark = max(held.watermark, watermark[:PREFIX_BYTES])
        return int(answer[1])

    async def _run(self, script: Script, keys: Sequence[str | bytes], args: Sequence[bytes | str | int]) -> Any:
        """Run a script by its hash; with its text where the server has forgotten it, which it may do at any time."""
        with translated(self._address):
            try:
                return await self._client.evalsha(script.sha, len(keys), *keys, *args)
            except NoScriptError:
                return await self._client.eval(script.text, len(keys), *keys, *args)
            except ReadOnlyError:
                # The server was made a replica: connect anew, for its name may stand for another one by now.
                await self._client.connection_pool.disconnect(inuse_connections=False)
                raise

    async def _command(self, name: str, key: str, *args: bytes) -> Any:
        """Run a command on one key."""
        with translated(self._address):
            return await self._client.execute_command(name, key, *args)

    async def _time_and_get(self, key: str) -> tuple[tuple[int, int], bytes | None]:
        """The server's clock, in seconds and microseconds, and what it has under a key."""
        with translated(self._address):
            pipeline = self._client.pipeline(transaction=False)
            pipeline.time()
            pipeline.get(key)
            now, stored = await pipeline.execute()
        return now, stored

    async def _replace_meta(self, stored: bytes, before: Meta, after: Meta) -> bool:
        """Put a shared record in the place of the one that was read, unless that is no longer there."""
        shown, gone = shown_keys(after), shown_keys(before)
        keys = [META_KEY, *shown, *(key for key in gone if key not in shown)]
        return bool(await self._run(REPLACE_META, keys, [stored, encode_meta(after), len(shown), *shown.values()]))

    async def _check_server(self) -> None:
        if self._checked:
            return
        with translated(self._address):
            try:
                info = await self._client.info()
            except ResponseError:  # access lists may forbid it
                info = {}
        check_kind(info, self._address)
        warn_of_eviction(info, f"the store at {self._address}")
        self._checked = True


def check_prefixes(entries: Mapping[bytes, bytes]) -> None:
    """Raise ``ValueError`` for a batch with an entry that is shorter than its prefix."""
    if any(len(entry) < PREFIX_BYTES for entry in entries.values()):
        msg = f"a key-value entry needs a prefix of {PREFIX_BYTES} bytes"
        raise ValueError(msg)


def shown_keys(meta: Meta) -> dict[str, str | bytes]:
    """The public keys that the shared record is written through to, with their values."""
    shown: dict[str, str | bytes] = {**meta.fallbacks, **meta.encoders}
    if meta.app is not None:
        shown[APP_KEY] = meta.app
    if meta.current is not None:
        shown[CURRENT_KEY] = encode_serving(meta.current)
    return shown
