"""Item versions and encoders as a worker's start would find them: what the control topic names, loaded and checked."""

import asyncio
from collections.abc import Mapping

from confluent_kafka.admin import AdminClient

from stream.config import Settings
from stream.findings import Finding, ok, warning
from stream.items.space import ItemSpace
from stream.kafka.log_reader import log_ends, open_consumer, read, whole
from stream.rollout.live_encoders import LiveEncoders
from stream.rollout.live_spaces import LiveSpaces
from stream.rollout.records import NOTHING_SAID, BadRecord, Catalogue


def catalogue_now(settings: Settings, admin: AdminClient) -> Catalogue:
    """What the control topic says, whose partition 0 must be there; blocking.

    Raises:
        DeliveryError: it can't be read.
        NotAllowed: it may not be read.
    """
    topic, catalogue = settings.item_versions_topic, NOTHING_SAID
    if not log_ends(admin, [(topic, 0)])[topic, 0].offset:
        return catalogue
    consumer = open_consumer(settings, "doctor")
    try:
        span = whole(consumer, topic, 0)
        for message in read(consumer, [span] if span else []):
            try:
                catalogue = catalogue.after(message.offset(), message.key(), message.value())
            except BadRecord:  # the workers speak of it in their logs
                continue
    finally:
        consumer.close()
    return catalogue


def look_at_versions(
    settings: Settings, catalogue: Catalogue, base: ItemSpace | None, largest_dim: int, hashes: Mapping[str, str]
) -> list[Finding]:
    """Load every live item version and encoder as a worker does; blocking.

    Args:
        settings: the encoder that is served while none is active.
        catalogue: what the control topic says.
        base: the space in ``UEMB_ITEMS``.
        largest_dim: what a record of the output topic has room for.
        hashes: of encoders by key, as the store has them.

    Raises:
        ConfigError: there is nothing to make vectors of, or the settings and the control topic disagree.
        ItemSpaceError: the served item version can't be loaded here.
        EncoderError: the served encoder can't be, or was made for other items than are there.
    """
    spaces, encoders = LiveSpaces(settings, base, largest_dim), LiveEncoders(settings)

    async def load() -> None:
        await spaces.load(catalogue)
        spaces.check()
        await encoders.load(catalogue, hashes)

    asyncio.run(load())
    made, loaded = encoders.encoders.values(), list(spaces.spaces.values())
    if not any(encoder.fits(space) for encoder in made for space in loaded):
        for encoder in made:
            encoder.check(loaded[0])
    refused = {**spaces.refused, **encoders.refused}
    if refused:
        return [
            warning(f"is refused, serving goes on: {why}", "publish it again, or retire it", version)
            for version, (_, why) in refused.items()
        ]
    items = ", ".join(f"{space.version} ({len(space):,} items, {space.dim} dims, {space.metric})" for space in loaded)
    return [ok(f"{items}; encoders {', '.join(encoder.version for encoder in made)}")]
