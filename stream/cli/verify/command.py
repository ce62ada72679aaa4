"""The command ``uemb verify``: does every store hold what the input adds up to?"""

import sys

import click

from stream.cli.rollouts import rollout_client
from stream.cli.terminal import PERCENT, out, print_json, progress_bar
from stream.cli.verify.run import Report, Verifier
from stream.errors import ConfigError, ExitCode
from stream.kv.stores import open_reader
from stream.rollout.client import pairs_of


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
@click.option("--item-version", help="only this one  [default: every pair of versions that is published]")
@click.option("--user-version", help="only this one")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def verify(
    partitions: tuple[int, ...],
    patience: float,
    no_store: bool,
    show: int,
    item_version: str | None,
    user_version: str | None,
    as_json: bool,
) -> None:
    """Compare changelog, output topic and store with what the input topics add up to; exit 1 if anything differs.

    Works beside running workers: what is being processed is looked at again, and counted as busy if it stays so. Where
    retention has cut the input off, a user's state must contain what is left of it, and the vector follow from the
    state. Needs the settings of the workers; reads only.
    """
    with rollout_client() as (settings, control):
        pairs = [
            pair
            for pair in pairs_of(settings, control)
            if item_version in (None, pair.space.version) and user_version in (None, pair.encoder.version)
        ]
    if not pairs:
        msg = "no such pair of versions is published; see `uemb items status` and `uemb encoder status`"
        raise ConfigError(msg)
    reader = None if no_store else open_reader(settings.kv_url)
    reports: dict[str, Report] = {}
    try:
        for pair in pairs:
            name = ":".join(pair.versions)
            verifier = Verifier(settings, pair, reader, patience_s=patience, keep=show)
            if partitions and max(partitions) >= verifier.partitions:
                msg = f"the topics have the partitions 0 to {verifier.partitions - 1}"
                raise click.BadParameter(msg, param_hint="--partition")
            with progress_bar(f"verified {name}", PERCENT) as update:
                reports[name] = verifier.run(sorted(set(partitions)), update)
    finally:
        if reader is not None:
            reader.close()
    ok = all(report.ok for report in reports.values())
    if as_json:
        print_json({"ok": ok, "pairs": {name: _document(report) for name, report in reports.items()}})
    else:
        for name, report in reports.items():
            _print(name, report)
    if not ok:
        sys.exit(ExitCode.FAULT)


def _document(report: Report) -> dict[str, object]:
    fields = {name: value for name, value in report.__dict__.items() if name != "differences"}
    return {"ok": report.ok, **fields, "differences": [difference.__dict__ for difference in report.differences]}


def _print(name: str, report: Report) -> None:
    for difference in report.differences:
        out.print(f"partition {difference.partition}, {difference.who}: {difference.what}")
    letters = f"{report.rejected:,} rejected records, {report.letterless:,} of them without a dead letter"
    out.print(
        f"{name}: {report.users:,} users, {report.whole:,} checked against their input, "
        f"{report.partial:,} against their state and what is left of it; {report.busy:,} busy, "
        f"{report.differ:,} differ\n"
        f"{letters if report.letters_checked else 'dead letters were not checked: retention took some'}",
    )
