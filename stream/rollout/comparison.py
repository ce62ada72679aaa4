"""Does a new version make sense? A sample of users in the served pair of versions and in another, side by side."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from stream.config import Settings
from stream.core.formulas import Float32
from stream.core.records import PREFIX_BYTES, CorruptRecord, EmbeddingRecord, decode
from stream.errors import ConfigError
from stream.items.space import ItemSpace
from stream.kafka.log_reader import open_consumer, read, whole
from stream.keys import user_cache_key
from stream.kv.protocol import KVReader

NEIGHBOURS: Final = 10
#: Records that a sample is drawn from: of each partition, and of all.
_NEWEST: Final = 2_000
_ALL_NEWEST: Final = 200_000
_SEED: Final = 7
_QUANTILES: Final = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Side:
    """One pair's side of the comparison.

    Attributes:
        user_version: the user version.
        version: the item version.
        items: rows of the space.
        dim: dimensions.
        found: users of the sample that have a record.
        fallback_share: of these, with the fallback vector.
        unknown_item_share: of the interactions in their histories, with an item that the version lacks.
        least_norm: of their vectors.
        greatest_norm: of their vectors.
        centroid_cosine: of vectors of a user's own to the centroid of the version's items, the 10 %, 50 % and 90 %
            quantile; empty without any. Near 1, popularity has collapsed them: they find the same for everybody.
    """

    user_version: str
    version: str
    items: int
    dim: int
    found: int
    fallback_share: float
    unknown_item_share: float
    least_norm: float
    greatest_norm: float
    centroid_cosine: tuple[float, ...]


@dataclass(frozen=True)
class VersionReport:
    """A served pair and another one.

    Attributes:
        served: the former.
        other: the latter.
        compared: users with a vector of their own in both.
        cosine: mean cosine of such a user's two vectors; None where the item versions differ, whose spaces don't mix.
        overlap: of the ten nearest items of such a user in one version, the share that is among the ten in the other.
    """

    served: Side
    other: Side
    compared: int
    cosine: float | None
    overlap: float | None


class Shown(NamedTuple):
    """A pair whose vectors are looked at."""

    user_version: str
    space: ItemSpace

    @property
    def prefix(self) -> bytes:
        """What its keys begin with."""
        return user_cache_key("", self.space.version, self.user_version).encode()


def compare(settings: Settings, store: KVReader, served: Shown, other: Shown, sample: int) -> VersionReport:
    """Look at about `sample` users who were active of late.

    Raises:
        ConfigError: there are no users yet.
        StoreError: the store can't be read.
    """
    users = recent_users(settings, served, sample, store.meta().partitions or 1)
    if not users:
        msg = (
            f"{settings.output_topic} holds no vectors of item version {served.space.version}, user version "
            f"{served.user_version} yet"
        )
        raise ConfigError(msg)
    records = [records_of(store, shown, users) for shown in (served, other)]
    both = [n for n, pair in enumerate(zip(*records, strict=True)) if all(r and r.status == "ok" for r in pair)]
    overlap = cosine = None
    if both:
        vectors = [np.stack([r.vector for n in both if (r := of_one[n]) is not None]) for of_one in records]
        nearest = [_nearest(shown.space, v) for shown, v in zip((served, other), vectors, strict=True)]
        shared = [len(a & b) / NEIGHBOURS for a, b in zip(*nearest, strict=True)]
        overlap = float(np.mean(shared))
        if served.space.version == other.space.version:
            cosine = float(np.einsum("nd,nd->n", *vectors, dtype=np.float64).mean())
    return VersionReport(_side(served, records[0]), _side(other, records[1]), len(both), cosine, overlap)


def recent_users(settings: Settings, shown: Shown, sample: int, partitions: int, newest: int = _NEWEST) -> list[bytes]:
    """Users of the `newest` records of every partition, at most `sample` of them, drawn at random.

    Of many partitions less is read of each.

    Raises:
        DeliveryError: the topic can't be read.
        NotAllowed: it may not be read.
    """
    prefix, newest = shown.prefix, min(newest, max(1, _ALL_NEWEST // partitions))
    found: dict[bytes, None] = {}
    consumer = open_consumer(settings, "report")
    try:
        spans, partition = [], 0
        while (span := whole(consumer, settings.output_topic, partition)) is not None:
            spans.append(span._replace(start=max(span.start, span.end - newest)))
            partition += 1
        for message in read(consumer, spans):
            key = message.key() or b""
            if key.startswith(prefix) and message.value() is not None:
                found[key.removeprefix(prefix)] = None
    finally:
        consumer.close()
    users = list(found)
    return random.Random(_SEED).sample(users, min(sample, len(users)))  # noqa: S311 - a sample, no secret


def records_of(store: KVReader, shown: Shown, users: Sequence[bytes]) -> list[EmbeddingRecord | None]:
    """What the store holds of users, in their order; None where it has no record, or a damaged one."""
    prefix = shown.prefix
    out: list[EmbeddingRecord | None] = []
    for entry in store.get([(user, prefix + user) for user in users]):
        try:
            out.append(decode(entry[PREFIX_BYTES:]) if entry and len(entry) > PREFIX_BYTES else None)
        except CorruptRecord:
            out.append(None)
    return out


def _side(shown: Shown, records: Sequence[EmbeddingRecord | None]) -> Side:
    space = shown.space
    found = [record for record in records if record is not None]
    norms = [record.norm for record in found]
    items = sum(record.history_len for record in found)
    own = [record.vector for record in found if record.status == "ok"]
    cosines = np.stack(own).astype(np.float64) @ space.fallback if own else np.zeros(0)
    return Side(
        shown.user_version,
        space.version,
        len(space),
        space.dim,
        len(found),
        sum(record.status != "ok" for record in found) / max(1, len(found)),
        sum(record.unknown_items for record in found) / max(1, items),
        min(norms, default=0.0),
        max(norms, default=0.0),
        tuple(float(q) for q in np.quantile(cosines, _QUANTILES)) if own else (),
    )


def _nearest(space: ItemSpace, vectors: Float32) -> list[set[bytes]]:
    """Ids of the items nearest to each of `vectors` [n, d]."""
    rows, _ = space.nearest(vectors, NEIGHBOURS)
    return [{space.ids[row] for row in of_one} for of_one in rows.tolist()]
