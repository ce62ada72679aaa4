"""The networked store spread over a Redis or Valkey cluster; keys and bytes are those of a single server.

The names of keys are fixed and have no hash tag, so a partition's lie in all slots, and no script can see two of them.
Each entry is compared and set by itself; claim and watermark are looked at before. Between that look and the writes
another worker may claim the partition. What is written then harms nobody: a writer's states are in the changelog before
they come here, where the broker takes none from an owner of before, so the new owner has read them, and its own entries
have a higher epoch, which none of a lower one replaces (law 7).
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stream.core.records import PREFIX_BYTES, kv_prefix
from stream.errors import StoreLost
from stream.keys import META_KEY, epoch_key, sentinel_key, watermark_key
from stream.kv.meta import decode_meta, encode_meta
from stream.kv.protocol import Meta, fenced
from stream.kv.redis.client import REPAIR, translated, warn_of_eviction
from stream.kv.redis.losses import Known, Server
from stream.kv.redis.router import Call, Router, checked
from stream.kv.redis.scripts import ABSENT, PUT_ONE, REMOVE, REPLACE_META, REPLACE_ONE, Script
from stream.kv.redis.slots import sentinel_tags
from stream.kv.redis.writer import CHUNK, EPOCH_BYTES, Held, RedisKV, check_prefixes, shown_keys
from stream.kv.urls import RedisAddress

#: Between two looks at who has slots: as often as a heartbeat.
_LOOK_S: Final = 1.0
#: Sections of INFO from which `Server` is made.
_RUN: Final = ("server", "replication")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class HeldInCluster(Held):
    """A partition that is open here.

    Attributes:
        inspected_at: the claim (epoch) under which this writer looked for losses from before it.
        whole: whether the store holds all of the partition, as its sentinels then say (revision 1). While it may not,
            they say that too (revision 0), until the next watermark: it tells that the partition was rebuilt.
        lost: whether the store lacks what was written, or may: no write but a claim is taken any more.
        reported: whether the loss was reported, with `StoreLost`: the next claim is to have the partition rebuilt.
        known: who held the partition's keys when all of them were there.
        owners: who had the slots of its sentinels when those were last seen there, None for nobody.
        runs_named: run of each server that the sentinels name, by its node.
    """

    inspected_at: bytes = b""
    whole: bool = False
    lost: bool = False
    reported: bool = False
    known: Known = field(default_factory=Known)
    owners: tuple[str | None, ...] = ()
    runs_named: Mapping[str, str] = field(default_factory=dict)


class ClusterKV(RedisKV):
    """A worker's hold on a cluster; see `RedisKV` for what is the same.

    A batch is written in this order: its claim, entries, its watermark. Of one that is `Fenced` by the partition's
    claim nothing was written; of one that is `StoreLost` its watermark was not, nor anything else unless the loss came
    meanwhile; of one that an entry of a higher epoch stands against, all but that one in its chunk may have been.

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

    async def put(self, partition: int, entries: Mapping[bytes, bytes], *, ordered: bool = False) -> int:
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
            # Also when servers have joined: who restarts one of those is to be noticed by the next owner as well.
            if held.claim and not (held.whole and held.runs_named == held.known.runs):
                await self._write_sentinels(partition, held, whole=True)
                self._refuse_lost(partition, held)
            refused += await self._write(partition, [(mark_key, watermark)])
            held.watermark = max(held.watermark, watermark[:PREFIX_BYTES])
        return refused

    async def remove(self, partition: int, keys: Sequence[bytes], epoch: int) -> None:
        """See `RedisKV`."""
        self._held(partition)
        below = epoch.to_bytes(EPOCH_BYTES, "big")
        for start in range(0, len(keys), CHUNK):
            await self._all([Call("", key, (below,), REMOVE) for key in keys[start : start + CHUNK]])

    async def move(self, partitions: int) -> int:
        """A user's keys are in the same place whatever the partition."""
        return 0

    async def sweep(self, partitions: int) -> None:
        """There is nothing to take away, then."""

    async def close(self) -> None:
        """See `RedisKV`."""
        self._partitions.clear()
        self._checked, self._looked_at = False, float("-inf")
        await self._router.close()

    async def _claim(self, partition: int, held: HeldInCluster, claim: bytes) -> int:
        epoch, key = claim[:EPOCH_BYTES], epoch_key(partition)
        if held.inspected_at != epoch:  # else a repetition, or anew after a loss: what was left before is inspected
            await self._inspect(partition, held, epoch)
        elif held.reported:
            held.lost = held.reported = False
        held.claim, held.watermark = b"", b""
        refused = await self._write(partition, [(key.encode(), claim)])
        await self._write_sentinels(partition, held, whole=held.whole)
        held.claim = epoch
        return refused

    async def _inspect(self, partition: int, held: HeldInCluster, epoch: bytes) -> None:
        """See whether what earlier owners wrote is all there, before this one's claim takes the place of theirs."""
        owners = await self._owners()
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
        held.inspected_at, held.reported, held.owners = epoch, False, owners

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
        owners = await self._owners()
        picked = _picked(owners, held.owners)
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
        self._refuse_lost(partition, held)
        held.owners = owners

    def _refuse_lost(self, partition: int, held: HeldInCluster) -> None:
        if not held.lost:
            return
        held.reported, held.whole = True, False
        self._shown_meta = None  # the public keys may be gone with the rest
        msg = (
            f"the store at {self._address} lost, or may have lost, what was written to partition {partition} (a server "
            "of it was wiped, set back to an older copy, started anew, or failed over)"
        )
        raise StoreLost(msg)

    async def _write(self, partition: int, entries: Sequence[tuple[bytes, bytes]]) -> int:
        answers = await self._all([Call("", key, (entry,), PUT_ONE) for key, entry in entries])
        for (_, entry), answer in zip(entries, answers, strict=True):
            if isinstance(answer, bytes):
                raise fenced(partition, answer, entry[:EPOCH_BYTES])
        return sum(answers)

    async def _write_sentinels(self, partition: int, held: HeldInCluster, *, whole: bool) -> None:
        """Write all sentinels of a partition under its claim, each with who holds it.

        That it is whole is written over a sentinel that is there, and nowhere else: one that is gone by now went with
        all that its server held, which no look would tell any more.
        """
        owners, servers, prefix = await self._owners(), self._servers, _sentinel_prefix(held.inspected_at, whole=whole)
        calls = []
        for (_, tag), node in zip(sentinel_tags(), owners, strict=True):
            body = servers[node].sentinel() if node in servers else b""
            calls.append(Call("", sentinel_key(tag, partition), (prefix + body,), REPLACE_ONE if whole else PUT_ONE))
        answers = await self._all(calls)
        for answer in answers:
            if isinstance(answer, bytes):
                raise fenced(partition, answer, held.inspected_at)
        held.runs_named = {node: server.run for node, server in servers.items()}
        held.lost |= ABSENT in answers
        held.whole = whole and not held.lost

    async def _look(self) -> Mapping[str, Server]:
        """See who has slots at present."""
        with translated(self._address):
            servers = {}
            for primary in await self._router.primaries():
                answers = await self._router.ask(primary.place, *(("INFO", part) for part in _RUN))
                servers[primary.node] = Server.of(primary.node, {**answers[0], **answers[1]})
        self._servers, self._looked_at = servers, time.monotonic()
        return servers

    async def _owners(self) -> tuple[str | None, ...]:
        """Node that has the slot of each sentinel, None where nobody has it."""
        with translated(self._address):
            slot_map = await self._router.slots()
        owners = (slot_map.primary(slot) for slot, _ in sentinel_tags())
        return tuple(None if owner is None else owner.node for owner in owners)

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
                memory, *others = await self._router.ask(primary.place, *(("INFO", part) for part in ("memory", *_RUN)))
                host, port = primary.place
                where = f"the server {host}:{port} of the store at {self._address}"
                warn_of_eviction(memory, where)
                if not Server.of(primary.node, {**others[0], **others[1]}).known:
                    log.warning(
                        "%s doesn't tell run_id and master_replid in INFO: when it is started anew or fails over, and "
                        "lacks its last writes only, nobody notices; run `uemb kv rebuild` then",
                        where,
                    )
        self._checked = True

    def _held_in_cluster(self, partition: int) -> HeldInCluster:
        held = self._held(partition)
        assert isinstance(held, HeldInCluster)  # noqa: S101 - no other is made here
        return held


def _sentinel_prefix(claim: bytes, *, whole: bool) -> bytes:
    """Prefix of a sentinel; `claim` is an epoch in its 8 bytes, or empty."""
    return kv_prefix(int.from_bytes(claim, "big"), int(whole))


def _picked(owners: Sequence[str | None], before: Sequence[str | None]) -> list[str]:
    """Tag of one sentinel on each server, and of all whose slots changed hands: those may have come without keys."""
    one_of_each: dict[str | None, str] = {}
    changed = []
    for n, (_, tag) in enumerate(sentinel_tags()):
        if before and owners[n] != before[n]:
            changed.append(tag)
        elif owners[n] is not None:
            one_of_each.setdefault(owners[n], tag)
    return [*one_of_each.values(), *changed]
