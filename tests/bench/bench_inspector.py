"""What the inspector costs: how soon its page is there, and whether a worker notices that somebody looks.

``python tests/bench/bench_inspector.py``, on an idle machine: a worker on a real Kafka, events at a rate, a reader in a
process of its own that waits for each vector. Rounds without an inspector take turns with rounds with one whose news
are read, as by a page on another machine, and with one whose page is open in a browser on this machine, which draws it
without a graphics card.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from browser import Inspector, Tab, chromium
from kafka_broker import KafkaBroker
from pipeline import Pipeline
from scraping import ANY_PORT, Scraped

from stream.feed.movielens import movielens
from stream.feed.sender import Feeder
from stream.learning.build import build_space
from stream.retrieval.reader import EmbeddingReader


def measured(pipeline: Pipeline, events: list, rate: float) -> list[float]:
    """Milliseconds from the sending of each event until its effect was read."""
    found = []
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder, EmbeddingReader.open(pipeline.kv_url) as reader:
        for row in events:
            began = time.perf_counter()
            before = reader.get(row.user_id)
            feeder.send([row])
            while (now := reader.get(row.user_id)).revision == before.revision and now.epoch == before.epoch:
                if time.perf_counter() - began > 5:
                    break
                time.sleep(0.0003)
            else:
                found.append(1000 * (time.perf_counter() - began))
            time.sleep(max(0.0, 1 / rate - (time.perf_counter() - began)))
    return found


def main() -> None:
    """Print medians, with what they are of."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=1_500, help="events of a round")
    parser.add_argument("--rate", type=float, default=50.0, help="events per second")
    parser.add_argument("--tabs", type=int, default=100)
    options = parser.parse_args()
    films = movielens()
    with tempfile.TemporaryDirectory() as folder, KafkaBroker() as kafka, chromium() as browser:
        build_space(films.events, Path(folder) / "items", "films_v1")
        pipeline = Pipeline(
            kafka.bootstrap, f"b{os.urandom(4).hex()}", Path(folder), Path(folder) / "items", http=ANY_PORT
        )
        try:
            pipeline.start()
            pipeline.until_ready()
            with Feeder(kafka.bootstrap, pipeline.topics) as feeder:
                feeder.send(films.events[:80_000])
            pipeline.until_committed()
            rows = iter(films.events[80_000:])
            found: dict[str, list[list[float]]] = {"without": [], "with a stream": [], "with a page": []}

            def measure(name: str) -> None:
                events = [next(rows) for _ in range(options.events)]
                found[name].append(measured(pipeline, events, options.rate))

            for _ in range(options.rounds):
                measure("without")
                with Inspector(pipeline, [Scraped(pipeline).address]) as inspector:
                    with urllib.request.urlopen(
                        f"{inspector.url}api/news"
                    ) as stream:  # as of a page on another machine
                        reading = threading.Thread(target=read_to_the_end, args=(stream,), daemon=True)
                        reading.start()
                        measure("with a stream")
                    tab = Tab(browser, inspector.url)
                    tab.open()
                    tab.until("document.querySelector('#link').textContent === 'live'", "live")
                    measure("with a page")
                    tab.close()
            report = {"events": options.events * options.rounds, "rate": options.rate, "ms": {}}
            for name, rounds in found.items():
                report["ms"][name] = {
                    q: statistics.median(round(float(np.percentile(one, float(q[1:]))), 2) for one in rounds)
                    for q in ("p50", "p99")
                }
            alone = report["ms"]["without"]["p99"]
            report["p99_ratio"] = {name: round(of["p99"] / alone, 3) for name, of in report["ms"].items()}
            with Inspector(pipeline, [Scraped(pipeline).address]) as inspector:
                report.update(page(browser, inspector, options.tabs))
                report["cpu_share_of_a_core"] = cpu(inspector, 10)
                report["told_s"] = told(browser, inspector, pipeline, kafka)
        finally:
            pipeline.close()
    print(json.dumps(report, indent=1))


def read_to_the_end(stream: Iterable[bytes]) -> None:
    """Take what comes until it is closed."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # closed meanwhile
        for _ in stream:
            pass


def page(browser: object, inspector: Inspector, tabs: int) -> dict:
    """How soon the page shows numbers, and what many of them take."""
    loads = []
    for _ in range(7):
        tab = Tab(browser, inspector.url)  # type: ignore[arg-type]
        began = time.perf_counter()
        tab.page.goto(inspector.url)
        tab.until("document.querySelectorAll('section[aria-label=Partitions] tbody tr').length", "numbers")
        loads.append(time.perf_counter() - began)
        tab.close()
    memory = inspector.memory_mb()
    tab = Tab(browser, inspector.url)  # type: ignore[arg-type]
    tab.open("letters")
    pages = [tab.context.new_page() for _ in range(tabs - 1)]
    for one in pages:
        one.goto(f"{inspector.url}#letters", wait_until="commit")
    time.sleep(5)
    sockets, more = inspector.sockets(), inspector.memory_mb() - memory
    tab.close()
    return {
        "page_s": round(statistics.median(loads), 2),
        "memory_mb": round(memory),
        "tabs": tabs,
        "sockets_of_all_tabs": sockets,
        "memory_of_all_tabs_mb": round(more, 1),
    }


def told(browser: object, inspector: Inspector, pipeline: Pipeline, kafka: KafkaBroker) -> dict[str, float]:
    """How soon the page says that brokers stand still, and that a worker was killed."""
    tab = Tab(browser, inspector.url)  # type: ignore[arg-type]
    tab.open()
    fine = "document.querySelector('#troubles').hidden && document.querySelector('#link').textContent === 'live'"
    found = {}
    for what, fault, says in (
        ("brokers stand still", kafka.pause, "the brokers do not answer"),
        ("a worker is killed", pipeline.kill, "partitions are stale"),
    ):
        tab.until(fine, "all is well")
        began = time.perf_counter()
        fault()
        tab.until(f"document.querySelector('#troubles').innerText.includes({says!r})", says)
        found[what] = round(time.perf_counter() - began, 2)
        if fault == kafka.pause:
            kafka.resume()
    tab.close()
    return found


def cpu(inspector: Inspector, seconds: float) -> float:
    """What it takes while a page is not even open."""

    def used() -> float:
        fields = Path(f"/proc/{inspector.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(seconds)
    return round((used() - before) / seconds, 3)


if __name__ == "__main__":
    main()
