"""The command group ``uemb items``: make, check and hand over item spaces."""

from pathlib import Path
from typing import Any

import click

from stream.cli import item_versions
from stream.cli.files import FileOptions, file_options, shape_of_files
from stream.cli.popular import items_popular
from stream.cli.terminal import MB, PERCENT, err, out, print_json, progress_bar
from stream.config import load_settings
from stream.errors import ConfigError


@click.group()
def items() -> None:
    """Make and check item spaces."""


items.add_command(items_popular)


@items.command("build")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--version", required=True, help="name of the version, [A-Za-z0-9._-]{1,64}")
@click.option(
    "--events",
    type=click.Path(path_type=Path),
    help="file or folder, as for `uemb send`; default MovieLens-100K",
)
@click.option(
    "--method",
    type=click.Choice(["two-tables", "ppmi"]),
    default="two-tables",
    show_default=True,
    help="two-tables: one vector for an item in a history, another in the index (metric dot); ppmi: one for both",
)
@click.option("--dim", type=click.IntRange(1), default=48, show_default=True, help="dimensions")
@click.option(
    "--popularity-exponent",
    type=click.FloatRange(0),
    help="two-tables: divide rows of the index by (1 + count)^this, so that less popular items are found too "
    "[default: 0.35]",
)
@click.option(
    "--history-exponent",
    type=click.FloatRange(0),
    help="two-tables: the same for items in histories, so that popular ones say less of their user  [default: 0]",
)
@click.option("--share", type=float, default=0.8, show_default=True, help="part of the stream, by time, to learn from")
@click.option("--seed", type=int, default=0, show_default=True, help="of all that is random; the same gives the same")
@file_options
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def items_build(
    folder: Path,
    version: str,
    events: Path | None,
    method: Any,
    dim: int,
    popularity_exponent: float | None,
    history_exponent: float | None,
    share: float,
    seed: int,
    look: FileOptions,
    as_json: bool,
) -> None:
    """Learn item vectors from interactions into FOLDER.

    two-tables: EASE and next-item regression, blended, in two tables by truncated SVD. ppmi: PPMI of co-occurrence,
    truncated SVD. The same events give the same vectors. `uemb evaluate` says which is better on yours.
    """
    from stream.feed.sources import load
    from stream.learning.build import build_space

    exponents = {"popularity_exponent": popularity_exponent, "history_exponent": history_exponent}
    chosen = {name: value for name, value in exponents.items() if value is not None}
    if chosen and method != "two-tables":
        msg = f"--method {method} has no exponents of popularity; leave them out"
        raise ConfigError(msg)
    settings = load_settings()
    with progress_bar("fetched", MB) as update:
        data = load(settings.cache_dir, events, update, err.print, shape=shape_of_files(settings, look))
    try:
        with progress_bar("learning", PERCENT) as update:
            space = build_space(
                data.events,
                folder,
                version,
                method,
                dim=dim,
                share=share,
                seed=seed,
                on_progress=update,
                on_note=err.print,
                **chosen,
            )
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    _describe(space, as_json)


@items.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--version", required=True, help="name of the version, [A-Za-z0-9._-]{1,64}")
@click.option("--metric", type=click.Choice(["cosine", "dot"]), default="cosine", show_default=True)
@click.option("--ids", type=click.Path(path_type=Path), help="ids for .npy or .npz: text, one a line, or another .npy")
@click.option("--id-column", help="name of the ids in the file  [default: item_id; ids in .npz]")
@click.option("--vector-column", help="name of the vectors in the file  [default: vector; vectors in .npz]")
@click.option(
    "--history-vectors",
    type=click.Path(path_type=Path),
    help="file of what items count as in a history, where that differs: same items, same order",
)
@click.option("--drop-bad", is_flag=True, help="leave bad rows out instead of failing")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def items_import(
    file: Path,
    folder: Path | None,
    version: str,
    metric: Any,
    ids: Path | None,
    id_column: str | None,
    vector_column: str | None,
    history_vectors: Path | None,
    drop_bad: bool,
    as_json: bool,
) -> None:
    """Make an item space in FOLDER (default ./items/VERSION) of the vectors in FILE, whose name tells its form.

    .npy, .npz, .parquet (or a folder of them), .jsonl, .csv or .tsv (a list in one column, as pgvector's, or a column a
    dimension), .txt or .vec (word2vec's text, GloVe), .bin (word2vec's binary); all text also as .gz.
    """
    from stream.items.importer import import_items
    from stream.items.vector_files import Columns

    default = Columns("ids", "vectors") if file.suffix.lower() == ".npz" else Columns()
    columns = Columns(id_column or default.ids, vector_column or default.vectors)
    target = folder or Path("items") / version
    with progress_bar("imported", "rows") as update:
        space, bad = import_items(
            file,
            target,
            version,
            metric=metric,
            ids=ids,
            columns=columns,
            history_vectors=history_vectors,
            drop_bad=drop_bad,
            on_progress=update,
        )
    dropped = {"dropped": dict(bad.counts)} if bad.total else {}
    _describe(space, as_json, {"folder": str(target), **dropped})


@items.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out_file", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--history", is_flag=True, help="what items count as in a history, with which nothing is searched")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def items_export(folder: Path, out_file: Path, history: bool, as_json: bool) -> None:
    """Write the ids and rows of FOLDER to OUT, to index in an ANN: .npy (ids beside it), .npz, .parquet or .jsonl."""
    from stream.items.exporter import export_items
    from stream.items.space import ItemSpace

    space = ItemSpace.load(folder)
    with progress_bar("exported", "rows") as update:
        files = export_items(space, out_file, update, history=history)
    _describe(space, as_json, {"files": " ".join(map(str, files))})


@items.command("check")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def items_check(folder: Path, as_json: bool) -> None:
    """Load FOLDER as a worker would: hashes, shapes, every row, every id; and its popularity list, if it has one."""
    from stream.items.space import ItemSpace

    space = ItemSpace.load(folder)
    popularity = space.popularity_version
    _describe(space, as_json, {"popularity_version": popularity} if popularity is not None else None)


def _describe(space: Any, as_json: bool, more: dict[str, Any] | None = None) -> None:
    facts = {
        "version": space.version,
        "items": len(space),
        "dim": space.dim,
        "metric": space.metric,
        "two_sided": space.two_sided,
        "max_row_norm": space.max_row_norm,
        "sha256": space.sha256,
        **(more or {}),
    }
    if as_json:
        print_json(facts)
    else:
        out.print("  ".join(f"{name} {value}" for name, value in facts.items()))


for command in (
    item_versions.publish,
    item_versions.activate,
    item_versions.rollback,
    item_versions.retire,
    item_versions.status,
):
    items.add_command(command)
