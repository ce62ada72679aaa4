"""How far the partitions are with a pair of versions, out of what their owners have said on the status topic."""

from typing import Any

from stream.rollout.records import Coverage


def progress_of(coverage: Coverage, partitions: int, user_version: str, item_version: str) -> dict[str, Any]:
    """How far the partitions are with a pair, as plain values: what commands print, and the inspector shows."""
    known = [coverage.of(user_version, item_version, p) for p in range(partitions)]
    found = [status for status in known if status is not None]
    stages = [coverage.stage(user_version, item_version, p) for p in range(partitions)]
    users, done = sum(status.users for status in found), sum(status.done for status in found)
    items = sum(status.items for status in found)
    per_second = sum(status.per_second for status in found if status.stage in ("covering", "removing"))
    return {
        "partitions": partitions,
        "covered": stages.count("covered"),
        "removed": [status.stage for status in found].count("removed"),
        "users": users,
        "done": done,
        "users_per_second": round(per_second, 1),
        "seconds_left": round((users - done) / per_second, 1) if per_second and users > done else None,
        "fallback_share": sum(status.fallbacks for status in found) / done if done else None,
        "unknown_item_share": sum(status.unknown_items for status in found) / items if items else None,
    }
