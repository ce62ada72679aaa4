"""What retrieval gets for one user, made from a stored entry or from the reason why there is none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stream.core.formulas import Float32, unit_vector
from stream.core.frozen import maker_of
from stream.core.records import PREFIX_BYTES, CorruptRecord, EmbeddingRecord, decode, decode_many, kv_order
from stream.errors import ConfigError
from stream.items.space import ItemSpace
from stream.keys import fallback_key
from stream.kv.lookups import Entry, Trouble
from stream.kv.protocol import Meta

_STATUSES: Final = frozenset({"ok", "fallback"})

Pair = tuple[str | None, str | None]  # user version, item version
Freshness = tuple[bool, float | None]  # stale, lag_s


@dataclass(frozen=True, slots=True, eq=False)
class UserEmbedding:
    """What retrieval gets for one user: always a unit vector to search with.

    Attributes:
        user_id: canonical id as asked for.
        vector: unit float32 [d].
        status: ``ok`` or ``fallback``.
        reason: empty for ``ok``; else the record's own (``no_known_items``, ``too_short_history``, ``degenerate``,
            ``encoder_error``) or the reader's (``missing``, ``erased``, ``corrupt``, ``store_down``, ``timeout``,
            ``version_missing``).
        stale: the pipeline is behind or silent; the vector is the last one known (law 10).
        lag_s: how far the pipeline is behind, in seconds; None when nothing is known of it.
        epoch: fencing token under which the record was written; 0 without one.
        revision: changes of this user's state so far; 0 without a record.
        as_of: event time of the newest interaction in epoch ms; None without one.
        history_len: interactions retained.
        unknown_items: retained interactions with items that this item version lacks.
        user_embedding_version: None while a store that was never reached decides it.
        item_embedding_version: the same.
    """

    user_id: str
    vector: Float32
    status: str
    reason: str
    stale: bool
    lag_s: float | None
    epoch: int
    revision: int
    as_of: int | None
    history_len: int
    unknown_items: int
    user_embedding_version: str | None
    item_embedding_version: str | None


_answer_of = maker_of(UserEmbedding)


class View(NamedTuple):
    """A pair of versions in one state of the shared record; a call keeps to one view, so it never mixes pairs."""

    meta: Meta | None
    user_version: str | None
    item_version: str | None
    fallback: Float32
    trouble: Trouble | None


def answers_for(
    names: Sequence[str | None], entries: Sequence[Entry], view: View, freshness: Sequence[Freshness]
) -> list[UserEmbedding]:
    """Answers for stored entries; anything but a record of exactly what was asked for is a fallback (law 4)."""
    bodies = [entry[PREFIX_BYTES:] for entry in entries if isinstance(entry, bytes)]
    records = iter(decode_many([body for body in bodies if body]))
    return [
        _answer(name, entry, records, view, fresh) for name, entry, fresh in zip(names, entries, freshness, strict=True)
    ]


def _answer(
    name: str | None, entry: Entry, records: Iterator[EmbeddingRecord | None], view: View, fresh: Freshness
) -> UserEmbedding:
    """The answer for one; `records` has that of each entry with a body, in turn."""
    if isinstance(entry, Trouble):
        return fallback_answer(name, entry.reason, view, fresh)
    if entry is None:
        return fallback_answer(name, "missing", view, fresh)
    if len(entry) < PREFIX_BYTES:
        return fallback_answer(name, "corrupt", view, fresh)
    epoch, revision = kv_order(entry)
    if len(entry) == PREFIX_BYTES:
        return fallback_answer(name, "erased", view, fresh, epoch, revision)
    record = next(records)
    if (
        record is None
        or record.user_id != name
        or record.epoch != epoch
        or record.revision != revision
        or record.user_embedding_version != view.user_version
        or record.item_embedding_version != view.item_version
        or record.vector.shape != view.fallback.shape
        or record.status not in _STATUSES
    ):
        return fallback_answer(name, "corrupt", view, fresh)
    return _answer_of(
        record.user_id,
        record.vector,
        record.status,
        record.reason,
        *fresh,
        record.epoch,
        record.revision,
        record.as_of,
        record.history_len,
        record.unknown_items,
        record.user_embedding_version,
        record.item_embedding_version,
    )


def fallback_answer(
    name: str | None, reason: str, view: View, fresh: Freshness, epoch: int = 0, revision: int = 0
) -> UserEmbedding:
    """The view's fallback vector with its reason."""
    stale, lag_s = fresh
    return UserEmbedding(
        user_id=name or "",
        vector=view.fallback,
        status="fallback",
        reason=reason,
        stale=stale,
        lag_s=lag_s,
        epoch=epoch,
        revision=revision,
        as_of=None,
        history_len=0,
        unknown_items=0,
        user_embedding_version=view.user_version,
        item_embedding_version=view.item_version,
    )


def stacked(answers: Sequence[UserEmbedding], view: View) -> Float32:
    """The answers' vectors, float32 [n, d]."""
    vectors = np.empty((len(answers), len(view.fallback)), dtype=np.float32)
    for row, answer in enumerate(answers):
        vectors[row] = answer.vector
    return vectors


def record_vector(meta: Meta, pair: Pair) -> Float32 | None:
    """The fallback vector that the store holds for a pair; None when it has none that can be used."""
    user_version, item_version = pair
    if user_version is None or item_version is None:
        return None
    data = meta.fallbacks.get(fallback_key(item_version, user_version))
    return None if data is None else decoded_vector(data, pair)


def decoded_vector(data: bytes, pair: Pair | None = None) -> Float32 | None:
    """Vector of a fallback record, None when it is damaged or of another pair."""
    try:
        record = decode(data)
    except CorruptRecord:
        return None
    if pair not in (None, (record.user_embedding_version, record.item_embedding_version)):
        return None
    return frozen(record.vector)


def fallback_vector(fallback: ArrayLike | ItemSpace, item_version: str | None) -> Float32:
    """The caller's own fallback as a unit vector; raises `ConfigError` for what can't be one."""
    if isinstance(fallback, ItemSpace):
        if item_version not in (None, fallback.version):
            msg = f"the fallback is of item version {fallback.version!r}, the reader is pinned to {item_version!r}"
            raise ConfigError(msg)
        return frozen(fallback.fallback)
    try:
        return frozen(unit_vector(fallback))
    except ValueError as exc:
        msg = "the fallback must be an ItemSpace, or one finite vector that is not zero"
        raise ConfigError(msg) from exc


def frozen(vector: Float32) -> Float32:
    """A copy that callers share and can't change."""
    copy = vector.copy()
    copy.flags.writeable = False
    return copy
