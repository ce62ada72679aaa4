"""The versions that are published: which pair is served, how far each is; their spaces and encoders, loaded once."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from stream.config import Settings
from stream.core.encoders import VersionedEncoder
from stream.errors import ConfigError, ItemSpaceError
from stream.items.space import ItemSpace
from stream.kafka.topics import topic_partitions
from stream.rollout.client import RolloutClient
from stream.rollout.live_encoders import encoder_of
from stream.rollout.progress import progress_of
from stream.rollout.records import ControlRecord, EncoderRecord

#: A topic may grow; how many partitions there are is asked again after so long.
_COUNT_S: Final = 30.0
#: A folder that can't be loaded is looked at again after so long.
_REFUSED_S: Final = 60.0
Versions = tuple[str, str]  # user version, item version


@dataclass(frozen=True)
class PairView:
    """A pair of versions.

    Attributes:
        user_version: name of the encoder.
        item_version: name of the item version.
        state: ``served``, ``active`` (it was served before), or ``prepare``.
        progress: how far the partitions are with it, as `stream.rollout.progress.progress_of` says.
        refused: why a worker refuses it; None where none does.
    """

    user_version: str
    item_version: str
    state: str
    progress: Mapping[str, Any]
    refused: str | None

    @property
    def versions(self) -> Versions:
        """Both names."""
        return self.user_version, self.item_version


@dataclass(frozen=True)
class VersionsView:
    """What the control and status topics say.

    Attributes:
        partitions: of the application.
        served: the pair that is to be served; None while none is named.
        pairs: all that are published, the served one first.
        items: record of each item version.
        encoders: record of each encoder.
    """

    partitions: int
    served: Versions | None
    pairs: list[PairView]
    items: Mapping[str, ControlRecord]
    encoders: Mapping[str, EncoderRecord]


class VersionsWatch:
    """Follows the topics.

    Args:
        settings: where they are.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: RolloutClient | None = None
        self._partitions = 0
        self._counted_s = self._refused_s = -float("inf")
        self._refusal: ItemSpaceError | None = None

    def look(self) -> VersionsView:
        """Take in what is new.

        Raises:
            UembError: the topics can't be read.
            ItemSpaceError: the folder in the settings can't be.
        """
        if time.monotonic() - self._counted_s > _COUNT_S:
            self._partitions, self._counted_s = topic_partitions(self._settings) or 0, time.monotonic()
        if not self._partitions:
            self._counted_s = -float("inf")
            msg = f"there is no topic {self._settings.event_topics[0]}; set UEMB_EVENT_TOPICS, or start a worker first"
            raise ConfigError(msg)
        if self._client is None:
            self._client = RolloutClient(self._settings)
        else:
            self._client.look()
        if self._refusal is not None and time.monotonic() - self._refused_s < _REFUSED_S:
            raise self._refusal
        try:
            return view_of(self._client, self._partitions)
        except ItemSpaceError as exc:  # to find out has all of it read
            self._refusal, self._refused_s = exc, time.monotonic()
            raise

    def close(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.close()


def view_of(control: RolloutClient, partitions: int) -> VersionsView:
    """What the topics say, as far as it was read."""
    base, active = control.base, control.served
    items = dict(control.catalogue.live)
    if base is not None and base.version not in control.catalogue.retired:
        items.setdefault(base.version, base)
    encoders, encoder = control.live_encoders, control.served_encoder
    served = None if active is None else (encoder.user_version, active.version)
    pairs = []
    for item_version, item in items.items():
        for user_version, record in encoders.items():
            if record.item_version not in ("", item_version):
                continue
            versions = (user_version, item_version)
            is_before = "active" in (item.state, record.state) and "prepare" not in (item.state, record.state)
            state = "served" if versions == served else "active" if is_before else "prepare"
            progress = progress_of(control.coverage, partitions, *versions)
            refused = control.refusal(item_version) or control.encoder_refusal(user_version)
            pairs.append(PairView(*versions, state, progress, refused))
    pairs.sort(key=lambda pair: pair.versions != served)
    return VersionsView(partitions, served, pairs, items, encoders)


class LoadedPair(NamedTuple):
    """An encoder, and an item space that it fits."""

    encoder: VersionedEncoder
    space: ItemSpace


class Loaded:
    """Item spaces and encoders of records, each loaded when it is first asked for, and kept; any thread may ask."""

    def __init__(self, history_limit: int) -> None:
        self._history_limit = history_limit
        self._spaces: dict[str, ItemSpace] = {}
        self._encoders: dict[str, VersionedEncoder] = {}
        self._loading = threading.Lock()

    def pair(self, view: VersionsView, versions: Versions | None) -> LoadedPair:
        """A pair that is published; None: the served one.

        Raises:
            ConfigError: it is not, or what is here is not what was published.
            ItemSpaceError: the item space can't be loaded here.
            EncoderError: the encoder can't be loaded here.
        """
        versions = versions or view.served
        if versions is None or versions not in [pair.versions for pair in view.pairs]:
            msg = "no vectors are published of these versions"
            raise ConfigError(msg)
        item, encoder = view.items[versions[1]], view.encoders[versions[0]]
        with self._loading:
            if (space := self._spaces.get(item.sha256)) is None:
                space = ItemSpace.load(Path(item.path))
                if space.sha256 != item.sha256:
                    msg = f"{item.path} is not here what was published as {item.version}"
                    raise ConfigError(msg)
                self._spaces[item.sha256] = space
            if (made := self._encoders.get(encoder.hash)) is None:
                made = self._encoders[encoder.hash] = encoder_of(encoder, self._history_limit)
        made.check(space)
        return LoadedPair(made, space)

    def forget(self, view: VersionsView) -> None:
        """Let go of what is published no more."""
        with self._loading:
            kept = {record.sha256 for record in view.items.values()}
            self._spaces = {sha256: space for sha256, space in self._spaces.items() if sha256 in kept}
            kept = {record.hash for record in view.encoders.values()}
            self._encoders = {hash_: made for hash_, made in self._encoders.items() if hash_ in kept}
