"""``uemb inspect``: a page that shows how fresh vectors are, and why a user has the one that they have."""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import click

from stream.cli.terminal import err
from stream.config import Address, Settings, load_settings
from stream.errors import ExitCode
from stream.logs import setup_logging


@click.command()
@click.option("--address", metavar="HOST:PORT", help="where to serve the page  [default: UEMB_INSPECT]")
@click.option(
    "--worker",
    "workers",
    multiple=True,
    metavar="HOST:PORT",
    help="a worker to look at; repeatable, also HOST:PORT-PORT",
)
@click.option("--titles", type=click.Path(path_type=Path), help="what items are called: a table with item_id and title")
@click.option("--name", "names", multiple=True, metavar="HOST", help="a name that a proxy in between is reached under")
def inspect(address: str | None, workers: tuple[str, ...], titles: Path | None, names: tuple[str, ...]) -> None:
    """Serve a page that shows how fresh vectors are, and why a user has the one that they have, until Ctrl-C.

    It reads topics, the store and workers' metrics, and writes nothing. On any address but this machine's own it
    needs UEMB_INSPECT_TOKEN, or a file with it.
    """
    settings = load_settings()
    setup_logging(settings.log_level, settings.log_format)
    where = settings.inspect if address is None else _address(address)
    asyncio.run(
        _serve(
            settings,
            Address.parse(where),
            workers or settings.inspect_workers or _own_worker(settings),
            titles or settings.inspect_titles,
            names,
        )
    )
    # Threads that wait for brokers who do not answer would hold the end up.
    sys.stderr.flush()
    os._exit(ExitCode.OK)


async def _serve(
    settings: Settings, address: Address, workers: tuple[str, ...], titles: Path | None, names: tuple[str, ...]
) -> None:
    from stream.inspector.inspector import Inspector
    from stream.inspector.server import Server
    from stream.inspector.titles import read_titles

    inspector = Inspector(settings, workers, {} if titles is None else read_titles(titles))
    server = Server(inspector, address, settings.secret("inspect_token"), names)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        inspector.start()
        found = await server.start()
        err.print(f"inspector: http://{found}/  (Ctrl-C stops it)")
        await stopped.wait()
    finally:
        await server.stop()
        await asyncio.to_thread(inspector.stop)


def _address(text: str) -> str:
    try:
        return str(Address.parse(text))
    except ValueError as exc:
        raise click.BadParameter(str(exc), param_hint="--address") from exc


def _own_worker(settings: Settings) -> tuple[str, ...]:
    """Where the settings have a worker listen."""
    http = settings.http_address
    if http is None or not http.port:
        logging.getLogger(__name__).warning("no worker is looked at: UEMB_HTTP names no port; see --worker")
        return ()
    return (str(http),)
