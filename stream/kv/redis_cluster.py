"""The networked store spread over a Redis or Valkey cluster; keys and bytes are those of a single server.

The names of keys are fixed and have no hash tag, so a partition's lie in all slots, and no script can see two of them.
Each entry is compared and set by itself; claim and watermark are looked at before. Between that look and the writes
another worker may claim the partition. What is written then harms nobody: a writer's states are in the changelog before
they come here, where the broker takes none from an owner of before, so the new owner has read them, and its own entries
have a higher epoch, which none of a lower one replaces (law 7).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stream.errors import StoreLost
from stream.keys import META_KEY, epoch_key, sentinel_key, watermark_key
from stream.kv.base import Meta, fenced
from stream.kv.meta import decode_meta, encode_meta
from stream.kv.redis import CHUNK, EPOCH_BYTES, Held, RedisKV, check_prefixes, shown_keys
from stream.kv.redis_client import REPAIR, translated, warn_of_eviction
from stream.kv.redis_router import Call, Router, checked
from stream.kv.redis_scripts import PUT_ONE, REMOVE, REPLACE_META, Script
from stream.kv.redis_shards import Known, Server
from stream.kv.redis_slots import SlotMap, sentinel_tags
from stream.kv.urls import RedisAddress
from stream.records import PREFIX_BYTES, kv_prefix

#: Between two looks at who has slots: as often as a heartbeat.
_LOOK_S: Final = 1.0


@dataclass(slots=True)
class HeldInCluster(Held):
    """A partition that is open here.

    Attributes:
        judged: the claim under which this writer looked for losses from before it.
        whole: whether the store holds all of the partition, as its sentinels then say (revision 1). While it may not,
            they say that too (revision 0), until the next watermark: it tells that the partition was rebuilt.
        lost: whether the next write is refused with `StoreLost`.
        known: who held the partition's keys when all of them were there.
    """

    judged: bytes = b""
    whole: bool = False
    lost: bool = False
    known: Known = field(default_factory=Known)


class ClusterKV(RedisKV):
    """A worker's hold on a cluster; see `RedisKV` for what is the same.

    A batch is written in this order: its claim, entries, its watermark. Of one that is `Fenced` by the partition's
    claim, or `StoreLost`, nothing was written; of one that an entry of a higher epoch stands against, all but that one
    in its chunk may have been.

    Args:
        address: the cluster.
        timeout_s: longest wait for one answer.

    Raises:
        ConfigError: the CA file of the address is missing.
    """

    def __init__(self, address: RedisAddress, *, timeout_s: float = 5.0) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._router = Router(address, timeout_s)
        self._servers: dict[str, Server] = {}
        self._looked_at = float("-inf")
        self._shown_meta: bytes | None = None
        self._gone: set[str] = set()

    async def update_meta(self, change: Callable[[Meta], Meta]) -> Meta:
        """See `RedisKV`; the public keys follow one by one; a first call, and one after a loss, writes all of them."""
        after = await super().update_meta(change)
        # Of writers that race, each writes what the record says after its own writes, so the last one is right.
        while (stored := await self._command("GET", META_KEY)) is not None and stored != self._shown_meta:
            shown = shown_keys(decode_meta(stored, f"{META_KEY} of {self._address}", REPAIR))
            calls = [Call("SET", key, (value,)) for key, value in shown.items()]
            await self._all([*calls, *(Call("DEL", key) for key in self._gone - set(shown))])
            self._shown_meta, self._gone = stored, set()
        return after

    async def open_partition(self, partition: int) -> None:
        """See `RedisKV`."""
        self._partitions.setdefault(partition, HeldInCluster())

    async def get(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `RedisKV`."""
        self._held(partition)
        found: list[bytes | None] = []
        for start in range(0, len(keys), CHUNK):
            found += await self._all([Call("GET", key) for key in keys[start : start + CHUNK]])
        return found

    async def put(self, partition: int, entries: Mapping[bytes, bytes]) -> int:
        """See `RedisKV`, and this class for what was written when it raises."""
        held = self._held_in_cluster(partition)
        check_prefixes(entries)
        if not entries:
            return 0
        claim_key, mark_key = epoch_key(partition).encode(), watermark_key(partition).encode()
        claim, watermark = entries.get(claim_key), entries.get(mark_key)
        refused = 0
        if claim is not None:
            refused += await self._claim(partition, held, claim)
        else:
            await self._check(partition, held, min(entries.values())[:EPOCH_BYTES])
        rest = [(key, entry) for key, entry in entries.items() if key not in (claim_key, mark_key)]
        for start in range(0, len(rest), CHUNK):
            refused += await self._write(partition, rest[start : start + CHUNK])
        if watermark is not None:  # after the vectors that it tells of (law 10)
            if held.claim and not held.whole:
                await self._write_sentinels(partition, held, whole=True)
            refused += await self._write(partition, [(mark_key, watermark)])
            held.watermark = max(held.watermark, watermark[:PREFIX_BYTES])
        return refused

    async def remove(self, partition: int, keys: Sequence[bytes], epoch: int) -> None:
        """See `RedisKV`."""
        self._held(partition)
        below = epoch.to_bytes(EPOCH_BYTES, "big")
        for start in range(0, len(keys), CHUNK):
            await self._all([Call("", key, (below,), REMOVE) for key in keys[start : start + CHUNK]])

    async def close(self) -> None:
        """See `RedisKV`."""
        self._partitions.clear()
        self._checked, self._looked_at = False, float("-inf")
        await self._router.close()

    async def _claim(self, partition: int, held: HeldInCluster, claim: bytes) -> int:
        epoch, key = claim[:EPOCH_BYTES], epoch_key(partition)
        if held.judged != epoch:  # else a repetition, or anew after a loss: what earlier owners left is judged already
            await self._judge(partition, held, epoch)
        elif held.claim:  # after a loss: sentinels tell of a whole partition, which it is once it was rebuilt
            held.whole = False
        held.claim, held.watermark = b"", b""
        refused = await self._write(partition, [(key.encode(), claim)])
        await self._write_sentinels(partition, held, whole=held.whole)
        held.claim = epoch
        return refused

    async def _judge(self, partition: int, held: HeldInCluster, epoch: bytes) -> None:
        """See whether what earlier owners wrote is all there, before this one's claim takes the place of theirs."""
        keys = [sentinel_key(tag, partition) for _, tag in sentinel_tags()]
        stored, *sentinels = await self._all([Call("GET", key) for key in (epoch_key(partition), *keys)])
        servers = await self._look()
        there = [entry for entry in sentinels if entry is not None]
        held.known = Known.by(there)
        replaced = held.known.adopt(servers.values())
        before = _sentinel_prefix((stored or b"")[:EPOCH_BYTES], whole=True)
        held.whole = stored is not None and all(entry is not None and entry >= before for entry in sentinels)
        held.whole &= not replaced
        # With neither claim nor sentinels there was no owner before, or the watermark is gone with them, which tells.
        held.lost = not held.whole and (stored is not None or bool(there))
        held.judged = epoch

    async def _check(self, partition: int, held: HeldInCluster, lowest: bytes) -> None:
        """See whether claim, newest watermark, and a sentinel of each server are as this writer left them."""
        claim_key, mark_key = epoch_key(partition), watermark_key(partition)
        if not held.claim:
            stored = (await self._all([Call("GETRANGE", claim_key, (0, EPOCH_BYTES - 1))]))[0]
            if len(stored) == EPOCH_BYTES and lowest < stored:
                raise fenced(partition, stored, lowest)
            return
        if time.monotonic() - self._looked_at > _LOOK_S:
            await self._look()
        held.lost |= held.known.adopt(self._servers.values())
        picked = _one_of_each(await self._slot_map())
        calls = [
            Call("GETRANGE", claim_key, (0, EPOCH_BYTES - 1)),
            Call("GETRANGE", mark_key, (0, PREFIX_BYTES - 1)),
            *(Call("GETRANGE", sentinel_key(tag, partition), (0, PREFIX_BYTES - 1)) for tag in picked),
        ]
        claim, watermark, *sentinels = await self._all(calls)
        if len(claim) == EPOCH_BYTES and lowest < claim:
            raise fenced(partition, claim, lowest)
        held.lost |= claim < held.claim or watermark < held.watermark
        held.lost |= any(sentinel < _sentinel_prefix(held.claim, whole=held.whole) for sentinel in sentinels)
        if held.lost:
            held.lost = False  # said once: the claim that follows has the partition rebuilt
            held.whole = False
            self._shown_meta = None  # the public keys may be gone with the rest
            msg = (
                f"the store at {self._address} lost, or may have lost, what was written to partition {partition} (a "
                "server of it was wiped, set back to an older copy, started anew, or failed over)"
            )
            raise StoreLost(msg)

    async def _write(self, partition: int, entries: Sequence[tuple[bytes, bytes]]) -> int:
        answers = await self._all([Call("", key, (entry,), PUT_ONE) for key, entry in entries])
        for (_, entry), answer in zip(entries, answers, strict=True):
            if isinstance(answer, bytes):
                raise fenced(partition, answer, entry[:EPOCH_BYTES])
        return sum(answers)

    async def _write_sentinels(self, partition: int, held: HeldInCluster, *, whole: bool) -> None:
        """Write all sentinels of a partition under its claim, each with who holds it."""
        slot_map, prefix = await self._slot_map(), _sentinel_prefix(held.judged, whole=whole)
        entries = []
        for slot, tag in sentinel_tags():
            owner = slot_map.primary(slot)
            server = self._servers.get(owner.node) if owner is not None else None
            body = b"" if server is None else server.sentinel()
            entries.append((sentinel_key(tag, partition).encode(), prefix + body))
        await self._write(partition, entries)
        held.whole = whole

    async def _look(self) -> Mapping[str, Server]:
        """See who has slots at present."""
        with translated(self._address):
            servers = {}
            for primary in await self._router.primaries():
                answers = await self._router.ask(primary.place, ("INFO", "server"), ("INFO", "replication"))
                servers[primary.node] = Server.of(primary.node, {**answers[0], **answers[1]})
        self._servers, self._looked_at = servers, time.monotonic()
        return servers

    async def _slot_map(self) -> SlotMap:
        with translated(self._address):
            return await self._router.slots()

    async def _all(self, calls: Sequence[Call]) -> list[Any]:
        with translated(self._address):
            return list(checked(await self._router.run(calls)))

    async def _command(self, name: str, key: str, *args: bytes) -> Any:
        return (await self._all([Call(name, key, args)]))[0]

    async def _run(self, script: Script, keys: Sequence[str | bytes], args: Sequence[bytes | str | int]) -> Any:
        (key,) = keys
        return (await self._all([Call("", key, tuple(args), script)]))[0]

    async def _time_and_get(self, key: str) -> tuple[tuple[int, int], bytes | None]:
        with translated(self._address):
            primary = (await self._router.slots()).primaries[0]
            ((seconds, micros),) = await self._router.ask(primary.place, ("TIME",))
        return (seconds, micros), await self._command("GET", key)

    async def _replace_meta(self, stored: bytes, before: Meta, after: Meta) -> bool:
        self._gone |= shown_keys(before).keys() - shown_keys(after).keys()
        return bool(await self._run(REPLACE_META, [META_KEY], [stored, encode_meta(after), 0]))

    async def _check_server(self) -> None:
        if self._checked:
            return
        with translated(self._address):
            for primary in await self._router.primaries():
                (info,) = await self._router.ask(primary.place, ("INFO", "memory"))
                host, port = primary.place
                warn_of_eviction(info, f"the server {host}:{port} of the store at {self._address}")
        self._checked = True

    def _held_in_cluster(self, partition: int) -> HeldInCluster:
        held = self._held(partition)
        assert isinstance(held, HeldInCluster)  # noqa: S101 - no other is made here
        return held


def _sentinel_prefix(claim: bytes, *, whole: bool) -> bytes:
    """Prefix of a sentinel; `claim` is an epoch in its 8 bytes, or empty."""
    return kv_prefix(int.from_bytes(claim, "big"), int(whole))


def _one_of_each(slot_map: SlotMap) -> list[str]:
    """Tag of one sentinel on each server that has one."""
    tags: dict[str, str] = {}
    for slot, tag in sentinel_tags():
        if (owner := slot_map.primary(slot)) is not None:
            tags.setdefault(owner.node, tag)
    return list(tags.values())
