"""The key-value store as retrieval sees it: whether it answers, which pair is served, how far each partition is."""

import time
from dataclasses import dataclass
from typing import Final, NamedTuple

from stream.core.records import CorruptRecord, kv_entry
from stream.core.watermark import Watermark, decode_watermark
from stream.errors import StoreError
from stream.keys import one_user_per_partition, user_cache_key
from stream.kv.protocol import KVReader, Meta
from stream.kv.stores import open_reader

#: Looked up to see whether a partition answers; no version has such a name.
_NOBODY: Final = user_cache_key("", "-", "-").encode()


class Sign(NamedTuple):
    """A sign of life of a partition's owner.

    Attributes:
        epoch: the owner's claim.
        watermark: what it wrote.
        changed_s: how long ago its heartbeat was seen to change, by no clock but ours; None where it was never seen to.
    """

    epoch: int
    watermark: Watermark
    changed_s: float | None


@dataclass(frozen=True)
class StoreView:
    """What the store says.

    Attributes:
        meta: the application's shared record.
        signs: what the owner of each partition wrote last; None where there is nothing.
        error: why it does not answer; None where it does.
    """

    meta: Meta
    signs: list[Sign | None]
    error: str | None


class StoreWatch:
    """Opens the store when it can.

    Args:
        kv_url: where it is.
    """

    def __init__(self, kv_url: str) -> None:
        self._kv_url = kv_url
        self._reader: KVReader | None = None
        self._users: list[bytes] = []
        self._beats: dict[
            int, tuple[int, float | None]
        ] = {}  # heartbeat of a partition, and when it came (monotonic s)

    @property
    def reader(self) -> KVReader:
        """The open store.

        Raises:
            StoreError: it could not be opened yet.
        """
        if self._reader is None:
            msg = "the store could not be opened yet"
            raise StoreError(msg)
        return self._reader

    def look(self) -> StoreView:
        """Ask it.

        Raises:
            StoreError: it can't be opened.
            ConfigError: its URL or login is wrong.
        """
        if self._reader is None:
            self._reader = open_reader(self._kv_url)
        reader = self._reader
        meta = reader.meta()
        if len(self._users) != (meta.partitions or 0):
            self._users = one_user_per_partition(meta.partitions or 0)
        error = None
        try:
            reader.get([(user, _NOBODY + user) for user in self._users])
        except StoreError as exc:
            error = str(exc)
        return StoreView(meta, [self._sign(n, reader.watermark(user)) for n, user in enumerate(self._users)], error)

    def _sign(self, partition: int, entry: bytes | None) -> Sign | None:
        told = _told(entry)
        if told is None:
            return None
        now_s, beat = time.monotonic(), told[1].heartbeat_ms
        before, changed_at_s = self._beats.get(partition, (beat, None))
        if beat != before:
            changed_at_s = now_s
        self._beats[partition] = beat, changed_at_s
        return Sign(*told, None if changed_at_s is None else now_s - changed_at_s)

    def close(self) -> None:
        """Let go of it."""
        if self._reader is not None:
            self._reader.close()


def _told(entry: bytes | None) -> tuple[int, Watermark] | None:
    watermark = decode_watermark(entry)
    if watermark is None or entry is None:
        return None
    try:
        return kv_entry(entry)[0], watermark
    except CorruptRecord:
        return None
