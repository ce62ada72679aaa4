"""The command line `uemb`: each command one function; errors are one line and an exit code, never a traceback."""

import errno
import logging
import os
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click

from stream.cli.files import FileOptions, file_options, shape_of_files
from stream.cli.terminal import as_utf8, err, out, print_json, take_any_text
from stream.config import ENV_PREFIX, Settings, load_settings, wants_json_lines
from stream.errors import ExitCode, UembError
from stream.logs import print_error

#: Commands and command groups of other modules, each under its own name there.
_ELSEWHERE: Final = {
    "acl": "stream.cli.acl",
    "bench": "stream.cli.bench.command",
    "delete": "stream.cli.delete",
    "dlq": "stream.cli.dlq.commands",
    "doctor": "stream.cli.doctor.command",
    "encoder": "stream.cli.encoder",
    "evaluate": "stream.cli.evaluate",
    "export": "stream.cli.export",
    "health": "stream.cli.health",
    "inspect": "stream.cli.inspect",
    "items": "stream.cli.items",
    "kv": "stream.cli.kv",
    "repartition": "stream.cli.repartition",
    "send": "stream.cli.send",
    "verify": "stream.cli.verify.command",
}

#: Errors of the system that no other argument mends.
_DEVICE: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


class Commands(click.Group):
    """Imports a command's module when it is asked for: half of a short command's time would go to the others'."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, in order."""
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; None when there is no such."""
        if (module := _ELSEWHERE.get(cmd_name)) is None:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(module), cmd_name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="user-embedding-stream", prog_name="uemb")
def cli() -> None:
    """Fresh user vectors for candidate retrieval: Kafka events in, versioned embeddings out.

    Settings come from UEMB_* environment variables; `uemb config` lists them.
    """


@cli.command()
@click.option(
    "--events", type=click.Path(path_type=Path), help="file or folder, as for `uemb send`, instead of MovieLens"
)
@click.option("--rate", type=float, help="events per second; default: as fast as they are processed")
@click.option("--stay", is_flag=True, help="keep broker and worker running after the summary, until Ctrl-C")
@file_options
@click.option("--json", "as_json", is_flag=True, help="print the summary as one JSON document")
def demo(events: Path | None, rate: float | None, stay: bool, look: FileOptions, as_json: bool) -> None:
    """Run the whole pipeline on real data: embedded broker, worker, key-value store, reader."""
    from stream.cli.demo.run import run_demo

    settings = load_settings()
    shape = shape_of_files(settings, look)
    sys.exit(run_demo(settings, events_file=events, shape=shape, rate=rate, stay=stay, as_json=as_json))


@cli.command()
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="workers on this host")
@click.option("--child", type=int, hidden=True, help="number of a process that another one looks after")
def worker(processes: int, child: int | None) -> None:
    """Run a worker until SIGTERM; exit 0 after a clean stop, 2 for a wrong setting, 75 if another start may help.

    With --processes, so many of them, each started again when it dies.
    """
    from stream.logs import setup_logging

    if wants_json_lines():
        setup_logging("info", "json", child)
    settings = load_settings()
    setup_logging(
        settings.log_level, settings.log_format, child, app=settings.app_id, instance=settings.group_instance_id
    )
    if child is None and processes > 1:
        from stream.worker.supervisor import supervise, worker_processes

        sys.exit(supervise(worker_processes(settings, processes)))
    from stream.worker.app import EmbeddingApp
    from stream.worker.run import main as run
    from stream.worker.supervisor import stop_when_orphaned

    if child is not None:
        stop_when_orphaned()
    run(EmbeddingApp(settings))


@cli.command()
def broker() -> None:
    """Run the embedded broker until Ctrl-C (demos and quick tests only: nothing is kept on disk)."""
    from stream.kafka.embedded_broker import DevBroker

    with DevBroker() as embedded:
        click.echo(f"export {ENV_PREFIX}BOOTSTRAP_SERVERS={embedded.bootstrap}")
        err.print("embedded broker runs; Ctrl-C stops it and forgets everything")
        done = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: done.set())
        done.wait()


@cli.command()
@click.argument("users", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="one JSON document per user, vector included")
def get(users: tuple[str, ...], as_json: bool) -> None:
    """Read the vectors of USERS from the key-value store, as retrieval does."""
    from stream.core.records import to_json
    from stream.retrieval.reader import EmbeddingReader

    logging.getLogger("stream").setLevel(logging.ERROR)  # fallbacks are on screen anyway
    with EmbeddingReader.open(load_settings().kv_url, timeout_s=1.0) as reader:
        _, found = reader.get_many(map(as_utf8, users))
    if as_json:
        for u in found:
            print_json({**to_json(_as_record(u)), "stale": u.stale, "lag_s": u.lag_s})
        return
    for u in found:
        head = " ".join(f"{x:+.3f}" for x in u.vector[:4])
        why = f" ({u.reason})" if u.reason else ""
        out.print(
            f"user {u.user_id}: {u.status}{why}, history {u.history_len} ({u.unknown_items} unknown), "
            f"as of {_time(u.as_of) or 'never'}, revision {u.epoch}.{u.revision}, {'stale' if u.stale else 'fresh'}, "
            f"vector[{len(u.vector)}] {head} …"
        )


@cli.command()
@click.option("--from-beginning", is_flag=True, help="start with what the topic holds, not with what comes next")
@click.option("-n", "count", type=int, help="stop after so many records")
@click.option("--json", "as_json", is_flag=True, help="one JSON document per record, vector included")
def tail(from_beginning: bool, count: int | None, as_json: bool) -> None:
    """Follow the embedding topic."""
    from stream.cli.follow import follow

    for key, record in follow(load_settings(), from_beginning=from_beginning, count=count):
        if as_json:
            print_json({"key": key, "record": record})
        elif record is None:
            out.print(f"{key}  gone")
        else:
            head = " ".join(f"{x:+.3f}" for x in record["user_embedding"]["vector"][:4])
            out.print(
                f"{key}  {record['epoch']}.{record['revision']}  {record['status']} {record['reason']}  "
                f"history {record['history_len']}  as of {_time(record['as_of'])}  {head} …"
            )


@cli.command()
@click.argument("file", type=click.File("rb"))
@click.option("--items", type=click.Path(path_type=Path), help="item space folder; default UEMB_ITEMS")
def embed(file: Any, items: Path | None) -> None:
    """Embed one history without Kafka: JSON with user_id, history_item_ids, history_ts, item_embedding_version."""
    from stream.cli.embed_file import MAX_INPUT_BYTES, embed_document

    settings = load_settings(items=items)
    print_json(embed_document(file.read(MAX_INPUT_BYTES + 1), settings))


def _as_record(u: Any) -> Any:
    from stream.core.records import EmbeddingRecord

    norm = float((u.vector.astype("f8") ** 2).sum()) ** 0.5
    return EmbeddingRecord(
        user_id=u.user_id,
        epoch=u.epoch,
        revision=u.revision,
        status=u.status,
        reason=u.reason,
        history_len=u.history_len,
        unknown_items=u.unknown_items,
        as_of=u.as_of,
        user_embedding_version=u.user_embedding_version or "",
        item_embedding_version=u.item_embedding_version or "",
        vector=u.vector,
        norm=norm,
    )


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def config(as_json: bool) -> None:
    """Show every setting, its value, and what it means; secrets are masked."""
    settings = load_settings()
    values = settings.model_dump(mode="json")
    if as_json:
        print_json({**values, "user_embedding_version": settings.versioned_encoder.version})
        return
    for name, field in Settings.model_fields.items():
        variable = ENV_PREFIX + name.upper()
        mark = "*" if variable in os.environ else " "
        out.print(f"{mark} {variable}={_plain(name, values[name])}  # {field.description}")
    out.print(f"# * set in the environment; user-embedding version: {settings.versioned_encoder.version}")


def _plain(name: str, value: object) -> str:
    """The value as the environment variable is written."""
    if isinstance(value, dict):
        return ",".join(f"{k}{':' if name == 'event_types' else '='}{v}" for k, v in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _time(ts_ms: int | None) -> str:
    from datetime import UTC, datetime

    try:
        return "" if ts_ms is None else datetime.fromtimestamp(ts_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):  # after the year 9999
        return f"{ts_ms} ms"


def main() -> None:
    """Entry point: translate every failure into one line and an exit code."""
    take_any_text()
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except click.ClickException as exc:
        print_error(exc.format_message())
        sys.exit(ExitCode.WRONG)
    except (KeyboardInterrupt, click.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that comes while Python ends would kill it, in its own way
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)
    except UembError as exc:
        print_error(str(exc))
        sys.exit(exc.exit_code)
    except OSError as exc:
        print_error(f"{exc.strerror or exc} {exc.filename or ''}")
        sys.exit(ExitCode.FAULT if exc.errno in _DEVICE else ExitCode.WRONG)
