"""Taking a partition: restore its histories, check what they were made for, claim it above every earlier owner."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any, Final, Protocol
from uuid import uuid4

from aiokafka.structs import TopicPartition

from stream.config import Settings
from stream.core.history import joined
from stream.core.history_codec import HistoryCodec, stored_order
from stream.core.records import kv_prefix
from stream.errors import DeliveryError, Fenced
from stream.kafka.clients import Clients
from stream.keys import CLAIM_KEY, epoch_key
from stream.kv.protocol import KVWriter
from stream.pipeline.table import HistoryStore, PartitionDB
from stream.worker.claims import Claim, check_claim, claimed_in_store, later_claim, next_epoch

log = logging.getLogger(__name__)

STALL_S: Final = 30.0
MAX_CLAIMS: Final = 8
_CHUNK_RECORDS: Final = 20_000
#: A changelog ends with the marker of the last fence, which the client passes over without returning: what is left of
#: this wait is then spent for nothing.
_POLL_MS: Final = 20


class Send(Protocol):
    """Sends one record to a partition and waits for its acknowledgement; returns its offset."""

    def __call__(self, topic: str, partition: int, key: bytes, value: bytes) -> Awaitable[int]:
        """Send and wait."""
        ...


class Restorer:
    """Reads whole partitions with a consumer outside the group."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    async def read(
        self,
        topic: str,
        partition: int,
        start: int,
        handle: Callable[[list[Any]], Awaitable[None] | None],
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Pass all committed records from `start` to the present end to `handle`, in chunks; return that end.

        `on_progress` is told how far off the end is, in offsets.

        Raises:
            DeliveryError: the log yields nothing for `STALL_S` seconds before its end.
        """
        tp = TopicPartition(topic, partition)
        consumer = self._clients.consumer(isolation_level="read_committed", fetch_max_wait_ms=50)
        await consumer.start()
        try:
            consumer.assign([tp])
            first = (await consumer.beginning_offsets([tp]))[tp]
            end = int((await consumer.end_offsets([tp]))[tp])
            position = max(start, first)
            if position < end:
                consumer.seek(tp, position)
            loop = asyncio.get_running_loop()
            moved_at = loop.time()
            while position < end:
                on_progress(end - position)
                fetched = await consumer.getmany(tp, timeout_ms=_POLL_MS, max_records=_CHUNK_RECORDS)
                records = [r for r in fetched.get(tp, ()) if r.offset < end]
                if records and (waiting := handle(records)) is not None:
                    await waiting
                now_at = await consumer.position(tp)
                if now_at > position:
                    position, moved_at = now_at, loop.time()
                elif loop.time() - moved_at > STALL_S:
                    msg = f"{topic}-{partition} can't be read past offset {position} of {end}; see the brokers' logs"
                    raise DeliveryError(msg)
            on_progress(0)
            return end
        finally:
            await consumer.stop()


def record_epoch(record: Any) -> int:
    """Epoch under which a changelog record was written; 0 for a tombstone."""
    if record.key is None or record.value is None:
        return 0
    return Claim.decode(record.value).epoch if record.key == CLAIM_KEY else stored_order(record.value)[0]


def apply_changelog(db: PartitionDB, codec: HistoryCodec, limit: int, records: list[Any]) -> None:
    """Write changelog records to the local table.

    A record replaces what is stored unless that is newer, in which case both are joined: histories are sets, so a
    record that an old owner sent too late can't undo anything. A tombstone ends what is before it: brokers let none but
    the owner write one, who does so when the marker of an erased user has been kept for long enough.
    """
    keys = list({record.key for record in records if record.key is not None})
    state = dict(zip(keys, db.get(keys), strict=True))
    for record in records:  # one after another from what is stored: where the log is cut must make no difference
        if record.key is not None:
            state[record.key] = _newer(record.key, state[record.key], record.value, codec, limit)
    db.put(state, records[-1].offset + 1)


def _newer(key: bytes, held: bytes | None, value: bytes | None, codec: HistoryCodec, limit: int) -> bytes | None:
    if held is None or value is None:
        return value
    return later_claim(held, value) if key == CLAIM_KEY else joined(held, value, codec, limit)


async def restore_and_claim(
    partition: int,
    *,
    settings: Settings,
    clients: Clients,
    partitions: int,
    store: HistoryStore,
    kv: KVWriter,
    send: Send,
    on_progress: Callable[[int], None] = lambda _: None,
    max_age_s: float = inf,
) -> tuple[PartitionDB, int, int]:
    """Bring the local table up to the changelog's end and claim the partition.

    Local state older than `max_age_s` is not used: the changelog may have forgotten what it still holds. `on_progress`
    is told how many records of the changelog are still to be read.

    Returns:
        The open database, the new epoch, and that of the claim before, 0 for none.

    Raises:
        StateError: the state was made for other settings, or can't be read.
        StoreLocked: another process holds the partition's databases.
        Fenced: other workers keep claiming the partition.
    """
    codec = HistoryCodec(settings.event_types)
    restorer = Restorer(clients)
    topic = settings.changelog_topic
    db = store.open(partition, max_age_s)
    await kv.open_partition(partition)
    started = asyncio.get_running_loop().time()
    highest, count = 0, 0
    mine = b""

    def handle(records: list[Any]) -> None:
        nonlocal highest, count
        apply_changelog(db, codec, settings.history_limit, records)
        highest = max(highest, *(record_epoch(r) for r in records if r.value != mine), 0)
        count += len(records)

    end = await restorer.read(topic, partition, db.changelog_offset, handle, on_progress)
    if db.changelog_offset > end:
        log.warning("%s-%s ends before local state: topic recreated or truncated; restoring anew", topic, partition)
        highest = max(highest, Claim.decode(db.claim).epoch if db.claim else 0)
        store.wipe(partition)
        db = store.open(partition)
        end = await restorer.read(topic, partition, 0, handle, on_progress)
    for _ in range(MAX_CLAIMS):
        claim = Claim.decode(db.claim) if db.claim else None
        if claim is not None:
            check_claim(claim, settings, partitions)
        in_kv = (await kv.get(partition, [epoch_key(partition).encode()]))[0]
        seen = max(highest, claim.epoch if claim else 0, claimed_in_store(in_kv, partition))
        epoch = next_epoch(seen, f"{topic}-{partition} or the store")
        mine = _claim(epoch, claim, settings, partitions).encode()
        if await send(topic, partition, CLAIM_KEY, mine) == end:
            db.put({CLAIM_KEY: mine}, end + 1)
        else:  # someone wrote meanwhile: read that too, and claim above it
            end = await restorer.read(topic, partition, db.changelog_offset, handle)
            if highest >= epoch:
                continue
        store.restored(partition)
        await kv.put(partition, {epoch_key(partition).encode(): kv_prefix(epoch, 0)})
        took_s = asyncio.get_running_loop().time() - started
        log.info("partition %s: restored %s records, claimed epoch %s (%.2f s)", partition, count, epoch, took_s)
        return db, epoch, claim.epoch if claim else 0
    msg = f"partition {partition} is being claimed by other workers again and again; check UEMB_APP_ID"
    raise Fenced(msg)


def _claim(epoch: int, earlier: Claim | None, settings: Settings, partitions: int) -> Claim:
    encoder = settings.versioned_encoder
    return Claim(
        epoch=epoch,
        app=settings.app_id,
        partitions=partitions,
        history_limit=settings.history_limit,
        types={**(earlier.types if earlier else {}), **settings.event_types},
        encoders={**(earlier.encoders if earlier else {}), encoder.version: encoder.hash},
        nonce=uuid4().hex,
        since=earlier.since if earlier else None,
    )
