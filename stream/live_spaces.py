"""The item spaces of a worker: every live version loaded and checked, or refused with the reason."""

import asyncio
import logging
from pathlib import Path

from stream.config import Settings
from stream.errors import ConfigError, ItemSpaceError
from stream.item_versions import Catalogue, ControlRecord
from stream.items import ItemSpace

log = logging.getLogger(__name__)


class LiveSpaces:
    """Loads what the control topic names.

    Args:
        settings: names of topics, for errors.
        base: the space in ``UEMB_ITEMS``, which is live until it is retired.
        largest_dim: what a record of the output topic has room for.

    Attributes:
        spaces: loaded spaces by version.
        refused: for versions that could not be loaded, the offset of the control record that asked for it, and why.
    """

    def __init__(self, settings: Settings, base: ItemSpace | None, largest_dim: int) -> None:
        self.base = base
        self.spaces: dict[str, ItemSpace] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self._settings = settings
        self._largest_dim = largest_dim

    async def load(self, catalogue: Catalogue) -> None:
        """Bring `spaces` in line with the catalogue.

        Raises:
            ItemSpaceError: the version that is to be served can't be loaded: without it, there is no worker.
            ConfigError: ``UEMB_ITEMS`` and the control topic disagree about a version.
        """
        base = self.base
        wanted: dict[str, ItemSpace] = {}
        if base is not None and base.version not in catalogue.retired:
            wanted[base.version] = base
        for version, (offset, record) in catalogue.records.items():
            if record.state == "retired":
                continue
            if base is not None and version == base.version and base.sha256 != record.sha256:
                msg = (
                    f"UEMB_ITEMS and {self._settings.item_versions_topic} have different items under {version!r}; "
                    "new vectors need a new version"
                )
                raise ConfigError(msg)
            space = wanted.get(version) or self.spaces.get(version)
            if space is None and self.refused.get(version, (-1,))[0] != offset:  # what was mended is published again
                space = await self._open(offset, record)
            if space is not None:
                wanted[version] = space
        self.spaces = wanted

    async def _open(self, offset: int, record: ControlRecord) -> ItemSpace | None:
        """Load a version, None if it is refused.

        Raises:
            ItemSpaceError: it is to be served.
        """
        try:
            space = await asyncio.to_thread(ItemSpace.load, Path(record.path))
            self._check(space, record)
        except ItemSpaceError as exc:
            if record.state == "active":
                raise
            self.refused[record.version] = offset, str(exc)
            log.error("item version %s is refused, serving goes on: %s", record.version, exc)  # noqa: TRY400 - one line
            return None
        self.refused.pop(record.version, None)
        return space

    def _check(self, space: ItemSpace, record: ControlRecord) -> None:
        """Raise `ItemSpaceError` unless it is what was published, and fits into records."""
        if (space.version, space.sha256) != (record.version, record.sha256):
            msg = f"{record.path} is not the folder that was published as {record.version} (its manifest differs)"
            raise ItemSpaceError(msg)
        if space.dim > self._largest_dim:
            msg = (
                f"vectors of {space.dim} dimensions don't fit into records of {self._settings.output_topic}; raise its "
                "max.message.bytes"
            )
            raise ItemSpaceError(msg)
