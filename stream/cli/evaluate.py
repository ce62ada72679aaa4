"""The command ``uemb evaluate``: what vectors find, on anyone's events."""

from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import click

from stream.cli.files import FileOptions, file_options, shape_of_files
from stream.cli.terminal import MB, PERCENT, err, out, print_json, progress_bar
from stream.config import load_settings
from stream.errors import ConfigError


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--movielens", is_flag=True, help="MovieLens-100K, which is also the default")
@click.option("--validation", is_flag=True, help="compare within the training part: for choosing parameters")
@click.option("--dim", type=click.IntRange(1), default=48, show_default=True, help="dimensions of the vectors")
@click.option("--share", type=float, default=0.8, show_default=True, help="part of the stream, by time, to learn from")
@click.option("--cases", type=click.IntRange(1), default=6_000, show_default=True, help="how many events to predict")
@click.option("--seed", type=int, default=0, show_default=True, help="of ties, the choice of cases, and resampling")
@file_options
@click.option("--figure", type=click.Path(path_type=Path), help="also draw it: .png, .svg or .pdf (needs matplotlib)")
@click.option("--markdown", "as_markdown", is_flag=True, help="print tables in Markdown")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def evaluate(
    file: Path | None,
    movielens: bool,
    validation: bool,
    dim: int,
    share: float,
    cases: int,
    seed: int,
    look: FileOptions,
    figure: Path | None,
    as_markdown: bool,
    as_json: bool,
) -> None:
    """Say which vectors find what users do next, in FILE of events (as `uemb send` reads it) or MovieLens.

    Learns from the earlier part of the events, and predicts of each later one its item, among all that its user has
    not seen. Intervals resample users; gains are paired, with the seed's mixture on one table. Three times: as ordered;
    with events of one user and time in random order; and with histories that are strictly older.
    """
    from stream.feed.sources import load
    from stream.learning import evaluate as learning
    from stream.learning.histories import split_by_time
    from stream.learning.report import COLUMNS, MEANING, cells, markdown, save_figure, stale_rows, summary

    if file is not None and movielens:
        msg = "name a file of events or --movielens, not both"
        raise ConfigError(msg)
    settings = load_settings()
    with progress_bar("fetched", MB) as update:
        data = load(settings.cache_dir, file, update, err.print, shape=shape_of_files(settings, look))
    try:
        events = split_by_time(data.events, share)[0] if validation else data.events
        with progress_bar("evaluated", PERCENT) as update:
            report = learning.evaluate(events, dim=dim, share=share, cases=cases, seed=seed, on_progress=update)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    if figure is not None:
        save_figure(report, figure)
    if as_json:
        print_json({"data": data.name, "validation": validation, "seed": seed, **asdict(report)})
        return
    if as_markdown:
        click.echo(markdown(report), nl=False)
        return
    out.print(f"{data.name}: {summary(report)}")
    for reading, rows in groupby(report.rows, key=lambda row: row.reading):
        _print_table(MEANING[reading], COLUMNS, [cells(row) for row in rows])
    heading, stale = stale_rows(report)
    if stale:
        _print_table("what age costs", heading, stale)
    for method, why in report.left_out.items():
        out.print(f"left out: {method}, which {why}")


def _print_table(title: str, heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Columns side by side, whole, however wide the terminal is."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    out.print()
    out.print(title)
    for first, *others in (heading, *rows):
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        out.print("  ".join((first.ljust(widths[0]), *cells)))
