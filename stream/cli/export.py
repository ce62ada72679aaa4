"""The command ``uemb export``: rows to train on, each with the vector from before it."""

from itertools import chain
from pathlib import Path

import click

from stream.cli.files import FileOptions, file_options, shape_of_files
from stream.cli.terminal import out, print_json, progress_bar
from stream.config import load_settings
from stream.errors import ConfigError


@click.command()
@click.argument("out_file", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--as-of",
    "events",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="file or folder of events, as for `uemb send`; may be given several times",
)
@file_options
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def export(out_file: Path, events: tuple[Path, ...], look: FileOptions, as_json: bool) -> None:
    """Write each event with its user's vector from before it to OUT (Parquet), to train rankers on.

    Vectors are those of UEMB_ITEMS and the encoder settings, made by the worker's own code of what is strictly older
    than the event: no label is in its own features. Events of ignored types (what was shown, say) get a row, and enter
    no history. The metadata of OUT name both versions.
    """
    from stream.feed.event_files import read_file
    from stream.items.input_files import files_in
    from stream.items.space import ItemSpace
    from stream.learning.as_of import save_parquet, vectors_before

    settings = load_settings()
    if settings.items is None:
        msg = "UEMB_ITEMS must name the folder of an item space"
        raise ConfigError(msg)
    space, encoder, shape = ItemSpace.load(settings.items), settings.versioned_encoder, shape_of_files(settings, look)
    rows = list(chain.from_iterable(read_file(file, shape) for file in files_in(events)))
    if unknown := {row.type for row in rows} - {*settings.event_types, *settings.ignored_types}:
        msg = f"unknown type {sorted(unknown)[0]!r}; add it to UEMB_EVENT_TYPES or UEMB_IGNORED_TYPES"
        raise ConfigError(msg)
    with progress_bar("written", "events") as update:
        found = vectors_before(rows, space, encoder, settings.event_types)
        count = save_parquet(found, out_file, space, encoder, update)
    facts = {
        "file": str(out_file),
        "events": count,
        "item_embedding_version": space.version,
        "user_embedding_version": encoder.version,
    }
    if as_json:
        print_json(facts)
    else:
        out.print("  ".join(f"{name} {value}" for name, value in facts.items()))
