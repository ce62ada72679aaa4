"""What a user's history demands of every store, and how what is there differs from it; no I/O."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from stream.core.encoders import REASONS, VersionedEncoder
from stream.core.framing import MAGIC, schema_id_of
from stream.core.history import History
from stream.core.history_codec import NEVER, key_ts_ms
from stream.core.records import CorruptRecord, EmbeddingRecord, decode, kv_entry, to_json, unframed
from stream.core.space import Space

TOLERANCE: Final = 1e-6
#: Fields of a record in the JSON shape that follow from the history, beside the vector and its norm.
_FIELDS: Final = (
    *("user_id", "status", "reason", "history_len", "unknown_items", "as_of"),
    *("user_embedding_version", "depends_on"),
)


@dataclass(frozen=True)
class Published:
    """Last record of a user on the output topic.

    Attributes:
        value: its bytes, None for a tombstone, or for no record.
        newest: greatest ``(epoch, revision)`` that any of the user's records had.
    """

    value: bytes | None = None
    newest: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Logged:
    """What a user's changelog records add up to.

    Attributes:
        state: their join.
        newest: ``(epoch, revision)`` of the join.
        last: that of the last record, which is all that compaction leaves.
    """

    state: History
    newest: tuple[int, int]
    last: tuple[int, int]


@dataclass(frozen=True)
class Evidence:
    """All that is known of a user.

    Attributes:
        folded: the history that the input topics hold, None without input.
        logged: what the changelog holds.
        published: what the output topic holds.
        stored: the key-value store's entry.
        oldest_ms: event time of the oldest event in the input topics, None without one.
    """

    folded: History | None
    logged: Logged | None
    published: Published
    stored: bytes | None
    oldest_ms: int | None = None


class Rules:
    """Compares what is found of a user with what must be there.

    Args:
        space: item space of the records.
        encoder: the encoder that makes them.
        json_output: whether the output topic has JSON.
        ended_ms: the markers of erasures before it may be gone, by the retention of markers; None: they are kept.
        is_output_id: says whether an id in the framing of schema registries is of the output's schema; None: all are.
    """

    def __init__(
        self,
        space: Space,
        encoder: VersionedEncoder,
        *,
        json_output: bool,
        ended_ms: int | None = None,
        is_output_id: Callable[[int], bool] | None = None,
    ) -> None:
        self._space = space
        self._encoder = encoder
        self._json_output = json_output
        self._ended_ms = ended_ms
        self._is_output_id = is_output_id

    def is_whole(self, found: Evidence) -> bool:
        """Whether the input explains all of the state; compaction may have taken an erasure before the user's last."""
        mine, theirs = found.folded, found.logged.state if found.logged else None
        return theirs is None or theirs.erased_at <= (mine.erased_at if mine else NEVER)

    def differences(self, user: str, found: Evidence, *, whole: bool, with_store: bool = True) -> list[str]:
        """How a user's stores differ from the user's history, each in a few words; empty when all is right.

        Args:
            user: canonical id.
            found: what is there.
            whole: the topics hold all of the user's input, so that the state must equal it; else it must contain it.
            with_store: whether the store was read.
        """
        out = []
        may_end = self._may_end(found)
        if may_end and found.folded and (found.logged is None or found.logged.state.erased_at == NEVER):
            out += _after_marker(found.folded.erased_at, found)
            found = replace(found, folded=_without_marker(found.folded))
        out += self._log_differences(found, whole=whole)
        state = found.logged.state if found.logged else None
        basis = found.folded if (whole and found.folded) or state is None else state
        want = self._expected(user, basis) if basis is not None and basis.keys else None
        published = self._read_output(found.published)
        out += self._record_differences("output", want, published)
        if with_store:
            # a marker leaves the store before it leaves the changelog
            known = basis is not None and not (may_end and not basis.keys)
            out += self._store_differences(found, want, published, known=known)
            if may_end and basis is None and found.stored is not None:
                out.append("store: an entry of an erased user whose marker is gone")
        return out

    def _may_end(self, found: Evidence) -> bool:
        """Whether the user was erased so long ago that the marker may be gone."""
        erased_at = found.folded.erased_at if found.folded else NEVER
        if found.logged:
            erased_at = max(erased_at, found.logged.state.erased_at)
        return self._ended_ms is not None and NEVER < erased_at < self._ended_ms

    def _log_differences(self, found: Evidence, *, whole: bool) -> list[str]:
        mine, logged = found.folded, found.logged
        if logged is None:
            return ["changelog: no state"] if mine is not None else []
        out = []
        if logged.last < logged.newest:
            out.append("changelog: an older record came last")
        state = logged.state
        if whole:
            keys, erased_at = (mine.keys, mine.erased_at) if mine else ([], NEVER)
            if state.keys != keys:
                out.append(f"changelog: {len({*keys} ^ {*state.keys})} interactions differ from the input's")
            if state.erased_at != erased_at:
                out.append("changelog: the erasure is another than the input's")
        elif mine is not None:
            joined = state.merge(mine)
            if (joined.keys, joined.erased_at) != (state.keys, state.erased_at):
                out.append("changelog: lacks interactions or an erasure that the input holds")
        return out

    def _expected(self, user: str, history: History) -> EmbeddingRecord:
        interactions = history.interactions()
        vector, found, unknown = self._encoder.embed(
            self._space,
            [i.item_id for i in interactions],
            [i.type for i in interactions],
            [i.ts_ms for i in interactions],
        )
        status, reason = REASONS[found]
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        return EmbeddingRecord(
            user_id=user,
            epoch=0,
            revision=0,
            status=status,
            reason=reason,
            history_len=len(interactions),
            unknown_items=unknown,
            as_of=history.as_of_ms,
            user_embedding_version=self._encoder.version,
            item_embedding_version=self._space.version,
            vector=vector,
            norm=norm,
        )

    def _read_output(self, published: Published) -> Mapping[str, Any] | str | None:
        """The last record in the JSON shape; None for none; a text where there is a fault."""
        if published.value is None:
            return None
        document = output_document(published.value, json_output=self._json_output)
        if document is None:
            return "damaged"
        value = published.value
        if self._is_output_id is not None and value.startswith(MAGIC) and not self._is_output_id(schema_id_of(value)):
            return f"schema {schema_id_of(value)} of the registry is another than that of the record"
        if order_of(document) < published.newest:
            return "an older record came last"
        return document

    def _record_differences(
        self, where: str, want: EmbeddingRecord | None, got: Mapping[str, Any] | str | None
    ) -> list[str]:
        if isinstance(got, str):
            return [f"{where}: {got}"]
        if want is None or got is None:
            if (want is None) == (got is None):
                return []
            return [f"{where}: no record" if got is None else f"{where}: a record where none may be"]
        wanted = to_json(want)
        body, mine = got["user_embedding"], wanted["user_embedding"]
        rest = [
            f"{where}: {name} is {got[name]!r}, the history says {wanted[name]!r}"
            for name in _FIELDS
            if got[name] != wanted[name]
        ]
        if len(body["vector"]) != mine["dim"]:
            return [*rest, f"{where}: the vector has {len(body['vector'])} dimensions"]
        off = float(np.abs(np.subtract(body["vector"], mine["vector"])).max())
        off = max(off, abs(body["norm"] - mine["norm"]))
        return rest if off <= TOLERANCE else [*rest, f"{where}: the vector is off by {off:.2g}"]

    def _store_differences(
        self, found: Evidence, want: EmbeddingRecord | None, published: Mapping[str, Any] | str | None, *, known: bool
    ) -> list[str]:
        if found.stored is None:
            return ["store: no entry"] if known else []
        try:
            epoch, revision, body = kv_entry(found.stored)
            record = to_json(decode(body)) if body else None
        except CorruptRecord:
            return ["store: damaged"]
        out = self._record_differences("store", want, record)
        if record is not None and order_of(record) != (epoch, revision):
            out.append("store: the prefix is another than the record's")
        if not isinstance(published, str) and not out:
            value = found.published.value
            same = record == published if self._json_output else (body or None) == (unframed(value) if value else value)
            if not same:
                out.append("store: the record is another than the output's")
        return out


def _after_marker(erased_at: int, found: Evidence) -> list[str]:
    """What may not be there of a user whose marker is gone: whatever is not younger than the erasure (ms)."""
    out = []
    if found.oldest_ms is not None and found.oldest_ms <= erased_at:
        out.append(
            "input: events from before an erasure outlived its marker, a replay would bring the user back; lower the "
            "event topics' retention.ms"
        )
    if found.logged and found.logged.state.keys and key_ts_ms(found.logged.state.keys[0]) <= erased_at:
        out.append("changelog: interactions from before an erasure")
    return out


def _without_marker(history: History) -> History | None:
    """What is left of a history whose erasure is forgotten; None for nothing."""
    if not history.keys:
        return None
    return History(history.codec, history.limit, history.keys, revision=history.revision)


def output_document(value: bytes, *, json_output: bool) -> dict[str, Any] | None:
    """A live output record in the JSON shape; None when it can't be read."""
    try:
        if not json_output:
            return to_json(decode(value))
        document = dict(json.loads(value))
        body = document["user_embedding"]
        vector = np.asarray(body["vector"], dtype=np.float64)
        _ = order_of(document), float(body["norm"]), [document[name] for name in _FIELDS]
    except (CorruptRecord, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return document if vector.ndim == 1 else None


def output_order(value: bytes, *, json_output: bool) -> tuple[int, int] | None:
    """``(epoch, revision)`` of a live output record; None when it can't be read."""
    if json_output:
        document = output_document(value, json_output=True)
        return None if document is None else order_of(document)
    try:
        record = decode(value)
    except CorruptRecord:
        return None
    return record.epoch, record.revision


def order_of(document: Mapping[str, Any]) -> tuple[int, int]:
    """``(epoch, revision)`` of a record."""
    return int(document["epoch"]), int(document["revision"])
