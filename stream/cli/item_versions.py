"""The commands ``uemb items publish|activate|rollback|retire|status``: another item version without downtime."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import click
from msgspec.structs import replace

from stream.cli.terminal import out, print_json, progress_bar
from stream.cli.user_versions import covered, retire_user_version, user_version_line, user_version_rows
from stream.config import Settings, load_settings
from stream.errors import ConfigError
from stream.items.space import ItemSpace
from stream.kafka.topics import topic_partitions
from stream.kv.stores import open_reader
from stream.rollout.client import ItemControl
from stream.rollout.comparison import VersionReport
from stream.rollout.comparison import compare as compare_versions
from stream.rollout.records import ControlRecord

_POLL_S: Final = 0.3


@contextmanager
def _control() -> Iterator[tuple[Settings, ItemControl]]:
    settings = load_settings()
    control = ItemControl(settings)
    try:
        yield settings, control
    finally:
        control.close()


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--wait", is_flag=True, help="return when every user has a vector in it")
def publish(folder: Path, wait: bool) -> None:
    """Hand over a new item version in FOLDER, which all workers must be able to read under this path.

    The workers check it, publish live updates in it beside the served version, and write a vector in it for every
    user; nobody is served from it before `uemb items activate`.
    """
    with _control() as (settings, control):
        record = control.record_of(folder, "prepare")
        known = control.catalogue.live.get(record.version)
        state = "is published already"
        if known is None or (known.state == "prepare" and control.refusal(record.version)):
            control.say(record)
            state = "is published again" if known else "is published"
        out.print(f"item version {record.version} {state}; see `uemb items status`")
        if wait:
            _wait(settings, control, record.version)


@click.command()
@click.argument("version")
@click.option("--force", is_flag=True, help="serve it although not every user has a vector in it yet")
@click.option("--wait", is_flag=True, help="first wait until every user has one")
def activate(version: str, force: bool, wait: bool) -> None:
    """Serve VERSION: readers that follow the serving pair change over at once, each call whole."""
    with _control() as (settings, control):
        _activate(settings, control, control.known(version), force=force, wait=wait)


@click.command()
@click.option("--force", is_flag=True, help="serve it although not every user has a vector in it")
@click.option("--wait", is_flag=True, help="first wait until every user has one")
def rollback(force: bool, wait: bool) -> None:
    """Serve the version again that was served before, while it is kept."""
    with _control() as (settings, control):
        active = sorted(
            (entry for entry in control.catalogue.records.values() if entry[1].state == "active"), key=itemgetter(0)
        )
        earlier = [record for _, record in active[:-1]]
        base = control.base
        if active and base is not None and base.version not in control.catalogue.records:
            earlier.insert(0, base)
        if not earlier:
            msg = "no earlier item version is kept; activate one by name"
            raise ConfigError(msg)
        _activate(settings, control, earlier[-1], force=force, wait=wait)


def _activate(settings: Settings, control: ItemControl, record: ControlRecord, *, force: bool, wait: bool) -> None:
    served, version = control.served, record.version
    if served is not None and served.version == version:
        out.print(f"item version {version} is served already")
        return
    if refused := control.refusal(version):
        msg = f"item version {version} was refused: {refused}"
        raise ConfigError(msg)
    if wait and not force:
        _wait(settings, control, version)
    done, of = covered(settings, control, version)
    if done < of and not force:
        msg = f"item version {version} covers {done} of {of} partitions; wait for them (--wait), or insist (--force)"
        raise ConfigError(msg)
    control.say(replace(record, state="active", force=force))
    out.print(f"item version {version} is served from here on")


@click.command()
@click.argument("version", required=False)
@click.option("--user-version", help="not an item version, but all that an earlier encoder made")
@click.option("--wait", is_flag=True, help="return when its vectors are removed")
def retire(version: str | None, user_version: str | None, wait: bool) -> None:
    """Stop publishing in VERSION and remove its vectors from topic and store; readers pinned to it lose them.

    With --user-version, remove the vectors of an encoder, or of parameters, that the workers have left for others.
    """
    with _control() as (settings, control):
        if user_version is not None and version is None:
            retire_user_version(settings, control, user_version, wait=wait)
            return
        if version is None or user_version is not None:
            msg = "name an item version, or a --user-version"
            raise click.UsageError(msg)
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
    with _control() as (settings, control):
        if version is not None:
            record = control.known(version) if compare else None
            if wait:
                _wait(settings, control, version)
            if record is not None and compare is not None:
                report = _compare(settings, control, record, compare)
        rows = [row for row in _rows(settings, control) if version in (None, row["version"])]
        others = [] if version is not None else user_version_rows(settings, control)
        if version is not None and not rows:
            control.known(version)
    if as_json:
        compared = {"comparison": asdict(report)} if report else {}
        print_json({"versions": rows, **({} if version else {"other_user_versions": others}), **compared})
        return
    for row in rows:
        out.print(_line(row))
    for other in others:
        out.print(user_version_line(other))
    if report:
        for side in (report.served, report.other):
            out.print(
                f"{side.version}: {side.items:,} items, {side.dim} dims; of {side.found:,} users "
                f"{side.fallback_share:.1%} fallbacks, {side.unknown_item_share:.1%} of their items unknown, "
                f"norms from {side.least_norm:.6f} to "
                f"{side.greatest_norm:.6f}",
            )
        shared = "no user has a vector in both" if report.overlap is None else f"{report.overlap:.1%}"
        out.print(f"nearest items in common ({report.compared:,} users, ten each): {shared}")


def _compare(settings: Settings, control: ItemControl, record: ControlRecord, sample: int) -> VersionReport:
    served = control.served
    if served is None or served.version == record.version:
        msg = f"item version {record.version} is served; name another one to compare it with that"
        raise ConfigError(msg)
    store = open_reader(settings.kv_url)
    try:
        return compare_versions(settings, store, ItemSpace.load(served.path), ItemSpace.load(record.path), sample)
    finally:
        store.close()


def _rows(settings: Settings, control: ItemControl) -> list[dict[str, Any]]:
    """One row a version, for the user version of these settings."""
    user_version, served = settings.versioned_encoder.version, control.served
    states: dict[str, str] = {version: record.state for version, (_, record) in control.catalogue.records.items()}
    base = control.base
    if base is not None:
        states.setdefault(base.version, "active")
    partitions = topic_partitions(settings) or 0
    rows = []
    for version, state in sorted(states.items()):
        known = [control.coverage.of(user_version, version, p) for p in range(partitions)]
        found = [status for status in known if status is not None]
        stages = [control.coverage.stage(user_version, version, p) for p in range(partitions)]
        users, done = sum(status.users for status in found), sum(status.done for status in found)
        items = sum(status.items for status in found)
        per_second = sum(status.per_second for status in found if status.stage in ("covering", "removing"))
        rows.append(
            {
                "version": version,
                "user_version": user_version,
                "state": "served" if served is not None and served.version == version else state,
                "partitions": partitions,
                "covered": stages.count("covered"),
                "removed": [status.stage for status in found].count("removed"),
                "users": users,
                "done": done,
                "users_per_second": round(per_second, 1),
                "seconds_left": round((users - done) / per_second, 1) if per_second and users > done else None,
                "fallback_share": sum(status.fallbacks for status in found) / done if done else None,
                "unknown_item_share": sum(status.unknown_items for status in found) / items if items else None,
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
    parts = [f"{head}, covers {row['covered']} of {row['partitions']} partitions"]
    if row["covered"] < row["partitions"]:
        left = "" if row["seconds_left"] is None else f", {row['seconds_left']:.0f} s left"
        parts.append(f"{row['done']:,} of about {row['users']:,} users, {row['users_per_second']:,.0f}/s{left}")
    if row["fallback_share"] is not None:
        parts.append(f"{row['fallback_share']:.1%} fallbacks")
    if row["unknown_item_share"] is not None:
        parts.append(f"{row['unknown_item_share']:.1%} of the items unknown")
    return "; ".join(parts)


def _wait(settings: Settings, control: ItemControl, version: str) -> None:
    """Show a progress bar until the version covers all partitions, or is removed from them.

    Raises:
        ConfigError: a worker refuses it.
    """
    with progress_bar(f"users of item version {version}") as update:
        while True:
            (row,) = [row for row in _rows(settings, control) if row["version"] == version]
            if row["refused"]:
                msg = f"item version {version} was refused: {row['refused']}"
                raise ConfigError(msg)
            update(row["done"], max(row["users"], row["done"]) or None)
            if row["removed" if row["state"] == "retired" else "covered"] == row["partitions"]:
                return
            time.sleep(_POLL_S)
            control.look()
