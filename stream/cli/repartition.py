"""The command ``uemb repartition``: more partitions for an application."""

import time
from dataclasses import asdict

import click

from stream.cli.terminal import err, out, print_json
from stream.config import load_settings
from stream.kv.stores import check_place
from stream.security.permissions import guard


@click.command()
@click.option("--partitions", type=click.IntRange(1, 10_000), required=True, help="how many there shall be")
@click.option("--dry-run", is_flag=True, help="only say what would grow")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def repartition(partitions: int, dry_run: bool, as_json: bool) -> None:
    """Raise all input topics, changelog and output to so many partitions, and move every user to the new place.

    Stop all workers before, and start them with UEMB_PARTITIONS unset or equal after. Producers may go on: what they
    sent to a place that is no more the user's becomes a dead letter (wrong_partition), for `uemb dlq replay`. A run
    that was interrupted is made again; until one has ended well, no worker starts.
    """
    from stream.worker.repartition import Repartition

    began = time.monotonic()
    settings = load_settings()
    guard(settings.kv_group)
    check_place(settings.kv_url, settings.kv_group)
    work = Repartition(settings, partitions, err.print)
    if dry_run:
        grown = {topic: {"from": count, "to": partitions} for topic, count in work.grown.items()}
        if as_json:
            print_json({"partitions": partitions, "topics": grown})
        else:
            for topic, counts in grown.items():
                out.print(f"{topic}: {counts['from']} → {counts['to']} partitions")
            out.print("nothing was changed")
        return
    moved = work.run()
    if as_json:
        print_json({"partitions": partitions, **asdict(moved), "seconds": round(time.monotonic() - began, 3)})
        return
    out.print(
        f"{partitions} partitions; moved: {moved.states} histories, {moved.records} records of the output, "
        f"{moved.entries} entries of the store, {moved.erasures} erasures that were not read yet"
    )
    out.print("start the workers, then `uemb dlq replay --reason wrong_partition`, then `uemb verify`")
