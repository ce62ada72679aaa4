"""The command ``uemb verify``: does every store hold what the input adds up to?"""

import sys

import click

from stream.config import load_settings
from stream.errors import ConfigError
from stream.terminal import out, print_json, progress_bar

DIFFERS = 1


@click.command()
@click.option("--partition", "partitions", type=click.IntRange(0), multiple=True, help="only this one; repeatable")
@click.option(
    "--patience",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="seconds to look again at users who are not in order, per partition",
)
@click.option("--no-store", is_flag=True, help="leave the key-value store out (a RocksDB on another host)")
@click.option("--show", type=click.IntRange(0), default=20, show_default=True, help="differences to print")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def verify(partitions: tuple[int, ...], patience: float, no_store: bool, show: int, as_json: bool) -> None:
    """Compare changelog, output topic and store with what the input topics add up to; exit 1 if anything differs.

    Works beside running workers: what is being processed is looked at again, and counted as busy if it stays so. Where
    retention has cut the input off, a user's state must contain what is left of it, and the vector follow from the
    state. Needs the settings of the workers; reads only.
    """
    from stream.items import ItemSpace
    from stream.kv.urls import open_reader
    from stream.verify import Verifier

    settings = load_settings()
    if settings.items is None:
        msg = "UEMB_ITEMS is not set; point it to the item space folder that the workers serve"
        raise ConfigError(msg)
    space = ItemSpace.load(settings.items)
    reader = None if no_store else open_reader(settings.kv_url)
    try:
        verifier = Verifier(settings, space, reader, patience_s=patience, keep=show)
        if partitions and max(partitions) >= verifier.partitions:
            msg = f"the topics have the partitions 0 to {verifier.partitions - 1}"
            raise click.BadParameter(msg, param_hint="--partition")
        with progress_bar("verified, thousandths of partitions") as update:
            report = verifier.run(sorted(set(partitions)), update)
    finally:
        if reader is not None:
            reader.close()
    if as_json:
        document = {name: value for name, value in report.__dict__.items() if name != "differences"}
        differences = [difference.__dict__ for difference in report.differences]
        print_json({"ok": report.ok, **document, "differences": differences})
    else:
        for difference in report.differences:
            out.print(f"partition {difference.partition}, {difference.who}: {difference.what}", markup=False)
        letters = f"{report.rejected:,} rejected records, {report.letterless:,} of them without a dead letter"
        out.print(
            f"{report.users:,} users: {report.whole:,} checked against their input, {report.partial:,} against their "
            f"state and what is left of it; {report.busy:,} busy, {report.differ:,} differ\n"
            f"{letters if report.letters_checked else 'dead letters were not checked: retention took some'}"
        )
    if not report.ok:
        sys.exit(DIFFERS)
