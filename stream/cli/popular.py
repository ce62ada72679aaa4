"""The command ``uemb items popular``: a popularity list for candidates when a user has no vector."""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stream.cli.files import FileOptions, file_options, shape_of_files
from stream.cli.terminal import out, print_json, progress_bar
from stream.config import Settings, load_settings
from stream.errors import ConfigError

if TYPE_CHECKING:
    from stream.core.events import EventRow


@click.command("popular")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--version", help="name of the new list, [A-Za-z0-9._-]{1,64}; required with FILES")
@click.option("--half-life-days", type=click.FloatRange(0, min_open=True), help="age at which an event counts half")
@click.option("--type-weights", help="what an event of a type counts, like=2,view=0.5; types not listed count 1")
@file_options
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, help="how many items to show")
@click.option("--json", "as_json", is_flag=True, help="print the list as one JSON document")
def items_popular(
    folder: Path,
    files: tuple[Path, ...],
    version: str | None,
    half_life_days: float | None,
    type_weights: str | None,
    look: FileOptions,
    top: int,
    as_json: bool,
) -> None:
    """Count the events of FILES (as `uemb send` reads them) into a popularity list of FOLDER, and show the top items.

    Each interaction should be in the files once. Types that histories do not admit (UEMB_EVENT_TYPES) do not count:
    what was merely shown is not what was liked. Neither vectors nor manifest of the item version change. Without FILES
    the present list is shown.
    """
    from stream.items.popularity import write_popularity
    from stream.items.space import ItemSpace

    settings = load_settings()
    space = ItemSpace.load(folder)
    facts: dict[str, Any] = {}
    if files:
        if version is None:
            msg = "name the new list with --version"
            raise ConfigError(msg)
        weights = _weights(settings, type_weights)
        made = write_popularity(
            folder,
            space,
            version,
            _events(files, settings, look),
            type_weights=weights,
            half_life_days=half_life_days,
        )
        as_of = datetime.fromtimestamp(made.as_of / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        facts = {
            "events": made.events,
            "not_counted": made.not_counted,
            "unknown_items": made.unknown_items,
            "as_of": made.as_of if as_json else as_of,
        }
    elif version or half_life_days or type_weights or look != FileOptions():
        msg = "name the files of events to count, or leave the options out to see the present list"
        raise ConfigError(msg)
    popular = space.popular(top)
    facts = {"version": space.version, "popularity_version": space.popularity_version, **facts}
    if as_json:
        print_json({**facts, "items": [{"item_id": item, "score": score} for item, score in popular]})
        return
    out.print("  ".join(f"{name} {value}" for name, value in facts.items()))
    for item, score in popular:
        out.print(f"{score:14,.1f}  {item}")


def _weights(settings: Settings, type_weights: str | None) -> dict[str, float]:
    """What an event of each admitted type counts."""
    try:
        given = {} if type_weights is None else load_settings(type_weights=type_weights).type_weights
    except ConfigError as exc:
        raise ConfigError(str(exc).replace("UEMB_TYPE_WEIGHTS", "--type-weights")) from exc
    return {kind: given.get(kind, 1.0) for kind in settings.event_types}


def _events(files: tuple[Path, ...], settings: Settings, look: FileOptions) -> "Iterator[EventRow]":
    """The rows of all files, counted on screen."""
    from stream.feed.event_files import read_file
    from stream.items.input_files import files_in

    shape = shape_of_files(settings, look)
    rows = chain.from_iterable(read_file(file, shape) for file in files_in(files))
    with progress_bar("counted", "events") as update:
        done = 0
        for done, row in enumerate(rows, 1):
            yield row
            if done % 10_000 == 0:
                update(done, None)
        update(done, None)
