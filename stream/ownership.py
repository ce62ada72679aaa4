"""Taking a partition: restore its histories, check what they were made for, claim it above every earlier owner."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Final, Protocol
from uuid import uuid4

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from stream.config import Settings
from stream.errors import Fenced, StateError
from stream.history import History
from stream.history_codec import HistoryCodec, stored_order
from stream.keys import epoch_key
from stream.kv.base import KVWriter
from stream.records import kv_entry, kv_prefix
from stream.table import CLAIM_KEY, HistoryStore, PartitionDB

log = logging.getLogger(__name__)

CLAIM_FORMAT: Final = 1
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


@dataclass(frozen=True)
class Claim:
    """The newest claim in a changelog partition: who owns it since which epoch, and what its state was made for."""

    epoch: int
    app: str
    partitions: int
    history_limit: int
    types: dict[str, int]
    encoders: dict[str, str]
    nonce: str  # tells two claims of the same epoch apart

    def encode(self) -> bytes:
        """Bytes of the changelog record."""
        return json.dumps({"format": CLAIM_FORMAT, **self.__dict__}, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Claim":
        """Read a claim; raises `StateError` for a format this release doesn't know."""
        try:
            fields = json.loads(data)
            if fields.pop("format") != CLAIM_FORMAT:
                raise ValueError
            return cls(**fields)
        except (ValueError, TypeError, KeyError) as exc:
            msg = "the changelog holds a claim of an unknown format; upgrade the worker"
            raise StateError(msg) from exc


def check_claim(claim: Claim, settings: Settings, partitions: int) -> None:
    """Refuse settings that would change the meaning of stored state.

    Raises:
        StateError: in one line, what differs and what to do.
    """
    what = f"changelog {settings.changelog_topic}"
    if claim.app != settings.app_id:
        msg = f"{what} belongs to application {claim.app!r}; set UEMB_APP_ID={claim.app}"
        raise StateError(msg)
    if claim.partitions != partitions:
        msg = f"{what} was written with {claim.partitions} partitions, the topics have {partitions}; restore the count"
        raise StateError(msg)
    if claim.history_limit != settings.history_limit:
        msg = (
            f"{what} was written with UEMB_HISTORY_LIMIT={claim.history_limit}; keep it, "
            "or start a new UEMB_APP_ID and replay the events"
        )
        raise StateError(msg)
    for name, code in claim.types.items():
        if settings.event_types.get(name) != code:
            msg = f"{what} was written with the type code {name}:{code}; keep it in UEMB_EVENT_TYPES (append only)"
            raise StateError(msg)
    encoder = settings.versioned_encoder
    if claim.encoders.get(encoder.version, encoder.hash) != encoder.hash:
        msg = f"user version {encoder.version!r} names other parameters in {what}; choose a new UEMB_USER_VERSION"
        raise StateError(msg)


class Restorer:
    """Reads whole partitions with a consumer outside the group."""

    def __init__(self, client: dict[str, Any]) -> None:
        self._client = client

    async def read(
        self, topic: str, partition: int, start: int, handle: Callable[[list[Any]], Awaitable[None] | None]
    ) -> int:
        """Pass all committed records from `start` to the present end to `handle`, in chunks; return that end.

        Raises:
            StateError: the log yields nothing for `STALL_S` seconds before its end.
        """
        tp = TopicPartition(topic, partition)
        consumer = AIOKafkaConsumer(**self._client, isolation_level="read_committed", fetch_max_wait_ms=50)
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
                fetched = await consumer.getmany(tp, timeout_ms=_POLL_MS, max_records=_CHUNK_RECORDS)
                records = [r for r in fetched.get(tp, ()) if r.offset < end]
                if records and (waiting := handle(records)) is not None:
                    await waiting
                now_at = await consumer.position(tp)
                if now_at > position:
                    position, moved_at = now_at, loop.time()
                elif loop.time() - moved_at > STALL_S:
                    msg = f"{topic}-{partition} can't be read past offset {position} of {end}; see the brokers' logs"
                    raise StateError(msg)
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
    newest: dict[bytes, bytes | None] = {}
    ended: set[bytes] = set()
    for record in records:
        if record.key is not None:
            newest[record.key] = _newer(record.key, newest.get(record.key), record.value, codec, limit)
            if record.value is None:
                ended.add(record.key)
    rest = [key for key in newest if key not in ended]
    for key, held in zip(rest, db.get(rest), strict=True):
        newest[key] = _newer(key, held, newest[key], codec, limit)
    db.put(newest, records[-1].offset + 1)


def _newer(key: bytes, held: bytes | None, value: bytes | None, codec: HistoryCodec, limit: int) -> bytes | None:
    if held is None or value is None:
        return value
    return _later_claim(held, value) if key == CLAIM_KEY else joined(held, value, codec, limit)


def _later_claim(held: bytes, value: bytes) -> bytes:
    return value if Claim.decode(value).epoch >= Claim.decode(held).epoch else held


def joined(held: bytes | None, value: bytes, codec: HistoryCodec, limit: int) -> bytes:
    """State of a user after one more changelog record: the newer one, joined with an older that came later."""
    if held is None or stored_order(value) >= stored_order(held):
        return value
    merged = History.decode(held, codec, limit).merge(History.decode(value, codec, limit))
    return merged.encode(stored_order(held)[0])


async def restore_and_claim(
    partition: int,
    *,
    settings: Settings,
    partitions: int,
    store: HistoryStore,
    kv: KVWriter,
    send: Send,
    max_age_s: float = inf,
) -> tuple[PartitionDB, int, int]:
    """Bring the local table up to the changelog's end and claim the partition.

    Local state older than `max_age_s` is not used: the changelog may have forgotten what it still holds.

    Returns:
        The open database, the new epoch, and that of the claim before, 0 for none.

    Raises:
        StateError: the state was made for other settings, or can't be read.
        StoreLocked: another process holds the partition's databases.
        Fenced: other workers keep claiming the partition.
    """
    codec = HistoryCodec(settings.event_types)
    restorer = Restorer(settings.kafka_client)
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

    end = await restorer.read(topic, partition, db.changelog_offset, handle)
    if db.changelog_offset > end:
        log.warning("%s-%s ends before local state: topic recreated or truncated; restoring anew", topic, partition)
        highest = max(highest, Claim.decode(db.claim).epoch if db.claim else 0)
        store.wipe(partition)
        db = store.open(partition)
        end = await restorer.read(topic, partition, 0, handle)
    for _ in range(MAX_CLAIMS):
        claim = Claim.decode(db.claim) if db.claim else None
        if claim is not None:
            check_claim(claim, settings, partitions)
        in_kv = (await kv.get(partition, [epoch_key(partition).encode()]))[0]
        epoch = 1 + max(highest, claim.epoch if claim else 0, kv_entry(in_kv)[0] if in_kv else 0)
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
    )
