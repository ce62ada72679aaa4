"""The error tree: what went wrong, whether retrying helps, what the operator should do.

UembError
├── ConfigError            a setting or an argument is wrong; exit 2, nothing was started
│   ├── TopicMismatch      topics disagree with the application (partition counts, limits, policies)
│   └── NotAllowed         the brokers' access lists lack a grant
├── ItemSpaceError         an item-vector folder is missing, damaged or of another version
├── EncoderError           an encoder's folder is missing, damaged, or of no use here
│   └── SpaceMismatch      an encoder was made for another item version
├── StateError             stored state does not belong to this configuration, or can't be read
│   └── StateDamaged       local state is damaged; the next start wipes and restores it
├── Fenced                 another worker holds a newer claim on this partition; stop, do not retry
├── OwnershipError         delivery broke its own rules (a gap, a partition that is not ours)
├── DeliveryError          Kafka did not acknowledge in time
│   └── RecordTooLarge     the topic's size limit refused a record
└── StoreError             the key-value store can't be reached or answered wrongly; retriable
    ├── StoreLocked        another process holds the partition's database
    ├── StorePartlyDown    some servers of a cluster can't be read; it has what the others gave
    └── StoreLost          the store was wiped or set back under its writer; claim the partition and rebuild it

UnknownItemError(IndexError)   an item index outside the item space (public functions of `stream.core.formulas`)
"""


class UembError(Exception):
    """Base of all our errors; its text is one line that says what to do."""

    exit_code = 1
    retriable = False


class ConfigError(UembError):
    """A setting or an argument is wrong; nothing was started."""

    exit_code = 2


class TopicMismatch(ConfigError):
    """Topics on the broker disagree with the application."""


class NotAllowed(ConfigError):
    """The brokers' access lists lack a grant.

    Args:
        name: of the thing; or all that is missing, with its operations, where that is more.
        to: operation and kind of thing, as in ``Read topic``.
    """

    def __init__(self, name: str, *, to: str = "") -> None:
        missing = f"{to} {name}".strip()
        super().__init__(f"not allowed to {missing}; grant it to this client's user (see `uemb acl`)")


class ItemSpaceError(UembError):
    """An item-vector folder is missing, damaged, or not what its manifest says."""

    exit_code = 2


class EncoderError(UembError):
    """An encoder's folder is missing, damaged, or can't be used here."""

    exit_code = 2


class SpaceMismatch(EncoderError):
    """An encoder was made for another item version: its vectors would look fine, and their neighbours be wrong."""


class StateError(UembError):
    """Stored state belongs to another configuration, or can't be read."""


class StateDamaged(StateError):
    """Local state is damaged; it is wiped at the next start and restored from the changelog."""


class Fenced(UembError):
    """A newer owner of the partition exists: this worker has lost it and must stop."""


class OwnershipError(UembError):
    """Records arrived with a gap, or for a partition this worker does not own."""


class DeliveryError(UembError):
    """Kafka did not acknowledge what it was sent."""

    retriable = True


class RecordTooLarge(DeliveryError):
    """The topic's size limit refused a record."""

    retriable = False


class StoreError(UembError):
    """The key-value store can't be reached or gave an impossible answer."""

    retriable = True


class StoreLocked(StoreError):
    """Another process holds the partition's database open for writing, and did so for all of the store's patience."""

    retriable = False


class StorePartlyDown(StoreError):
    """Some servers of a cluster can't be read.

    Args:
        message: what happened to the first of them.
        found: what the others gave, None for what was not read.
        unread: places in `found` of what was not read.
    """

    def __init__(self, message: str, found: list[bytes | None], unread: frozenset[int]) -> None:
        super().__init__(message)
        self.found = found
        self.unread = unread


class StoreLost(StoreError):
    """The store no longer holds what this worker wrote: it was wiped under us, or set back to an older copy.

    Writing on would fill an empty store with a few new vectors and call it whole. The partition must be claimed again
    and rebuilt from its histories (law 10); the same write can't succeed before that.
    """

    retriable = False


class UnknownItemError(IndexError):
    """An item index is negative or beyond the item matrix."""


def way_on(partitions: int) -> str:
    """What to do where topics have grown to so many partitions, or a repartition was cut short."""
    return f"stop all workers, then run `uemb repartition --partitions {partitions}`"
