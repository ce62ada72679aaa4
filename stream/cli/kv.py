"""The command group ``uemb kv``: care of the key-value store."""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import click

from stream.cli.terminal import err, out, print_json, progress_bar
from stream.config import Settings, load_settings
from stream.errors import StoreError
from stream.kafka.topics import topic_partitions
from stream.kv.protocol import KVWriter
from stream.kv.stores import open_reader, open_writer
from stream.security.permissions import guard

_POLL_S: Final = 0.2


@click.group()
def kv() -> None:
    """Care for the key-value store that retrieval reads."""


@kv.command()
@click.option("--partition", "partitions", type=click.IntRange(0), multiple=True, help="only this one; repeatable")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def rebuild(partitions: tuple[int, ...], as_json: bool) -> None:
    """Write every vector anew from the histories, deletions included.

    The workers that own the partitions do it beside their events. Where none runs, this command runs one until all is
    done; it needs the worker's own settings.
    """
    settings = load_settings(http="")  # a worker that is run here is nobody's to watch
    guard(settings.kv_group)
    store = open_writer(settings.kv_url)
    count = _partition_count(settings)
    wanted = sorted(set(partitions)) or list(range(count))
    if wanted[-1] >= count:
        msg = f"the store has the partitions 0 to {count - 1}"
        raise click.BadParameter(msg, param_hint="--partition")
    started = time.monotonic()
    owned = asyncio.run(_ask(store, wanted))
    with progress_bar("rebuilt", "partitions") as update:

        async def all_done() -> None:
            try:
                while left := [p for p in wanted if await store.rebuild_request(p) is not None]:
                    update(len(wanted) - len(left), len(wanted))
                    if owned and not await _any_owned(store, left):
                        msg = "the workers have stopped; the request stays, the next owner of the partitions answers it"
                        raise StoreError(msg)
                    await asyncio.sleep(_POLL_S)
            finally:
                await store.close()
            update(len(wanted), len(wanted))
            _report(wanted, time.monotonic() - started, as_json)

        if owned:
            asyncio.run(all_done())
            return
        err.print("no worker runs here: starting one until the store is rebuilt")
        from stream.logs import setup_logging
        from stream.worker.app import EmbeddingApp
        from stream.worker.run import main as run

        setup_logging("warning", settings.log_format, app=settings.app_id)
        passing = settings.model_copy(update={"group_instance_id": None})  # the group shall not wait for its return
        run(EmbeddingApp(passing), all_done)


def _partition_count(settings: Settings) -> int:
    """Partitions of the store, or of the event topics where there is no store any more."""
    try:
        reader = open_reader(settings.kv_url)
    except StoreError:
        return topic_partitions(settings, to="Read") or settings.partitions
    try:
        return reader.meta().partitions or settings.partitions
    finally:
        reader.close()


async def _ask(store: KVWriter, partitions: Sequence[int]) -> bool:
    """Ask for all of `partitions`; return whether a worker owns any of the store, which this leaves closed."""
    try:
        for partition in partitions:
            await store.ask_rebuild(partition)
        return await _any_owned(store, partitions)
    finally:
        await store.close()


async def _any_owned(store: KVWriter, partitions: Sequence[int]) -> bool:
    return any([await store.is_owned(partition) for partition in partitions])


def _report(partitions: Sequence[int], seconds: float, as_json: bool) -> None:
    if as_json:
        print_json({"partitions": list(partitions), "seconds": round(seconds, 3)})
    else:
        out.print(f"{len(partitions)} partitions rebuilt in {seconds:.1f} s")
