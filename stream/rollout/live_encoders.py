"""The encoders of a worker: every live one made or loaded, and checked, or refused with the reason."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from stream.config import LEARNED, Settings
from stream.core.encoders import VersionedEncoder, make_encoder
from stream.encoders.folder import load_encoder
from stream.errors import ConfigError, EncoderError
from stream.keys import encoder_key
from stream.rollout.loading import Refused, in_line, load_beside
from stream.rollout.records import Catalogue, EncoderRecord

log = logging.getLogger(__name__)


class LiveEncoders:
    """Makes what the control topic names, beside the encoder of the settings.

    Args:
        settings: the encoder that is served while none is active, and the history length of all.

    Attributes:
        base: the encoder of the settings.
        encoders: by user version.
        refused: those that could not be made.
    """

    def __init__(self, settings: Settings) -> None:
        self.base = settings.versioned_encoder
        self.encoders: dict[str, VersionedEncoder] = {}
        self.refused: Refused = {}
        self._settings = settings
        self._base_tried = False

    async def load(self, catalogue: Catalogue, hashes: Mapping[str, str]) -> None:
        """Bring `encoders` in line with the catalogue.

        The encoder of the settings is among them until it is retired while another one is active.

        Args:
            catalogue: what the control topic says.
            hashes: full hashes by key, as the key-value store has them.

        Raises:
            EncoderError: the one that is to be served can't be loaded: without it, there is no worker.
            ConfigError: the settings and the control topic disagree about a user version.
        """
        wanted: dict[str, VersionedEncoder] = {}
        if catalogue.active_encoder is None or self.base.version not in catalogue.retired_encoders:
            folder = self._settings.encoder_folder
            if folder is not None and not self._base_tried:
                learned = await load_beside(folder, load_encoder, self._settings.items_timeout_s, EncoderError)
                self.base = replace(self.base, encoder=learned)
                self._base_tried = True
            wanted[self.base.version] = self.base
        base = self.base
        live = {version: catalogue.encoders[version] for version in catalogue.live_encoders}
        if base.version in live and base.hash != live[base.version][1].hash:
            msg = (
                f"the settings and {self._settings.item_versions_topic} have different encoders under "
                f"{base.version!r}; choose another UEMB_USER_VERSION"
            )
            raise ConfigError(msg)
        make = partial(self._make, hashes=hashes)
        self.encoders = await in_line(live, wanted, self.encoders, self.refused, make)

    async def _make(self, offset: int, record: EncoderRecord, hashes: Mapping[str, str]) -> VersionedEncoder | None:
        """An encoder, None if it is refused.

        Raises:
            EncoderError: it is to be served.
        """
        version = record.user_version
        try:
            encoder = await self._made(record)
            if hashes.get(encoder_key(version), encoder.hash) != encoder.hash:
                msg = f"user version {version!r} names other parameters in the store; publish it under a new name"
                raise EncoderError(msg)
        except EncoderError as exc:
            if record.state == "active":
                raise
            self.refused[version] = offset, str(exc)
            log.error("encoder %s is refused, serving goes on: %s", version, exc)  # noqa: TRY400 - one line
            return None
        self.refused.pop(version, None)
        return encoder

    async def _made(self, record: EncoderRecord) -> VersionedEncoder:
        settings = self._settings
        if record.encoder != LEARNED:
            return encoder_of(record, settings.history_limit)

        def load(folder: Path) -> VersionedEncoder:
            return encoder_of(record, settings.history_limit, folder)

        return await load_beside(Path(record.path), load, settings.items_timeout_s, EncoderError)


def encoder_of(record: EncoderRecord, history_limit: int, folder: Path | None = None) -> VersionedEncoder:
    """The encoder that a record speaks of; a learned one is loaded from its folder, and tried.

    Raises:
        EncoderError: this release doesn't know it, or what is here is not what was published.
    """
    version = record.user_version
    if record.encoder == LEARNED:
        encoder = VersionedEncoder(load_encoder(folder or Path(record.path)), history_limit, version)
    else:
        try:
            formula = make_encoder(record.encoder, record.params, record.type_weights)
        except ValueError as exc:
            msg = f"{exc}, or upgrade this worker"
            raise EncoderError(msg) from exc
        encoder = VersionedEncoder(formula, history_limit, version)
    if encoder.hash != record.hash:
        msg = f"what is here is not what was published as {version} (its model, or UEMB_HISTORY_LIMIT, differs)"
        raise EncoderError(msg)
    return encoder
