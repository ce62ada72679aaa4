"""Bytes per user: in the changelog, on the worker's disk and in the store, for each kind of id."""

from pathlib import Path
from typing import Final

from stream.bench.load import IDS, ITEM_VERSION, Load
from stream.bench.throughput import Stage
from stream.encoders import REASONS
from stream.keys import user_cache_key
from stream.records import PREFIX_BYTES, RecordEncoder

_USERS: Final = 5_000


def measure_footprint(stage: Stage) -> dict[str, dict[str, float]]:
    """Restore users with full histories into a worker and look at what it holds; by kind of id."""
    found: dict[str, dict[str, float]] = {}
    for kind, make in IDS.items():
        load = Load(users=_USERS, length=stage.load.length, items=2_000, dim=stage.load.dim, user_id=make, item_id=make)
        folder = stage.folder / f"footprint-{kind}"
        folder.mkdir()
        own = Stage(stage.settings, f"{stage.prefix}.{kind}", folder, load, stage.partitions)
        own.prepare()
        system, _ = own.worker("worker")
        with system:
            system.until_claimed(stage.partitions)
            system.stop()
        states = [len(user) + len(state) for user, state in load.states(stage.settings)]
        entry = _entry_bytes(stage, load)
        found[kind] = {
            "changelog_bytes_per_user": sum(states) / len(states),
            "disk_bytes_per_user": _folder_bytes(folder / "worker" / "state-0") / _USERS,
            "store_bytes_per_user": entry,
        }
    return found


def _entry_bytes(stage: Stage, load: Load) -> float:
    """Key and value of a user in the store."""
    encoder = stage.settings.versioned_encoder
    records = RecordEncoder(encoder.version, ITEM_VERSION, load.dim)
    user = load.user_id(_USERS // 2)
    vector = bytes(4 * load.dim)
    body = records.avro(user.encode(), 1, load.length, REASONS[0], load.length, 0, 1_700_000_000_000, 1.0, vector)
    return len(user_cache_key(user, ITEM_VERSION, encoder.version)) + PREFIX_BYTES + len(body)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.suffix in (".sst", ".log"))
