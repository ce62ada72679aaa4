"""What a program imports: the names that are promised, and that reading loads no Kafka client."""

import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import stream
from stream import extras
from stream.cli import main
from stream.extras import need_worker

ROOT = Path(__file__).resolve().parents[2]
KAFKA = {"faust", "mode", "aiokafka", "confluent_kafka"}
#: What services that read vectors don't install, or load for themselves only.
NOT_FOR_READERS = {*KAFKA, "numba", "llvmlite", "scipy", "threadpoolctl", "click", "rich", "pydantic", "pydantic_core"}
NOT_FOR_READERS |= {"pydantic_settings", "prometheus_client", "onnxruntime", "pyarrow", "matplotlib", "sklearn"}

FACES = {
    "stream": {
        "AsyncEmbeddingReader",
        "ConfigError",
        "CorruptRecord",
        "EmbeddingReader",
        "ItemSpace",
        "ItemSpaceError",
        "MemoryStore",
        "StoreError",
        "UembError",
        "UnknownItemError",
        "UserEmbedding",
        "UserMatrix",
        "get_or_build_user_embedding",
        "get_or_build_user_embedding_async",
    },
    "stream.embedding": {
        "build_user_embedding",
        "fallback_user_embedding",
        "l2_normalize",
        "make_user_features",
        "safe_take_item_emb",
        "user_embed_avg",
        "user_embed_learned",
        "user_embed_mix",
    },
    "stream.items": {"ItemSpace"},
    "stream.records": {"CorruptRecord", "EmbeddingRecord", "decode", "encode", "kv_entry", "to_json"},
    "stream.retrieval": {
        "AsyncEmbeddingReader",
        "EmbeddingReader",
        "UserEmbedding",
        "UserMatrix",
        "get_or_build_user_embedding",
        "get_or_build_user_embedding_async",
    },
}


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after `code`."""
    code = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return set(json.loads(out.splitlines()[-1]))


@pytest.mark.parametrize("face", FACES)
def test_a_face_exports_what_is_promised_and_no_more(face: str) -> None:
    module = import_module(face)
    assert set(module.__all__) == FACES[face]
    assert len(module.__all__) == len(FACES[face])


@pytest.mark.parametrize(("face", "name"), [(face, name) for face in FACES for name in sorted(FACES[face])])
def test_each_member_can_be_imported_and_says_what_it_is(face: str, name: str) -> None:
    member = getattr(import_module(face), name)
    assert member.__name__ == name
    assert (inspect.getdoc(member) or "").strip()


def test_a_name_is_one_thing_in_all_faces() -> None:
    for name in FACES["stream"]:
        assert len({id(getattr(import_module(face), name)) for face in FACES if name in FACES[face]}) == 1


def test_the_face_shows_its_members_and_has_no_others() -> None:
    assert FACES["stream"] <= set(dir(stream))
    with pytest.raises(AttributeError, match="module 'stream' has no attribute 'Embeddingreader'"):
        _ = stream.Embeddingreader


def test_the_package_alone_loads_nothing() -> None:
    before, after = loaded_by(""), loaded_by("import stream; dir(stream)")
    assert after - before <= {"stream", "importlib", "typing", *sys.stdlib_module_names}
    assert "numpy" not in after


def test_reading_through_the_face_loads_no_kafka_client() -> None:
    loaded = loaded_by(
        "from stream import *\n"
        "store = MemoryStore('items_v1', 'mix-1', fallback=[0.6, 0.8])\n"
        "store.put('42', [1.0, 0.0])\n"
        "with EmbeddingReader.open(store.url, timeout_s=30) as reader:\n"
        "    assert reader.get('42').status == 'ok'\n"
    )
    assert "numpy" in loaded
    assert not NOT_FOR_READERS & loaded


@pytest.mark.parametrize("reader", ["rocksdb.reader", "redis.reader", "redis.cluster_reader"])
def test_no_reader_of_a_store_loads_what_services_do_without(reader: str) -> None:
    loaded = loaded_by(f"from stream import *; import stream.kv.{reader}")
    assert reader.partition(".")[0].replace("rocksdb", "rocksdict") in loaded
    assert not NOT_FOR_READERS & loaded


def test_who_needs_the_worker_and_lacks_it_is_told_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    need_worker("uemb")
    monkeypatch.setattr(extras, "_missing", lambda: ("no_such_module",))
    text = "uemb needs no_such_module, which readers do without: pip install 'user-embedding-stream[worker]'"
    with pytest.raises(ImportError, match=re.escape(text)):
        need_worker("uemb")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


def test_what_workers_need_is_found_where_faust_came_first() -> None:
    loaded_by("import faust; from stream.extras import need_worker; need_worker('faust -A stream.app')")


def test_no_store_loads_the_library_of_another() -> None:
    loaded = loaded_by("from stream import MemoryStore; MemoryStore('i', 'u', fallback=[1.0])")
    assert not {"rocksdict", "redis", *KAFKA} & loaded
