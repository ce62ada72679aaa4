"""What the commands on item versions and on encoders share: how far a pair is, waiting for it, comparing it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from stream.cli.terminal import out, progress_bar
from stream.config import Settings, load_settings
from stream.errors import ConfigError
from stream.items.space import ItemSpace
from stream.kafka.topics import topic_partitions
from stream.kv.stores import open_reader
from stream.rollout.client import RolloutClient
from stream.rollout.comparison import Shown, VersionReport, compare
from stream.rollout.progress import progress_of
from stream.rollout.records import AnyRecord, EncoderRecord

_POLL_S: Final = 0.3


@contextmanager
def rollout_client() -> Iterator[tuple[Settings, RolloutClient]]:
    """The settings, and what the topics say."""
    settings = load_settings()
    control = RolloutClient(settings)
    try:
        yield settings, control
    finally:
        control.close()


def serving_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of commands that change who is served."""
    wait = click.option("--wait", is_flag=True, help="first wait until every user has a vector")
    force = click.option("--force", is_flag=True, help="serve it although not every user has a vector yet")
    return force(wait(command))


def publish_once(control: RolloutClient, record: AnyRecord, known: AnyRecord | None, refused: str | None) -> str:
    """Publish what is not, or what was refused as it was; return what to say of it."""
    if known is not None and not (known.state == "prepare" and refused):
        return "is published already"
    control.say(record)
    return "is published again" if known else "is published"


def progress_text(row: dict[str, Any]) -> str:
    """A row of `progress_of` in words."""
    parts = [f"covers {row['covered']} of {row['partitions']} partitions"]
    if row["covered"] < row["partitions"]:
        left = "" if row["seconds_left"] is None else f", {row['seconds_left']:.0f} s left"
        parts.append(f"{row['done']:,} of about {row['users']:,} users, {row['users_per_second']:,.0f}/s{left}")
    if row["fallback_share"] is not None:
        parts.append(f"{row['fallback_share']:.1%} fallbacks")
    if row["unknown_item_share"] is not None:
        parts.append(f"{row['unknown_item_share']:.1%} of the items unknown")
    return "; ".join(parts)


def check_covered(settings: Settings, control: RolloutClient, user_version: str, item_version: str, what: str) -> None:
    """Raise `ConfigError` unless all users have a vector of a pair; `what` is to be activated."""
    row = progress_of(control.coverage, topic_partitions(settings) or 0, user_version, item_version)
    done, of = row["covered"], row["partitions"]
    if done < of:
        msg = f"{what} covers {done} of {of} partitions; wait for them (--wait), or insist (--force)"
        raise ConfigError(msg)


def wait_until(control: RolloutClient, what: str, row: Callable[[], dict[str, Any]], count: str) -> None:
    """Show a progress bar until `count` of a row's partitions are all.

    Raises:
        ConfigError: a worker refuses the version.
    """
    with progress_bar(what, "users") as update:
        while True:
            now = row()
            if now["refused"]:
                msg = f"{what} was refused: {now['refused']}"
                raise ConfigError(msg)
            update(now["done"], max(now["users"], now["done"]) or None)
            if now[count] == now["partitions"]:
                return
            time.sleep(_POLL_S)
            control.look()


def compared(
    settings: Settings, control: RolloutClient, encoder: EncoderRecord, item_version: str, sample: int
) -> VersionReport:
    """A pair beside the served one.

    Raises:
        ConfigError: it is the served one, or there are no users yet.
    """
    served = control.served
    if served is None or (control.served_encoder.user_version, served.version) == (encoder.user_version, item_version):
        msg = f"item version {item_version}, user version {encoder.user_version} is served; name another one to compare"
        raise ConfigError(msg)
    store = open_reader(settings.kv_url)
    try:
        first = Shown(control.served_encoder.user_version, ItemSpace.load(Path(served.path)))
        second = Shown(encoder.user_version, ItemSpace.load(Path(control.known(item_version).path)))
        return compare(settings, store, first, second, sample)
    finally:
        store.close()


def print_comparison(report: VersionReport) -> None:
    """Print what `compared` found."""
    for side in (report.served, report.other):
        out.print(
            f"{side.version}, {side.user_version}: {side.items:,} items, {side.dim} dims; of {side.found:,} users "
            f"{side.fallback_share:.1%} fallbacks, {side.unknown_item_share:.1%} of their items unknown, "
            f"norms from {side.least_norm:.6f} to {side.greatest_norm:.6f}, "
            f"cosine to the items' centroid {' · '.join(f'{q:.2f}' for q in side.centroid_cosine) or 'of none'}",
        )
    shared = "no user has a vector in both" if report.overlap is None else f"{report.overlap:.1%}"
    alike = "" if report.cosine is None else f"; mean cosine of the two vectors {report.cosine:.3f}"
    out.print(f"nearest items in common ({report.compared:,} users, ten each): {shared}{alike}")
