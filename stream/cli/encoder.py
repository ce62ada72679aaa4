"""The command group ``uemb encoder``: another encoder without downtime, and encoders that are learned."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace

from stream.cli.files import FileOptions, file_options, shape_of_files
from stream.cli.rollouts import (
    check_covered,
    compared,
    print_comparison,
    progress_text,
    publish_once,
    rollout_client,
    serving_options,
    wait_until,
)
from stream.cli.terminal import MB, err, out, print_json, progress_bar
from stream.config import Settings, load_settings, numbers_of
from stream.core.encoders import VersionedEncoder, make_encoder
from stream.encoders.folder import load_encoder, read_manifest
from stream.errors import ConfigError
from stream.items.space import ItemSpace
from stream.kafka.topics import topic_partitions
from stream.rollout.client import RolloutClient, encoder_record
from stream.rollout.progress import progress_of
from stream.rollout.records import EncoderRecord


@click.group()
def encoder() -> None:
    """Publish with another encoder beside the served one, and learn encoders."""


@encoder.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--items", type=click.Path(path_type=Path), help="folder of the item version  [default: UEMB_ITEMS]")
@click.option(
    "--events",
    type=click.Path(path_type=Path),
    help="file or folder, as for `uemb send`; default MovieLens-100K",
)
@click.option("--method", type=click.Choice(["ridge", "mlp"]), default="ridge", show_default=True)
@click.option(
    "--features",
    default="decay:0.02,decay:0.1,decay:0.3,last",
    show_default=True,
    help="what the model is given: mean, mean:N, decay:RATE, last; the seed's are mean,mean:5,last",
)
@click.option("--share", type=float, default=0.8, show_default=True, help="part of the stream, by time, to learn from")
@click.option("--seed", type=int, default=0, show_default=True, help="of all that is random; the same gives the same")
@file_options
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def train(
    folder: Path,
    items: Path | None,
    events: Path | None,
    method: Any,
    features: str,
    share: float,
    seed: int,
    look: FileOptions,
    as_json: bool,
) -> None:
    """Learn an encoder for an item version from interactions into FOLDER, as an ONNX model with its manifest.

    It learns what follows from histories that are strictly older, in the earlier part of the stream only: that which
    the item vectors were learned from. Publish it with `uemb encoder publish FOLDER`.
    """
    from stream.feed.sources import load
    from stream.learning.heads import train_encoder

    settings = load_settings()
    where = items or settings.items
    if where is None:
        msg = "no item space; give --items FOLDER or set UEMB_ITEMS"
        raise ConfigError(msg)
    space, shape = ItemSpace.load(where), shape_of_files(settings, look)
    with progress_bar("fetched", MB) as update:
        data = load(settings.cache_dir, events, update, err.print, shape=shape)
    rows = [row for row in data.events if row.type not in settings.ignored_types]
    names = [name.strip() for name in features.split(",")]
    try:
        made, training = train_encoder(
            rows,
            space,
            folder,
            share=share,
            seed=seed,
            method=method,
            features=names,
            history_limit=settings.history_limit,
        )
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    name = VersionedEncoder(made, settings.history_limit).version
    if as_json:
        print_json({"folder": str(folder), "user_version": name, **made.params, **asdict(training)})
        return
    chosen = "" if training.ridge is None else f", ridge {training.ridge:g}"
    out.print(
        f"{folder}: encoder {name} for item version {space.version}, {method} on {training.cases:,} events{chosen}; "
        f"recall@10 {training.recall_10:.3f} on the latest {training.validated:,} of them, when left out "
        f"(mix with its defaults {training.mix_recall_10:.3f})"
    )


@encoder.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def check(folder: Path, as_json: bool) -> None:
    """Check a learned encoder's FOLDER: hash, features, and what its model says of histories."""
    found, manifest = load_encoder(folder), read_manifest(folder)
    made_for = found.made_for
    if as_json:
        print_json({"folder": str(folder), **found.params, "about": manifest.about})
        return
    out.print(f"{folder}: sound; {', '.join(found.features)} of item version {made_for.version}, {made_for.dim} dims")


@encoder.command()
@click.argument("what")
@click.option("--params", default="", help="of a formula, as alpha_short=0.5,decay_long=0.02; others are the default")
@click.option("--type-weights", default="", help="of a formula, factor per type, as like=2.0")
@click.option("--as", "alias", help="name of the user version  [default: kind and hash]")
@click.option("--wait", is_flag=True, help="return when every user has a vector of it")
def publish(what: str, params: str, type_weights: str, alias: str | None, wait: bool) -> None:
    """Publish vectors of another encoder beside the served one: avg, mix, mix_time, or the FOLDER of a learned one.

    All workers must be able to read the folder under this path. They publish live updates of it, and write a vector of
    it for every user; nobody is served from it before `uemb encoder activate`, but readers may be pinned to it.
    """
    with rollout_client() as (settings, control):
        record = _record_of(settings, what, params, type_weights, alias)
        name = record.user_version
        if record.item_version and record.item_version not in _live_items(control):
            msg = (
                f"encoder {what} was made for item version {record.item_version}, which is not published; publish that "
                "first (`uemb items publish`)"
            )
            raise ConfigError(msg)
        known = control.live_encoders.get(name)
        earlier = known or control.catalogue.retired_encoders.get(name)
        if earlier is not None and earlier.hash not in ("", record.hash):
            msg = f"user version {name} names another encoder; choose another name (--as)"
            raise ConfigError(msg)
        state = publish_once(control, record, known, control.encoder_refusal(name))
        out.print(f"encoder {name} {state}; see `uemb encoder status`")
        if wait:
            _wait(settings, control, name)


def _record_of(settings: Settings, what: str, params: str, type_weights: str, alias: str | None) -> EncoderRecord:
    folder = Path(what)
    try:
        if folder.is_dir():
            if params or type_weights:
                msg = "a learned encoder has its parameters in its folder; leave --params and --type-weights out"
                raise ConfigError(msg)
            learned = VersionedEncoder(load_encoder(folder), settings.history_limit, alias)
            return encoder_record(learned, folder, "prepare")
        formula = make_encoder(what, numbers_of(params), numbers_of(type_weights))
        if unknown := set(formula.type_weights) - set(settings.event_types):
            msg = f"--type-weights names {sorted(unknown)[0]!r}, which is not among UEMB_EVENT_TYPES"
            raise ConfigError(msg)
        return encoder_record(VersionedEncoder(formula, settings.history_limit, alias), None, "prepare")
    except ValueError as exc:
        msg = f"{exc}" if not what.count("/") else f"there is no folder {what}"
        raise ConfigError(msg) from exc


def _live_items(control: RolloutClient) -> set[str]:
    base = control.base
    mine = {base.version} if base is not None and base.version not in control.catalogue.retired else set()
    return mine | control.catalogue.live.keys()


@encoder.command()
@click.argument("version")
@serving_options
def activate(version: str, force: bool, wait: bool) -> None:
    """Serve encoder VERSION: readers that follow the serving pair change over at once, each call whole.

    A learned one is served with the item version that it was made for; if that is not served yet, it is from here on.
    """
    with rollout_client() as (settings, control):
        _activate(settings, control, control.known_encoder(version), force=force, wait=wait)


@encoder.command()
@serving_options
def rollback(force: bool, wait: bool) -> None:
    """Serve the encoder again that was served before, while it is kept."""
    with rollout_client() as (settings, control):
        _activate(settings, control, control.encoder_served_before(), force=force, wait=wait)


def _activate(settings: Settings, control: RolloutClient, record: EncoderRecord, *, force: bool, wait: bool) -> None:
    version, served = record.user_version, control.served
    item_version = record.item_version or (served.version if served is not None else "")
    if control.served_encoder.user_version == version and served is not None and served.version == item_version:
        out.print(f"encoder {version} is served already")
        return
    if refused := control.encoder_refusal(version):
        msg = f"encoder {version} was refused: {refused}"
        raise ConfigError(msg)
    items = control.known(item_version)
    if wait and not force:
        _wait(settings, control, version)
    if not force:
        check_covered(settings, control, version, item_version, f"encoder {version}")
    control.say(replace(record, state="active", force=force, epochs=None))
    if served is None or served.version != item_version:
        # after the encoder: it is no use in the items of before, so that workers change nothing until both are said
        control.say(replace(items, state="active", force=force))
    out.print(f"encoder {version} is served from here on, with item version {item_version}")


@encoder.command()
@click.argument("version")
@click.option("--wait", is_flag=True, help="return when its vectors are removed")
def retire(version: str, wait: bool) -> None:
    """Stop publishing of encoder VERSION and remove its vectors from topic and store; readers pinned to it lose them.

    Encoders that the workers had in their settings before are retired in the same way.
    """
    with rollout_client() as (settings, control):
        if version not in control.catalogue.retired_encoders or version in control.live_encoders:
            control.say(_retirement(settings, control, version))
        out.print(f"encoder {version} is retired; its vectors are being removed")
        if wait:
            _wait(settings, control, version)


def _retirement(settings: Settings, control: RolloutClient, version: str) -> EncoderRecord:
    live = control.live_encoders.get(version)
    served, items = control.served_encoder, control.served
    if served.user_version == version:
        msg = f"encoder {version} is served; activate another one first"
        raise ConfigError(msg)
    if live is not None:
        return replace(live, state="retired", force=False, epochs=None)
    if version not in control.coverage.user_versions():
        msg = f"encoder {version!r} is not known; see `uemb encoder status`"
        raise ConfigError(msg)
    # until the served pair covers all, readers may still be served from what the workers have left
    if items is None:
        msg = "no item version is served yet; see `uemb items status`"
        raise ConfigError(msg)
    check_covered(settings, control, served.user_version, items.version, f"encoder {served.user_version}")
    return EncoderRecord(version, "retired", epochs=dict(control.coverage.epochs))


@encoder.command()
@click.argument("version", required=False)
@click.option("--wait", is_flag=True, help="return when VERSION covers all users, or is removed")
@click.option("--compare", type=click.IntRange(1), metavar="USERS", help="compare VERSION with the served one on some")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def status(version: str | None, wait: bool, compare: int | None, as_json: bool) -> None:
    """Show the encoders, and how far the workers are with each; those that they have left, too.

    With --compare, whether VERSION makes sense: a sample of active users with it and with the served pair, side by
    side, how alike their vectors are, and how many of their ten nearest items are the same.
    """
    if (wait or compare) and version is None:
        msg = "name the version for --wait and --compare"
        raise click.UsageError(msg)
    report = None
    with rollout_client() as (settings, control):
        if version is not None:
            record = control.known_encoder(version) if compare else None
            if wait:
                _wait(settings, control, version)
            if record is not None and compare is not None:
                report = compared(settings, control, record, _items_of(control, record), compare)
        rows = [row for row in _rows(settings, control) if version in (None, row["user_version"])]
        if version is not None and not rows:
            control.known_encoder(version)
    if as_json:
        print_json({"encoders": rows, **({"comparison": asdict(report)} if report else {})})
        return
    for row in rows:
        out.print(_line(row))
    if report:
        print_comparison(report)


def _items_of(control: RolloutClient, record: EncoderRecord) -> str:
    """The item version that an encoder is, or would be, served with."""
    served = control.served
    return record.item_version or (served.version if served is not None else "")


def _rows(settings: Settings, control: RolloutClient) -> list[dict[str, Any]]:
    """One row an encoder: those whose vectors are published, then those whose vectors are, or were, kept as left."""
    served, partitions = control.served_encoder.user_version, topic_partitions(settings) or 0
    rows = []
    for name, record in control.live_encoders.items():
        item_version = _items_of(control, record)
        rows.append(
            {
                "user_version": name,
                "encoder": record.encoder,
                "params": record.params,
                "state": "served" if name == served else record.state,
                "item_version": item_version,
                **progress_of(control.coverage, partitions, name, item_version),
                "refused": control.encoder_refusal(name),
            }
        )
    for name, statuses in sorted(control.coverage.user_versions(but=control.live_encoders).items()):
        kept = [status for status in statuses if status.stage != "removed"]
        rows.append(
            {
                "user_version": name,
                "state": "retired" if name in control.catalogue.retired_encoders else "left",
                "item_versions": sorted({status.item_version for status in statuses}),
                "partitions": len(statuses),
                "removed": len(statuses) - len(kept),
                "users": sum(status.users for status in kept),
                "done": sum(status.done for status in kept if status.stage == "removing"),
                "refused": None,
            }
        )
    return rows


def _line(row: dict[str, Any]) -> str:
    head = f"{row['user_version']}: {row['state']}"
    if row["refused"]:
        return f"{head}, refused: {row['refused']}"
    if row["state"] == "retired":
        return f"{head}, removed in {row['removed']} of {row['partitions']} partitions of its item versions"
    if row["state"] == "left":
        return f"{head} as it was, in {', '.join(row['item_versions'])}; uemb encoder retire removes it"
    params = ", ".join(f"{name} {value:g}" for name, value in row["params"].items())
    kind = f"{row['encoder']} ({params})" if params else row["encoder"]
    return f"{head}, {kind} with {row['item_version']}, {progress_text(row)}"


def _wait(settings: Settings, control: RolloutClient, version: str) -> None:
    """Show a progress bar until the encoder covers all partitions, or is removed from them."""
    row = partial(_row, settings, control, version)
    wait_until(control, f"encoder {version}", row, "covered" if version in control.live_encoders else "removed")


def _row(settings: Settings, control: RolloutClient, version: str) -> dict[str, Any]:
    (row,) = [row for row in _rows(settings, control) if row["user_version"] == version]
    return row
