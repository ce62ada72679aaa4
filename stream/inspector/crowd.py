"""Users seen together: their vectors in two dimensions, and how close to one another popularity has drawn them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from stream.config import Settings
from stream.core.formulas import Float64
from stream.core.records import EmbeddingRecord
from stream.core.space_engine import NEAR_CENTROID
from stream.items.space import ItemSpace
from stream.kv.protocol import KVReader
from stream.rollout.comparison import Shown, recent_users, records_of

#: Users that a map shows at most.
USERS: Final = 2_000
#: Records of each partition that they are looked for in: somebody who is busy has many.
_NEWEST: Final = 20_000
#: Classes of the cosine to the centroid, from -1 to 1.
CLASSES: Final = 40
#: More than this share of users near the centroid is called a collapse.
COLLAPSED_SHARE: Final = 0.2
_ENDS: Final = 3
_DIGITS: Final = 5


def crowd(
    settings: Settings, store: KVReader, user_version: str, space: ItemSpace, titles: Mapping[str, str]
) -> dict[str, Any]:
    """A sample of users who were active of late, as plain values.

    Raises:
        UembError: topic or store can't be read.
    """
    shown = Shown(user_version, space)
    users = recent_users(settings, shown, USERS, store.meta().partitions or 1, _NEWEST)
    records = [record for record in records_of(store, shown, users) if record is not None]
    own = [record for record in records if record.status == "ok"]
    document: dict[str, Any] = {
        "user_version": user_version,
        "item_version": space.version,
        "users": len(records),
        "fallbacks": len(records) - len(own),
        "axes": [],
        "points": [],
        "collapse": _collapse(own, space),
    }
    if len(own) >= 2:
        vectors = np.stack([record.vector for record in own]).astype(np.float64)
        axes, explained = principal_axes(vectors)
        document["axes"] = [
            {"explained": float(share), **_ends(space, axis, titles)}
            for axis, share in zip(axes, explained, strict=True)
        ]
        middle = vectors.mean(axis=0)
        document["points"] = [
            {
                "user": record.user_id,
                "at": [round(float(x), _DIGITS) for x in (record.vector - middle) @ axes.T],
                "as_of": record.as_of,
                "status": record.status,
                "unknown": record.unknown_items / max(1, record.history_len),
            }
            for record in records
        ]
    return document


def principal_axes(vectors: Float64) -> tuple[Float64, Float64]:
    """The two directions [2, d] in which vectors [n, d] differ most, and the shares of their variance in them [2].

    An axis points to where its greatest component is positive, so that a map does not flip from one look to the next.
    """
    centred = vectors - vectors.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    axes = directions[:, ::-1][:, :2].T
    if len(axes) < 2:  # a space of one dimension
        axes = np.concatenate([axes, np.zeros_like(axes)])
        values = np.concatenate([[0.0], values])
    peaks = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    signs = np.where(peaks < 0, -1.0, 1.0)
    whole = max(float(values.sum()), np.finfo(np.float64).tiny)
    return axes * signs, np.maximum(values[::-1][:2], 0.0) / whole


def _ends(space: ItemSpace, axis: Float64, titles: Mapping[str, str]) -> dict[str, list[str]]:
    """What lies furthest out on either end of an axis: items' ids or titles."""
    both = np.stack([axis, -axis]).astype(np.float32)
    rows, _ = space.nearest(both, _ENDS)
    names = [[space.ids[row].decode() for row in of_one] for of_one in rows.tolist()]
    high, low = [[titles.get(item, item) for item in items] for items in names]
    return {"high": high, "low": low}


def _collapse(own: Sequence[EmbeddingRecord], space: ItemSpace) -> dict[str, Any]:
    """How close to the items' centroid users lie."""
    cosines = np.stack([record.vector for record in own]).astype(np.float64) @ space.fallback if own else np.zeros(0)
    counts, edges = np.histogram(np.clip(cosines, -1, 1), bins=CLASSES, range=(-1, 1))
    near = float((cosines > NEAR_CENTROID).mean()) if own else 0.0
    return {
        "counts": counts.tolist(),
        "edges": edges.round(_DIGITS).tolist(),
        "median": float(np.median(cosines)) if own else None,
        "near": near,
        "near_from": NEAR_CENTROID,
        "threshold": COLLAPSED_SHARE,
        "collapsed": near > COLLAPSED_SHARE,
    }
