"""The error tree: what went wrong, how the process ends of it, what the operator should do.

UembError                  1   anything else of ours
├── ConfigError            2   a setting or an argument is wrong; nothing was started
│   ├── TopicMismatch      2   topics disagree with the application (partition counts, limits, policies)
│   ├── NotAllowed         2   the brokers' access lists lack a grant
│   └── StoreRefused       2   the store's server refuses the login, or its access list lacks something
├── ItemSpaceError         2   an item-vector folder is missing, damaged or of another version
├── EncoderError           2   an encoder's folder is missing, damaged, or of no use here
│   └── SpaceMismatch      2   an encoder was made for another item version
├── StateError             1   stored state can't be read, or does not go with the topics
│   ├── StateMismatch      2   stored state belongs to other settings, or to another release
│   └── StateDamaged       75  local state is damaged; the next start wipes and restores it
├── Fenced                 75  another worker holds a newer claim on this partition
├── OwnershipError         75  delivery broke its own rules (a gap, a partition that is not ours)
├── DeliveryError          75  Kafka is away, or did not acknowledge in time
│   └── RecordTooLarge     2   the topic's size limit refused a record
├── RegistryError          75  the schema registry is away, or answers wrongly
│   └── RegistryRefused    2   it lets nobody in, or its certificate is refused
└── StoreError             75  the key-value store can't be reached or answered wrongly
    ├── StoreLocked        75  another process holds the partition's database
    ├── StorePartlyDown    75  some servers of a cluster can't be read; it has what the others gave
    └── StoreLost          75  the store was wiped or set back under its writer; claim the partition and rebuild it

UnknownItemError(IndexError)   an item index outside the item space (public functions of `stream.core.formulas`)
"""

from enum import IntEnum

from stream.foreign_text import one_line


class ExitCode(IntEnum):
    """How a worker, or a command, ends: whoever started it decides by that whether to start it again."""

    OK = 0
    #: A fault of ours, or damage that no start mends. What `uemb verify`, `doctor` and `health` find, too.
    FAULT = 1
    #: Usage and configuration: another start ends the same way.
    WRONG = 2
    #: What was away may be back at the next start (EX_TEMPFAIL of sysexits.h).
    TRY_AGAIN = 75
    #: By a signal, with what was under way left to the next start.
    INTERRUPTED = 130
    TERMINATED = 143


class UembError(Exception):
    """Base of all our errors; its text is one line that says what to do."""

    #: What the process ends with.
    exit_code = ExitCode.FAULT
    #: Whether the same call may succeed a little later.
    retriable = False

    def __init__(self, text: str = "") -> None:
        super().__init__(one_line(text))


class ConfigError(UembError):
    """A setting or an argument is wrong; nothing was started."""

    exit_code = ExitCode.WRONG


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


class StoreRefused(ConfigError):
    """The store's server refuses the login, or what its access list does not allow."""


class ItemSpaceError(UembError):
    """An item-vector folder is missing, damaged, or not what its manifest says."""

    exit_code = ExitCode.WRONG


class EncoderError(UembError):
    """An encoder's folder is missing, damaged, or can't be used here."""

    exit_code = ExitCode.WRONG


class SpaceMismatch(EncoderError):
    """An encoder was made for another item version: its vectors would look fine, and their neighbours be wrong."""


class StateError(UembError):
    """Stored state can't be read, or does not go with the topics."""


class StateMismatch(StateError):
    """Stored state belongs to other settings, or to another release."""

    exit_code = ExitCode.WRONG


class StateDamaged(StateError):
    """Local state is damaged; it is wiped at the next start and restored from the changelog."""

    exit_code = ExitCode.TRY_AGAIN


class Fenced(UembError):
    """A newer owner of the partition exists: this worker has lost it and must stop."""

    exit_code = ExitCode.TRY_AGAIN


class OwnershipError(UembError):
    """Records arrived with a gap, or for a partition this worker does not own."""

    exit_code = ExitCode.TRY_AGAIN


class DeliveryError(UembError):
    """Kafka is away, or did not acknowledge what it was sent."""

    exit_code = ExitCode.TRY_AGAIN
    retriable = True


class RecordTooLarge(DeliveryError):
    """The topic's size limit refused a record."""

    exit_code = ExitCode.WRONG
    retriable = False


class RegistryError(UembError):
    """The schema registry is away, or answers wrongly."""

    exit_code = ExitCode.TRY_AGAIN
    retriable = True


class RegistryRefused(RegistryError):
    """The schema registry lets nobody in, or shows a certificate that is refused."""

    exit_code = ExitCode.WRONG
    retriable = False


class StoreError(UembError):
    """The key-value store can't be reached or gave an impossible answer."""

    exit_code = ExitCode.TRY_AGAIN
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
