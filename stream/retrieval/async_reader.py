"""The reader for an event loop: the same answers as `EmbeddingReader`, and the loop never waits for the store.

Lookups run in the same few threads as those of the blocking reader, for both stores. RocksDB has no other way. For
Redis the library's asyncio client saves a lone call a tenth of a millisecond and nothing once calls are many, when a
thread reads for several at once (``tests/bench/bench_reader.py`` prints both); and it would be a second client with
faults of its own.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Final, Unpack

from stream.core.encoders import VersionedEncoder
from stream.core.formulas import Float32
from stream.items.space import ItemSpace
from stream.kv.lookups import STORE_DOWN, Entry
from stream.kv.protocol import KVReader
from stream.kv.stores import open_reader
from stream.kv.urls import parse_kv_url
from stream.retrieval.answers import UserEmbedding, View, stacked
from stream.retrieval.cold_start import Request
from stream.retrieval.reader_core import Call, ReaderOptions, ReaderState

_SLICE: Final = 64  # users whose answers are made without a pause: under a millisecond of the loop's time


class AsyncEmbeddingReader:
    """`stream.retrieval.EmbeddingReader` with ``await``: the same pairs, deadline, reasons and counts; use `open`.

    One reader serves any number of tasks, and may be used from several loops. Cancelling a call is harmless.

    Attributes:
        fallbacks: how many fallback vectors were given out, by reason.
    """

    def __init__(self, connect: Callable[[], KVReader], **options: Unpack[ReaderOptions]) -> None:
        self._state = ReaderState(connect, **options)
        self.fallbacks = self._state.counted.by_reason

    @classmethod
    async def open(cls, kv_url: str, **options: Unpack[ReaderOptions]) -> "AsyncEmbeddingReader":
        """Open the store at `kv_url`, in a thread; in a server that forks, in each worker process.

        Args:
            kv_url: the worker's ``UEMB_KV_URL``.
            options: those of `stream.retrieval.reader.EmbeddingReader.open`, with the same meaning.

        Raises:
            StoreError: the store can't be reached, or has no vector to fall back to, and there is no `fallback`.
            ConfigError: the URL, a version's name, the fallback or the registry can't be right.
        """
        parse_kv_url(kv_url)
        return await asyncio.to_thread(lambda: cls(lambda: open_reader(kv_url), **options))

    async def __aenter__(self) -> "AsyncEmbeddingReader":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the store, in a thread; what is asked for afterwards is answered with ``store_down``."""
        await asyncio.to_thread(self._state.close)

    async def get(self, user_id: int | str) -> UserEmbedding:
        """The user's vector, or the fallback with its reason; never raises."""
        began_s = time.monotonic()
        return self._state.given_out(await self._lookup([user_id], self._state.view()), began_s)[0]

    async def get_pair(self, user_id: int | str, item_emb_version: str, user_emb_version: str) -> UserEmbedding:
        """Like `get`, of exactly this pair of versions."""
        began_s = time.monotonic()
        view = self._state.view((user_emb_version, item_emb_version))
        return self._state.given_out(await self._lookup([user_id], view), began_s)[0]

    async def get_many(self, user_ids: Iterable[int | str]) -> tuple[Float32, list[UserEmbedding]]:
        """Vectors of many users, all of one pair of versions; never raises.

        Returns:
            float32 [n, d], and n answers in the order of `user_ids`.
        """
        began_s = time.monotonic()
        view = self._state.view()
        answers = self._state.given_out(await self._lookup(list(user_ids), view), began_s)
        return stacked(answers, view), answers

    async def _lookup(self, user_ids: Sequence[int | str], view: View) -> list[UserEmbedding]:
        state, calls = self._state, list[Call]()
        for start in range(0, len(user_ids), _SLICE):
            if start:
                await asyncio.sleep(0)
            calls.append(state.call(user_ids[start : start + _SLICE], view))
        lookups = [lookup for call in calls for lookup in call.lookups]
        found: list[Entry] = [STORE_DOWN] * len(lookups)
        if lookups and calls[0].store is not None:
            found = await state.bounded.find_async(calls[0].store, lookups, calls[0].partitions)
        answers, at = list[UserEmbedding](), 0
        for number, call in enumerate(calls):
            if number:
                await asyncio.sleep(0)
            answers += state.answers(call, found[at : at + len(call.lookups)])
            at += len(call.lookups)
        return answers


async def get_or_build_user_embedding_async(
    user_id: int | str,
    item_emb_version: str,
    user_emb_version: str,
    *,
    reader: AsyncEmbeddingReader,
    history: Sequence[int | str] | None = None,
    items: ItemSpace | None = None,
    encoder: VersionedEncoder | None = None,
    history_types: Sequence[str] | None = None,
    history_ts: Sequence[int] | None = None,
) -> UserEmbedding:
    """`stream.retrieval.get_or_build_user_embedding` for an event loop; see there for the arguments."""
    began_s, state = time.monotonic(), reader._state
    view = state.view((user_emb_version, item_emb_version))
    stored = (await reader._lookup([user_id], view))[0]
    request = Request(history, items, encoder, history_types, history_ts)
    return state.given_out([request.answer(stored, view)], began_s)[0]
