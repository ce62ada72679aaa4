"""What is said about versions: control records (what shall be), and status records (how far it is); no I/O.

The control topic holds one record per item version and one per encoder, which is a user version; who folds it whole
knows which of them are published and which pair is served. The status topic holds one record per partition and pair of
versions, written by the partition's owner.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_type_hints

import msgspec

from stream.core.json_records import NotJson, WrongFields, decode_json, encode_json
from stream.keys import check_version_name

State = Literal["prepare", "active", "retired"]
STATES: Final[tuple[State, ...]] = get_args(State)
_USER_VERSION_KEY: Final = b"user-version:"
_Kind = TypeVar("_Kind")
#: The field that a text of msgspec's ends with; before it may stand a value, which nobody needs to see in a log.
_FIELD: Final = re.compile(r"`(?:\$\.)?(\w+)[^`]*`\Z")
#: Without a zero byte, which no path has; the length is that of the longest.
_FOLDER: Final = r"\A(file://)?/[^\0]{0,4095}\Z"

#: How far a partition is with a pair of versions: being filled, filled and kept so, refused by its owner (the space
#: can't be loaded), being removed, removed.
Stage = Literal["covering", "covered", "refused", "removing", "removed"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


class BadRecord(ValueError):
    """A record of the control or status topic that says nothing this release understands; its text says what."""


class ControlRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What shall become of an item version.

    Attributes:
        version: its name.
        uri: its folder, as every worker finds it: a path, or ``file://`` and a path.
        sha256: of its ``manifest.json``, which holds those of the other files.
        state: ``prepare``: publish vectors in it beside the served version; ``active``: serve it; ``retired``: remove.
        force: serve it although not all users have a vector in it yet.
    """

    version: Annotated[str, msgspec.Meta(description="a version name")]
    uri: Annotated[str, msgspec.Meta(pattern=_FOLDER, description="an absolute path, or file:// and one")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z", description="64 hex digits")]
    state: Annotated[State, msgspec.Meta(description=f"one of {', '.join(STATES)}")]
    force: bool = False

    @property
    def name(self) -> str:
        """What the catalogue has it under."""
        return self.version

    @property
    def path(self) -> str:
        """The folder."""
        return self.uri.removeprefix("file://")

    def encode(self) -> tuple[bytes, bytes]:
        """Key and value of the record."""
        return self.version.encode(), encode_json(self)

    @classmethod
    def decode(cls, key: bytes | None, value: bytes) -> "ControlRecord":
        """Read a record.

        Raises:
            BadRecord: it is none, or its key is not its version.
        """
        record = _decoded(value, cls)
        try:
            check_version_name(record.version)
        except ValueError as exc:
            raise BadRecord(str(exc)) from exc
        if key != record.version.encode():
            msg = "the key is not the record's version"
            raise BadRecord(msg)
        return record


class EncoderRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What shall become of an encoder, and of the vectors under its user version.

    Attributes:
        user_version: its name.
        state: ``prepare``: publish its vectors beside the served ones; ``active``: serve them; ``retired``: remove.
        hash: of all that decides its vectors (`stream.core.encoders.encoder_hash`); empty where it is retired and
            nothing is known of it but the name.
        encoder: ``avg``, ``mix``, ``mix_time`` or ``learned``.
        params: of a formula, all of them.
        type_weights: factor per type; a learned encoder's folder has its own.
        uri: folder of a learned one, as every worker finds it: a path, or ``file://`` and a path.
        item_version: the one that a learned one was made for.
        force: serve it although not all users have a vector of it yet.
        epochs: of one that was in the settings of workers, which have left it: newest owner of each partition as it was
            retired. What later ones say of it means that workers went back to it, and stays.
    """

    user_version: Annotated[str, msgspec.Meta(description="a version name")]
    state: Annotated[State, msgspec.Meta(description=f"one of {', '.join(STATES)}")]
    hash: Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z", description="64 hex digits")] = ""
    encoder: str = ""
    params: Annotated[dict[str, float], msgspec.Meta(description="numbers by name")] = {}
    type_weights: Annotated[dict[str, float], msgspec.Meta(description="numbers by type")] = {}
    uri: Annotated[str, msgspec.Meta(pattern=rf"({_FOLDER})|\A\Z", description="an absolute path, or none")] = ""
    item_version: str = ""
    force: bool = False
    epochs: Annotated[dict[int, int] | None, msgspec.Meta(description="integers by partition")] = None

    @property
    def name(self) -> str:
        """What the catalogue has it under."""
        return self.user_version

    @property
    def path(self) -> str:
        """The folder."""
        return self.uri.removeprefix("file://")

    def encode(self) -> tuple[bytes, bytes]:
        """Key and value of the record; no item version has such a key."""
        return _USER_VERSION_KEY + self.user_version.encode(), encode_json(self)

    @classmethod
    def decode(cls, key: bytes, value: bytes) -> "EncoderRecord":
        """Read a record.

        Raises:
            BadRecord: it is none, or its key is not that of its user version.
        """
        record = _decoded(value, cls)
        try:
            check_version_name(record.user_version)
        except ValueError as exc:
            raise BadRecord(str(exc)) from exc
        if key != _USER_VERSION_KEY + record.user_version.encode():
            msg = "the key is not that of the record's user version"
            raise BadRecord(msg)
        if record.state != "retired" and not (record.hash and record.encoder):
            msg = "an encoder that is to be published needs its kind and its hash"
            raise BadRecord(msg)
        return record

    def removes(self, status: "Status") -> bool:
        """Whether a partition's vectors in a pair of versions are to be removed; what was begun is gone on with."""
        if self.state != "retired" or status.user_version != self.user_version or status.stage == "removed":
            return False
        if status.stage == "removing" or self.epochs is None:
            return True
        return status.epoch <= self.epochs.get(status.partition, -1)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The control topic folded: the newest record of each item version and of each encoder, with its offset."""

    records: Mapping[str, tuple[int, ControlRecord]]
    encoders: Mapping[str, tuple[int, EncoderRecord]] = field(default_factory=dict)

    def after(self, offset: int, key: bytes | None, value: bytes | None) -> "Catalogue":
        """The catalogue with one more record; a null value withdraws its version.

        Raises:
            BadRecord: the record says nothing; the catalogue stays as it is.
        """
        if key is not None and key.startswith(_USER_VERSION_KEY):
            name = key.removeprefix(_USER_VERSION_KEY).decode(errors="replace")
            others = {version: found for version, found in self.encoders.items() if version != name}
            mine = {} if value is None else {name: (offset, EncoderRecord.decode(key, value))}
            return replace(self, encoders=others | mine)
        if value is None:
            gone = (key or b"").decode(errors="replace")
            return replace(self, records={version: found for version, found in self.records.items() if version != gone})
        record = ControlRecord.decode(key, value)
        return replace(self, records={**self.records, record.version: (offset, record)})

    @property
    def active(self) -> tuple[int, ControlRecord] | None:
        """The served item version and the offset of its record; None while ``UEMB_ITEMS`` is served."""
        return _newest_active(self.records)

    @property
    def active_encoder(self) -> tuple[int, EncoderRecord] | None:
        """The served encoder and the offset of its record; None while ``UEMB_ENCODER`` is served."""
        return _newest_active(self.encoders)

    @property
    def live_encoders(self) -> dict[str, EncoderRecord]:
        """Encoders whose vectors are published."""
        return {version: record for version, (_, record) in self.encoders.items() if record.state != "retired"}

    @property
    def retired_encoders(self) -> dict[str, EncoderRecord]:
        """Encoders whose vectors are removed."""
        return {version: record for version, (_, record) in self.encoders.items() if record.state == "retired"}

    @property
    def live(self) -> dict[str, ControlRecord]:
        """Versions that vectors are published in."""
        return {version: record for version, (_, record) in self.records.items() if record.state != "retired"}

    @property
    def retired(self) -> dict[str, ControlRecord]:
        """Versions whose vectors are removed."""
        return {version: record for version, (_, record) in self.records.items() if record.state == "retired"}


#: A record of either kind.
AnyRecord = TypeVar("AnyRecord", ControlRecord, EncoderRecord)


def _newest_active(records: Mapping[str, tuple[int, AnyRecord]]) -> tuple[int, AnyRecord] | None:
    found = [(offset, record) for offset, record in records.values() if record.state == "active"]
    return max(found, key=lambda entry: entry[0]) if found else None


NOTHING_SAID: Final = Catalogue({})


class Status(msgspec.Struct, frozen=True):
    """How far the owner of a partition is with a pair of versions.

    Attributes:
        user_version: the user-embedding version.
        item_version: the item version.
        partition: number of the partition.
        epoch: the owner's claim.
        stage: see `Stage`.
        users: users of the partition when it began (done ones, where it is not known).
        done: of them, those that have been written.
        fallbacks: of those, the ones that got the fallback vector.
        items: interactions in their histories.
        unknown_items: of these, the ones that the version lacks.
        per_second: users a second of late.
        error: why it was refused.
        asked: for a refusal, offset of the control record that it answers: it says nothing of a later one.
    """

    user_version: str
    item_version: str
    partition: int
    epoch: int
    stage: Annotated[Stage, msgspec.Meta(description=f"one of {', '.join(STAGES)}")]
    users: int = 0
    done: int = 0
    fallbacks: int = 0
    items: int = 0
    unknown_items: int = 0
    per_second: float = 0.0
    error: str = ""
    asked: int = -1

    def encode(self) -> tuple[bytes, bytes]:
        """Key and value of the record."""
        key = f"{self.user_version}:{self.item_version}:{self.partition}"
        return key.encode(), encode_json(self)

    @classmethod
    def decode(cls, value: bytes) -> "Status":
        """Read a record; fields of later releases are passed over.

        Raises:
            BadRecord: it is none.
        """
        return _decoded(value, cls)

    @property
    def pair(self) -> tuple[str, str]:
        """User version and item version."""
        return self.user_version, self.item_version

    def at(self, stage: Stage, **fields: Any) -> "Status":
        """The status at another stage."""
        return msgspec.structs.replace(self, stage=stage, **fields)


class Coverage:
    """The status topic folded: what is known of each partition and pair of versions."""

    def __init__(self) -> None:
        self.statuses: dict[tuple[str, str, int], Status] = {}
        self.epochs: dict[int, int] = {}  # newest owner of each partition that has spoken

    def add(self, status: Status) -> None:
        """Take in a record; one of an earlier owner than the last that spoke of the pair is passed over."""
        key = (*status.pair, status.partition)
        held = self.statuses.get(key)
        if held is None or status.epoch >= held.epoch:
            self.statuses[key] = status
            self.epochs[status.partition] = max(self.epochs.get(status.partition, 0), status.epoch)

    def of(self, user_version: str, item_version: str, partition: int) -> Status | None:
        """Status of a partition, None where nobody has spoken of the pair."""
        return self.statuses.get((user_version, item_version, partition))

    def stage(self, user_version: str, item_version: str, partition: int) -> Stage | None:
        """Stage of a partition as its present owner has it.

        An owner speaks of every pair that it publishes before it processes anything. So what an earlier one said of a
        pair on which the present one is silent says nothing any more: its vectors are no longer kept current.
        """
        status = self.of(user_version, item_version, partition)
        if status is None or status.epoch < self.epochs[partition]:
            return None
        return status.stage

    def covered(self, user_version: str, item_version: str, partitions: int) -> bool:
        """Whether all users of all partitions have a vector of the pair, and it is kept current."""
        return all(self.stage(user_version, item_version, p) == "covered" for p in range(partitions))

    def user_versions(self, but: Collection[str] = ()) -> dict[str, list[Status]]:
        """What is known of all user versions but some, by name."""
        found: dict[str, list[Status]] = {}
        for status in self.statuses.values():
            if status.user_version not in but:
                found.setdefault(status.user_version, []).append(status)
        return found

    def refusals(self, asked: int) -> list[Status]:
        """Partitions whose owner could not load what the control record at an offset asked for."""
        return [status for status in self.statuses.values() if status.stage == "refused" and status.asked == asked]


def _decoded(value: bytes, kind: type[_Kind]) -> _Kind:
    try:
        return decode_json(value, kind)
    except NotJson as exc:
        raise BadRecord(str(exc)) from exc
    except WrongFields as exc:
        raise BadRecord(_refusal(str(exc), kind)) from exc


def _refusal(text: str, kind: type) -> str:
    """What is wrong with a record: the field that msgspec names must be what its description says."""
    found = _FIELD.search(text)
    name = found[1] if found else "a field"
    about = getattr(get_type_hints(kind, include_extras=True).get(name), "__metadata__", ())
    described = next((what.description for what in about if what.description), None)
    return f"{name} must be {described}" if described else f"{name} is missing, or has no value of its kind"
