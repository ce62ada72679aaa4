"""The item spaces of a worker: every live version loaded and checked, or refused with the reason."""

import logging
from pathlib import Path

from stream.config import Settings
from stream.errors import ConfigError, ItemSpaceError
from stream.items.space import ItemSpace
from stream.rollout.loading import Refused, in_line, load_beside
from stream.rollout.records import Catalogue, ControlRecord

log = logging.getLogger(__name__)


async def load_space(folder: Path, timeout_s: float) -> ItemSpace:
    """Load an item space beside the loop.

    Raises:
        ItemSpaceError: it is no sound item space, or was not loaded in time.
    """
    return await load_beside(folder, ItemSpace.load, timeout_s, ItemSpaceError)


class LiveSpaces:
    """Loads what the control topic names.

    Args:
        settings: names of topics, for errors.
        base: the space in ``UEMB_ITEMS``, which is live until it is retired.
        largest_dim: what a record of the output topic has room for.

    Attributes:
        spaces: loaded spaces by version.
        refused: those that could not be loaded.
    """

    def __init__(self, settings: Settings, base: ItemSpace | None, largest_dim: int) -> None:
        self.base = base
        self.spaces: dict[str, ItemSpace] = {}
        self.refused: Refused = {}
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
        live = {version: catalogue.records[version] for version in catalogue.live}
        if base is not None and base.version in live and base.sha256 != live[base.version][1].sha256:
            msg = (
                f"UEMB_ITEMS and {self._settings.item_versions_topic} have different items under {base.version!r}; "
                "new vectors need a new version"
            )
            raise ConfigError(msg)
        self.spaces = await in_line(live, wanted, self.spaces, self.refused, self._open)

    def check(self) -> None:
        """See that there is one.

        Raises:
            ConfigError: there is nothing to make vectors of.
        """
        if not self.spaces:
            msg = (
                "UEMB_ITEMS is not set, and no item version is active; point it to an item space folder (make one with "
                "`uemb items build`), or activate a version"
            )
            raise ConfigError(msg)

    async def _open(self, offset: int, record: ControlRecord) -> ItemSpace | None:
        """Load a version, None if it is refused.

        Raises:
            ItemSpaceError: it is to be served.
        """
        try:
            space = await load_space(Path(record.path), self._settings.items_timeout_s)
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
