"""One history in, one vector out, without Kafka: the seed's input JSON to its output JSON plus the record's fields."""

from typing import Any, Final

import msgspec
import numpy as np

from stream.config import Settings
from stream.core.encoders import REASONS
from stream.core.events import Rejected, to_ms
from stream.core.history_codec import MAX_TS_MS
from stream.core.records import EmbeddingRecord, to_json
from stream.errors import ConfigError
from stream.foreign_text import shortened
from stream.items.space import ItemSpace
from stream.keys import canonical_id

#: A hundred thousand interactions have room.
MAX_INPUT_BYTES: Final = 16 << 20


class _Input(msgspec.Struct):
    user_id: int | str
    history_item_ids: list[int | str]
    history_ts: list[int | float] | None = None
    item_embedding_version: str | None = None


def embed_document(data: bytes, settings: Settings) -> dict[str, Any]:
    """Embed the history of an input document.

    ``history_ts`` only gives an order (a stable sort), and may be left out when the items are oldest first. To an
    encoder that goes by time it says more, in the unit of ``UEMB_EVENT_TS_UNIT``, and can't be left out. Nothing is
    deduplicated and no time is implausible here.

    Raises:
        ConfigError: the document is not such an input, or asks for another item version.
        ItemSpaceError: the item space can't be loaded.
    """
    if len(data) > MAX_INPUT_BYTES:
        msg = f"not an input document: it is larger than {MAX_INPUT_BYTES >> 20} MiB"
        raise ConfigError(msg)
    if settings.items is None:
        msg = "no item space; give --items FOLDER or set UEMB_ITEMS"
        raise ConfigError(msg)
    space = ItemSpace.load(settings.items)
    try:
        document = msgspec.json.decode(data, type=_Input)
        user = canonical_id(document.user_id)
        ids = [canonical_id(i) for i in document.history_item_ids]
        times = document.history_ts or list(range(len(ids)))
        if len(times) != len(ids):
            raise ValueError("history_ts and history_item_ids differ in length")  # noqa: EM101
        order = np.argsort(np.asarray(times, dtype=np.float64), kind="stable").tolist()
    except (ValueError, OverflowError, RecursionError) as exc:  # msgspec's texts hold names and kinds, never values
        msg = f"not an input document: {exc}"
        raise ConfigError(msg) from exc
    version = document.item_embedding_version
    if version not in (None, space.version):
        asked = shortened(version or "")
        msg = f"the input asks for item version {asked!r}, the folder holds {space.version!r}; spaces never mix"
        raise ConfigError(msg)
    encoder = settings.versioned_encoder
    history = [ids[i] for i in order][-encoder.history_limit :]
    times_ms = None
    if encoder.encoder.by_time:
        if ids and not document.history_ts:
            msg = f"encoder {encoder.version} goes by time; the input needs history_ts"
            raise ConfigError(msg)
        try:
            times_ms = [to_ms(times[i], settings.event_ts_unit) for i in order][-encoder.history_limit :]
        except Rejected as exc:
            msg = f"history_ts: {exc.reject.detail}"
            raise ConfigError(msg) from exc
        if any(abs(ts_ms) > MAX_TS_MS for ts_ms in times_ms):
            msg = "history_ts: a time is further away than any can be"
            raise ConfigError(msg)
    vector, found, unknown = encoder.embed(space, history, None, times_ms)
    status, reason = REASONS[found]
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    newest = max(times) if ids else None
    return to_json(
        EmbeddingRecord(
            user_id=user,
            epoch=0,
            revision=0,
            status=status,
            reason=reason,
            history_len=len(history),
            unknown_items=unknown,
            as_of=newest,  # type: ignore[arg-type]  # a time of the input, whatever it is in
            user_embedding_version=encoder.version,
            item_embedding_version=space.version,
            vector=vector,
            norm=norm,
        )
    )
