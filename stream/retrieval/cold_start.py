"""The cold edge: a vector from the history that a request brings, by the worker's own encoder, never written back."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from stream.core.encoders import REASONS, VectorStatus, VersionedEncoder
from stream.items.space import ItemSpace
from stream.keys import encoder_key
from stream.retrieval.answers import UserEmbedding, View

log = logging.getLogger("stream.retrieval")


class Request(NamedTuple):
    """What a request can offer beside the user's id; `stream.retrieval.get_or_build_user_embedding` says what is what.

    Attributes:
        history: item ids, oldest to newest.
        items: the item space.
        encoder: the encoder.
        history_types: the type of each interaction.
        history_ts: the event time of each (ms).
    """

    history: Sequence[int | str] | None
    items: ItemSpace | None
    encoder: VersionedEncoder | None
    history_types: Sequence[str] | None = None
    history_ts: Sequence[int] | None = None

    def answer(self, stored: UserEmbedding, view: View) -> UserEmbedding:
        """The stored answer if it is ``ok`` or nothing fits to build another, else one from the history."""
        if stored.status == "ok" or self.history is None or self.items is None or self.encoder is None:
            return stored
        return self._built(stored, view, self.history, self.items, self.encoder) or stored

    def _built(
        self,
        stored: UserEmbedding,
        view: View,
        history: Sequence[int | str],
        items: ItemSpace,
        encoder: VersionedEncoder,
    ) -> UserEmbedding | None:
        """A vector from the caller's history, or None when its parts are not of the versions asked for, or not all."""
        try:
            if items.version != view.item_version or encoder.version != view.user_version:
                return None
            known_hash = view.meta.encoders.get(encoder_key(encoder.version)) if view.meta is not None else None
            if known_hash not in (None, encoder.hash):
                return None
            history = list(history)
            types = None if self.history_types is None else list(self.history_types)
            times = None if self.history_ts is None else list(self.history_ts)
            if any(given is not None and len(given) != len(history) for given in (types, times)):
                return None
            if encoder.encoder.by_time and times is None:
                return None
        except Exception as exc:  # noqa: BLE001 - retrieval must get a vector whatever the caller passed
            log.debug("a vector could not be built: %s", type(exc).__name__)
            return None
        try:
            vector, status, unknown = encoder.embed(items, history, types, times)
        except Exception as exc:  # noqa: BLE001 - the same
            log.debug("an encoder failed: %s", type(exc).__name__)  # counted, and in the line of each minute
            vector, status, unknown = items.fallback, VectorStatus.ENCODER_ERROR, 0
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
