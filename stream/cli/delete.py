"""The command ``uemb delete``: erase users, and say where traces of them may lie for a while."""

import json
import time
from dataclasses import asdict
from typing import Final

import click

from stream.cli.terminal import as_utf8, out, print_json, progress_bar
from stream.cli.traces import Trace, traces
from stream.config import Settings, load_settings
from stream.errors import ConfigError, DeliveryError
from stream.kafka.brokers import BY_KEY, producer, write_all
from stream.keys import canonical_id
from stream.retrieval.reader import EmbeddingReader

_TIMEOUT_S: Final = 20.0
_POLL_S: Final = 0.1
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3_600, 86_400


@click.command()
@click.argument("users", nargs=-1, required=True)
@click.option("--wait", is_flag=True, help="return when the store no longer holds their vectors")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0), default=60.0, show_default=True, help="for --wait")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def delete(users: tuple[str, ...], wait: bool, timeout_s: float, as_json: bool) -> None:
    """Erase USERS: all that they did up to now (and 5 minutes), in history, vectors and store, and whenever it comes.

    What they do afterwards begins a new history. Prints where traces may still be found, and until when.
    """
    settings = load_settings()
    try:
        ids = [canonical_id(as_utf8(user)) for user in users]
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    found = traces(settings)
    _send(settings, ids)
    if wait:
        _wait(settings, ids, timeout_s)
    if as_json:
        print_json({"erased": len(ids), "traces": [asdict(trace) for trace in found]})
        return
    out.print(f"{len(ids)} erasures sent to {settings.deletion_topic}; traces that remain:")
    for trace in found:
        out.print(f"  {trace.where}: {trace.what}, {_until(trace)}")


def _until(trace: Trace) -> str:
    if trace.longest_s is None:
        return trace.bound
    for unit, size in (("days", _DAY_S), ("hours", _HOUR_S), ("minutes", _MINUTE_S)):
        if trace.longest_s >= 2 * size:
            return f"for {trace.longest_s / size:.0f} {unit} at most ({trace.bound})"
    return f"for {trace.longest_s:.0f} seconds at most ({trace.bound})"


def _send(settings: Settings, ids: list[str]) -> None:
    writer = producer(settings, {"partitioner": "murmur2_random", "acks": "all"})
    ts_ms = time.time_ns() // 1_000_000
    records = [(user.encode(), BY_KEY, json.dumps({"user_id": user, "ts": ts_ms}).encode()) for user in ids]
    write_all(writer, settings.deletion_topic, records, _TIMEOUT_S, "send the erasures again")


def _wait(settings: Settings, ids: list[str], timeout_s: float) -> None:
    """Return when no user is served from before the erasure any more.

    Raises:
        DeliveryError: that took longer.
    """
    deadline = time.monotonic() + timeout_s
    with EmbeddingReader.open(settings.kv_url, timeout_s=1.0) as reader, progress_bar("erased", "users") as update:
        while True:
            _, found = reader.get_many(ids)
            left = sum(user.reason not in ("erased", "missing") for user in found)
            update(len(ids) - left, len(ids))
            if not left:
                return
            if time.monotonic() > deadline:
                msg = f"{left} of {len(ids)} users are not erased after {timeout_s:g} s; see whether a worker runs"
                raise DeliveryError(msg)
            time.sleep(_POLL_S)
