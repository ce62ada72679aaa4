"""What the table asks of the worker without a peer: its growth, its size, its restores, its readers, its processes."""

import asyncio
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from bench_reader import fill, make_records, measure
from supervised import children, owners

from stream.cli.bench.footprint import measure_footprint
from stream.cli.bench.process import BenchError, Ends, System, cpu_s_of
from stream.cli.bench.throughput import Setup
from stream.retrieval.reader import EmbeddingReader

#: How many processes share the work; each has a core of its own in the figure, whatever this machine has.
PROCESSES: Final = (1, 2, 4)
_ASKED: Final = 1_000
_PATIENCE_S: Final = 120.0


def many_users(setup: Setup, events: int) -> dict[str, float]:
    """Seconds to restore all users onto an empty disk, and peak memory in MB once events of many of them are done."""
    setup.prepare()
    setup.feed(events, 0)
    system, output = setup.worker("many")
    began_s = time.perf_counter()
    ends = Ends(setup.client, setup.partitions)
    with system:
        system.until_claimed(setup.partitions)
        restored_s = time.perf_counter() - began_s
        system.until_count(ends, output, events)
        peak = system.peak_bytes()
    ends.close()
    return {"restored_s": restored_s, "peak_mb": peak / 1e6}


def footprint(setup: Setup) -> dict[str, float]:
    """Bytes of a user with integer ids."""
    return measure_footprint(setup)["integer"]


def reader_us(folder: Path, users: int) -> float:
    """Microseconds a user of `get_many`, for a thousand of so many in RocksDB."""
    url = f"rocksdb://{folder}/kv"
    asyncio.run(fill(url, make_records(users, 48)))
    with EmbeddingReader.open(url) as reader:
        names = [str(100_000 + n) for n in range(0, users, users // _ASKED)][:_ASKED]
        return measure(lambda: reader.get_many(names), 3.0, len(names))["wall_us"]


def processes(setup: Setup, events: int) -> dict[str, float]:
    """What a process of N does of one by itself if each has a core, N being the key; the busiest of them counts.

    CPU is what is measured: this machine need not have so many cores. All work off a backlog that is written while they
    are frozen, for the first to start would have done much of it before the last one joins.
    """
    busiest: dict[int, float] = {}
    for count in PROCESSES:
        (folder := setup.folder / str(count)).mkdir()
        own = replace(setup, prefix=f"{setup.prefix}-{count}", folder=folder)
        own.prepare()
        ends = Ends(own.client, own.partitions)
        system, output = own.worker("worker", processes=count)
        with system:
            _until_shared(system, folder / "worker" / "log-0", own.partitions, count)
            pids = [system.pid] if count == 1 else children(system.pid)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            own.feed(events, 0)
            before = [cpu_s_of(pid) for pid in pids]
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            system.until_count(ends, output, events)
            spent = [cpu_s_of(pid) - at for pid, at in zip(pids, before, strict=True)]
        ends.close()
        busiest[count] = max(spent) * 1e6 / events
        print(f"{count} processes: the busiest takes {busiest[count]:.1f} us for each event of all", flush=True)
    return {str(count): busiest[1] / (count * us) for count, us in busiest.items()}


def _until_shared(system: System, log: Path, partitions: int, processes: int) -> None:
    """Wait until each process owns as many partitions as any other."""
    end_s = time.monotonic() + _PATIENCE_S
    while True:
        shares = Counter(owned := owners(log.read_text()))
        if len(owned) == partitions and sorted(shares.values()) == [partitions // processes] * processes:
            return
        system.check()
        if time.monotonic() > end_s:
            msg = f"{processes} processes do not share {partitions} partitions: {dict(shares)}"
            raise BenchError(msg)
        time.sleep(0.1)


def summary(found: dict[str, Any]) -> dict[str, float]:
    """Figures by the names of the table's targets."""
    growth, sizes, many = found["growth"], found["footprint"], found["many"]
    return {
        "the step at 1,000 interactions against 100, hot": growth["1,000 interactions"]["hot_ratio"],
        "the step at 1,000 interactions against 100, cold": growth["1,000 interactions"]["cold_ratio"],
        "the step at 10 million items against 20,000, hot": growth["10 million items"]["hot_ratio"],
        "the step at 10 million items against 20,000, cold": growth["10 million items"]["cold_ratio"],
        "get_many(1000) of 1 million users, us each": found["reader_us"],
        "restore of 1 million users, s": many["restored_s"],
        "memory with 1 million users, MB": many["peak_mb"],
        "bytes of a user, changelog": sizes["changelog_bytes_per_user"],
        "bytes of a user, local disk": sizes["disk_bytes_per_user"],
        "one of 2 processes against one alone": found["processes"]["2"],
        "one of 4 processes against one alone": found["processes"]["4"],
    }
