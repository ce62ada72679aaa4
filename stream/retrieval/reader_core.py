"""What both faces of the reader share: the store, the pair of versions of a call, and answers from what was found.

Nothing here waits for the store: a call is made, its lookups are found by the face in its own way, and the answers
follow. So the blocking and the asyncio reader can't differ in what they say.
"""

import logging
import operator
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypedDict

from numpy.typing import ArrayLike

from stream.core.formulas import Float32, fallback_user_embedding
from stream.errors import ConfigError, StoreError, UembError
from stream.items.space import ItemSpace
from stream.keys import canonical_id, check_version_name, user_cache_key
from stream.kv.lookups import STORE_DOWN, BoundedLookups, Entry, Lookup, Trouble
from stream.kv.outages import DOWN_S
from stream.kv.protocol import KVReader, Meta
from stream.metrics import Registry
from stream.retrieval.answers import (
    Pair,
    UserEmbedding,
    View,
    answers_for,
    decoded_vector,
    fallback_vector,
    frozen,
    record_vector,
)
from stream.retrieval.fallback_count import FallbackCount
from stream.retrieval.reader_metrics import metrics_of
from stream.retrieval.staleness import Judge

_VIEWS: Final = 256

MISSING: Final = Trouble("missing")
VERSION_MISSING: Final = Trouble("version_missing")

log = logging.getLogger("stream.retrieval")


class ReaderOptions(TypedDict, total=False):
    """How a reader is opened; `stream.retrieval.reader.EmbeddingReader.open` says what each means."""

    item_version: str | None
    user_version: str | None
    fallback: ArrayLike | ItemSpace | None
    max_lag_s: float | None
    timeout_s: float
    clock: Callable[[], float]
    registry: Registry | None


class Call(NamedTuple):
    """One question to the store, of one pair of versions.

    Attributes:
        view: the pair, and what to answer where there is no vector.
        store: None while there is none.
        names: canonical ids [n], None for what is no id.
        lookups: what to find [k], for those that are ids; empty where the view knows the answer.
        partitions: how many the store has.
    """

    view: View
    store: KVReader | None
    names: list[str | None]
    lookups: list[Lookup]
    partitions: int


class ReaderState:
    """See `stream.retrieval.reader.EmbeddingReader.open` for the arguments; any number of threads may share one.

    Raises:
        StoreError: the store can't be reached, or has no vector to fall back to, and there is no `fallback`.
        ConfigError: a version's name or the fallback can't be right.
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
        registry: Registry | None = None,
    ) -> None:
        self._connect = connect
        self._pins = (_checked_name(user_version), _checked_name(item_version))
        self._fallback = None if fallback is None else fallback_vector(fallback, item_version)
        self._judge = Judge(max_lag_s, clock)
        self._views: dict[Pair, View] = {}
        self.counted = FallbackCount()
        self._metrics = None if registry is None else metrics_of(registry)
        self._closed = threading.Event()
        self._connecting = threading.Lock()
        self._store: KVReader | None = None
        self._default = self._first_connect()
        self.bounded = BoundedLookups(timeout_s)
        _all_states.add(self)

    def view(self, asked: Pair | None = None) -> View:
        """The pair asked for (None: the pins), with what it leaves open from the one that is served at this moment."""
        asked = self._pins if asked is None else asked
        store = self._store
        meta = None if store is None else store.meta()
        view = self._views.get(asked)
        if view is None or view.meta is not meta:
            view = self._make_view(meta, asked)
            if len(self._views) >= _VIEWS:
                self._views.clear()
            self._views[asked] = view
        return view

    def call(self, user_ids: Sequence[int | str], view: View) -> Call:
        """What to look up for `user_ids`; any object may stand among them."""
        names = [_canonical(user_id) for user_id in user_ids]
        store, partitions = self._store, (view.meta.partitions if view.meta is not None else None) or 1
        lookups: list[Lookup] = []
        if view.trouble is None:
            prefix = user_cache_key("", str(view.item_version), str(view.user_version)).encode()
            keys = [name.encode() for name in names if name is not None]
            lookups = [(key, prefix + key) for key in keys]
        return Call(view, store, names, lookups, partitions)

    def answers(self, call: Call, found: Sequence[Entry]) -> list[UserEmbedding]:
        """An answer for each user of the call, from what its lookups found [k]."""
        view, of_ids = call.view, iter(found)
        freshness = self._judge.freshness(call.store, call.names, call.partitions)
        entries = [MISSING if name is None else (view.trouble or next(of_ids)) for name in call.names]
        return answers_for(call.names, entries, view, freshness)

    def given_out(self, answers: list[UserEmbedding], began_s: float) -> list[UserEmbedding]:
        """Count what is about to be given out, of a call that began then (monotonic s)."""
        if self._metrics is not None:
            self._metrics.add(answers, began_s)
        return self.counted.add(answers)

    def close(self) -> None:
        """Let go of the store; any number of times."""
        with self._connecting:
            self._closed.set()
        self.bounded.close()
        if self._store is not None:
            self._store.close()

    def after_fork(self) -> None:
        """In a child process: answer without the store, whose threads stayed in the parent, and leave it alone."""
        self.bounded.after_fork()
        self.counted.after_fork()
        if self._metrics is not None:
            self._metrics.after_fork()
        self._connecting = threading.Lock()
        self._closed = threading.Event()
        self._closed.set()
        if self._store is not None:
            _left_by_fork.append(self._store)
            self._store = None
            log.warning("a reader was opened before a fork and gives fallbacks in the child; open one in each process")

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
        own = record_vector(meta, _pair(meta, self._pins))
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

    def _make_view(self, meta: Meta | None, asked: Pair) -> View:
        if meta is None:
            return View(None, *asked, self._default, STORE_DOWN)
        pair = _pair(meta, asked)
        own = record_vector(meta, pair)
        served = meta.current is not None and pair == (meta.current.user_version, meta.current.item_version)
        trouble = None if own is not None or served else VERSION_MISSING
        return View(meta, *pair, self._default if own is None else own, trouble)


_all_states: "weakref.WeakSet[ReaderState]" = weakref.WeakSet()


def _after_fork() -> None:
    for state in list(_all_states):
        state.after_fork()


#: Closing a RocksDB in a child would wait for threads of its own that are not there.
_left_by_fork: list[KVReader] = []

os.register_at_fork(after_in_child=_after_fork)


def _pair(meta: Meta, asked: Pair) -> Pair:
    """The pair asked for, with what it leaves open from the one that is served."""
    current = meta.current
    if current is None:
        return asked
    return asked[0] or current.user_version, asked[1] or current.item_version


def _canonical(user_id: object) -> str | None:
    """The canonical id, or None for what is no id; takes numpy's integers too."""
    try:
        return canonical_id(user_id if isinstance(user_id, int | str) else operator.index(user_id))  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - anything may be asked for
        return None


def _checked_name(version: str | None) -> str | None:
    if version is None:
        return None
    try:
        return check_version_name(version)
    except (TypeError, ValueError) as exc:
        raise ConfigError(str(exc)) from exc
