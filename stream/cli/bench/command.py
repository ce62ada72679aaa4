"""``uemb bench``: measures the worker on the broker that the settings name."""

import logging
import os
import platform
import tempfile
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import click

from stream.cli.terminal import err, out, print_json
from stream.config import load_settings
from stream.kafka.connection import librdkafka_config
from stream.kafka.grants import BENCH_PREFIX

_RATES: Final = (50.0, 3_000.0)


@click.command()
@click.option("--quick", is_flag=True, help="about two minutes instead of six")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def bench(quick: bool, as_json: bool) -> None:
    """Measure the worker beside a plain Faust agent, and its latency, memory and disk, on your broker.

    Uses topics of its own on the broker in UEMB_BOOTSTRAP_SERVERS and removes them. Wants the machine to itself.
    """
    from stream.cli.bench.footprint import measure_footprint
    from stream.cli.bench.grants import check_grants
    from stream.cli.bench.load import Load, delete_topics
    from stream.cli.bench.throughput import Setup, Sizes, compare

    settings = load_settings()
    logging.getLogger("stream").setLevel(logging.ERROR)
    check_grants(settings)
    sizes = Sizes(peer_events=5_000, sweep_events=2_000) if quick else Sizes()
    prefix = f"{BENCH_PREFIX}{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix=BENCH_PREFIX) as folder:
        setup = Setup(settings, prefix, Path(folder), Load())
        try:
            found = compare(setup, sizes, err.print)
            found["latency"] = latencies(setup, 8.0 if quick else 30.0)
            found["bytes_per_user"] = measure_footprint(setup)
        finally:
            delete_topics(librdkafka_config(settings), prefix)
    found["machine"] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "faust_streaming": version("faust-streaming"),
        "load": f"{setup.load.users} users with {setup.load.length} interactions, {setup.load.dim} dimensions",
    }
    if as_json:
        print_json(found)
    else:
        show(found)


def latencies(setup: Any, seconds: float) -> dict[str, Any]:
    """Latency at each rate, of one worker that runs throughout."""
    from stream.cli.bench.latency import measure_latency

    system, _ = setup.worker("latency")
    with system:
        system.until_claimed(setup.partitions)
        setup.until_read(system)
        return {f"{rate:g}_per_s": measure_latency(setup, setup.kv_url("latency"), rate, seconds) for rate in _RATES}


def show(found: dict[str, Any]) -> None:
    """The result for people."""
    peer = found["plain_faust"]
    out.print(
        f"worker       {found['events_per_s']:>9,.0f} events/s  {found['cpu_us_per_event']:>7.1f} µs CPU per event"
    )
    out.print(f"plain Faust  {peer['events_per_s']:>9,.0f} events/s  {peer['cpu_us_per_event']:>7.1f} µs CPU per event")
    out.print(
        f"ratio {found['ratio_to_plain_faust']:.1f} in events/s  {found['cpu_ratio_to_plain_faust']:.1f} in CPU"
        f" (medians of alternating rounds; {found['users_checked_equal']} users' vectors checked equal before)"
    )
    for rate, figures in found["latency"].items():
        out.print(
            f"event to readable in another process at {rate}: "
            f"p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms ({figures['probes']} probes)"
        )
    for kind, sizes in found["bytes_per_user"].items():
        out.print(
            f"bytes per user with {kind} ids: changelog {sizes['changelog_bytes_per_user']:,.0f}, "
            f"disk {sizes['disk_bytes_per_user']:,.0f}, store {sizes['store_bytes_per_user']:,.0f}"
        )
    out.print(f"peak memory of the worker: {found['peak_memory_bytes'] / 2**20:,.0f} MiB")
