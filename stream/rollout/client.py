"""The command line's side of versions: what the control and status topics say, and saying something new."""

from collections.abc import Mapping
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Final

from stream.config import LEARNED, Settings
from stream.core.encoders import VersionedEncoder
from stream.core.space_engine import Pair
from stream.errors import ConfigError
from stream.items.space import ItemSpace
from stream.kafka.brokers import producer, write_all
from stream.kafka.log_reader import open_consumer, read, whole
from stream.rollout.live_encoders import encoder_of
from stream.rollout.records import (
    NOTHING_SAID,
    AnyRecord,
    BadRecord,
    Catalogue,
    ControlRecord,
    Coverage,
    EncoderRecord,
    State,
    Status,
)

_TIMEOUT_S: Final = 20.0


class RolloutClient:
    """Both topics as they were when this was made, or looked at again.

    Args:
        settings: where they are.

    Raises:
        ConfigError: there is no such topic.
        DeliveryError: the broker does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self.catalogue: Catalogue = NOTHING_SAID
        self.coverage = Coverage()
        self._settings = settings
        self._consumer = open_consumer(settings, "items")
        self._next = dict.fromkeys((settings.item_versions_topic, settings.item_status_topic), 0)
        self.look()

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close()

    def look(self) -> None:
        """Take in what is new."""
        for topic, start in self._next.items():
            if (span := whole(self._consumer, topic, 0)) is None:
                msg = f"there is no topic {topic}; start a worker first, it makes its topics"
                raise ConfigError(msg)
            for message in read(self._consumer, [span._replace(start=max(start, span.start))]):
                try:
                    if topic == self._settings.item_versions_topic:
                        self.catalogue = self.catalogue.after(message.offset(), message.key(), message.value())
                    elif message.value() is not None:
                        self.coverage.add(Status.decode(message.value()))
                except BadRecord:  # the workers speak of it in their logs
                    continue
            self._next[topic] = span.end

    def say(self, record: ControlRecord | EncoderRecord) -> None:
        """Write a record.

        Raises:
            DeliveryError: it was not acknowledged.
            NotAllowed: the topic may not be written to.
        """
        key, value = record.encode()
        topic = self._settings.item_versions_topic
        writer = producer(self._settings, {"acks": "all"})
        write_all(writer, topic, [(key, 0, value)], _TIMEOUT_S, "see the brokers, then try again")
        self.look()

    @cached_property
    def base(self) -> ControlRecord | None:
        """The version in ``UEMB_ITEMS``, as a record that would name it; loaded once, for a version does not change."""
        if self._settings.items is None:
            return None
        space = ItemSpace.load(self._settings.items)
        return ControlRecord(space.version, str(self._settings.items.absolute()), space.sha256, "active")

    @property
    def served(self) -> ControlRecord | None:
        """The version that is to be served."""
        active = self.catalogue.active
        if active is not None:
            return active[1]
        base = self.base
        return base if base is not None and base.version not in self.catalogue.retired else None

    def served_before(self) -> ControlRecord:
        """The item version that was served before the present one, and is kept.

        Raises:
            ConfigError: there is none.
        """
        return _earlier(self.catalogue.records, self.base, "item version")

    def encoder_served_before(self) -> EncoderRecord:
        """The encoder that was served before the present one, and is kept.

        Raises:
            ConfigError: there is none.
        """
        return _earlier(self.catalogue.encoders, self.base_encoder, "encoder")

    def known(self, version: str) -> ControlRecord:
        """The record of a version that vectors are published in, of that in ``UEMB_ITEMS`` too.

        Raises:
            ConfigError: nobody has published it, or it is retired.
        """
        if version in self.catalogue.retired:
            msg = f"item version {version} is retired; publish its folder again to bring it back"
            raise ConfigError(msg)
        base = self.base
        record = self.catalogue.live.get(version) or (base if base is not None and base.version == version else None)
        if record is None:
            msg = f"item version {version!r} is not known; publish its folder first (`uemb items publish DIR`)"
            raise ConfigError(msg)
        return record

    def refusal(self, version: str) -> str | None:
        """Why a worker refuses a version as it was published last; None if none does."""
        if version not in self.catalogue.records:
            return None
        return self._refusal(self.catalogue.records[version][0])

    def _refusal(self, asked: int) -> str | None:
        return next((status.error for status in self.coverage.refusals(asked)), None)

    def record_of(self, folder: Path, state: State) -> ControlRecord:
        """A record for a folder, which is loaded and checked for it.

        Raises:
            ItemSpaceError: the folder is no sound item space.
            ConfigError: its version was published with other vectors.
        """
        space = ItemSpace.load(folder)
        known = self.catalogue.records.get(space.version)
        if known is not None and known[1].sha256 != space.sha256:
            msg = f"item version {space.version} was published with other vectors; new vectors need a new version"
            raise ConfigError(msg)
        return ControlRecord(space.version, str(folder.absolute()), space.sha256, state)

    # -- encoders -------------------------------------------------------------------------------------------------

    @property
    def base_encoder(self) -> EncoderRecord:
        """The encoder of the settings, as a record that would name it."""
        return encoder_record(self._settings.versioned_encoder, self._settings.encoder_folder, "active")

    @property
    def base_encoder_is_live(self) -> bool:
        """Whether workers with these settings publish their own encoder's vectors."""
        retired = self._settings.versioned_encoder.version in self.catalogue.retired_encoders
        return not retired or self.catalogue.active_encoder is None

    @property
    def live_encoders(self) -> dict[str, EncoderRecord]:
        """All that vectors are published of, by user version, that of the settings first."""
        base = self.base_encoder
        mine = {base.user_version: base} if self.base_encoder_is_live else {}
        return mine | self.catalogue.live_encoders

    @property
    def served_encoder(self) -> EncoderRecord:
        """The encoder that is to be served."""
        active = self.catalogue.active_encoder
        return self.base_encoder if active is None else active[1]

    def encoder_for(self, item_version: str) -> EncoderRecord | None:
        """The encoder whose vectors of an item version are looked at: the served one, or another where that is no use.

        None where no encoder is of use in it.
        """
        some = (self.served_encoder, *self.live_encoders.values())
        return next((record for record in some if record.item_version in ("", item_version)), None)

    def known_encoder(self, version: str) -> EncoderRecord:
        """The record of an encoder whose vectors are published, of that of the settings too.

        Raises:
            ConfigError: nobody has published it, or it is retired.
        """
        if (record := self.live_encoders.get(version)) is not None:
            return record
        if version in self.catalogue.retired_encoders:
            msg = f"encoder {version} is retired; publish it again to bring it back"
            raise ConfigError(msg)
        msg = f"encoder {version!r} is not known; publish it first (`uemb encoder publish`)"
        raise ConfigError(msg)

    def encoder_refusal(self, version: str) -> str | None:
        """Why a worker refuses an encoder as it was published last; None if none does."""
        if version not in self.catalogue.encoders:
            return None
        return self._refusal(self.catalogue.encoders[version][0])


def _earlier(records: Mapping[str, tuple[int, AnyRecord]], base: AnyRecord | None, what: str) -> AnyRecord:
    """The record that was active before the one that is; that of the settings before all others."""
    active = sorted((entry for entry in records.values() if entry[1].state == "active"), key=itemgetter(0))
    earlier = [record for _, record in active[:-1]]
    if active and base is not None and base.name not in records:
        earlier.insert(0, base)
    if not earlier:
        msg = f"no earlier {what} is kept; activate one by name"
        raise ConfigError(msg)
    return earlier[-1]


def encoder_record(encoder: VersionedEncoder, folder: Path | None, state: State) -> EncoderRecord:
    """A record for an encoder; a learned one lies in `folder`."""
    kind, made_for = encoder.encoder, encoder.encoder.made_for
    return EncoderRecord(
        encoder.version,
        state,
        encoder.hash,
        kind.name if folder is None else LEARNED,
        {} if folder is not None else dict(kind.params),
        {} if folder is not None else dict(kind.type_weights),
        "" if folder is None else str(folder.absolute()),
        "" if made_for is None else made_for.version,
    )


def pairs_of(settings: Settings, control: RolloutClient) -> list[Pair]:
    """All pairs that vectors are published of, those of the settings first.

    Raises:
        ConfigError: there is none.
        ItemSpaceError: an item space can't be loaded here.
        EncoderError: an encoder can't be loaded here.
    """
    folders: dict[str, str] = {}
    base = control.base
    if base is not None and base.version not in control.catalogue.retired:
        folders[base.version] = base.path
    folders.update({version: record.path for version, record in control.catalogue.live.items()})
    spaces = [ItemSpace.load(Path(path)) for version, path in folders.items() if control.refusal(version) is None]
    if not spaces:
        msg = "UEMB_ITEMS is not set, and no item version is active; point it to the folder that the workers serve"
        raise ConfigError(msg)
    encoders = [
        encoder_of(record, settings.history_limit)
        for version, record in control.live_encoders.items()
        if control.encoder_refusal(version) is None
    ]
    return [Pair(encoder, space) for space in spaces for encoder in encoders if encoder.fits(space)]
