"""What the changelog's state was made for, read from the log without taking a partition."""

from collections.abc import Iterable
from typing import Final

from confluent_kafka.admin import AdminClient

from stream.config import Settings
from stream.findings import Finding, ok, skipped
from stream.kafka.log_reader import Span, log_ends, open_consumer, read
from stream.keys import CLAIM_KEY
from stream.worker.claims import Claim, check_claim

#: So much of the log is read for a claim: of each partition the end, where that of a worker's last start is, then from
#: the beginning.
_TAIL: Final = 5_000
_MOST: Final = 200_000
_STALL_S: Final = 4.0


def look_at_claims(settings: Settings, admin: AdminClient, partitions: int) -> Finding:
    """Compare the settings with the newest claim that is found among some of the changelog's records; blocking.

    Raises:
        StateError: a worker of these settings would refuse the state, or can't read it.
        DeliveryError: the log can't be read.
        NotAllowed: it may not be read.
    """
    topic = settings.changelog_topic
    ends = log_ends(admin, [(topic, partition) for partition in range(partitions)])
    spans = [Span(topic, partition, 0, info.offset) for (_, partition), info in ends.items() if info.offset > 0]
    if not spans:
        return ok("the changelog is empty: there is no state yet")
    tails = [span._replace(start=max(0, span.end - _TAIL)) for span in spans]
    heads = [span._replace(end=tail.start) for span, tail in zip(spans, tails, strict=True) if tail.start]
    claim = _claim(settings, tails) or _claim(settings, heads)
    if claim is None:
        return skipped("no claim is among the records that were read; a worker compares all at its start")
    check_claim(claim, settings, partitions)
    codes = ",".join(f"{name}:{code}" for name, code in claim.types.items())
    return ok(f"its state was made for these settings (UEMB_HISTORY_LIMIT={claim.history_limit}, types {codes})")


def _claim(settings: Settings, spans: Iterable[Span]) -> Claim | None:
    """The claim of the highest epoch among the first `_MOST` records of some stretches."""
    found: Claim | None = None
    consumer = open_consumer(settings, "doctor")
    try:
        for number, message in enumerate(read(consumer, spans, stall_s=_STALL_S)):
            value = message.value()
            if message.key() == CLAIM_KEY and value is not None:
                claim = Claim.decode(value)
                if found is None or claim.epoch > found.epoch:
                    found = claim
            if number >= _MOST:
                break
    finally:
        consumer.close()
    return found
