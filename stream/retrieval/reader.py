"""The reader: a user's stored vector for retrieval, or a fallback with its reason; after `open` nothing raises.

A reader belongs to one process. In a server that forks, open it in each worker process: a child that got one from its
parent is answered with ``store_down`` (and RocksDB, once open in a parent, lets a child end only by `os._exit`). One
reader serves any number of threads; `AsyncEmbeddingReader` is the same for an event loop. Closing is final and may be
repeated: what is asked for afterwards is answered with ``store_down``.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Unpack

from numpy.typing import ArrayLike

from stream.core.encoders import VersionedEncoder
from stream.core.formulas import Float32
from stream.items.space import ItemSpace
from stream.kv.lookups import STORE_DOWN
from stream.kv.protocol import KVReader
from stream.kv.stores import open_reader
from stream.kv.urls import parse_kv_url
from stream.metrics import Registry
from stream.retrieval.answers import UserEmbedding, View, stacked
from stream.retrieval.cold_start import Request
from stream.retrieval.reader_core import ReaderOptions, ReaderState


class EmbeddingReader:
    """Stored vectors of one pair of versions, within a deadline, from any number of threads; use `open`.

    Attributes:
        fallbacks: how many fallback vectors were given out, by reason.
    """

    def __init__(self, connect: Callable[[], KVReader], **options: Unpack[ReaderOptions]) -> None:
        self._state = ReaderState(connect, **options)
        self.fallbacks = self._state.counted.by_reason

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
        registry: Registry | None = None,
    ) -> "EmbeddingReader":
        """Open the store at `kv_url`; in a server that forks, in each worker process.

        Args:
            kv_url: the worker's ``UEMB_KV_URL``.
            item_version: the item version to stay with; None follows the one that is served.
            user_version: the user-embedding version to stay with; None follows the one that is served.
            fallback: vector [d] for when the store can't give one (an `ItemSpace` gives its own). With it `open`
                succeeds without a store, and looks for it once a second.
            max_lag_s: a pipeline further behind marks its vectors ``stale``.
            timeout_s: longest wait of one call for the store. A store that failed, or took longer, counts as down for
                a second: calls are then answered at once, and after it one of them tries again.
            clock: wall clock in epoch seconds.
            registry: a ``prometheus_client.CollectorRegistry`` that is told of answers and times; readers may share it.

        Raises:
            StoreError: the store can't be reached, or has no vector to fall back to, and there is no `fallback`.
            ConfigError: the URL, a version's name, the fallback or the registry can't be right.
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
            registry=registry,
        )

    def __enter__(self) -> "EmbeddingReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store; what is asked for afterwards is answered with ``store_down``."""
        self._state.close()

    def get(self, user_id: int | str) -> UserEmbedding:
        """The user's vector, or the fallback with its reason; never raises."""
        began_s = time.monotonic()
        return self._state.given_out(self._lookup([user_id], self._state.view()), began_s)[0]

    def get_pair(self, user_id: int | str, item_emb_version: str, user_emb_version: str) -> UserEmbedding:
        """Like `get`, of exactly this pair of versions."""
        began_s = time.monotonic()
        view = self._state.view((user_emb_version, item_emb_version))
        return self._state.given_out(self._lookup([user_id], view), began_s)[0]

    def get_many(self, user_ids: Iterable[int | str]) -> tuple[Float32, list[UserEmbedding]]:
        """Vectors of many users, all of one pair of versions; never raises.

        Returns:
            float32 [n, d], and n answers in the order of `user_ids`.
        """
        began_s = time.monotonic()
        view = self._state.view()
        answers = self._state.given_out(self._lookup(list(user_ids), view), began_s)
        return stacked(answers, view), answers

    def _lookup(self, user_ids: Sequence[int | str], view: View) -> list[UserEmbedding]:
        state = self._state
        call = state.call(user_ids, view)
        if call.store is None:
            return state.answers(call, [STORE_DOWN] * len(call.lookups))
        return state.answers(call, state.bounded.find(call.store, call.lookups, call.partitions))


def get_or_build_user_embedding(
    user_id: int | str,
    item_emb_version: str,
    user_emb_version: str,
    *,
    reader: EmbeddingReader,
    history: Sequence[int | str] | None = None,
    items: ItemSpace | None = None,
    encoder: VersionedEncoder | None = None,
    history_types: Sequence[str] | None = None,
    history_ts: Sequence[int] | None = None,
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
        history_types: the type of each interaction, for an encoder that weighs types; None weighs all alike.
        history_ts: the event time of each (ms), which an encoder that goes by time can't do without.
    """
    began_s, state = time.monotonic(), reader._state
    view = state.view((user_emb_version, item_emb_version))
    stored = reader._lookup([user_id], view)[0]
    request = Request(history, items, encoder, history_types, history_ts)
    return state.given_out([request.answer(stored, view)], began_s)[0]
