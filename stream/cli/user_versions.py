"""The command line's side of user versions that workers have left: what is kept of them, and having it removed."""

import time
from typing import Any, Final

from stream.cli.terminal import out, progress_bar
from stream.config import Settings
from stream.errors import ConfigError
from stream.kafka.topics import topic_partitions
from stream.rollout.client import ItemControl
from stream.rollout.records import RetiredUserVersion

_POLL_S: Final = 0.3


def covered(settings: Settings, control: ItemControl, version: str) -> tuple[int, int]:
    """How many partitions an item version covers, with vectors of these settings' user version, and of how many."""
    partitions = topic_partitions(settings) or 0
    user_version = settings.versioned_encoder.version
    stages = [control.coverage.stage(user_version, version, p) for p in range(partitions)]
    return stages.count("covered"), partitions


def user_version_rows(settings: Settings, control: ItemControl) -> list[dict[str, Any]]:
    """One row a user version that is known beside these settings' own."""
    rows = []
    for name, statuses in sorted(control.coverage.other_user_versions(settings.versioned_encoder.version).items()):
        kept = [status for status in statuses if status.stage != "removed"]
        rows.append(
            {
                "user_version": name,
                "state": "retired" if name in control.catalogue.retired_user_versions else "kept",
                "item_versions": sorted({status.item_version for status in statuses}),
                "pairs": len(statuses),
                "removed": len(statuses) - len(kept),
                "users": sum(status.users for status in kept),
                "done": sum(status.done for status in kept if status.stage == "removing"),
            }
        )
    return rows


def user_version_line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    head = f"user version {row['user_version']}: {row['state']}"
    if row["state"] == "retired":
        return f"{head}, removed in {row['removed']} of {row['pairs']} partitions of its item versions"
    return f"{head} as it was left, in {', '.join(row['item_versions'])}; uemb items retire --user-version removes it"


def retire_user_version(settings: Settings, control: ItemControl, user_version: str, *, wait: bool) -> None:
    """Have the vectors of a user version removed that the workers have left for that of these settings.

    Raises:
        ConfigError: there is no such version, or readers may still be served from it.
    """
    ours = settings.versioned_encoder.version
    if user_version == ours:
        msg = f"user version {ours} is that of these settings; start the workers with another encoder first"
        raise ConfigError(msg)
    if user_version not in control.coverage.other_user_versions(ours):
        msg = f"user version {user_version!r} is not known; see `uemb items status`"
        raise ConfigError(msg)
    served = control.served
    done, of = (0, 0) if served is None else covered(settings, control, served.version)
    if served is None or done < of:
        msg = (
            f"user version {ours}, that of these settings, covers {done} of {of} partitions, so that readers may still "
            "be served from the other; wait until it covers all (`uemb items status`)"
        )
        raise ConfigError(msg)
    control.say(RetiredUserVersion(user_version, dict(control.coverage.epochs)))
    out.print(f"user version {user_version} is retired; its vectors are being removed")
    if wait:
        _wait(settings, control, user_version)


def _wait(settings: Settings, control: ItemControl, user_version: str) -> None:
    with progress_bar(f"users of user version {user_version}") as update:
        while True:
            (row,) = [r for r in user_version_rows(settings, control) if r["user_version"] == user_version]
            update(row["done"], max(row["users"], row["done"]) or None)
            if row["removed"] == row["pairs"]:
                return
            time.sleep(_POLL_S)
            control.look()
