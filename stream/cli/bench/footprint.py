"""Bytes per user: in the changelog, on the worker's disk and in the store, for each kind of id."""

from pathlib import Path
from typing import Final

import numpy as np

from stream.cli.bench.load import IDS, ITEM_VERSION, Load
from stream.cli.bench.throughput import Setup
from stream.core.records import PREFIX_BYTES, EmbeddingRecord, encode
from stream.keys import user_cache_key

_USERS: Final = 5_000


def measure_footprint(setup: Setup) -> dict[str, dict[str, float]]:
    """Restore users with full histories into a worker and look at what it holds; by kind of id."""
    found: dict[str, dict[str, float]] = {}
    for kind, make in IDS.items():
        load = Load(users=_USERS, length=setup.load.length, items=2_000, dim=setup.load.dim, user_id=make, item_id=make)
        folder = setup.folder / f"footprint-{kind}"
        folder.mkdir()
        own = Setup(setup.settings, f"{setup.prefix}.{kind}", folder, load, setup.partitions)
        own.prepare()
        system, _ = own.worker("worker")
        with system:
            system.until_claimed(setup.partitions)
            system.stop()
        states = [len(user) + len(state) for user, state in load.states(setup.settings)]
        entry = _entry_bytes(setup, load)
        found[kind] = {
            "changelog_bytes_per_user": sum(states) / len(states),
            "disk_bytes_per_user": _folder_bytes(folder / "worker" / "state-0") / _USERS,
            "store_bytes_per_user": entry,
        }
    return found


def _entry_bytes(setup: Setup, load: Load) -> float:
    """Key and value of a user in the store."""
    encoder = setup.settings.versioned_encoder
    user = load.user_id(_USERS // 2)
    body = encode(
        EmbeddingRecord(
            user_id=user,
            epoch=1,
            revision=load.length,
            status="ok",
            reason="",
            history_len=load.length,
            unknown_items=0,
            as_of=1_700_000_000_000,
            user_embedding_version=encoder.version,
            item_embedding_version=ITEM_VERSION,
            vector=np.zeros(load.dim, dtype=np.float32),
            norm=1.0,
        )
    )
    return len(user_cache_key(user, ITEM_VERSION, encoder.version)) + PREFIX_BYTES + len(body)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.suffix in (".sst", ".log"))
