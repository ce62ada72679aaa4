"""One user: the stored vector, the history that it comes from, what each interaction does to it, and what if."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from stream.config import Settings
from stream.core.encoders import REASONS
from stream.core.formulas import Float32
from stream.core.history import History
from stream.core.history_codec import MAX_TS_MS, HistoryCodec, sort_key
from stream.core.records import PREFIX_BYTES, CorruptRecord, EmbeddingRecord, decode
from stream.errors import ConfigError, DeliveryError
from stream.foreign_text import one_line
from stream.inspector.explanation import Explanation, explain
from stream.inspector.histories import Histories, Kept
from stream.inspector.versions import LoadedPair
from stream.items.space import ItemSpace
from stream.keys import canonical_id, user_cache_key
from stream.kv.protocol import KVReader

NEIGHBOURS: Final = 10
#: Interactions that a question may add.
MAX_ADDED: Final = 100
#: Two float32 vectors of one formula differ by no more (law 2).
SAME: Final = 1e-6
#: A history that was read longer ago than this is told to be old.
_OLD_S: Final = 3.0
_KEY: Final = re.compile(r"[0-9a-f]{2,1200}")

#: What a status and its reason mean, and what to do about it: whole sentences.
WORDS: Final[Mapping[str, str]] = {
    "ok": "This user has a vector of their own.",
    "no_known_items": "The item version knows none of the items in the history; readers get the fallback vector.",
    "too_short_history": "Only one of the items is known, and one is not enough; readers get the fallback vector.",
    "degenerate": "The items cancel out, and no direction is left; readers get the fallback vector.",
    "encoder_error": "The model made nothing of the history; readers get the fallback vector.",
    "missing": "No event of this user was ever kept; readers get the fallback vector.",
    "erased": "This user was erased, and silent since; readers get the fallback vector.",
    "version_missing": "The store holds no vector of this user in these versions; see how far their rollout is.",
    "corrupt": "What the store holds of this user is damaged; `uemb kv rebuild` writes it anew from the histories.",
    "store_down": "The store can't be read; what follows is made from the history.",
}


class Added(msgspec.Struct, frozen=True):
    """An interaction that is supposed."""

    item: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    type: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    ts_ms: Annotated[int, msgspec.Meta(ge=0, le=MAX_TS_MS)]


class Question(msgspec.Struct, frozen=True):
    """What is asked about a user.

    Attributes:
        user: whose vector.
        user_version: with `item_version` the pair; both empty: the served one.
        item_version: see there.
        without: keys of interactions to take away, as an answer has them.
        add: interactions to add.
        known: the ``state`` of an answer that is at hand: where it is still the same, that is all that is said.
    """

    user: str
    user_version: str = ""
    item_version: str = ""
    without: Annotated[list[str], msgspec.Meta(max_length=10_000)] = []
    add: Annotated[list[Added], msgspec.Meta(max_length=MAX_ADDED)] = []
    known: Annotated[str, msgspec.Meta(max_length=200)] = ""

    @property
    def versions(self) -> tuple[str, str] | None:
        """The pair; None for the served one."""
        return (self.user_version, self.item_version) if self.user_version and self.item_version else None


class UserView:
    """Answers about users; nothing is written anywhere.

    Args:
        settings: the worker's own.
        histories: where histories are read.
        titles: of items, by id.
    """

    def __init__(self, settings: Settings, histories: Histories, titles: Mapping[str, str]) -> None:
        self._settings = settings
        self._histories = histories
        self._titles = titles

    def answer(self, question: Question, pair: LoadedPair, store: KVReader | None, partitions: int) -> dict[str, Any]:
        """All about a user in a pair of versions, as plain values.

        Raises:
            ConfigError: what is asked can't be.
            UembError: the changelog or the store can't be read.
        """
        try:
            user = canonical_id(question.user)
        except ValueError as exc:
            raise ConfigError(str(exc)) from exc
        stored, reason = _stored(store, user, pair)
        kept, problem = self._kept(user, partitions, can_do_without=stored is not None)
        if stored is None and not reason:
            reason = "missing" if kept is None else "version_missing"
        status = "ok" if stored is not None and stored.status == "ok" else "fallback"
        reason = stored.reason if stored is not None else reason
        state = _state(pair, status, reason, kept, stored)
        if question.known == state:
            return {"same": True}
        answer: dict[str, Any] = {
            "user": user,
            "state": state,
            "user_version": pair.encoder.version,
            "item_version": pair.space.version,
            "status": status,
            "reason": reason,
            "words": WORDS.get(reason or status, reason),
            "problem": problem,
            "stored": None if stored is None else _facts(stored),
            "kept": None if kept is None else _kept(kept),
            "explained": None,
            "before": None,
            "supposed": None,
        }
        history = History(HistoryCodec(self._settings.event_types), self._settings.history_limit)
        found = None
        if kept is not None:
            history = kept.history
        if history.keys:
            found = explain(pair.encoder, pair.space, history.interactions())
            answer["explained"] = self._explained(history, found, pair.space)
            answer["before"] = self._before(history, found, pair)
            if stored is not None:
                answer["agrees"] = bool(np.abs(stored.vector - found.vector).max(initial=0) <= SAME)
        if question.without or question.add:
            answer["supposed"] = self._supposed(history, question, pair, found)
        return answer

    def _kept(self, user: str, partitions: int, *, can_do_without: bool) -> tuple[Kept | None, str | None]:
        """What the changelog keeps of a user, and what is wrong with it: old, or away where the store has a vector."""
        try:
            kept = self._histories.of(user, partitions)
        except DeliveryError as exc:
            if not can_do_without:
                raise
            return None, f"the history can't be read: {one_line(str(exc))}"
        if kept is not None and kept.age_s > _OLD_S:
            return kept, f"the history is that of {kept.age_s:.0f} s ago: the changelog can't be read now"
        return kept, None

    def nearest(self, space: ItemSpace, vector: Float32) -> list[dict[str, Any]]:
        """The items nearest to a vector [d]."""
        rows, scores = space.nearest(vector[None], NEIGHBOURS)
        found = [
            (space.ids[row].decode(), score) for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        ]
        return [{"item": item, "title": self._titles.get(item), "score": round(score, 6)} for item, score in found]

    def _before(self, history: History, now: Explanation, pair: LoadedPair) -> dict[str, Any] | None:
        """What was nearest without the newest interaction; None where it is the only one."""
        if len(history.keys) < 2:
            return None
        older = history.interactions()[:-1]
        columns = [[one.item_id for one in older], [one.type for one in older], [one.ts_ms for one in older]]
        vector, status, _ = pair.encoder.embed(pair.space, *columns)  # type: ignore[arg-type]
        return {
            "status": REASONS[status][0],
            "cosine": float(vector.astype(np.float64) @ now.vector),
            "nearest": self.nearest(pair.space, vector),
        }

    def _supposed(
        self, history: History, question: Question, pair: LoadedPair, now: Explanation | None
    ) -> dict[str, Any]:
        """The same without some interactions, and with others."""
        supposed, outcomes = self._edited(history, question.without, question.add)
        found = explain(pair.encoder, pair.space, supposed.interactions())
        document = self._explained(supposed, found, pair.space)
        document["outcomes"] = outcomes
        if now is not None:
            document["cosine"] = float(found.vector.astype(np.float64) @ now.vector)
        return document

    def _edited(self, history: History, without: Sequence[str], add: Sequence[Added]) -> tuple[History, list[str]]:
        """The history after the same rules as a worker's, and what became of each that was added."""
        if not all(_KEY.fullmatch(key) and len(key) % 2 == 0 for key in without):
            msg = "name interactions by the keys that the answer about a user gives"
            raise ConfigError(msg)
        gone = {bytes.fromhex(key) for key in without}
        if not gone <= set(history.keys):
            msg = "the history has changed meanwhile; look at the user again"
            raise ConfigError(msg)
        kept = [key for key in history.keys if key not in gone]
        edited = History(history.codec, history.limit, kept, erased_at=history.erased_at)
        outcomes = []
        for one in add:
            if one.type not in self._settings.event_types:
                msg = f"type {one.type!r} enters no history; UEMB_EVENT_TYPES lists those that do"
                raise ConfigError(msg)
            try:
                item = canonical_id(one.item)
            except ValueError as exc:
                raise ConfigError(str(exc)) from exc
            outcome, _ = edited.add(sort_key(one.ts_ms, item.encode(), one.type.encode()))
            outcomes.append(outcome.value)
        return edited, outcomes

    def _explained(self, history: History, found: Explanation, space: ItemSpace) -> dict[str, Any]:
        status, reason = REASONS[found.status]
        interactions = history.interactions()
        rows = []
        for n, (key, one) in enumerate(zip(history.keys, interactions, strict=True)):
            rows.append(
                {
                    "key": key.hex(),
                    "ts_ms": one.ts_ms,
                    "item": one.item_id,
                    "title": self._titles.get(one.item_id),
                    "type": one.type,
                    "known": bool(found.known[n]),
                    "shares": [float(share) for share in found.shares[:, n]],
                    "pull": None if found.pulls is None else float(found.pulls[n]),
                    "turn": None if np.isnan(found.turns[n]) else float(found.turns[n]),
                }
            )
        return {
            "status": status,
            "reason": reason,
            "words": WORDS[reason or status],
            "vector": [float(value) for value in found.vector],
            "parts": list(found.parts),
            "history": rows,
            "nearest": self.nearest(space, found.vector),
        }


def _state(pair: LoadedPair, status: str, reason: str, kept: Kept | None, stored: EmbeddingRecord | None) -> str:
    """What an answer rests on: the same again has the same answer."""
    log = None if kept is None else (kept.epoch, kept.history.revision)
    record = None if stored is None else (stored.epoch, stored.revision)
    return f"{pair.encoder.version}:{pair.space.version}:{status}:{reason}:{log}:{record}"


def _stored(store: KVReader | None, user: str, pair: LoadedPair) -> tuple[EmbeddingRecord | None, str]:
    """The user's record in the store, or why there is none; empty where the store just has none."""
    if store is None:
        return None, "store_down"
    key = user_cache_key(user, pair.space.version, pair.encoder.version).encode()
    try:
        (entry,) = store.get([(user.encode(), key)])
    except Exception:  # noqa: BLE001 - whatever a store does, the rest of the answer is there
        return None, "store_down"
    if entry is None:
        return None, ""
    if len(entry) == PREFIX_BYTES:
        return None, "erased"
    try:
        return decode(entry[PREFIX_BYTES:]), ""
    except CorruptRecord:
        return None, "corrupt"


def _facts(record: EmbeddingRecord) -> dict[str, Any]:
    return {
        "epoch": record.epoch,
        "revision": record.revision,
        "as_of": record.as_of,
        "history_len": record.history_len,
        "unknown_items": record.unknown_items,
    }


def _kept(kept: Kept) -> dict[str, Any]:
    return {
        "partition": kept.partition,
        "epoch": kept.epoch,
        "revision": kept.history.revision,
        "erased_at": kept.history.erased_at if kept.history.erased_at >= 0 else None,
        "limit": kept.history.limit,
    }
