"""What readers tell a registry: every answer once, by status and reason, and how long calls took."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from stream import AsyncEmbeddingReader, EmbeddingReader, MemoryStore, get_or_build_user_embedding
from stream.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore("films", "mix-1", fallback=[0.6, 0.8])
    made.put("42", [1.0, 0.0])
    return made


def answers(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    found = [s for family in registry.collect() for s in family.samples if s.name == "uemb_reader_requests_total"]
    return {(s.labels["status"], s.labels["reason"]): s.value for s in found}


def calls(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("uemb_reader_seconds_count")


def test_every_answer_is_counted_and_every_call_is_timed(store: MemoryStore) -> None:
    registry = CollectorRegistry()
    with EmbeddingReader.open(store.url, timeout_s=30, registry=registry) as reader:
        assert answers(registry) == {}
        reader.get("42")
        reader.get_many(["42", "43", "44"])
        reader.get_pair("42", "other", "mix-1")
        get_or_build_user_embedding("42", "films", "mix-1", reader=reader)
        assert answers(registry) == {("ok", ""): 3, ("fallback", "missing"): 2, ("fallback", "version_missing"): 1}
        assert calls(registry) == 4
        assert reader.fallbacks == {"missing": 2, "version_missing": 1}
    reader.get("42")
    assert answers(registry)["fallback", "store_down"] == 1
    seconds = registry.get_sample_value("uemb_reader_seconds_sum")
    assert seconds is not None
    assert 0 < seconds < 30


async def test_the_reader_of_an_event_loop_tells_the_same(store: MemoryStore) -> None:
    registry = CollectorRegistry()
    async with await AsyncEmbeddingReader.open(store.url, timeout_s=30, registry=registry) as reader:
        await reader.get("42")
        await reader.get_many(["42", "43"])
        await reader.get_pair("42", "other", "mix-1")
    assert answers(registry) == {("ok", ""): 2, ("fallback", "missing"): 1, ("fallback", "version_missing"): 1}
    assert calls(registry) == 3


def test_stale_answers_are_counted(store: MemoryStore) -> None:
    registry = CollectorRegistry()
    with EmbeddingReader.open(store.url, timeout_s=30, registry=registry, clock=lambda: 4e9) as reader:
        is_stale = reader.get("42").stale
        assert registry.get_sample_value("uemb_reader_stale_total") == int(is_stale)


def test_readers_share_a_registry(store: MemoryStore) -> None:
    registry = CollectorRegistry()
    with (
        EmbeddingReader.open(store.url, timeout_s=30, registry=registry) as one,
        EmbeddingReader.open(store.url, timeout_s=30, registry=registry, user_version="mix-1") as other,
        EmbeddingReader.open(store.url, timeout_s=30, registry=CollectorRegistry()) as apart,
    ):
        for reader in (one, other, apart):
            reader.get("42")
    assert answers(registry) == {("ok", ""): 2}


def test_a_registry_with_others_of_that_name_is_refused(store: MemoryStore) -> None:
    registry = CollectorRegistry()
    Gauge("uemb_reader_seconds", "somebody else's", registry=registry)
    with pytest.raises(ConfigError, match="give readers one of their own"):
        EmbeddingReader.open(store.url, registry=registry)


def test_a_child_counts_though_its_parent_was_counting(store: MemoryStore) -> None:
    registry = CollectorRegistry()
    with EmbeddingReader.open(store.url, timeout_s=30, registry=registry) as reader:
        metrics = reader._state._metrics
        assert metrics is not None
        with metrics._lock:
            child = os.fork()
            if child == 0:
                reader.get("42")
                os._exit(0 if answers(registry) == {("fallback", "store_down"): 1} else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_without_a_registry_nobody_loads_the_client() -> None:
    code = (
        "import sys\nfrom stream import *\n"
        "store = MemoryStore('films', 'mix-1', fallback=[0.6, 0.8])\n"
        "with EmbeddingReader.open(store.url, timeout_s=30) as reader: reader.get('42')\n"
        "assert 'prometheus_client' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
