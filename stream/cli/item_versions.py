"""The commands ``uemb items publish|activate|rollback|retire|status``: another item version without downtime."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace

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
from stream.cli.terminal import out, print_json
from stream.config import Settings
from stream.errors import ConfigError
from stream.kafka.topics import topic_partitions
from stream.rollout.client import RolloutClient
from stream.rollout.progress import progress_of
from stream.rollout.records import ControlRecord, EncoderRecord


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--wait", is_flag=True, help="return when every user has a vector in it")
def publish(folder: Path, wait: bool) -> None:
    """Hand over a new item version in FOLDER, which all workers must be able to read under this path.

    The workers check it, publish live updates in it beside the served version, and write a vector in it for every
    user; nobody is served from it before `uemb items activate`.
    """
    with rollout_client() as (settings, control):
        record = control.record_of(folder, "prepare")
        known = control.catalogue.live.get(record.version)
        state = publish_once(control, record, known, control.refusal(record.version))
        out.print(f"item version {record.version} {state}; see `uemb items status`")
        if wait:
            _wait(settings, control, record.version)


@click.command()
@click.argument("version")
@serving_options
def activate(version: str, force: bool, wait: bool) -> None:
    """Serve VERSION: readers that follow the serving pair change over at once, each call whole."""
    with rollout_client() as (settings, control):
        _activate(settings, control, control.known(version), force=force, wait=wait)


@click.command()
@serving_options
def rollback(force: bool, wait: bool) -> None:
    """Serve the version again that was served before, while it is kept."""
    with rollout_client() as (settings, control):
        _activate(settings, control, control.served_before(), force=force, wait=wait)


def _activate(settings: Settings, control: RolloutClient, record: ControlRecord, *, force: bool, wait: bool) -> None:
    served, version = control.served, record.version
    if served is not None and served.version == version:
        out.print(f"item version {version} is served already")
        return
    if refused := control.refusal(version):
        msg = f"item version {version} was refused: {refused}"
        raise ConfigError(msg)
    encoder = control.served_encoder
    if encoder.item_version not in ("", version):
        msg = (
            f"encoder {encoder.user_version} is served, and was made for item version {encoder.item_version}; activate "
            f"one that is of use in {version} (`uemb encoder activate`)"
        )
        raise ConfigError(msg)
    if wait and not force:
        _wait(settings, control, version)
    if not force:
        check_covered(settings, control, encoder.user_version, version, f"item version {version}")
    control.say(replace(record, state="active", force=force))
    out.print(f"item version {version} is served from here on")


@click.command()
@click.argument("version")
@click.option("--wait", is_flag=True, help="return when its vectors are removed")
def retire(version: str, wait: bool) -> None:
    """Stop publishing in VERSION and remove its vectors from topic and store; readers pinned to it lose them."""
    with rollout_client() as (settings, control):
        if version not in control.catalogue.retired:
            record = control.known(version)
            served = control.served
            if served is not None and served.version == version:
                msg = f"item version {version} is served; activate another one first"
                raise ConfigError(msg)
            control.say(replace(record, state="retired", force=False))
        out.print(f"item version {version} is retired; its vectors are being removed")
        if wait:
            _wait(settings, control, version)


@click.command()
@click.argument("version", required=False)
@click.option("--wait", is_flag=True, help="return when VERSION covers all users, or is removed")
@click.option("--compare", type=click.IntRange(1), metavar="USERS", help="compare VERSION with the served one on some")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def status(version: str | None, wait: bool, compare: int | None, as_json: bool) -> None:
    """Show the item versions, and how far the workers are with each.

    With --compare, whether VERSION makes sense: a sample of active users in it and in the served version, side by side,
    and how many of their ten nearest items are the same.
    """
    if (wait or compare) and version is None:
        msg = "name the version for --wait and --compare"
        raise click.UsageError(msg)
    report = None
    with rollout_client() as (settings, control):
        if version is not None:
            record = control.known(version) if compare else None
            if wait:
                _wait(settings, control, version)
            if record is not None and compare is not None:
                report = compared(settings, control, _encoder_for(control, version), version, compare)
        rows = [row for row in _rows(settings, control) if version in (None, row["version"])]
        if version is not None and not rows:
            control.known(version)
    if as_json:
        print_json({"versions": rows, **({"comparison": asdict(report)} if report else {})})
        return
    for row in rows:
        out.print(_line(row))
    if report:
        print_comparison(report)


def _rows(settings: Settings, control: RolloutClient) -> list[dict[str, Any]]:
    """One row a version, with the served encoder where that is of use in it."""
    served = control.served
    states: dict[str, str] = {version: record.state for version, (_, record) in control.catalogue.records.items()}
    base = control.base
    if base is not None:
        states.setdefault(base.version, "active")
    partitions = topic_partitions(settings) or 0
    rows = []
    for version, state in sorted(states.items()):
        user_version = (control.encoder_for(version) or control.served_encoder).user_version
        rows.append(
            {
                "version": version,
                "user_version": user_version,
                "state": "served" if served is not None and served.version == version else state,
                **progress_of(control.coverage, partitions, user_version, version),
                "refused": control.refusal(version),
            }
        )
    return rows


def _line(row: dict[str, Any]) -> str:
    head = f"{row['version']}: {row['state']}"
    if row["refused"]:
        return f"{head}, refused: {row['refused']}"
    if row["state"] == "retired":
        return f"{head}, removed in {row['removed']} of {row['partitions']} partitions"
    return f"{head}, {progress_text(row)}"


def _wait(settings: Settings, control: RolloutClient, version: str) -> None:
    """Show a progress bar until the version covers all partitions, or is removed from them."""
    retired = version in control.catalogue.retired
    if not retired:
        _encoder_for(control, version)
    row = partial(_row, settings, control, version)
    wait_until(control, f"item version {version}", row, "removed" if retired else "covered")


def _encoder_for(control: RolloutClient, version: str) -> EncoderRecord:
    if (record := control.encoder_for(version)) is None:
        msg = f"no encoder is of use in item version {version}; publish one (`uemb encoder publish mix`)"
        raise ConfigError(msg)
    return record


def _row(settings: Settings, control: RolloutClient, version: str) -> dict[str, Any]:
    (row,) = [row for row in _rows(settings, control) if row["version"] == version]
    return row
