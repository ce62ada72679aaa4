"""Claims in the changelog: who owns a partition since which epoch, and what settings its state was made for."""

from typing import Annotated, Final

import msgspec

from stream.config import Settings
from stream.core.history_codec import MAX_ORDER
from stream.core.json_records import decode_json, encode_json, format_of
from stream.core.records import CorruptRecord, kv_entry
from stream.errors import StateError, StateMismatch, way_on
from stream.keys import epoch_key

CLAIM_FORMAT: Final = 1


class Claim(
    msgspec.Struct,
    frozen=True,
    tag_field="format",
    tag=CLAIM_FORMAT,
    omit_defaults=True,
    forbid_unknown_fields=True,  # what a later release added may change what the state means
):
    """The newest claim in a changelog partition: who owns it since which epoch, and what its state was made for.

    After a repartition, `since` has the offset in each input topic from which on the partition has its present users:
    what is before it was processed when users lay elsewhere.
    """

    epoch: Annotated[int, msgspec.Meta(ge=0, le=MAX_ORDER)]
    app: str
    partitions: int
    history_limit: int
    types: dict[str, int]
    encoders: dict[str, str]
    nonce: str  # tells two claims of the same epoch apart
    since: dict[str, int] | None = None

    def encode(self) -> bytes:
        """Bytes of the changelog record."""
        return encode_json(self, sort_keys=True)

    @classmethod
    def decode(cls, data: bytes) -> "Claim":
        """Read a claim; raises `StateMismatch` for a format this release doesn't know."""
        try:
            if format_of(data) != CLAIM_FORMAT:
                raise ValueError
            return decode_json(data, cls)
        except ValueError as exc:
            msg = "the changelog holds a claim of an unknown format; upgrade the worker"
            raise StateMismatch(msg) from exc


def later_claim(held: bytes | None, value: bytes) -> bytes:
    """The one of two claims that counts, the second of them written later; raises `StateMismatch` as `Claim.decode`."""
    return value if held is None or Claim.decode(value).epoch >= Claim.decode(held).epoch else held


def next_epoch(highest: int, where: str) -> int:
    """The epoch of a claim above all that were seen.

    Raises:
        StateError: there is none: no worker wrote the highest.
    """
    if highest >= MAX_ORDER:
        msg = f"{where} holds an epoch that no worker wrote; see who else writes there, and restore it from a copy"
        raise StateError(msg)
    return highest + 1


def claimed_in_store(entry: bytes | None, partition: int) -> int:
    """The newest claim of a partition that the store knows, 0 for none.

    Raises:
        StateError: what it holds is no claim.
    """
    try:
        return kv_entry(entry)[0] if entry else 0
    except CorruptRecord as exc:
        key = epoch_key(partition)
        msg = f"{key} in the store is damaged; stop the workers, remove it and start them again"
        raise StateError(msg) from exc


def check_claim(claim: Claim, settings: Settings, partitions: int) -> None:
    """Refuse settings that would change the meaning of stored state.

    Raises:
        StateMismatch: in one line, what differs and what to do.
    """
    what = f"changelog {settings.changelog_topic}"
    if claim.app != settings.app_id:
        msg = f"{what} belongs to application {claim.app!r}; set UEMB_APP_ID={claim.app}"
        raise StateMismatch(msg)
    if claim.partitions != partitions:
        what_to_do = way_on(max(claim.partitions, partitions))
        msg = f"{what} was written with {claim.partitions} partitions, the topics have {partitions}; {what_to_do}"
        raise StateMismatch(msg)
    if claim.history_limit != settings.history_limit:
        msg = (
            f"{what} was written with UEMB_HISTORY_LIMIT={claim.history_limit}; keep it, "
            "or start a new UEMB_APP_ID and replay the events"
        )
        raise StateMismatch(msg)
    for name, code in claim.types.items():
        if settings.event_types.get(name) != code:
            msg = f"{what} was written with the type code {name}:{code}; keep it in UEMB_EVENT_TYPES (append only)"
            raise StateMismatch(msg)
    encoder = settings.versioned_encoder
    if claim.encoders.get(encoder.version, encoder.hash) != encoder.hash:
        msg = f"user version {encoder.version!r} names other parameters in {what}; choose a new UEMB_USER_VERSION"
        raise StateMismatch(msg)
