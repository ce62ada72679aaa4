"""The reader: a user's stored vector for retrieval, or a fallback with its reason; after `open` nothing raises."""

import json
import logging
import operator
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stream.embedding import NORM_EPS, Float32, fallback_user_embedding, l2_normalize
from stream.encoders import REASONS, Status, VersionedEncoder
from stream.errors import ConfigError, StoreError, UembError
from stream.items import ItemSpace
from stream.keys import (
    canonical_id,
    check_version_name,
    encoder_key,
    fallback_key,
    partition_of,
    user_cache_key,
)
from stream.kv.base import KVReader, Meta
from stream.kv.urls import open_reader, parse_kv_url
from stream.records import CorruptRecord, decode, kv_entry

UNIT_TOLERANCE: Final = 1e-5
DOWN_S: Final = 1.0  # for so long after a failure lookups are answered at once
HEARTBEAT_S: Final = 1.5  # a younger heartbeat adds nothing to the lag
STALE_HEARTBEAT_S: Final = 5.0
_LOG_EVERY_S: Final = 60.0
_READ_THREADS: Final = 4
_HELD_UP_S: Final = 0.002
_OUTAGE: Final = 5  # timeouts that a read may take before its store counts as down for the whole of `DOWN_S`
_WHOLE_STORE: Final = -1
_VIEWS: Final = 256
_STATUSES: Final = frozenset({"ok", "fallback"})

log = logging.getLogger(__name__)


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


class _Trouble(NamedTuple):
    """Stands for an entry that was not read."""

    reason: str


class _View(NamedTuple):
    """A pair of versions in one state of the shared record; a call keeps to one view, so it never mixes pairs."""

    meta: Meta | None
    user_version: str | None
    item_version: str | None
    fallback: Float32
    trouble: _Trouble | None


_Lookup = tuple[bytes, bytes]
_Found = bytes | _Trouble | None
_Freshness = tuple[bool, float | None]
_Pair = tuple[str | None, str | None]

_MISSING: Final = _Trouble("missing")
_STORE_DOWN: Final = _Trouble("store_down")
_TIMEOUT: Final = _Trouble("timeout")
_VERSION_MISSING: Final = _Trouble("version_missing")
_UNVOUCHED: Final[_Freshness] = (True, None)


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
        self._fallback = None if fallback is None else _fallback_vector(fallback, item_version)
        self._max_lag_s = max_lag_s
        self._clock = clock
        self._views: dict[_Pair, _View] = {}
        self._progress: dict[bytes, tuple[float, float]] = {}
        self._counted = _FallbackCount()
        self.fallbacks = self._counted.by_reason
        self._closed = threading.Event()
        self._connecting = threading.Lock()
        self._store: KVReader | None = None
        self._default = self._first_connect()
        self._bounded = _Bounded(timeout_s)

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
        own = _record_vector(meta, self._pair(meta, self._pins))
        if self._fallback is not None:
            if own is not None and own.shape != self._fallback.shape:
                msg = f"the fallback has dimension {len(self._fallback)}, the store's vectors have {len(own)}"
                raise ConfigError(msg)
            return self._fallback
        if own is None:
            own = next((v for key in meta.fallbacks if (v := _decoded(meta.fallbacks[key])) is not None), None)
        if own is None:
            msg = "the store has no fallback vector yet; start a worker first, or open with fallback="
            raise StoreError(msg)
        # Not another pair's own fallback: that one lives in another space, this one in none.
        return _frozen(fallback_user_embedding(len(own)))

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
    def _pair(meta: Meta, asked: _Pair) -> _Pair:
        """The pair asked for, with what it leaves open from the one that is served."""
        current = meta.current
        if current is None:
            return asked
        return asked[0] or current.user_version, asked[1] or current.item_version

    def _view(self, asked: _Pair) -> _View:
        store = self._store
        meta = None if store is None else store.meta()
        view = self._views.get(asked)
        if view is None or view.meta is not meta:
            view = self._make_view(meta, asked)
            if len(self._views) >= _VIEWS:
                self._views.clear()
            self._views[asked] = view
        return view

    def _make_view(self, meta: Meta | None, asked: _Pair) -> _View:
        if meta is None:
            return _View(None, *asked, self._default, _STORE_DOWN)
        pair = self._pair(meta, asked)
        own = _record_vector(meta, pair)
        served = meta.current is not None and pair == (meta.current.user_version, meta.current.item_version)
        trouble = None if own is not None or served else _VERSION_MISSING
        return _View(meta, *pair, self._default if own is None else own, trouble)

    def _lookup(self, user_ids: Sequence[int | str], view: _View) -> list[UserEmbedding]:
        names = [_canonical(user_id) for user_id in user_ids]
        found: list[_Found] = [_MISSING if name is None else view.trouble for name in names]
        places = [place for place, name in enumerate(names) if name is not None]
        store, partitions = self._store, (view.meta.partitions if view.meta is not None else None) or 1
        if store is None:
            return [_answer(name, entry, view, _UNVOUCHED) for name, entry in zip(names, found, strict=True)]
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
        return [_answer(name, entry, view, fresh) for name, entry, fresh in triples]

    def _freshness(self, store: KVReader, names: Sequence[str | None], partitions: int) -> list[_Freshness]:
        known: dict[int, _Freshness] = {}
        out = []
        for name in names:
            if name is None:
                out.append(_UNVOUCHED)
                continue
            user_id = name.encode()
            partition = partition_of(user_id, partitions)
            if partition not in known:
                known[partition] = self._judge(store.watermark(user_id))
            out.append(known[partition])
        return out

    def _judge(self, watermark: bytes | None) -> _Freshness:
        """Whether a partition's progress record makes its vectors stale, and how far behind it says they are."""
        if watermark is None:
            return _UNVOUCHED
        progress = self._progress.get(watermark)
        if progress is None:
            progress = _progress(watermark)
            if progress is None:
                return _UNVOUCHED
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


class _Job:
    __slots__ = ("abandoned", "done", "found", "lookups", "store")

    def __init__(self, store: KVReader, lookups: Sequence[_Lookup]) -> None:
        self.store = store
        self.lookups = lookups
        self.found: list[bytes | None] | _Trouble = _STORE_DOWN
        self.abandoned = False
        self.done = threading.Lock()
        self.done.acquire()


class _Bounded:
    """Lookups that wait no longer than agreed; after a failure, a second of none at all.

    What fails counts as down: the partition when it can't be read, the whole store when it is slow (until the read
    comes back after all, if that is soon).
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._down: dict[int, tuple[float, _Trouble]] = {}
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = False
        for number in range(_READ_THREADS):
            # Daemons: a read that hangs must not keep the process from ending.
            threading.Thread(target=self._work, name=f"uemb-lookup-{number}", daemon=True).start()

    def find(self, store: KVReader, lookups: Sequence[_Lookup], partitions: int) -> list[_Found]:
        """What the store has under each of `lookups`, or why that is not known."""
        if not lookups:
            return []
        deadline = time.monotonic() + self._timeout_s
        if not self._down_now():
            found = self._read(store, lookups, deadline)
            if not isinstance(found, _Trouble):
                return list(found)
            if found is _TIMEOUT:
                return [found] * len(lookups)
            if len(lookups) == 1:
                self._mark(partition_of(lookups[0][0], partitions), found)
        return self._find_by_partition(store, lookups, partitions, deadline)

    def close(self) -> None:
        """Answer nothing more."""
        self._closed = True
        for _ in range(_READ_THREADS):
            self._jobs.put(None)

    def _find_by_partition(
        self, store: KVReader, lookups: Sequence[_Lookup], partitions: int, deadline: float
    ) -> list[_Found]:
        """One partition that can't be read must not cost the users of the others their vectors."""
        places: dict[int, list[int]] = {}
        for place, (user_id, _) in enumerate(lookups):
            places.setdefault(partition_of(user_id, partitions), []).append(place)
        out: list[_Found] = [None] * len(lookups)
        for partition, at in places.items():
            down = self._down_now()
            found: list[bytes | None] | _Trouble | None = down.get(_WHOLE_STORE) or down.get(partition)
            if found is None:
                found = self._read(store, [lookups[place] for place in at], deadline)
                if found is _STORE_DOWN:
                    self._mark(partition, found)
            for n, place in enumerate(at):
                out[place] = found if isinstance(found, _Trouble) else found[n]
        return out

    def _down_now(self) -> dict[int, _Trouble]:
        if not self._down:
            return {}
        now = time.monotonic()
        marks = list(self._down.items())
        for key, mark in marks:
            if mark[0] <= now and self._down.get(key) is mark:
                self._down.pop(key, None)
        return {key: trouble for key, (until, trouble) in marks if until > now}

    def _mark(self, key: int, trouble: _Trouble) -> None:
        self._down[key] = (time.monotonic() + DOWN_S, trouble)

    def _read(self, store: KVReader, lookups: Sequence[_Lookup], deadline: float) -> list[bytes | None] | _Trouble:
        if self._closed:
            return _STORE_DOWN
        job = _Job(store, lookups)
        self._jobs.put(job)
        if job.done.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return job.found
        # Woken late, this process was held up (other threads had the interpreter), which says nothing about the store.
        if time.monotonic() - deadline > _HELD_UP_S and job.done.acquire(timeout=self._timeout_s):
            return job.found
        self._mark(_WHOLE_STORE, _TIMEOUT)
        job.abandoned = True
        if job.done.acquire(blocking=False):  # done before it could see that it was abandoned
            self._down.pop(_WHOLE_STORE, None)
            return job.found
        return _TIMEOUT

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            took_s = 0.0
            if not job.abandoned:
                began = time.monotonic()
                try:
                    found = job.store.get(job.lookups)
                    job.found = found if len(found) == len(job.lookups) else _STORE_DOWN
                except StoreError:
                    pass  # what a job holds from the start
                except Exception:
                    log.exception("a lookup failed in an unexpected way")
                took_s = time.monotonic() - began
                job.done.release()
            if job.abandoned and took_s < _OUTAGE * self._timeout_s:
                self._down.pop(_WHOLE_STORE, None)  # it came, if late: a busy process or store, not one that is down


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
    stored: UserEmbedding, view: _View, history: Sequence[int | str], items: ItemSpace, encoder: VersionedEncoder
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


def _answer(name: str | None, entry: _Found, view: _View, fresh: _Freshness) -> UserEmbedding:
    if isinstance(entry, _Trouble):
        return _fallback_answer(name, entry.reason, view, fresh)
    if entry is None:
        return _fallback_answer(name, "missing", view, fresh)
    try:
        epoch, revision, body = kv_entry(entry)
        if not body:
            return _fallback_answer(name, "erased", view, fresh, epoch, revision)
        record = decode(body)
    except CorruptRecord:
        return _fallback_answer(name, "corrupt", view, fresh)
    asked = (name, view.user_version, view.item_version, epoch, revision, view.fallback.shape)
    got = (
        record.user_id,
        record.user_embedding_version,
        record.item_embedding_version,
        record.epoch,
        record.revision,
        record.vector.shape,
    )
    if asked != got or record.status not in _STATUSES or not _is_unit(record.vector):
        return _fallback_answer(name, "corrupt", view, fresh)
    return UserEmbedding(
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


def _fallback_answer(
    name: str | None, reason: str, view: _View, fresh: _Freshness, epoch: int = 0, revision: int = 0
) -> UserEmbedding:
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


def _record_vector(meta: Meta, pair: _Pair) -> Float32 | None:
    """The fallback vector that the store holds for a pair; None when it has none that can be used."""
    user_version, item_version = pair
    if user_version is None or item_version is None:
        return None
    data = meta.fallbacks.get(fallback_key(item_version, user_version))
    return None if data is None else _decoded(data, pair)


def _decoded(data: bytes, pair: _Pair | None = None) -> Float32 | None:
    try:
        record = decode(data)
    except CorruptRecord:
        return None
    if pair not in (None, (record.user_embedding_version, record.item_embedding_version)):
        return None
    return _frozen(record.vector) if _is_unit(record.vector) else None


def _fallback_vector(fallback: ArrayLike | ItemSpace, item_version: str | None) -> Float32:
    if isinstance(fallback, ItemSpace):
        if item_version not in (None, fallback.version):
            msg = f"the fallback is of item version {fallback.version!r}, the reader is pinned to {item_version!r}"
            raise ConfigError(msg)
        return _frozen(fallback.fallback)
    try:
        vector = np.array(fallback, dtype=np.float32)
    except (TypeError, ValueError) as exc:
        msg = "the fallback must be one vector of numbers, or an ItemSpace"
        raise ConfigError(msg) from exc
    if vector.ndim != 1 or not np.isfinite(vector).all() or not np.linalg.norm(vector) > NORM_EPS:
        msg = "the fallback must be one finite vector that is not zero"
        raise ConfigError(msg)
    if not _is_unit(vector):
        vector = l2_normalize(vector.astype(np.float64)).astype(np.float32)
    return _frozen(vector)


def _frozen(vector: Float32) -> Float32:
    """A copy that callers share and can't change."""
    copy = vector.copy()
    copy.flags.writeable = False
    return copy


def _is_unit(vector: Float32) -> bool:
    return abs(float(vector @ vector) - 1.0) <= 2 * UNIT_TOLERANCE


def _checked_name(version: str | None) -> str | None:
    if version is None:
        return None
    try:
        return check_version_name(version)
    except (TypeError, ValueError) as exc:
        raise ConfigError(str(exc)) from exc
