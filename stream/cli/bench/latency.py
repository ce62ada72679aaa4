"""From an event's send to the moment at which another process reads the vector that it caused; open loop.

Events go out at a fixed rate whatever becomes of them. Some are probes: another process polls the store until it reads
a vector whose `as_of` is the probe's event time. What the polling adds, and a slow sender, are part of the figure.
"""

import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np
from confluent_kafka import Producer

from stream.cli.bench.process import BenchError
from stream.cli.bench.throughput import Setup
from stream.retrieval.reader import EmbeddingReader

#: Probes are of users of their own, so that no other event can bring their `as_of` forward.
PROBE_USERS: Final = 500
PROBES_PER_S: Final = 40.0
_POLL_S: Final = 0.0005
_PATIENCE_S: Final = 10.0


def _watch(kv_url: str, probes: Connection, results: Connection) -> None:
    """Poll for probes (user, as_of, sent at) until None comes; send the seconds that each took."""
    waiting: dict[str, tuple[int, float]] = {}
    took: list[float] = []
    open_ended, last_at = True, 0.0
    with EmbeddingReader.open(kv_url, timeout_s=1.0) as reader:
        results.send(None)
        while open_ended or waiting:
            while probes.poll(_POLL_S if not waiting else 0):
                probe = probes.recv()
                if probe is None:
                    open_ended, last_at = False, time.monotonic()
                    break
                user, as_of, sent_at = probe
                waiting[user] = (as_of, sent_at)
            if waiting:
                users = list(waiting)
                _, found = reader.get_many(users)
                now = time.monotonic()
                for user, answer in zip(users, found, strict=True):
                    as_of, sent_at = waiting[user]
                    if answer.as_of is not None and answer.as_of >= as_of:
                        took.append(now - sent_at)
                        del waiting[user]
                time.sleep(_POLL_S)
            if not open_ended and time.monotonic() - last_at > _PATIENCE_S:
                break
    results.send((took, len(waiting)))


def measure_latency(setup: Setup, kv_url: str, rate: float, seconds: float, hot: float = 0.0) -> dict[str, Any]:
    """Send at `rate` for `seconds` to a running worker; return percentiles in ms.

    Args:
        setup: where.
        kv_url: the worker's store.
        rate: events per second.
        seconds: how long.
        hot: share of the events that one single user causes.

    Raises:
        BenchError: a probe was never read.
    """
    context = multiprocessing.get_context("spawn")
    probes_in, probes_out = context.Pipe(duplex=False)
    results_in, results_out = context.Pipe(duplex=False)
    watcher = context.Process(target=_watch, args=(kv_url, probes_in, results_out), daemon=True)
    watcher.start()
    results_in.recv()
    sent = send(setup, rate, seconds, hot, probes_out.send)
    probes_out.send(None)
    took, missing = results_in.recv()
    watcher.join()
    if missing or not took:
        msg = f"{missing} of {missing + len(took)} probes were never read"
        raise BenchError(msg)
    p50, p90, p99 = (1e3 * np.percentile(took, [50, 90, 99])).tolist()
    return {"events_per_s": sent / seconds, "probes": len(took), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}


def send(setup: Setup, rate: float, seconds: float, hot: float, probe: Callable[[Any], None]) -> int:
    """Send at `rate` for `seconds`, calling `probe` with (user, as_of, sent at) of some; return how many were sent."""
    producer = Producer(
        {**setup.client, "partitioner": "murmur2_random", "linger.ms": 0, "acks": "all", "log_level": 0}
    )
    rng = np.random.default_rng(3)
    count = int(rate * seconds)
    users, items = rng.integers(setup.load.users, size=count), rng.integers(setup.load.items, size=count)
    users[rng.random(count) < hot] = 0
    every = max(1, round(rate / PROBES_PER_S))
    started = time.monotonic()
    for n, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        while (early := started + n / rate - time.monotonic()) > 0:
            producer.poll(0)
            time.sleep(min(early, 0.001))
        now_ms = time.time_ns() // 1_000_000
        is_probe = n % every == 0
        user_id = f"probe-{n // every % PROBE_USERS}" if is_probe else setup.load.user_id(user)
        event = {"user_id": user_id, "item_id": setup.load.item_id(item), "type": "view", "ts": now_ms}
        if is_probe:
            probe((user_id, now_ms, time.monotonic()))
        producer.produce(setup.events, json.dumps(event).encode(), user_id.encode())
        producer.poll(0)
    producer.flush()
    return count
