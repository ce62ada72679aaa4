"""`uemb demo`: embedded broker, worker, key-value store and reader on one machine, fed with real interactions."""

import csv
import logging
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from confluent_kafka import Consumer, TopicPartition
from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table

from stream.cli.demo.process import PARTITIONS, Pipeline, Stop, interruptible
from stream.cli.terminal import MB, PERCENT, PlainConsole, err, print_json, progress_bar
from stream.config import ENV_PREFIX, Settings
from stream.core.events import EventRow
from stream.errors import ConfigError, ItemSpaceError, UembError
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.feed.shape import FileShape
from stream.feed.sources import load
from stream.foreign_text import escaped
from stream.inspector.titles import COLUMNS
from stream.items.space import ItemSpace
from stream.kafka.embedded_broker import DevBroker
from stream.learning.build import build_space
from stream.retrieval.answers import UserEmbedding
from stream.retrieval.reader import EmbeddingReader

#: Events at the end of the stream that are sent one by one, to see how soon each can be read.
LIVE_EVENTS: Final = 200
SHOWN_USERS: Final = 3
SHOWN_ITEMS: Final = 5
MIN_PAST: Final = 10
#: Records on their way at most; the embedded broker drops what nobody has read for 5 MB.
OUTSTANDING: Final = 20_000
DRAIN_TIMEOUT_S: Final = 120.0
LIVE_TIMEOUT_S: Final = 5.0
_LIVE_RATE: Final = 50.0
_DIM: Final = 48
_ITEM_VERSION: Final = "demo_v1"

out = PlainConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Taste:
    """What a user's vector points to: titles of the nearest items."""

    status: str
    nearest: list[str]


@dataclass(frozen=True)
class Summary:
    """What the demo measured and saw."""

    data: str
    synthetic: bool
    users: int
    sent: int
    processed: int
    dead_letters: int
    seconds: float
    users_readable: int
    latency_ms: dict[str, float]
    shown: list[dict[str, Any]]
    kv_url: str


def run_demo(
    settings: Settings, *, events_file: Path | None, shape: FileShape, rate: float | None, stay: bool, as_json: bool
) -> int:
    """Run the demo; return the exit code."""
    folder = settings.cache_dir / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True, mode=0o700)
    except OSError as exc:
        msg = f"UEMB_CACHE_DIR {settings.cache_dir} can't be used ({exc.strerror})"
        raise ConfigError(msg) from exc
    logging.getLogger("stream").setLevel(logging.ERROR)  # a fallback for a user not seen yet is no news here
    with interruptible() as stop:
        data = _load(settings, events_file, shape)
        space = _build_items(data, folder / "items")
        with DevBroker() as broker:
            pipeline = Pipeline(broker.bootstrap, folder, folder / "items", sorted({row.type for row in data.events}))
            stop.callbacks.append(pipeline.kill)
            try:
                pipeline.wait_until_ready(stop)
                summary = _feed_and_watch(data, space, pipeline, broker, rate, stop)
                if as_json:
                    print_json(summary.__dict__)
                else:
                    _show(summary)
                    _show_how_to_go_on(summary, broker, stay=stay)
                if stay:
                    err.print(f"look at it:          {pipeline.inspect(_write_titles(data, folder), stop)}")
                    stop.wait()
            finally:
                pipeline.stop()
    return 0


def _feed_and_watch(
    data: Dataset,
    space: ItemSpace,
    pipeline: Pipeline,
    broker: DevBroker,
    rate: float | None,
    stop: Stop,
) -> Summary:
    live = data.events[-min(LIVE_EVENTS, max(1, len(data.events) // 10)) :]
    bulk = data.events[: len(data.events) - len(live)]
    users = list(dict.fromkeys(row.user_id for row in data.events))
    titles = [data.titles.get(item.decode(), item.decode()) for item in space.ids]
    shown = _users_to_show(bulk, live)
    reading = EmbeddingReader.open(pipeline.kv_url, fallback=space, timeout_s=1.0)
    with Feeder(broker.bootstrap) as feeder, reading as reader:
        began = time.monotonic()
        _send_bulk(feeder, bulk, pipeline, rate, stop)
        seconds = time.monotonic() - began
        before = {user: _taste(reader.get(user), space, titles) for user in shown}
        latencies = _send_live(feeder, live, reader, pipeline, stop)
        _await_processed(pipeline, len(data.events), stop)
        after = {user: _taste(reader.get(user), space, titles) for user in shown}
        readable = sum(found.status == "ok" for found in reader.get_many(users)[1])
        processed = pipeline.processed()
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (float("nan"),) * 2
    return Summary(
        data=data.name,
        synthetic=data.synthetic,
        users=len(users),
        sent=len(data.events),
        processed=processed,
        dead_letters=_dead_letters(broker),
        seconds=round(seconds, 2),
        users_readable=readable,
        latency_ms={"p50": round(float(p50), 2), "p99": round(float(p99), 2), "events": len(latencies)},
        shown=[_shown(user, data, live, before[user], after[user]) for user in shown],
        kv_url=pipeline.kv_url,
    )


def _users_to_show(bulk: Sequence[EventRow], live: Sequence[EventRow]) -> list[str]:
    """Users of the live tail with a past and the most news, so that before and after differ visibly."""
    past, news = Counter(row.user_id for row in bulk), Counter(row.user_id for row in live)
    return sorted(news, key=lambda user: (past[user] < MIN_PAST, -news[user]))[:SHOWN_USERS]


def _send_bulk(feeder: Feeder, bulk: Sequence[EventRow], pipeline: Pipeline, rate: float | None, stop: Stop) -> None:
    """Send all but the live tail while a display shows how far things are."""
    sent, users = [0], {row.user_id for row in bulk}
    failure: list[Exception] = []

    def feed() -> None:
        try:
            feeder.send(
                bulk,
                rate=rate,
                pace=lambda: OUTSTANDING - (sent[0] - pipeline.processed()),
                stop=stop.event,
                on_progress=lambda done, _: sent.__setitem__(0, done),
            )
        except UembError as exc:
            failure.append(exc)

    thread = threading.Thread(target=feed, name="feeder")
    began = time.monotonic()
    thread.start()
    try:
        with Live(console=err, refresh_per_second=8, transient=True) as display:
            while thread.is_alive() or pipeline.processed() < sent[0]:
                stop.check()
                pipeline.check()
                done, elapsed = pipeline.processed(), time.monotonic() - began
                display.update(
                    f"sent {sent[0]:,}/{len(bulk):,}  processed {done:,}  {done / elapsed:,.0f}/s  "
                    f"lag {max(0, sent[0] - done):,}  users {len(users):,}"
                )
                time.sleep(0.1)
    finally:
        if failure or thread.is_alive():
            stop.event.set()
        thread.join()
    if failure:
        raise failure[0]
    elapsed = time.monotonic() - began
    err.print(
        f"processed {len(bulk):,} events of {len(users):,} users in {elapsed:.1f} s ({len(bulk) / elapsed:,.0f}/s)"
    )


def _send_live(
    feeder: Feeder, live: Sequence[EventRow], reader: EmbeddingReader, pipeline: Pipeline, stop: Stop
) -> list[float]:
    """Send events one at a time; return milliseconds from each send until its effect was read."""
    latencies = []
    for row in live:
        stop.check()
        pipeline.check()
        before = _order(reader.get(row.user_id))
        began = time.perf_counter()
        feeder.send([row])
        while time.perf_counter() - began < LIVE_TIMEOUT_S:
            if _order(reader.get(row.user_id)) > before:
                latencies.append((time.perf_counter() - began) * 1000)
                break
            time.sleep(0.0002)
        time.sleep(max(0.0, 1 / _LIVE_RATE - (time.perf_counter() - began)))
    return latencies


def _order(found: UserEmbedding) -> tuple[int, int]:
    return found.epoch, found.revision


def _await_processed(pipeline: Pipeline, count: int, stop: Stop) -> None:
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while pipeline.processed() < count:
        stop.check()
        pipeline.check()
        if time.monotonic() > deadline:
            msg = f"only {pipeline.processed()} of {count} events were processed within {DRAIN_TIMEOUT_S:g} s"
            raise UembError(msg)
        time.sleep(0.02)


def _load(settings: Settings, events_file: Path | None, shape: FileShape) -> Dataset:
    with progress_bar("MovieLens-100K fetched" if events_file is None else f"reading {events_file}", MB) as update:
        data = load(settings.cache_dir, events_file, update, err.print, shape=shape)
    err.print(f"{data.name}: {len(data.events):,} events of {len({e.user_id for e in data.events}):,} users")
    return data


def _build_items(data: Dataset, folder: Path) -> ItemSpace:
    dim = _DIM
    with progress_bar("learning item vectors", PERCENT) as update:
        while True:
            try:
                space = build_space(data.events, folder, _ITEM_VERSION, dim=dim, on_progress=update, on_note=err.print)
                break
            except ItemSpaceError:  # few items fill few dimensions
                if dim == 1:
                    raise
                dim //= 2
    err.print(f"item vectors: {len(space):,} items, {space.dim} dimensions, from the first 80 % of the stream")
    return space


def _taste(found: UserEmbedding, space: ItemSpace, titles: Sequence[str]) -> Taste:
    rows, _ = space.nearest(found.vector[None], SHOWN_ITEMS)
    return Taste(found.status, [titles[row] for row in rows[0].tolist()])


def _shown(user: str, data: Dataset, live: Sequence[EventRow], before: Taste, after: Taste) -> dict[str, Any]:
    mine = [data.titles.get(row.item_id, row.item_id) for row in data.events if row.user_id == user]
    new = sum(row.user_id == user for row in live)
    return {
        "user": user,
        "last_items": mine[-SHOWN_ITEMS:],
        "new_events": new,
        "nearest_before": before.nearest,
        "nearest_after": after.nearest,
    }


def _show(summary: Summary) -> None:
    for shown in summary.shown:
        table = Table(
            "last seen",
            "nearest before",
            "nearest after",
            title=escaped(f"user {shown['user']}: {shown['new_events']} new events"),
            title_justify="left",
            box=SIMPLE_HEAD if out.is_terminal else None,
        )
        last = list(reversed(shown["last_items"]))
        for row in zip(last, shown["nearest_before"], shown["nearest_after"], strict=False):
            table.add_row(*map(escaped, row))
        out.print(table)
    latency = summary.latency_ms
    out.print(
        f"{summary.data}: {summary.sent:,} events sent, {summary.processed:,} processed, {summary.dead_letters} dead "
        f"letters; {summary.users_readable:,} of {summary.users:,} users have a vector of their own"
    )
    out.print(
        f"event to readable vector, in another process: p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms "
        f"({latency['events']} events, one by one)"
    )


def _write_titles(data: Dataset, folder: Path) -> Path:
    """A table of what items are called, as the inspector reads it."""
    path = folder / "titles.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *sorted(data.titles.items())])
    return path


def _show_how_to_go_on(summary: Summary, broker: DevBroker, *, stay: bool) -> None:
    user = summary.shown[0]["user"] if summary.shown else "42"
    out.print()
    out.print(f"ask for a vector:    {ENV_PREFIX}KV_URL={summary.kv_url} uemb get {user}")
    if stay:
        out.print(f"follow the topic:    {ENV_PREFIX}BOOTSTRAP_SERVERS={broker.bootstrap} uemb tail")
        out.print("Ctrl-C stops broker and worker")
    else:
        out.print("look at it:          uemb demo --stay   (a page; and `uemb tail` follows the topic, as it says)")


def _dead_letters(broker: DevBroker) -> int:

    consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "demo-count", "log_level": 2})
    try:
        places = [TopicPartition("user-events.dlq", partition) for partition in range(PARTITIONS)]
        return sum(consumer.get_watermark_offsets(place, timeout=5)[1] for place in places)
    finally:
        consumer.close()
