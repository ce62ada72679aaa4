"""What a worker counts, listed once: each counter's name, and what one more of it means."""

from enum import StrEnum
from typing import Self


class Counter(StrEnum):
    """A counter's name; `description` says what it counts.

    >>> f"{Counter.TOO_OLD}: {Counter.TOO_OLD.description}"
    'too_old: interactions older than all that a full history retains'
    """

    description: str

    def __new__(cls, name: str, description: str) -> Self:
        """See the class."""
        counter = str.__new__(cls, name)
        counter._value_ = name
        counter.description = description
        return counter

    RECORDS = "records", "records of input topics that were processed"
    APPLIED = "applied", "interactions that entered a history"
    DUPLICATE = "duplicate", "interactions that their history had already"
    TOO_OLD = "too_old", "interactions older than all that a full history retains"
    ERASED = "erased", "interactions from before their user's erasure"
    IGNORED = "ignored", "events of a type that never is part of a history"
    REJECTED = "rejected", "records that were turned away as dead letters"
    SOURCED = "sourced", "admitted events that say what led to them (UEMB_EVENT_SOURCE)"
    SELF_CAUSED = "self_caused", "of these, events that what our own vectors found led to (UEMB_OWN_SOURCES)"
    VECTORS = "vectors", "vectors of a user's own that were published"
    NEAR_CENTROID = "near_centroid", "of these, ones nearly the same for everybody: cosine to the centroid above 0.95"
    FALLBACKS = "fallbacks", "fallback vectors that were published"
    ENCODER_ERRORS = "encoder_errors", "vectors that a learned encoder failed to make; the fallback was published"
    HOT_USERS_HITS = "hot_users_hits", "users of a batch who were in memory"
    HOT_USERS_MISSES = "hot_users_misses", "users of a batch who were read from disk, or are new"
    ERASURES = "erasures", "erasures that took effect"
    WITHDRAWN = "withdrawn", "tombstones on the deletion topic"
    SENT_AGAIN = "sent_again", "states that were sent once more by a rebuild"
    MARKERS_ENDED = "markers_ended", "markers of erasures that were kept for long enough"
    GAPS = "gaps", "partitions read again because something fetched did not arrive"
