"""Every format that outlives a process: how this release writes it, and what it reads out of it.

`freeze.py` keeps both for good, a folder a release; `test_compat.py` holds every later release against them.
What is written is made of the smallest values that show each field; what is read is plain data, to be put into JSON.
"""

import asyncio
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import numpy as np
from onnx_models import linear
from rocksdict import Cache

from stream.config import Settings
from stream.core.encoders import MadeFor
from stream.core.events import DeletionDecoder, EventDecoder, EventRow, EventRules, Reason, Reject
from stream.core.history import History, Interaction
from stream.core.history_codec import HistoryCodec, sort_key, stored_order
from stream.core.records import EmbeddingRecord, decode, encode, kv_entry, kv_prefix, to_json
from stream.core.watermark import Watermark, decode_watermark
from stream.encoders.folder import read_manifest, save_encoder
from stream.feed.event_writer import EventWriter
from stream.feed.send_plan import Position
from stream.feed.send_progress import SendProgress
from stream.items.popularity import read_popularity, write_popularity
from stream.items.space import ItemSpace
from stream.kafka.dead_letters import Letter, dead_letter
from stream.kafka.delivery import RecordBatch
from stream.kafka.topic_owners import decode_topics, topics_record
from stream.keys import (
    CLAIM_KEY,
    META_KEY,
    encoder_key,
    epoch_key,
    fallback_key,
    partition_of,
    rebuild_key,
    sentinel_key,
    user_cache_key,
    watermark_key,
)
from stream.kv.meta import decode_meta, encode_meta
from stream.kv.protocol import Meta, Serving
from stream.kv.redis.losses import Known, Server
from stream.kv.redis.writer import shown_keys
from stream.kv.rocksdb.layout import SEQ_HEADER
from stream.kv.stores import open_reader, open_writer
from stream.pipeline.table import OFFSET_KEY, PartitionDB
from stream.rollout.records import ControlRecord, EncoderRecord, Status
from stream.worker.claims import Claim

#: What one case of a format is made of: bytes by the name of the part, or of the file; None for a null.
Parts = Mapping[str, bytes | None]

_USER, _ITEMS = "mix-edd8f311", "films_v1"
_HASH: Final = "ab" * 32
_NOW_MS: Final = 1_700_000_000_000
_TYPES: Final = {"view": 1, "like": 2}
_CODEC: Final = HistoryCodec(_TYPES)
_LIMIT: Final = 100


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        write: what this release writes, by the name of the case.
        read: what this release reads out of a case, as plain data.
        schema: file in ``schemas/`` that a part is valid under, by the name of the part.
        is_repeatable: whether the same values give the same bytes; a database has times and ids of its own.
    """

    write: Callable[[], dict[str, Parts]]
    read: Callable[[Parts], Any]
    schema: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True


def _value(parts: Parts, name: str = "value") -> bytes:
    data = parts[name]
    assert data is not None
    return data


# -- topics -----------------------------------------------------------------------------------------------------------


def _events() -> dict[str, Parts]:
    writer = EventWriter(EventRules(_TYPES), lambda kind: f"user-events.{kind}")
    made = {}
    for name, user, item in (("numbers", "42", "311"), ("texts", "Zoë:1", "été")):
        written = writer.record(EventRow(user, item, "like", _NOW_MS), _NOW_MS)
        topic, key, value = written  # type: ignore[misc]
        made[name] = {"topic": topic.encode(), "key": key, "value": value}
    value = b'{"user_id": 42, "item_id": 311, "type": "view", "ts": 1700000000000, "page": {"n": 3}}'
    made["from_a_producer"] = {"topic": b"user-events.view", "key": b"42", "value": value}
    return made


def _read_event(parts: Parts) -> Any:
    topic, key = _value(parts, "topic").decode(), _value(parts, "key")
    found = EventDecoder(EventRules(_TYPES)).decode(topic, key, _value(parts), _NOW_MS)
    assert isinstance(found, bytes), found
    return [asdict_of(one) for one in History(_CODEC, _LIMIT, [found]).interactions()]


def _erasures() -> dict[str, Parts]:
    value = json.dumps({"user_id": "42", "ts": _NOW_MS}).encode()
    return {"erasure": {"key": b"42", "value": value}, "withdrawn": {"key": b"42", "value": None}}


def _read_erasure(parts: Parts) -> Any:
    erased_at = DeletionDecoder().decode(parts["key"], parts["value"], _NOW_MS)
    assert not isinstance(erased_at, Reject), erased_at
    return {"erased_at": erased_at}


def _histories() -> dict[str, Parts]:
    interactions = [
        (_NOW_MS, "311", "view"),
        (_NOW_MS + 1, "0b0e0c52-95cf-4d4e-9d0a-2c2a2b9b8d11", "like"),
        (_NOW_MS + 2, "été", "view"),
        (_NOW_MS + 3, "-9223372036854775808", "like"),
    ]
    keys = [sort_key(ts_ms, item.encode(), kind.encode()) for ts_ms, item, kind in interactions]
    history = History(_CODEC, _LIMIT, keys, revision=184, erased_at=1_600_000_000_000)
    return {
        "history": {"value": history.encode(7)},
        "erased": {"value": History(_CODEC, _LIMIT, revision=3, erased_at=1_600_000_000_000).encode(9)},
    }


def _read_history(parts: Parts) -> Any:
    history = History.decode(_value(parts), _CODEC, _LIMIT)
    return {
        "interactions": [asdict_of(one) for one in history.interactions()],
        "revision": history.revision,
        "erased_at": history.erased_at,
        "order": list(stored_order(_value(parts))),
    }


def asdict_of(interaction: Interaction) -> dict[str, Any]:
    """An interaction as plain data."""
    return interaction._asdict()


_CLAIM: Final = Claim(7, "app", 4, _LIMIT, _TYPES, {_USER: _HASH}, "00" * 16)


def _claims() -> dict[str, Parts]:
    moved = msgspec.structs.replace(_CLAIM, since={"user-events": 5})
    return {name: {"key": CLAIM_KEY, "value": c.encode()} for name, c in (("claim", _CLAIM), ("repartitioned", moved))}


def _read_claim(parts: Parts) -> Any:
    return {"key": parts["key"] == CLAIM_KEY, **msgspec.to_builtins(Claim.decode(_value(parts)))}


def _record(**changes: Any) -> EmbeddingRecord:
    return EmbeddingRecord(
        **{
            "user_id": "42", "epoch": 7, "revision": 184, "status": "ok", "reason": "", "history_len": 4,
            "unknown_items": 1, "as_of": _NOW_MS + 3, "user_embedding_version": _USER, "item_embedding_version": _ITEMS,
            "vector": np.float32([0.6, 0.8]), "norm": 1.0, **changes,
        }
    )  # fmt: skip


_RECORDS: Final = {
    "ok": _record(),
    "fallback": _record(user_id="Zoë:1", status="fallback", reason="no_known_items", history_len=200, epoch=1 << 40),
    "without_as_of": _record(status="fallback", reason="degenerate", history_len=0, unknown_items=0, as_of=None),
}


def _key(record: EmbeddingRecord) -> bytes:
    return user_cache_key(record.user_id, record.item_embedding_version, record.user_embedding_version).encode()


def _vectors(written: Callable[[EmbeddingRecord], bytes]) -> dict[str, Parts]:
    return {name: {"key": _key(record), "value": written(record)} for name, record in _RECORDS.items()}


def _read_vector(parts: Parts) -> Any:
    record = decode(_value(parts))
    return {"key": _key(record).decode() == _value(parts, "key").decode(), **to_json(record)}


def _dead_letters() -> dict[str, Parts]:
    own = [("trace", b"\x00"), ("dlq.reason", b"its own")]
    record: Any = SimpleNamespace(key=b"42", value=b'{"t":1}', headers=own, offset=17, timestamp=_NOW_MS)
    batch = RecordBatch("user-events.view", 3, [record], seeks=0, number=0, start=0)
    made: dict[str, Parts] = {}
    for name, max_bytes in (("whole", 7), ("reference", 6)):
        key, value, headers = dead_letter(batch, 0, Reject(Reason.UNKNOWN_TYPE, "no such type"), max_bytes)
        told = [[name, (data or b"").hex()] for name, data in headers]
        made[name] = {"key": key, "value": value, "headers": json.dumps(told).encode()}
    return made


def _read_letter(parts: Parts) -> Any:
    headers = [(name, bytes.fromhex(data)) for name, data in json.loads(_value(parts, "headers"))]
    letter = Letter(0, 9, _NOW_MS, parts["key"], parts["value"], headers)  # type: ignore[arg-type]
    replayed = [[name, (data or b"").decode()] for name, data in letter.replay_headers]
    source = letter.source
    return {
        "reason": letter.reason,
        "source": None if source is None else source._asdict(),
        "size": letter.value_size,
        "replayed": replayed,
    }


def _item_versions() -> dict[str, Parts]:
    records = {
        "prepare": ControlRecord("v1", "file:///srv/itéms/v1", _HASH, "prepare"),
        "forced": ControlRecord("v1", "/srv/items/v1", _HASH, "active", force=True),
    }
    return {name: dict(zip(("key", "value"), record.encode(), strict=True)) for name, record in records.items()}


def _read_item_version(parts: Parts) -> Any:
    return msgspec.to_builtins(ControlRecord.decode(parts["key"], _value(parts)))


def _encoder_versions() -> dict[str, Parts]:
    learned = EncoderRecord("l-1", "active", _HASH, "learned", uri="/srv/encoders/1", item_version="v1", force=True)
    records = {
        "formula": EncoderRecord("avg-1", "prepare", _HASH, "avg", {"decay": 0.3}, {"like": 2.0}),
        "learned": learned,
        "left": EncoderRecord("avg-1", "retired", epochs={0: 5, 1: 7}),
    }
    return {name: dict(zip(("key", "value"), record.encode(), strict=True)) for name, record in records.items()}


def _read_encoder_version(parts: Parts) -> Any:
    return msgspec.to_builtins(EncoderRecord.decode(_value(parts, "key"), _value(parts)), str_keys=True)


def _statuses() -> dict[str, Parts]:
    statuses = {
        "covering": Status("u", "v1", 3, 7, "covering"),
        "refused": Status("u", "v1", 3, 7, "refused", 10, 5, 1, 500, 20, 99.5, "no “vectors.npy”", 12),
    }
    return {name: dict(zip(("key", "value"), status.encode(), strict=True)) for name, status in statuses.items()}


def _read_status(parts: Parts) -> Any:
    return msgspec.to_builtins(Status.decode(_value(parts)))


def _written_topics() -> dict[str, Parts]:
    settings: Any = SimpleNamespace(output_topic="é-out", dlq_topic="user-events.dlq")
    return {"topics": dict(zip(("key", "value"), topics_record(settings), strict=True))}


def _read_written_topics(parts: Parts) -> Any:
    return msgspec.to_builtins(decode_topics(_value(parts)))


def _names() -> dict[str, Parts]:
    """What is looked for under its name: another name would be another thing."""
    settings = Settings(app_id="app", event_topics=("user-events",))
    names = {
        "changelog": settings.changelog_topic,
        "status": settings.item_status_topic,
        "vector": user_cache_key(42, _ITEMS, _USER),
        "fallback": fallback_key(_ITEMS, _USER),
        "encoder": encoder_key(_USER),
        "epoch": epoch_key(3),
        "watermark": watermark_key(3),
        "rebuild": rebuild_key(3),
        "sentinel": sentinel_key("0", 3),
        "meta": META_KEY,
        "state claim": CLAIM_KEY.decode(),
        "state offset": OFFSET_KEY.decode(),
        "user version": settings.versioned_encoder.version,
        "partitions": " ".join(str(partition_of(user, 12)) for user in (b"1", b"42", b"anna", "Zoë:1".encode())),
    }
    return {name: {"name": text.encode()} for name, text in names.items()}


def _read_name(parts: Parts) -> Any:
    return _value(parts, "name").decode()


# -- the store --------------------------------------------------------------------------------------------------------


def _entries() -> dict[str, Parts]:
    offsets = {"user-events.été": 5, "user-deletions": 0}
    watermark = Watermark(offsets=offsets, kafka_time_ms=_NOW_MS, lag_ms=996, heartbeat_ms=_NOW_MS + 999)
    return {
        "vector": {"value": kv_prefix(7, 184) + encode(_RECORDS["ok"])},
        "deletion": {"value": kv_prefix(7, 185)},
        "epoch": {"value": kv_prefix(7, 0)},
        "watermark": {"value": watermark.entry(7, 184)},
        "first_watermark": {"value": Watermark(lag_ms=0, heartbeat_ms=_NOW_MS).entry(7, 1)},
        "sentinel": {"value": kv_prefix(7, 0) + Server("a1", "b2", "c3", "d4").sentinel()},
    }


def _read_entry(parts: Parts) -> Any:
    epoch, revision, body = kv_entry(_value(parts))
    said: dict[str, Any] = {"epoch": epoch, "revision": revision}
    if body.startswith(b"{"):
        known = Known.by([_value(parts)])
        if known.runs:
            return said | {"runs": known.runs, "histories": sorted(known.histories)}
        watermark = decode_watermark(_value(parts))
        assert watermark is not None
        return said | msgspec.to_builtins(watermark)
    return said | ({"record": to_json(decode(body))} if body else {})


_META: Final = Meta(
    "app",
    4,
    Serving(_USER, _ITEMS, -1),
    {fallback_key(_ITEMS, _USER): encode(_record(user_id="", status="fallback", reason="no_known_items"))},
    {encoder_key(_USER): _HASH},
)


def _metas() -> dict[str, Parts]:
    shown = {key: value.encode() if isinstance(value, str) else value for key, value in shown_keys(_META).items()}
    return {"shared": {"meta": encode_meta(_META), **shown}, "empty": {"meta": encode_meta(Meta())}}


def _read_meta(parts: Parts) -> Any:
    meta = decode_meta(_value(parts, "meta"), "meta", "repair it")
    fallbacks = {key: to_json(decode(value)) for key, value in meta.fallbacks.items()}
    return asdict(meta) | {"fallbacks": fallbacks}


def _sequences() -> dict[str, Parts]:
    return {"p-00003.seq": {"value": SEQ_HEADER.pack(b"0123456789abcdef", 184)}}


def _read_sequence(parts: Parts) -> Any:
    incarnation, count = SEQ_HEADER.unpack(_value(parts))
    return {"incarnation": incarnation.decode(), "count": count}


# -- folders and files ------------------------------------------------------------------------------------------------


def _files(folder: Path, *, but: tuple[str, ...] = ()) -> Parts:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(but or ("\0",)))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _unpacked(parts: Parts, folder: Path) -> Path:
    for name, data in parts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data or b"")
    return folder


def _item_folders() -> dict[str, Parts]:
    made = {}
    with tempfile.TemporaryDirectory() as work:
        for metric in ("cosine", "dot"):
            folder = Path(work) / metric
            vectors, history = [[0.0, 2.0], [1.0, 0.0]], [[0.0, 1.0], [0.6, 0.8]]
            side = {"history_vectors": history} if metric == "dot" else {}
            ItemSpace.save(folder, _ITEMS, ["311", "été"], vectors, metric=metric, **side)
            if metric == "cosine":
                events = [EventRow("1", "311", "view", _NOW_MS), EventRow("2", "été", "like", _NOW_MS)]
                weights = {"view": 1.0, "like": 2.0}
                write_popularity(folder, ItemSpace.load(folder), "p1", events, type_weights=weights)
            made[metric] = _files(folder)
    return made


def _read_item_folder(parts: Parts) -> Any:
    with tempfile.TemporaryDirectory() as work:
        folder = _unpacked(parts, Path(work))
        space = ItemSpace.load(folder)
        popular = read_popularity(folder, space)
        return {
            "version": space.version,
            "metric": space.metric,
            "sha256": space.sha256,
            "ids": [space.ids[row].decode() for row in range(len(space))],
            "vectors": space.vectors.tolist(),
            "history_vectors": space.history_vectors.tolist(),
            "fallback": space.fallback.tolist(),
            "popularity": None if popular is None else popular[1].tolist(),
        }


def _encoder_folders() -> dict[str, Parts]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "encoder"
        model = linear(np.float32([[1, 0], [0, 1], [1, 0], [0, 1], [0, 0], [0, 0]]))
        made_for = MadeFor(_ITEMS, _HASH, 2)
        save_encoder(folder, model, made_for, type_weights={"like": 2.0}, about={"made": "for a test"})
        return {"linear": _files(folder)}


def _read_encoder_folder(parts: Parts) -> Any:
    from stream.encoders.folder import load_encoder

    with tempfile.TemporaryDirectory() as work:
        folder = _unpacked(parts, Path(work))
        encoder = load_encoder(folder)
        said = np.asarray(encoder.model(np.float64([[0.6, 0.8, 1, 0, 0, 1]])))
        return {**msgspec.to_builtins(read_manifest(folder)), "says": said.round(6).tolist()}


def _send_progress() -> dict[str, Parts]:
    with tempfile.TemporaryDirectory() as work:
        _progress_of(Path(work)).save()
        return {"progress": {"value": (Path(work) / "progress").read_bytes()}}


def _progress_of(work: Path) -> SendProgress:
    data = work / "events.csv"
    data.write_text("user_id,item_id,type,ts\n42,311,view,1700000000000\n")
    progress = SendProgress(work / "progress", [data], _HASH, on_note=lambda _: None)
    progress.reached(Position(0, 1))
    return progress


def _read_progress(parts: Parts) -> Any:
    with tempfile.TemporaryDirectory() as work:
        progress = _progress_of(Path(work))
        (Path(work) / "progress").write_bytes(_value(parts))
        return progress.load()._asdict()


# -- databases: a file that the next start makes anew is left out -----------------------------------------------------

_MADE_ANEW: Final = ("LOG", "LOCK", "OPTIONS")


def _state_databases() -> dict[str, Parts]:
    with tempfile.TemporaryDirectory() as work:
        db = PartitionDB(Path(work) / "user-history-0.db", Cache(1 << 20))
        entries = {b"42": _histories()["history"]["value"], b"7": _histories()["erased"]["value"]}
        db.put({**entries, CLAIM_KEY: _CLAIM.encode()}, 19)
        db.close()
        return {"partition": _files(Path(work), but=_MADE_ANEW)}


def _read_state_database(parts: Parts) -> Any:
    with tempfile.TemporaryDirectory() as work:
        db = PartitionDB(_unpacked(parts, Path(work)) / "user-history-0.db", Cache(1 << 20))
        try:
            assert db.claim is not None
            return {
                "users": {user.decode(): _read_history({"value": state}) for user, state in db.users()},
                "claim": msgspec.to_builtins(Claim.decode(db.claim)),
                "offset": db.changelog_offset,
            }
        finally:
            db.close()


def _stores() -> dict[str, Parts]:
    async def write(url: str) -> None:
        store = open_writer(url)
        await store.update_meta(lambda _: Meta(**{**asdict(_META), "current": _META.current, "partitions": 1}))
        await store.open_partition(0)
        entries = _entries()
        keys = {"vector": _key(_RECORDS["ok"]), "epoch": epoch_key(0).encode(), "watermark": watermark_key(0).encode()}
        await store.put(0, {key: _value(entries[name]) for name, key in keys.items()})
        await store.close()

    with tempfile.TemporaryDirectory() as work:
        asyncio.run(write(f"rocksdb://{work}"))
        return {"one_partition": _files(Path(work), but=_MADE_ANEW)}


def _read_store(parts: Parts) -> Any:
    with tempfile.TemporaryDirectory() as work:
        reader = open_reader(f"rocksdb://{_unpacked(parts, Path(work))}")
        try:
            entry, missing = reader.get([(b"42", _key(_RECORDS["ok"])), (b"7", b"uemb:no:such:7")])
            watermark = reader.watermark(b"42")
            assert entry is not None
            assert watermark is not None
            assert missing is None
            return {
                "vector": _read_entry({"value": entry}),
                "watermark": _read_entry({"value": watermark}),
                "app": reader.meta().app,
                "serving": asdict(reader.meta().current),  # type: ignore[arg-type]
            }
        finally:
            reader.close()


FORMATS: Final[dict[str, Format]] = {
    "events": Format(_events, _read_event, {"value": "user_event.v1.schema.json"}),
    "erasures": Format(_erasures, _read_erasure, {"value": "user_deletion.v1.schema.json"}),
    "histories": Format(_histories, _read_history),
    "claims": Format(_claims, _read_claim),
    "vectors": Format(lambda: _vectors(encode), _read_vector),
    "vectors_as_json": Format(
        lambda: _vectors(lambda record: json.dumps(to_json(record)).encode()),
        lambda parts: json.loads(_value(parts)),
        {"value": "user_embedding.v1.schema.json"},
    ),
    "dead_letters": Format(_dead_letters, _read_letter, {"headers": "dead_letter_headers.v1.schema.json"}),
    "item_versions": Format(_item_versions, _read_item_version, {"value": "item_version.v1.schema.json"}),
    "encoder_versions": Format(_encoder_versions, _read_encoder_version, {"value": "encoder_version.v1.schema.json"}),
    "statuses": Format(_statuses, _read_status, {"value": "item_status.v1.schema.json"}),
    "written_topics": Format(_written_topics, _read_written_topics, {"value": "written_topics.v1.schema.json"}),
    "names": Format(_names, _read_name),
    "store_entries": Format(_entries, _read_entry),
    "store_meta": Format(_metas, _read_meta),
    "store_sequences": Format(_sequences, _read_sequence),
    "stores": Format(_stores, _read_store, is_repeatable=False),
    "state_databases": Format(_state_databases, _read_state_database, is_repeatable=False),
    "item_folders": Format(_item_folders, _read_item_folder),
    "encoder_folders": Format(_encoder_folders, _read_encoder_folder),
    "send_progress": Format(_send_progress, _read_progress),
}
