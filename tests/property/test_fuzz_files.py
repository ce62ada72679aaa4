"""Whatever files hold that others made: what is right in them, or one line that says what to do."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import BINARY_TOKENS, JSON_TOKENS, PAYLOAD, check_line, counts, file_counts, fuzz

from stream.cli import embed_file
from stream.cli.embed_file import embed_document
from stream.config import Settings, load_settings
from stream.encoders.folder import MANIFEST, open_encoder
from stream.errors import ConfigError, EncoderError, ItemSpaceError
from stream.feed.event_files import EventFile
from stream.feed.send_plan import Position
from stream.feed.send_progress import SendProgress
from stream.feed.shape import BadRow, FileShape
from stream.items.arrays import NoArray, array_header
from stream.items.space import ItemSpace
from stream.items.vector_files import pieces

T0 = 1_700_000_000_000
ROWS = np.eye(4, dtype=np.float32)
TEXT_TOKENS = (
    *(b'"', b"\n", b"\r", b"\0", b",", b";", b"\t", b" ", b"_", b"nan", b"inf", b"1e999", b"\xff", b"9" * 5_000, b"'"),
    *(b"\xe2\x80\xa8", b"\xc2\x85", b"x" * 300, b"[]", b"{", b"999999999999 999999\n", b"0 0\n", b"1e9999999"),
)
HEADER_TOKENS = (
    *(
        b"{'descr':",
        b"'|O'",
        b"'<f8'",
        b"'<U1000000000'",
        b"(10**30,)",
        b"(99999999999999999999999, 4)",
        b"(-1,)",
        b"1L",
    ),
    *(b"(" * 500, b"-" * 3_000 + b"1", b"[('a','<f4')]", b"True", b"'''", b"\\", b"(0, 4)", b"lambda", b"'m8[ns]'"),
    *(b"\x93NUMPY\x02\x00\xff\xff\xff\xff", b"\x93NUMPY\x03\x00", b"(2147483647, 4)", b"'V4'", b"\xff" * 8, b"\n"),
)
ZIP_TOKENS = (
    b"PK\1\2",
    b"PK\3\4",
    b"PK\5\6",
    b"PK\6\6",
    b"\xff" * 4,
    b"\0" * 4,
    b"../../x.npy",
    b"\x0e\x00",
    b"\x0c\x00",
)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> ItemSpace:
    return ItemSpace.save(
        tmp_path_factory.mktemp("space") / "v1", "v1", ["a", "b", PAYLOAD, "ö"], ROWS, popularity=[1, 2, 3, 4]
    )


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@counts
def test_headers_of_arrays(count: int) -> None:
    def target(data: bytes) -> None:
        try:
            header = array_header(io.BytesIO(data))
        except NoArray:
            return
        assert header.offset <= 10_012
        assert header.offset <= header.end < 1 << 62
        assert not header.dtype.hasobject

    fuzz(target, [npy(ROWS), npy(np.array(["a", "b"]))], HEADER_TOKENS, count)


@file_counts
@pytest.mark.parametrize("name", ["manifest.json", "ids.txt", "vectors.npy"])
def test_item_spaces(name: str, count: int, space: ItemSpace, tmp_path: Path) -> None:
    assert space._folder is not None
    for file in space._folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    seed = (tmp_path / name).read_bytes()

    def target(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        if name != "manifest.json":
            manifest["sha256"][name] = sha256(data).hexdigest()
            (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        try:
            found = ItemSpace.load(tmp_path)
        except ItemSpaceError as exc:
            return check_line(str(exc))
        assert found.vectors.shape == found.history_vectors.shape == (len(found.ids), found.dim)
        assert np.isfinite(found.vectors).all()
        assert [found.row(item, -1) for item in found.ids] == list(range(len(found.ids)))
        return None

    tokens = {"manifest.json": JSON_TOKENS, "ids.txt": TEXT_TOKENS, "vectors.npy": HEADER_TOKENS}
    fuzz(target, [seed], tokens[name], count // 2)


@file_counts
def test_encoders(count: int, tmp_path: Path) -> None:
    made = {"contract": 1, "features": ["mean", "last"], "item_version": "v1", "items_sha256": "ab" * 32, "dim": 4}
    seed = json.dumps({**made, "model_sha256": "cd" * 32, "type_weights": {"like": 2.0}, "about": {"x": 1}}).encode()

    def target(data: bytes) -> None:
        (tmp_path / MANIFEST).write_bytes(data)
        try:
            assert open_encoder(tmp_path).made_for.dim > 0
        except EncoderError as exc:
            check_line(str(exc))

    fuzz(target, [seed], JSON_TOKENS, count)


def npz(save: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def packed_by(method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("ids.npy"), npy(np.arange(4)), method)
        archive.writestr(zipfile.ZipInfo("vectors.npy"), npy(ROWS), method)
    return out.getvalue()


def parquet(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


CSV = f"item_id,vector_0,vector_1\na,1,2\n{PAYLOAD},3,4\n".encode()
VECTORS: dict[str, tuple[list[bytes], tuple[bytes, ...]]] = {
    "v.npz": (
        [
            npz(ids=np.array(["a", PAYLOAD]), vectors=ROWS[:2]),
            packed_by(zipfile.ZIP_LZMA),
            packed_by(zipfile.ZIP_BZIP2),
        ],
        (*HEADER_TOKENS, *ZIP_TOKENS),
    ),
    "v.csv": ([CSV, b'item_id;vector\na;"[1,2]"\nb;"[3,4]"\n'], TEXT_TOKENS),
    "v.jsonl": ([b'{"item_id": "%b", "vector": [1, 2.5]}\n' % PAYLOAD.encode() * 2], JSON_TOKENS),
    "v.txt": ([b"2 3\na 1 2 3\nb 2 3 4\n", b"a 1 2 3\n"], TEXT_TOKENS),
    "v.bin": ([b"2 2\na " + struct.pack("<2f", 1, 2) + b"\nb " + struct.pack("<2f", 3, 4)], TEXT_TOKENS),
    "v.csv.gz": ([gzip.compress(CSV)], BINARY_TOKENS),
    "v.parquet": ([parquet(item_id=["a", PAYLOAD], vector=[[1.0, 2.0], [3.0, 4.0]])], BINARY_TOKENS),
}


@file_counts
@pytest.mark.parametrize("name", VECTORS)
def test_vector_files(name: str, count: int, tmp_path: Path) -> None:
    seeds, tokens = VECTORS[name]

    def target(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        try:
            for piece in pieces(tmp_path / name, None, None, tmp_path):
                assert len(piece.ids) == len(piece.vectors)
                for why in piece.wrong.values():
                    check_line(why)
        except ConfigError as exc:
            check_line(str(exc), payload=True)  # it may name columns, or members

    fuzz(target, seeds, tokens, count)


ROW = {"user_id": PAYLOAD, "item_id": 311, "type": "view", "ts": T0}
EVENT_CSV = f"user_id,item_id,type,ts\n{PAYLOAD},1,view,{T0}\n2,3,like,{T0 + 1}\n".encode()
EVENTS: dict[str, tuple[bytes, tuple[bytes, ...], FileShape]] = {
    "csv": (EVENT_CSV, TEXT_TOKENS, FileShape()),
    "csv in seconds": (EVENT_CSV.replace(b"000\n", b".5\n"), TEXT_TOKENS, FileShape(ts_unit="s")),
    "jsonl": (json.dumps(ROW).encode() + b"\n", JSON_TOKENS, FileShape()),
    "jsonl of several": (
        json.dumps({**ROW, "items": [{"id": 3}, {"id": 4}]}).encode() + b"\n",
        JSON_TOKENS,
        FileShape({"item_id": "items[].id"}),
    ),
    "gzip": (gzip.compress(EVENT_CSV), BINARY_TOKENS, FileShape()),
    "parquet": (
        parquet(user_id=["a", PAYLOAD], item_id=[1, 2], type=["view", "like"], ts=[T0] * 2),
        BINARY_TOKENS,
        FileShape(),
    ),
}


@file_counts
@pytest.mark.parametrize("kind", EVENTS)
def test_event_files(kind: str, count: int, tmp_path: Path) -> None:
    seed, tokens, shape = EVENTS[kind]

    def target(data: bytes) -> None:
        (tmp_path / "events").write_bytes(data)
        try:
            for _, row in EventFile(tmp_path / "events", shape).rows():
                if isinstance(row, BadRow):
                    check_line(row.detail)
                    check_line(row.reason)
        except ConfigError as exc:
            check_line(str(exc), payload=True)

    fuzz(target, [seed], tokens, count)


@file_counts
def test_notes_of_a_send(count: int, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_bytes(EVENT_CSV)
    note = tmp_path / "note.json"
    progress = SendProgress(note, [tmp_path / "events.csv"], "settings", lambda _: None)
    progress.reached(Position(0, 1))
    assert progress.save()
    seed = note.read_bytes()

    def target(data: bytes) -> None:
        note.write_bytes(data)
        try:
            position = progress.load()
        except ConfigError as exc:
            return check_line(str(exc))
        assert position.file == 0
        list(EventFile(tmp_path / "events.csv").rows(position.rows))
        return None

    regressions = [seed.replace(b'"rows": 1', b'"rows": %b' % n) for n in (b"-1", b"1" + b"0" * 30)]
    regressions.append(b'{"x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}")
    fuzz(target, [seed], JSON_TOKENS, count, regressions)


@counts
@pytest.mark.parametrize("encoder", ["mix", "mix_time"])
def test_input_of_embed(encoder: str, count: int, space: ItemSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(items="loaded once", encoder=encoder)
    monkeypatch.setattr(embed_file, "ItemSpace", SimpleNamespace(load=lambda _: space))
    whole = {"user_id": "u", "history_item_ids": ["a", PAYLOAD, 5], "history_ts": [3, 1, 2]}

    def target(data: bytes) -> None:
        try:
            document = embed_document(data, settings)
        except ConfigError as exc:
            return check_line(str(exc))
        vector = document["user_embedding"]["vector"]
        assert abs(np.linalg.norm(vector) - 1) < 1e-5
        json.dumps(document, allow_nan=False)
        return None

    seeds = [json.dumps(whole).encode(), json.dumps({**whole, "item_embedding_version": "v1"}).encode()]
    lists = (
        b"[[1],[2],[3]]",
        b"[1e30,2,3]",
        b"[true,false,null]",
        b'["x","y","z"]',
        b"[1,2,%b]" % (b"9" * 30),
        b'"abc"',
    )
    regressions = [seeds[0].replace(b"[3, 1, 2]", times) for times in lists]
    fuzz(target, seeds, (*JSON_TOKENS, *lists), count, regressions)


# -- settings -----------------------------------------------------------------------------------------------------

SECRET = "sEcr3t"
SETTING_TOKENS = (
    *b"= , : / // @ % %00 [ ] [] ? # \\ . .. ~ ~nobody/ -1 0 1e999 nan inf redis +cluster rocksdb:/// s".split(),
    *(b"9" * 5_000, b"x" * 5_000, b" ", b"\t", b"\n", b"\r", "é\u202e".encode(), b"\xff"),
)
SETTINGS = {
    "kv_url": f"redis://ali:{SECRET}@host:6379/0",
    "sasl_password": SECRET,
    "event_fields": "user_id=uid,item_id=product.id,type=event,ts=at",
    "event_types": "view:1,like:2",
    "event_topics": "user-events.view,user-events.like",
    "event_type_by_topic": "user-events.view=view",
    "event_source": "from.what",
    "type_weights": "like=2.0",
    "encoder_params": "alpha_short=0.6,decay_long=0.01",
    "encoder": "mix",
    "user_version": "mine",
    "app_id": "app",
    "http": "127.0.0.1:9464",
    "erasure_marker_retention": "30d",
    "session_timeout_s": "30",
    "kv_lock_patience_s": "30",
    "hot_users": "10000",
    "history_limit": "100",
    "ssl_cafile": __file__,
    "state_dir": "~/state",
    "encoder_folder": "/srv/encoder",
}


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def target(data: bytes) -> None:
        monkeypatch.setenv(f"UEMB_{name.upper()}", data.decode("utf-8", "surrogateescape").replace("\0", ""))
        try:
            settings: Settings = load_settings()
        except ConfigError as exc:
            return check_line(str(exc).replace(SECRET, PAYLOAD))
        shown = json.dumps(settings.model_dump(mode="json"), allow_nan=False) + repr(settings)
        assert SECRET not in shown
        assert settings.versioned_encoder.version
        assert settings.rules.types
        return None

    regressions = [b"x" * 5_000, b"\xff", b"user_id=\xffid", b"1e999"]
    fuzz(target, [SETTINGS[name].encode()], SETTING_TOKENS, count, regressions)
