"""Item versions of one worker: which it publishes in, how far its partitions are with each, and which one is served.

What must outlive a process lies in Kafka. The control topic says what shall be, the status topic how far it is.

A pair of versions is covered when every user has a vector in it that was kept current without a break. Therefore an
owner writes a status of every pair that it publishes before it processes anything. Where the owner right before it
wrote that the pair was covered, it goes on. Every other pair it covers anew.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from stream.config import Settings
from stream.core.records import encode
from stream.core.space_engine import fallback_record
from stream.errors import ConfigError
from stream.items.space import ItemSpace
from stream.kafka.clients import Clients
from stream.keys import encoder_key, fallback_key, user_cache_key
from stream.kv.protocol import KVWriter, Meta, Serving
from stream.pipeline.processor import BatchProcessor, Owned
from stream.rollout.backfill import Backfill
from stream.rollout.control_topics import ControlTopics
from stream.rollout.live_spaces import LiveSpaces
from stream.rollout.records import Catalogue, Status

log = logging.getLogger(__name__)

#: Offset of a serving pair that came from ``UEMB_ITEMS``.
FROM_ITEMS: Final = -1
Tell = Callable[[Status], Awaitable[None]]


@dataclass
class _Here:
    """A partition that this worker owns, and what is still to be done for it: versions to cover or to remove.

    A pair of an item version with another user version than this worker's, which can only be removed, has the name
    ``user_version:item_version``.
    """

    owned: Owned
    statuses: dict[str, Status]
    todo: list[str]


class Rollout:
    """Follows the control topic and does what it says for the partitions of this worker.

    Args:
        settings: the encoder, and the folder that is served while nothing is active.
        clients: read the topics.
        kv: the store whose shared record says what is served.
        processor: queues the vectors of a backfill.
        tell: writes a status record and waits for its acknowledgement.
        records: how many records the worker has processed so far.
        on_error: called with a fault that must stop the worker.
    """

    def __init__(
        self,
        settings: Settings,
        clients: Clients,
        kv: KVWriter,
        processor: BatchProcessor,
        tell: Tell,
        records: Callable[[], int],
        on_error: Callable[[BaseException], Awaitable[None]],
    ) -> None:
        self.partitions = 0
        self._live = LiveSpaces(settings, None, 0)
        self._settings = settings
        self._encoder = settings.versioned_encoder
        self._kv = kv
        self._tell = tell
        self._on_error = on_error
        self._backfill = Backfill(processor, records)
        self._changed = asyncio.Event()
        self._control = ControlTopics(settings, clients, self._changed.set, on_error)
        self._here: dict[int, _Here] = {}
        self._applied: Catalogue | None = None
        self._turn = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._work: asyncio.Task[None] | None = None
        self._served: Serving | None = None
        self._forgotten: set[str] = set()

    # -- start and stop -------------------------------------------------------------------------------------------

    async def start(self, base: ItemSpace | None, partitions: int, largest_dim: int) -> None:
        """Read what is said, and load every version that is live.

        Args:
            base: the space in ``UEMB_ITEMS``.
            partitions: how many the application has.
            largest_dim: what a record of the output topic has room for.

        Raises:
            ConfigError: there is nothing to publish in, or ``UEMB_ITEMS`` is not the version that it says it is.
            ItemSpaceError: the served version can't be loaded.
        """
        self.partitions = partitions
        self._live = LiveSpaces(self._settings, base, largest_dim)
        await self._control.start()
        await self._live.load(self._control.catalogue)
        if not self._live.spaces:
            msg = (
                "UEMB_ITEMS is not set, and no item version is active; point it to an item space folder (make one with "
                "`uemb items build`), or activate a version"
            )
            raise ConfigError(msg)
        self._tasks = [asyncio.create_task(self._follow(), name="item-versions")]

    async def stop(self) -> None:
        """Stop following and working."""
        await self.give_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._control.stop()

    @property
    def spaces(self) -> list[ItemSpace]:
        """The item spaces that vectors are published in."""
        return list(self._live.spaces.values())

    # -- partitions -----------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Take in all that has been said by now: what an earlier owner published in must be published in further on."""
        await self._control.catch_up()
        async with self._turn:
            await self._live.load(self._control.catalogue)

    async def take(self, owned: Owned, earlier_epoch: int) -> None:
        """Speak of every version for a partition that is being taken, before it processes anything.

        Args:
            owned: the partition; its engine serves `spaces`.
            earlier_epoch: the claim of the owner right before, 0 for none.
        """
        partition, user_version = owned.partition, self._encoder.version
        coverage = self._control.coverage
        empty = next(owned.db.users(), None) is None
        here = _Here(owned, {}, [])
        for version in owned.engine.versions:
            status = coverage.of(user_version, version, partition)
            status = status or Status(user_version, version, partition, 0, "covering")
            unbroken = status.stage == "covered" and status.epoch == earlier_epoch
            status = status.at("covered" if unbroken or empty else "covering", epoch=owned.epoch, error="")
            here.statuses[version] = status
        await asyncio.gather(*map(self._tell, here.statuses.values()))
        here.todo = [version for version, status in here.statuses.items() if status.stage == "covering"]
        self._here[partition] = here

    def begin(self) -> None:
        """Work on what the partitions lack, from here on."""
        self._applied = None  # refusals and removals of the new partitions are still to be looked at
        self._changed.set()

    async def give_up(self) -> None:
        """Stop working; the next owners go on."""
        self._here.clear()
        work, self._work = self._work, None
        if work is not None:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    # -- what is said ---------------------------------------------------------------------------------------------

    def announce(self, meta: Meta) -> Meta:
        """Enter this worker's versions into the store's shared record; in a fresh one they are served from here on."""
        encoder = self._encoder
        fallbacks = {
            fallback_key(space.version, encoder.version): encode(fallback_record(space, encoder))
            for space in self.spaces
        }
        return replace(
            meta,
            current=meta.current or self._target(),
            encoders={**meta.encoders, encoder_key(encoder.version): encoder.hash},
            fallbacks={**meta.fallbacks, **fallbacks},
        )

    def _target(self) -> Serving | None:
        """The pair that is to be served, None while this worker can't."""
        active, base = self._control.catalogue.active, self._live.base
        if active is not None:
            offset, record = active
            return (
                Serving(self._encoder.version, record.version, offset) if record.version in self._live.spaces else None
            )
        if base is not None and base.version in self._live.spaces:
            return Serving(self._encoder.version, base.version, FROM_ITEMS)
        return None

    async def _follow(self) -> None:
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                async with self._turn:
                    await self._apply()
                await self._serve()
                await self._forget()
                if self._work is None and any(here.todo for here in self._here.values()):
                    self._work = asyncio.create_task(self._work_off(), name="item-version-work")
        except Exception as exc:  # noqa: BLE001 - a version that can't be followed would be served in part
            await self._on_error(exc)

    async def _apply(self) -> None:
        """Do what a changed catalogue asks for."""
        catalogue = self._control.catalogue
        if catalogue is self._applied:
            return
        before = set(self._live.spaces)
        await self._live.load(self._control.catalogue)
        if set(self._live.spaces) != before:
            await self._kv.update_meta(self.announce)
            for version in set(self._live.spaces) - before:
                log.info("item version %s: publishing in it from here on", version)
        for here in list(self._here.values()):
            await self._change(here, catalogue)
        self._applied = catalogue

    async def _change(self, here: _Here, catalogue: Catalogue) -> None:
        """Publish in the present versions for a partition, and see what is to be covered or removed."""
        owned, user_version = here.owned, self._encoder.version
        partition = owned.partition
        new = [version for version in self._live.spaces if version not in owned.engine.versions]
        for version in new:
            status = Status(user_version, version, partition, owned.epoch, "covering")
            here.statuses[version] = status
            await self._tell(status)  # before the first vector of the version: whoever comes next must know of it
        if set(owned.engine.versions) != set(self._live.spaces):
            async with owned.turn:
                owned.engine.serve(self.spaces)
        here.todo += [version for version in new if version not in here.todo]
        for version, (asked, why) in self._live.refused.items():
            refusal = Status(user_version, version, partition, owned.epoch, "refused", error=why, asked=asked)
            known = self._control.coverage.of(user_version, version, partition)
            if version in catalogue.live and known != refusal:
                await self._tell(refusal)
        for version in catalogue.retired:
            if version not in here.todo and self._spoken_of(version, partition):
                here.statuses[version] = Status(user_version, version, partition, owned.epoch, "removing")
                here.todo.append(version)
        for retired in catalogue.retired_user_versions.values():
            for status in filter(retired.covers, list(self._control.coverage.statuses.values())):
                pair = ":".join(status.pair)
                if status.partition == partition and status.user_version != user_version and pair not in here.todo:
                    here.statuses[pair] = status.at("removing", epoch=owned.epoch)
                    here.todo.append(pair)

    def left_behind(self, owned: Owned) -> list[bytes]:
        """Prefixes of the keys that a partition has vectors under which nobody keeps current any more."""
        live = {(self._encoder.version, version) for version in owned.engine.versions}
        spoken_of = self._control.coverage.statuses.values()
        pairs = {s.pair for s in spoken_of if s.partition == owned.partition and s.stage != "removed"}
        return [user_cache_key("", item, user).encode() for user, item in sorted(pairs - live)]

    def _spoken_of(self, version: str, partition: int) -> list[Status]:
        """What is known of a version's vectors in a partition, of whatever user version, that are not removed yet."""
        statuses = self._control.coverage.statuses.values()
        return [s for s in statuses if (s.item_version, s.partition) == (version, partition) and s.stage != "removed"]

    async def _serve(self) -> None:
        """Let readers follow another pair once it covers all users, or somebody insists."""
        target, active = self._target(), self._control.catalogue.active
        if target is None or target == self._served:
            return
        forced = active is not None and active[1].force and active[0] == target.offset
        pair = target.user_version, target.item_version
        if not forced and not self._control.coverage.covered(*pair, self.partitions):
            return

        end = await self._control.end()
        outlived = False  # what the store says rests on a control topic that is no more

        def change(meta: Meta) -> Meta:
            nonlocal outlived
            current = meta.current
            outlived = current is not None and current.offset >= end
            if current is not None and current.offset > target.offset and not (outlived and active is not None):
                return meta
            return replace(meta, current=target)

        after = await self._kv.update_meta(change)
        if outlived and after.current is not None:
            log.warning(
                "%s was made anew since the store's item version was activated; %s is served until another is "
                "(uemb items publish, uemb items activate)",
                self._control.topic,
                after.current.item_version,
            )
        if after.current == target:
            log.info("serving item version %s, user version %s", target.item_version, target.user_version)
        self._served = target

    async def _forget(self) -> None:
        """Take the fallbacks of versions that nobody has a vector in any more out of the shared record."""
        coverage, encoder = self._control.coverage, self._encoder.version
        for version in self._control.catalogue.retired:
            stages = {status.stage for status in coverage.statuses.values() if status.item_version == version}
            if version in self._forgotten or stages != {"removed"}:
                continue
            await self._kv.update_meta(partial(_without, {fallback_key(version, encoder)}))
            self._forgotten.add(version)
        for version, statuses in coverage.other_user_versions(encoder).items():
            stages, name = {status.stage for status in statuses}, f"{version}:"
            if name in self._forgotten or stages != {"removed"}:
                continue
            await self._kv.update_meta(partial(_without, {fallback_key(s.item_version, version) for s in statuses}))
            self._forgotten.add(name)

    # -- work on all users ----------------------------------------------------------------------------------------

    async def _work_off(self) -> None:
        """Cover and remove what is to be, one partition after another."""
        try:
            while here := next((here for here in self._here.values() if here.todo), None):
                await self._work_on(here, here.todo[0])
                here.todo.pop(0)
        except Exception as exc:  # noqa: BLE001 - a version that covers some users only must not be left so
            await self._on_error(exc)
        self._work = None

    async def _work_on(self, here: _Here, version: str) -> None:
        status = here.statuses[version]
        if status.stage == "removing":
            meta = await self._kv.update_meta(lambda meta: meta)
            mine, current = status.user_version == self._encoder.version, meta.current
            served = current is not None and current.item_version == status.item_version
            if served and (mine or (current is not None and current.user_version == status.user_version)):
                log.warning("item version %s is retired while it is served; activate another one first", version)
                return
            versions = [key.rsplit(":", 1)[1] for key in meta.encoders] if mine else [status.user_version]
            status = await self._backfill.remove(here.owned, status, versions, self._tell)
            for spoken in self._spoken_of(version, status.partition) if mine else ():
                await self._tell(status.at(status.stage, user_version=spoken.user_version))
        elif version in self._live.spaces:
            status = await self._backfill.cover(here.owned, status, self._tell)
        here.statuses[version] = status
        await self._tell(status)


def _without(fallbacks: Collection[str], meta: Meta) -> Meta:
    return replace(meta, fallbacks={key: record for key, record in meta.fallbacks.items() if key not in fallbacks})
