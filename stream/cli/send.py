"""The command ``uemb send``: files of events to their topics, resumable, beside live traffic."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from stream.cli.files import FileOptions, file_options, shape_of_files
from stream.cli.terminal import MB, err, out, print_json, progress_bar
from stream.config import Settings, load_settings
from stream.errors import ConfigError, ExitCode
from stream.kafka.brokers import reach
from stream.kafka.connection import librdkafka_config

if TYPE_CHECKING:
    from stream.feed.dataset import Dataset
    from stream.feed.send_plan import SendPlan
    from stream.feed.send_progress import SendProgress
    from stream.feed.send_run import Outgoing
    from stream.feed.sender import SendReport
    from stream.feed.shape import FileShape

_ANY_FILE: Final = click.Path(path_type=Path, allow_dash=True)


@click.command()
@click.argument("files", nargs=-1, type=_ANY_FILE)
@click.option("--movielens", is_flag=True, help="MovieLens-100K instead of files: something to look at")
@click.option("--rate", type=float, help="events per second; default: as fast as Kafka takes them")
@file_options
@click.option("--topic", help="send all rows to this one of UEMB_EVENT_TOPICS")
@click.option("--skip-bad", is_flag=True, help="count bad rows by reason and go on, instead of ending at the first")
@click.option("--resume", is_flag=True, help="go on where an interrupted send of the same files ended")
@click.option(
    "--progress", "place", type=click.Path(path_type=Path), help="progress file; default beside the first FILE"
)
@click.option("--json", "as_json", is_flag=True, help="print what was sent as one JSON document")
def send(
    files: tuple[Path, ...],
    movielens: bool,
    rate: float | None,
    look: FileOptions,
    topic: str | None,
    skip_bad: bool,
    resume: bool,
    place: Path | None,
    as_json: bool,
) -> None:
    """Send the events of FILES to their topics: CSV, JSON lines, Parquet, or folders of them; - is standard input.

    Files look like the events on the topics (UEMB_EVENT_FIELDS, UEMB_EVENT_TS_UNIT), unless the options say otherwise;
    what is sent always looks as a worker with these settings expects it.
    """
    from stream.feed.event_files import EventFile
    from stream.feed.event_writer import EventWriter
    from stream.feed.send_plan import BEGINNING, SendPlan
    from stream.feed.sender import Feeder
    from stream.items.input_files import files_in

    if movielens == bool(files):
        msg = "name files of events, or --movielens"
        raise click.UsageError(msg)
    settings = load_settings()
    logging.getLogger("stream").setLevel(logging.ERROR)  # what the client says is part of the error
    logging.getLogger("stream.feed.send_run").setLevel(logging.WARNING)
    shape = shape_of_files(settings, look, topic)
    files = tuple(files_in(files))
    progress = None if movielens else _progress(files, settings, shape, topic, place)
    start = BEGINNING
    if progress is None and resume:
        msg = "only files can be resumed, not standard input, a pipe or --movielens"
        raise ConfigError(msg)
    if progress is not None and progress.path.exists():
        if resume:
            start = progress.load()
        else:
            err.print(f"{progress.path} is from an interrupted send: starting over; --resume would go on there")
    elif resume:
        err.print("nothing to resume: starting with the first row")
    stop = _stop_on_signals()
    plan = SendPlan(
        [_movielens(settings)] if movielens else [EventFile(file, shape, stop) for file in files],
        EventWriter(settings.rules, settings.topic_of, topic=topic),
        skip_bad=skip_bad,
        stop=stop,
    )
    finished = False
    try:
        with (
            Feeder(settings.bootstrap_servers, client_config=librdkafka_config(settings)) as feeder,
            progress_bar("sent", "events") as update,
            closing(plan.records(start)) as planned,
        ):
            reached = None if progress is None else progress.reached
            report = feeder.send_records(
                _once_reached(settings, planned), rate=rate, stop=stop, on_progress=update, on_acknowledged=reached
            )
        finished = not stop.is_set()
    finally:
        if progress is not None:
            _leave(progress, finished=finished)
    _tell(report, plan, interrupted=not finished, as_json=as_json)
    if not finished:
        sys.exit(ExitCode.INTERRUPTED)


def _movielens(settings: Settings) -> "Dataset":
    from stream.feed.sources import load

    with progress_bar("fetched", MB) as update:
        return load(settings.cache_dir, None, update, err.print)


def _once_reached(settings: Settings, records: "Iterable[Outgoing]") -> "Iterator[Outgoing]":
    """The records, the first of which is made before the brokers are asked for: a bad file is told of without them."""
    for number, record in enumerate(records):
        if not number:
            reach(settings)
        yield record


def _stop_on_signals() -> threading.Event:
    """Set by Ctrl-C or SIGTERM; a second Ctrl-C ends at once."""
    stop = threading.Event()

    def end(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    return stop


def _progress(
    files: Sequence[Path], settings: Settings, shape: "FileShape", topic: str | None, place: Path | None
) -> "SendProgress | None":
    """The progress file; None where the input can't be read again."""
    from stream.feed.send_progress import SendProgress, settings_hash
    from stream.items.input_files import PROGRESS

    if not all(file.is_file() for file in files if file.exists()) or Path("-") in files:
        if place is not None:
            msg = "--progress: only files can be resumed, not standard input or a pipe"
            raise ConfigError(msg)
        return None
    path = place or files[0].with_name(files[0].name + PROGRESS)
    if not os.access(path.parent, os.W_OK):
        if place is not None:
            msg = f"--progress: {path.parent} is no folder that can be written to"
            raise ConfigError(msg)
        err.print(f"{path.parent} can't be written to: this send can't be resumed; --progress names another place")
    return SendProgress(path, files, settings_hash(settings, shape, topic), err.print)


def _leave(progress: "SendProgress", *, finished: bool) -> None:
    if finished:
        progress.finish()
    elif progress.save():
        err.print(f"what was acknowledged is noted in {progress.path}; the same command with --resume goes on there")


def _tell(report: "SendReport", plan: "SendPlan", *, interrupted: bool, as_json: bool) -> None:
    skipped = plan.skipped
    if as_json:
        print_json(
            {
                "sent": report.sent,
                "seconds": round(report.seconds, 3),
                "interrupted": interrupted,
                "skipped": dict(sorted(skipped.items())),
            }
        )
    else:
        out.print(f"{report.sent:,} events acknowledged in {report.seconds:.1f} s")
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
        err.print(f"{skipped.total():,} bad rows skipped: {reasons}; the first is {plan.first_skipped}")
    if interrupted:
        err.print("interrupted; events that arrive twice change nothing")
