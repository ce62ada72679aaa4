"""The state of the pipeline at this moment, put together from what the sources have seen; no I/O."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from stream.inspector.letters import LettersView
from stream.inspector.sources import Reading
from stream.inspector.store import Sign, StoreView
from stream.inspector.versions import PairView, VersionsView
from stream.inspector.workers import Page, WorkerView, by_label, quantile, total
from stream.retrieval.staleness import HEARTBEAT_S

#: What was seen longer ago than this is shown as stale, and said so.
SILENT_S: Final = 2.0
#: A worker writes a sign of life a second, as old as the brokers' last answer, which may take another second.
STALE_HEARTBEAT_S: Final = 3.0
#: Partitions that are listed; of more, the worst.
LISTED: Final = 200
_MS: Final = 1000.0
_AGE: Final = "uemb_event_age_seconds"


def snapshot(
    now_ms: int,
    workers: Reading[list[WorkerView]],
    store: Reading[StoreView],
    versions: Reading[VersionsView],
    letters: Reading[LettersView],
) -> dict[str, Any]:
    """What is known, as plain values, each part with its age.

    Args:
        now_ms: wall clock, epoch ms.
        workers: what they say of themselves.
        store: what it says.
        versions: what the control and status topics say.
        letters: dead letters.
    """
    views = workers.seen or []
    answering = [view for view in views if view.last is not None]
    partitions = _partitions(now_ms, views, store, versions.seen)
    stale = [row["partition"] for row in partitions if row["stale"]]
    serving = _serving(store.seen, versions.seen)
    return {
        "at_ms": now_ms,
        "sources": {
            name: _source(reading)
            for name, reading in (
                ("workers", workers),
                ("store", store),
                ("versions", versions),
                ("letters", letters),
            )
        },
        "rates": _rates(views),
        "workers": [_worker(view) for view in views],
        "silent_workers": len(views) - len(answering),
        "partitions": sorted(partitions, key=_urgency)[:LISTED],
        "partition_count": len(partitions),
        "stale_partitions": len(stale),
        "worst_lag_s": max((row["lag_s"] for row in partitions if row["lag_s"] is not None), default=None),
        "least_silence_s": min(
            (s for row in partitions if row["stale"] and (s := row["heartbeat_s"]) is not None), default=None
        ),
        "store": _store(store),
        "serving": serving,
        "rollout": [_pair(pair, serving) for pair in versions.seen.pairs] if versions.seen else [],
        "letters": _letters(letters.seen),
    }


def _source(reading: Reading[Any]) -> dict[str, Any]:
    known = reading.seen is not None
    return {
        "age_s": round(reading.age_s, 2) if known else None,
        "error": reading.error,
        "stale": not known or reading.age_s > SILENT_S or reading.error is not None,
    }


def _rates(views: Sequence[WorkerView]) -> dict[str, Any]:
    """Events per second, and how soon they could be read, over the last seconds; None where nobody tells."""
    answering = [view for view in views if view.last is not None]
    if not answering:
        return {"events_per_s": None, "dead_per_s": None, "p50_ms": None, "p99_ms": None}
    classes: dict[float, float] = defaultdict(float)
    for view in answering:
        for bound, count in view.grown(_AGE).items():
            classes[bound] += count
    p50, p99 = (quantile(q, classes) for q in (0.5, 0.99))
    return {
        "events_per_s": sum(view.per_second("uemb_records_total") for view in answering),
        "dead_per_s": sum(view.per_second("uemb_dead_letters_total") for view in answering),
        "p50_ms": None if p50 is None else p50 * _MS,
        "p99_ms": None if p99 is None else p99 * _MS,
    }


def _worker(view: WorkerView) -> dict[str, Any]:
    page = view.last
    if page is None:
        return {"address": view.address, "answers": False, "ready": False, "reasons": [view.error or "not asked yet"]}
    owned = by_label(page.samples, "uemb_partition_owned", "partition")
    return {
        "address": view.address,
        "answers": True,
        "ready": page.ready,
        "reasons": list(page.reasons),
        "events_per_s": view.per_second("uemb_records_total"),
        "cpu": view.per_second("process_cpu_seconds_total"),
        "memory_bytes": total(page.samples, "process_resident_memory_bytes"),
        "partitions": sum(1 for is_one in owned.values() if is_one),
        "taking": sum(1 for is_one in owned.values() if not is_one),
        "build": dict(next(iter(page.samples.get("uemb_build_info", {})), ())).get("version"),
    }


def _partitions(
    now_ms: int, views: Sequence[WorkerView], store: Reading[StoreView], versions: VersionsView | None
) -> list[dict[str, Any]]:
    """A row for each partition: who owns it, how far behind it is, and how old the last sign of life in the store."""
    seen = store.seen
    count = len(seen.signs) if seen is not None else 0
    count = max(count, versions.partitions if versions is not None else 0)
    rows: dict[int, dict[str, Any]] = {n: _row(n) for n in range(count)}
    if seen is not None:
        for n, told in enumerate(seen.signs):
            if told is not None:
                _add_watermark(rows[n], now_ms, told, store.age_s)
    silent: set[int] = set()
    for view in views:
        if view.last is not None:
            _add_worker(rows, view.address, view.last)
        else:
            silent |= view.owned
    for row in rows.values():
        is_left = row["owner"] is None and row["partition"] in silent  # its owner fell silent, and nobody has taken it
        is_old = row["heartbeat_s"] is None or row["heartbeat_s"] > STALE_HEARTBEAT_S
        row["stale"] = is_left or is_old or store.age_s > SILENT_S
    return list(rows.values())


def _row(partition: int) -> dict[str, Any]:
    names = ("owner", "epoch", "lag_records", "lag_s", "heartbeat_s", "restoring")
    return {"partition": partition, **dict.fromkeys(names)}


def _add_watermark(row: dict[str, Any], now_ms: int, sign: Sign, age_s: float) -> None:
    """What the store vouched for `age_s` ago; while it hears nothing, what is behind grows, as readers see it."""
    by_clock_s = max(0, now_ms - sign.watermark.heartbeat_ms) / _MS
    silent_s = by_clock_s if sign.changed_s is None else sign.changed_s + age_s
    row["epoch"] = sign.epoch
    row["heartbeat_s"] = round(silent_s, 2)
    row["lag_s"] = round(sign.watermark.lag_ms / _MS + max(0.0, silent_s - HEARTBEAT_S), 3)


def _add_worker(rows: dict[int, dict[str, Any]], address: str, page: Page) -> None:
    """What a worker says of its partitions; of two that claim one, the later claim counts."""
    samples = page.samples
    epochs = by_label(samples, "uemb_partition_epoch", "partition")
    records = by_label(samples, "uemb_lag_records", "partition")
    left = by_label(samples, "uemb_restore_remaining_records", "partition")
    seconds: dict[str, float] = {}
    for labels, value in samples.get("uemb_lag_seconds", {}).items():
        name = dict(labels).get("partition", "")
        seconds[name] = max(value, seconds.get(name, 0.0))
    for name, is_owned in by_label(samples, "uemb_partition_owned", "partition").items():
        row = rows.setdefault(int(name), _row(int(name)))
        epoch = int(epochs.get(name, 0))
        if not is_owned:
            row["restoring"] = int(left.get(name, 0))
            row["owner"] = row["owner"] or address
        elif row["owner"] is None or epoch >= (row["epoch"] or 0):
            row.update(owner=address, epoch=max(epoch, row["epoch"] or 0))
            row["lag_records"] = int(records[name]) if name in records else None
            row["lag_s"] = seconds.get(name, row["lag_s"])


def _urgency(row: Mapping[str, Any]) -> tuple[bool, float, int]:
    return not row["stale"], -(row["lag_s"] or 0.0), row["partition"]


def _store(store: Reading[StoreView]) -> dict[str, Any]:
    problem = store.error or (store.seen.error if store.seen is not None else "it was not looked at yet")
    return {"answers": problem is None and store.age_s <= SILENT_S, "error": problem}


def _serving(store: StoreView | None, versions: VersionsView | None) -> dict[str, Any]:
    """The pair that readers follow, as the store says it, and the one that is to be served."""
    current = store.meta.current if store is not None else None
    wanted = versions.served if versions is not None else None
    served = None if current is None else (current.user_version, current.item_version)
    return {
        "user_version": None if served is None else served[0],
        "item_version": None if served is None else served[1],
        "wanted": None if wanted is None or wanted == served else list(wanted),
    }


def _pair(pair: PairView, serving: Mapping[str, Any]) -> dict[str, Any]:
    is_read = pair.versions == (serving["user_version"], serving["item_version"])
    state = pair.state if pair.state != "served" else "wanted"  # until readers follow it
    return {
        "user_version": pair.user_version,
        "item_version": pair.item_version,
        "state": "served" if is_read else state,
        "refused": pair.refused,
        **pair.progress,
    }


def _letters(letters: LettersView | None) -> dict[str, Any]:
    """How many there are, and how many came of late: who sees one change asks for the rest."""
    if letters is None:
        return {"count": None, "written": None}
    return {"count": sum(letters.counts.values()), "written": letters.written}
