"""The reader: a user's stored vector for retrieval, or a fallback with its reason; after `open` nothing raises."""

import json
import logging
import operator
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from stream.answers import (
    Freshness,
    Pair,
    UserEmbedding,
    View,
    answer_for,
    decoded_vector,
    fallback_vector,
    frozen,
    record_vector,
)
from stream.embedding import Float32, fallback_user_embedding
from stream.encoders import REASONS, Status, VersionedEncoder
from stream.errors import ConfigError, StoreError, UembError
from stream.items import ItemSpace
from stream.keys import canonical_id, check_version_name, encoder_key, partition_of, user_cache_key
from stream.kv.base import KVReader, Meta
from stream.kv.bounded import DOWN_S, STORE_DOWN, BoundedLookups, Found, Trouble
from stream.kv.urls import open_reader, parse_kv_url
from stream.records import kv_entry

__all__ = ["EmbeddingReader", "UserEmbedding", "get_or_build_user_embedding"]

HEARTBEAT_S: Final = 1.5  # a younger heartbeat adds nothing to the lag
STALE_HEARTBEAT_S: Final = 5.0
_LOG_EVERY_S: Final = 60.0
_VIEWS: Final = 256

MISSING: Final = Trouble("missing")
VERSION_MISSING: Final = Trouble("version_missing")
UNVOUCHED: Final[Freshness] = (True, None)

log = logging.getLogger(__name__)


class EmbeddingReader:
    """Stored vectors of one pair of versions, within a deadline, from any number of threads; use `open`.

    Attributes:
        fallbacks: how many fallback vectors were given out, by reason.
    """

    def __init__(
        self,
        connect: Callable[[], KVReader],
        *,
        item_version: str | None = None,
        user_version: str | None = None,
        fallback: ArrayLike | ItemSpace | None = None,
        max_lag_s: float | None = None,
        timeout_s: float = 0.02,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._connect = connect
        self._pins = (_checked_name(user_version), _checked_name(item_version))
        self._fallback = None if fallback is None else fallback_vector(fallback, item_version)
        self._max_lag_s = max_lag_s
        self._clock = clock
        self._views: dict[Pair, View] = {}
        self._progress: dict[bytes, tuple[float, float]] = {}
        self._counted = _FallbackCount()
        self.fallbacks = self._counted.by_reason
        self._closed = threading.Event()
        self._connecting = threading.Lock()
        self._store: KVReader | None = None
        self._default = self._first_connect()
        self._bounded = BoundedLookups(timeout_s)

    @classmethod
    def open(
        cls,
        kv_url: str,
        *,
        item_version: str | None = None,
        user_version: str | None = None,
        fallback: ArrayLike | ItemSpace | None = None,
        max_lag_s: float | None = None,
        timeout_s: float = 0.02,
        clock: Callable[[], float] = time.time,
    ) -> "EmbeddingReader":
        """Open the store at `kv_url`; in a server that forks, in each worker process.

        Args:
            kv_url: the worker's ``UEMB_KV_URL``.
            item_version: the item version to stay with; None follows the one that is served.
            user_version: the user-embedding version to stay with; None follows the one that is served.
            fallback: vector [d] for when the store can't give one (an `ItemSpace` gives its own). With it `open`
                succeeds without a store, and looks for it once a second.
            max_lag_s: a pipeline further behind marks its vectors ``stale``.
            timeout_s: longest wait of one call for the store.
            clock: wall clock in epoch seconds.

        Raises:
            StoreError: the store can't be reached, or has no vector to fall back to, and there is no `fallback`.
            ConfigError: the URL, a version's name or the fallback can't be right.
        """
        parse_kv_url(kv_url)
        return cls(
            lambda: open_reader(kv_url),
            item_version=item_version,
            user_version=user_version,
            fallback=fallback,
            max_lag_s=max_lag_s,
            timeout_s=timeout_s,
            clock=clock,
        )

    def __enter__(self) -> "EmbeddingReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store; what is asked for afterwards is answered with ``store_down``."""
        with self._connecting:
            self._closed.set()
        self._bounded.close()
        if self._store is not None:
            self._store.close()

    def get(self, user_id: int | str) -> UserEmbedding:
        """The user's vector, or the fallback with its reason; never raises."""
        return self._counted.add(self._lookup([user_id], self._view(self._pins)))[0]

    def get_pair(self, user_id: int | str, item_emb_version: str, user_emb_version: str) -> UserEmbedding:
        """Like `get`, of exactly this pair of versions."""
        return self._counted.add(self._lookup([user_id], self._view((user_emb_version, item_emb_version))))[0]

    def get_many(self, user_ids: Iterable[int | str]) -> tuple[Float32, list[UserEmbedding]]:
        """Vectors of many users, all of one pair of versions; never raises.

        Returns:
            float32 [n, d], and n answers in the order of `user_ids`.
        """
        view = self._view(self._pins)
        answers = self._counted.add(self._lookup(list(user_ids), view))
        vectors = np.empty((len(answers), len(view.fallback)), dtype=np.float32)
        for row, answer in enumerate(answers):
            vectors[row] = answer.vector
        return vectors, answers

    def _first_connect(self) -> Float32:
        """Connect, and return the vector for when the store has none; without a fallback both must succeed."""
        try:
            self._store = self._connect()
        except Exception as exc:
            if self._fallback is None:
                if isinstance(exc, UembError):
                    raise
                msg = f"the store can't be opened ({exc})"
                raise StoreError(msg) from exc
            log.warning("no store yet, looking for it once a second: %s", exc)
            threading.Thread(target=self._connect_later, name="uemb-reader-connect", daemon=True).start()
            return self._fallback
        try:
            return self._default_vector(self._store.meta())
        except UembError:
            self._store.close()
            raise

    def _default_vector(self, meta: Meta) -> Float32:
        own = record_vector(meta, self._pair(meta, self._pins))
        if self._fallback is not None:
            if own is not None and own.shape != self._fallback.shape:
                msg = f"the fallback has dimension {len(self._fallback)}, the store's vectors have {len(own)}"
                raise ConfigError(msg)
            return self._fallback
        if own is None:
            own = next((v for key in meta.fallbacks if (v := decoded_vector(meta.fallbacks[key])) is not None), None)
        if own is None:
            msg = "the store has no fallback vector yet; start a worker first, or open with fallback="
            raise StoreError(msg)
        # Not another pair's own fallback: that one lives in another space, this one in none.
        return frozen(fallback_user_embedding(len(own)))

    def _connect_later(self) -> None:
        while not self._closed.wait(DOWN_S):
            try:
                store = self._connect()
            except Exception as exc:  # noqa: BLE001 - whatever it is, the fallback goes on being given
                log.debug("still no store: %s", exc)
                continue
            with self._connecting:
                if not self._closed.is_set():
                    self._store = store
                    log.info("the store was found")
                    return
            store.close()

    @staticmethod
    def _pair(meta: Meta, asked: Pair) -> Pair:
        """The pair asked for, with what it leaves open from the one that is served."""
        current = meta.current
        if current is None:
            return asked
        return asked[0] or current.user_version, asked[1] or current.item_version

    def _view(self, asked: Pair) -> View:
        store = self._store
        meta = None if store is None else store.meta()
        view = self._views.get(asked)
        if view is None or view.meta is not meta:
            view = self._make_view(meta, asked)
            if len(self._views) >= _VIEWS:
                self._views.clear()
            self._views[asked] = view
        return view

    def _make_view(self, meta: Meta | None, asked: Pair) -> View:
        if meta is None:
            return View(None, *asked, self._default, STORE_DOWN)
        pair = self._pair(meta, asked)
        own = record_vector(meta, pair)
        served = meta.current is not None and pair == (meta.current.user_version, meta.current.item_version)
        trouble = None if own is not None or served else VERSION_MISSING
        return View(meta, *pair, self._default if own is None else own, trouble)

    def _lookup(self, user_ids: Sequence[int | str], view: View) -> list[UserEmbedding]:
        names = [_canonical(user_id) for user_id in user_ids]
        found: list[Found] = [MISSING if name is None else view.trouble for name in names]
        places = [place for place, name in enumerate(names) if name is not None]
        store, partitions = self._store, (view.meta.partitions if view.meta is not None else None) or 1
        if store is None:
            return [answer_for(name, entry, view, UNVOUCHED) for name, entry in zip(names, found, strict=True)]
        if view.trouble is None:
            user_version, item_version = str(view.user_version), str(view.item_version)
            lookups = [
                (name.encode(), user_cache_key(name, item_version, user_version).encode())
                for name in names
                if name is not None
            ]
            for place, entry in zip(places, self._bounded.find(store, lookups, partitions), strict=True):
                found[place] = entry
        freshness = self._freshness(store, names, partitions)
        triples = zip(names, found, freshness, strict=True)
        return [answer_for(name, entry, view, fresh) for name, entry, fresh in triples]

    def _freshness(self, store: KVReader, names: Sequence[str | None], partitions: int) -> list[Freshness]:
        known: dict[int, Freshness] = {}
        out = []
        for name in names:
            if name is None:
                out.append(UNVOUCHED)
                continue
            user_id = name.encode()
            partition = partition_of(user_id, partitions)
            if partition not in known:
                known[partition] = self._judge(store.watermark(user_id))
            out.append(known[partition])
        return out

    def _judge(self, watermark: bytes | None) -> Freshness:
        """Whether a partition's progress record makes its vectors stale, and how far behind it says they are."""
        if watermark is None:
            return UNVOUCHED
        progress = self._progress.get(watermark)
        if progress is None:
            progress = _progress(watermark)
            if progress is None:
                return UNVOUCHED
            if len(self._progress) >= _VIEWS:
                self._progress.clear()
            self._progress[watermark] = progress
        lag_s, heartbeat_s = progress
        silent_s = self._clock() - heartbeat_s
        lag_s += max(0.0, silent_s - HEARTBEAT_S)
        behind = self._max_lag_s is not None and lag_s > self._max_lag_s
        return silent_s > STALE_HEARTBEAT_S or behind, lag_s


class _FallbackCount:
    """Counts fallbacks by reason and says so in the log, in one line a minute without ids."""

    def __init__(self) -> None:
        self.by_reason: dict[str, int] = {}
        self._lock = threading.Lock()
        self._reported: dict[str, int] = {}
        self._report_at = 0.0

    def add(self, answers: list[UserEmbedding]) -> list[UserEmbedding]:
        """Count what is about to be given out."""
        reasons = [answer.reason for answer in answers if answer.status != "ok"]
        if not reasons:
            return answers
        with self._lock:
            for reason in reasons:
                self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
            now = time.monotonic()
            due = now >= self._report_at
            if due:
                self._report_at = now + _LOG_EVERY_S
                news = {r: n - self._reported.get(r, 0) for r, n in self.by_reason.items()}
                self._reported = dict(self.by_reason)
        if due:
            log.warning("fallback vectors given out: %s", ", ".join(f"{n} {r}" for r, n in sorted(news.items()) if n))
        return answers


def get_or_build_user_embedding(
    user_id: int | str,
    item_emb_version: str,
    user_emb_version: str,
    *,
    reader: EmbeddingReader,
    history: Sequence[int | str] | None = None,
    items: ItemSpace | None = None,
    encoder: VersionedEncoder | None = None,
) -> UserEmbedding:
    """The stored vector of exactly this pair if it is ``ok``, else one built from `history`; never raises (seed §6).

    What is built is not written back: only the stream writes. Without the parts to build from, or when they are of
    other versions than asked for, the answer is the reader's fallback with its reason.

    Args:
        user_id: whose vector.
        item_emb_version: the item version that the vector must live in.
        user_emb_version: the encoder's version.
        reader: where stored vectors come from.
        history: item ids, oldest to newest.
        items: the item space of `item_emb_version`.
        encoder: the encoder of `user_emb_version`.
    """
    view = reader._view((user_emb_version, item_emb_version))
    answer = reader._lookup([user_id], view)[0]
    if answer.status != "ok" and history is not None and items is not None and encoder is not None:
        answer = _built(answer, view, history, items, encoder) or answer
    return reader._counted.add([answer])[0]


def _built(
    stored: UserEmbedding, view: View, history: Sequence[int | str], items: ItemSpace, encoder: VersionedEncoder
) -> UserEmbedding | None:
    """A vector from the caller's history, or None when its parts are not of the versions asked for."""
    try:
        if items.version != view.item_version or encoder.version != view.user_version:
            return None
        known_hash = view.meta.encoders.get(encoder_key(encoder.version)) if view.meta is not None else None
        if known_hash not in (None, encoder.hash):
            return None
        history = list(history)
    except Exception as exc:  # noqa: BLE001 - retrieval must get a vector whatever the caller passed
        log.debug("a vector could not be built: %s", type(exc).__name__)
        return None
    try:
        vector, status, unknown = encoder.embed(items, history)
    except Exception as exc:  # noqa: BLE001 - the same
        log.debug("an encoder failed: %s", type(exc).__name__)  # counted, and in the line of each minute
        vector, status, unknown = items.fallback, Status.ENCODER_ERROR, 0
    return UserEmbedding(
        stored.user_id,
        vector,
        *REASONS[status],
        stale=False,
        lag_s=None,
        epoch=0,
        revision=0,
        as_of=None,
        history_len=min(len(history), encoder.history_limit),
        unknown_items=unknown,
        user_embedding_version=view.user_version,
        item_embedding_version=view.item_version,
    )


def _canonical(user_id: object) -> str | None:
    """The canonical id, or None for what is no id; takes numpy's integers too."""
    try:
        return canonical_id(user_id if isinstance(user_id, int | str) else operator.index(user_id))  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - anything may be asked for
        return None


def _progress(watermark: bytes) -> tuple[float, float] | None:
    """Lag and heartbeat, in seconds, of a partition's progress record; None when it is damaged."""
    try:
        body = json.loads(kv_entry(watermark)[2])
        return body["lag_ms"] / 1000, body["heartbeat_ms"] / 1000
    except (ValueError, KeyError, TypeError):
        return None


def _checked_name(version: str | None) -> str | None:
    if version is None:
        return None
    try:
        return check_version_name(version)
    except (TypeError, ValueError) as exc:
        raise ConfigError(str(exc)) from exc
