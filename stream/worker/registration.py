"""What an application enters into the store's shared record, and what it refuses to find there."""

from dataclasses import replace

from stream.config import Settings
from stream.errors import StateMismatch, way_on
from stream.keys import encoder_key
from stream.kv.protocol import Meta


def registered(settings: Settings, partitions: int, meta: Meta) -> Meta:
    """The store's shared record with this application in it.

    Raises:
        StateMismatch: the store belongs to another, or was made for other settings.
    """
    encoder = settings.versioned_encoder
    if meta.app not in (None, settings.app_id):
        msg = f"the key-value store belongs to application {meta.app!r}; choose another UEMB_KV_URL"
        raise StateMismatch(msg)
    if meta.partitions not in (None, partitions):
        there, here = meta.partitions, partitions
        msg = f"the key-value store has {there} partitions, the topics have {here}; {way_on(max(there, here))}"
        raise StateMismatch(msg)
    name = encoder_key(encoder.version)
    if meta.encoders.get(name, encoder.hash) != encoder.hash:
        msg = f"user version {encoder.version!r} names other parameters in the store; set a new UEMB_USER_VERSION"
        raise StateMismatch(msg)
    return replace(meta, app=settings.app_id, partitions=partitions)
