"""Item versions and encoders of one worker: which pairs it publishes, how far its partitions are, which pair is served.

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
from stream.core.space_engine import Pair, fallback_record
from stream.items.space import ItemSpace
from stream.kafka.clients import Clients
from stream.keys import encoder_key, fallback_key, user_cache_key
from stream.kv.protocol import KVWriter, Meta, Serving
from stream.pipeline.processor import BatchProcessor, NotPublished, Owned
from stream.rollout.backfill import Backfill
from stream.rollout.control_topics import ControlTopics
from stream.rollout.live_encoders import LiveEncoders
from stream.rollout.live_spaces import LiveSpaces
from stream.rollout.records import Catalogue, Stage, Status

log = logging.getLogger(__name__)

#: Offset of a serving pair that came from the settings.
FROM_SETTINGS: Final = -1
#: User and item version of a pair. With an empty user version it stands for all pairs of the item version.
Versions = tuple[str, str]
Tell = Callable[[Status], Awaitable[None]]


@dataclass
class _Here:
    """A partition that this worker owns, and what is still to be done for it: pairs to cover or to remove."""

    owned: Owned
    statuses: dict[Versions, Status]
    todo: list[Versions]


class Rollout:
    """Follows the control topic and does what it says for the partitions of this worker.

    Args:
        settings: the encoder and the folder that are served while no others are active.
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
        self._encoders = LiveEncoders(settings)
        self._processor = processor
        self._settings = settings
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
        self._current: Serving | None = None
        self._forgotten: set[str] = set()

    # -- start and stop -------------------------------------------------------------------------------------------

    async def start(self, base: ItemSpace | None, partitions: int, largest_dim: int) -> None:
        """Read what is said, and load every version that is live.

        Args:
            base: the space in ``UEMB_ITEMS``.
            partitions: how many the application has.
            largest_dim: what a record of the output topic has room for.

        Raises:
            ConfigError: there is nothing to publish, or the settings and the control topic disagree about a version.
            ItemSpaceError: the served item version can't be loaded.
            EncoderError: the served encoder can't be loaded, or was made for other items than are there.
        """
        self.partitions = partitions
        self._live = LiveSpaces(self._settings, base, largest_dim)
        await self._control.start()
        await self._load()
        self._live.check()
        if not self.pairs:
            for encoder in self._encoders.encoders.values():
                encoder.check(next(iter(self._live.spaces.values())))
        self._tasks = [asyncio.create_task(self._follow(), name="item-versions")]

    async def stop(self) -> None:
        """Stop following and working."""
        await self.give_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._control.stop()

    async def _load(self) -> None:
        """Have every version that the catalogue names, and none else."""
        catalogue = self._control.catalogue
        hashes = (await self._kv.update_meta(lambda meta: meta)).encoders if catalogue.encoders else {}
        await asyncio.gather(self._live.load(catalogue), self._encoders.load(catalogue, hashes))

    @property
    def spaces(self) -> list[ItemSpace]:
        """The item spaces that vectors are published in."""
        return list(self._live.spaces.values())

    @property
    def pairs(self) -> list[Pair]:
        """The pairs that vectors are published of: every encoder in every space that it is of any use in."""
        encoders = list(self._encoders.encoders.values())  # at once: metrics ask from another thread
        return [Pair(encoder, space) for encoder in encoders for space in self.spaces if encoder.fits(space)]

    @property
    def serving(self) -> Serving | None:
        """The pair that readers follow, as this worker last saw it in the store; None before it looked."""
        return self._current

    def saw(self, meta: Meta) -> None:
        """Take note of the store's shared record."""
        self._current = meta.current

    def covered(self) -> dict[Versions, int]:
        """Of each pair that vectors are to be published of, how many partitions cover it; from any thread.

        These are partitions of the whole application, as their owners tell on the status topic. What this worker
        refused is among them for as long as it is wanted: it is never covered, and must be seen not to be.
        """
        stage = self._control.coverage.stage
        return {
            pair: sum(stage(*pair, partition) == "covered" for partition in range(self.partitions))
            for pair in [*(pair.versions for pair in self.pairs), *self._refused_pairs()]
        }

    def _refused_pairs(self) -> list[Versions]:
        """Versions that could not be loaded, each under the name of the other that its refusal is told with."""
        user_version, item_version = self._spokesmen()
        catalogue = self._control.catalogue
        items = [(user_version, version) for version in list(self._live.refused) if version in catalogue.live]
        users = [(version, item_version) for version in list(self._encoders.refused)]
        return items + [pair for pair in users if pair[0] in catalogue.live_encoders]

    def _spokesmen(self) -> Versions:
        """The encoder and the item version under which it is told that a version of the other kind is refused."""
        user_version = next(iter(self._encoders.encoders), self._encoders.base.version)
        return user_version, next(iter(self._live.spaces), "")

    # -- partitions -----------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Take in all that has been said by now: what an earlier owner published in must be published in further on."""
        await self._control.catch_up()
        async with self._turn:
            await self._load()

    async def take(self, owned: Owned, earlier_epoch: int) -> None:
        """Speak of every pair for a partition that is being taken, before it processes anything.

        Args:
            owned: the partition, of which vectors of `pairs` are published.
            earlier_epoch: the claim of the owner right before, 0 for none.
        """
        partition, coverage = owned.partition, self._control.coverage
        empty = next(owned.db.users(), None) is None
        here = _Here(owned, {}, [])
        async with self._turn:  # no pair comes between what is told here and the first vector
            for versions in self._processor.versions:
                status = coverage.of(*versions, partition) or Status(*versions, partition, 0, "covering")
                unbroken = status.stage == "covered" and status.epoch == earlier_epoch
                stage: Stage = "covered" if unbroken or empty else "covering"
                here.statuses[versions] = status.at(stage, epoch=owned.epoch, error="", asked=-1)
            await asyncio.gather(*map(self._tell, here.statuses.values()))
            here.todo = [versions for versions, status in here.statuses.items() if status.stage == "covering"]
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
        fallbacks = {
            fallback_key(space.version, encoder.version): encode(fallback_record(space, encoder))
            for encoder, space in self.pairs
        }
        hashes = {encoder_key(version): encoder.hash for version, encoder in self._encoders.encoders.items()}
        return replace(
            meta,
            current=meta.current or self._target(),
            encoders={**meta.encoders, **hashes},
            fallbacks={**meta.fallbacks, **fallbacks},
        )

    def _target(self) -> Serving | None:
        """The pair that is to be served, None while this worker can't."""
        catalogue, base = self._control.catalogue, self._live.base
        offset, user_version, item_version = FROM_SETTINGS, self._encoders.base.version, base.version if base else ""
        if (active_encoder := catalogue.active_encoder) is not None:
            offset, user_version = active_encoder[0], active_encoder[1].user_version
        if (active := catalogue.active) is not None:
            offset, item_version = max(offset, active[0]), active[1].version
        if (user_version, item_version) not in [pair.versions for pair in self.pairs]:
            return None  # or one that is in the making: of two that were made for each other, one was activated so far
        return Serving(user_version, item_version, offset)

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
        before = {pair.versions for pair in self.pairs}
        await self._load()
        now = {pair.versions for pair in self.pairs}
        if now != before:
            await self._kv.update_meta(self.announce)
            for user_version, item_version in sorted(now - before):
                log.info("item version %s, user version %s: publishing from here on", item_version, user_version)
        new = [versions for versions in sorted(now) if versions not in self._processor.versions]
        for here in list(self._here.values()):
            for versions in new:
                status = Status(*versions, here.owned.partition, here.owned.epoch, "covering")
                here.statuses[versions] = status
                await self._tell(status)  # before the first vector of the pair: whoever comes next must know of it
        if set(self._processor.versions) != now:
            await self._processor.serve(self.pairs)
        for here in list(self._here.values()):
            await self._change(here, new, now, catalogue)
        self._applied = catalogue

    async def _change(self, here: _Here, new: Collection[Versions], live: set[Versions], catalogue: Catalogue) -> None:
        """See what is to be covered or removed of a partition, now that these pairs are live."""
        owned = here.owned
        here.todo = [
            versions for versions in here.todo if _is_wanted(here.statuses[versions], versions, live, catalogue)
        ]
        here.todo += [versions for versions in new if versions not in here.todo]
        await self._refuse(owned, catalogue)
        for version in catalogue.retired:
            everything = "", version
            if everything not in here.todo and self._spoken_of(version, owned.partition):
                here.statuses[everything] = Status(*everything, owned.partition, owned.epoch, "removing")
                here.todo.append(everything)
        for retired in catalogue.retired_encoders.values():
            for status in filter(retired.removes, list(self._control.coverage.statuses.values())):
                if status.partition != owned.partition or status.pair in live or status.pair in here.todo:
                    continue
                here.statuses[status.pair] = status.at("removing", epoch=owned.epoch)
                here.todo.append(status.pair)

    async def _refuse(self, owned: Owned, catalogue: Catalogue) -> None:
        """Say of each live version that this worker could not load why."""
        user_version, item_version = self._spokesmen()
        refused = [
            (Status(user_version, version, owned.partition, owned.epoch, "refused", error=why, asked=asked))
            for version, (asked, why) in self._live.refused.items()
            if version in catalogue.live
        ]
        refused += [
            (Status(version, item_version, owned.partition, owned.epoch, "refused", error=why, asked=asked))
            for version, (asked, why) in self._encoders.refused.items()
            if version in catalogue.live_encoders
        ]
        for refusal in refused:
            if self._control.coverage.of(*refusal.pair, owned.partition) != refusal:
                await self._tell(refusal)

    def left_behind(self, owned: Owned) -> list[bytes]:
        """Prefixes of the keys that a partition has vectors under which nobody keeps current any more."""
        spoken_of = self._control.coverage.statuses.values()
        pairs = {s.pair for s in spoken_of if s.partition == owned.partition and s.stage != "removed"}
        abandoned = sorted(pairs - set(self._processor.versions))
        return [user_cache_key("", item, user).encode() for user, item in abandoned]

    def _spoken_of(self, version: str, partition: int) -> list[Status]:
        """What is known of an item version's vectors in a partition, of whatever user version, not removed yet."""
        statuses = self._control.coverage.statuses.values()
        return [s for s in statuses if (s.item_version, s.partition) == (version, partition) and s.stage != "removed"]

    async def _serve(self) -> None:
        """Let readers follow another pair once it covers all users, or somebody insists."""
        target, catalogue = self._target(), self._control.catalogue
        if target is None or target == self._served:
            return
        said = [active for active in (catalogue.active, catalogue.active_encoder) if active is not None]
        forced = any(record.force and offset == target.offset for offset, record in said)
        pair = target.user_version, target.item_version
        if not forced and not self._control.coverage.covered(*pair, self.partitions):
            return

        end = await self._control.end()
        outlived = False  # what the store says rests on a control topic that is no more

        def change(meta: Meta) -> Meta:
            nonlocal outlived
            current = meta.current
            outlived = current is not None and current.offset >= end
            if current is not None and current.offset > target.offset and not (outlived and said):
                return meta
            return replace(meta, current=target)

        after = await self._kv.update_meta(change)
        self.saw(after)
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
        """Take the fallbacks of pairs that nobody has a vector of any more out of the shared record."""
        coverage, catalogue = self._control.coverage, self._control.catalogue
        gone = [
            (f":{version}", [status for status in coverage.statuses.values() if status.item_version == version])
            for version in catalogue.retired
        ]
        gone += [(f"{name}:", some) for name, some in coverage.user_versions(but=self._encoders.encoders).items()]
        self._forgotten &= {name for name, _ in gone}  # what came back may go again
        for name, statuses in gone:
            if name in self._forgotten or {status.stage for status in statuses} != {"removed"}:
                continue
            keys = {fallback_key(status.item_version, status.user_version) for status in statuses}
            await self._kv.update_meta(partial(_without, keys))
            self._forgotten.add(name)

    # -- work on all users ----------------------------------------------------------------------------------------

    async def _work_off(self) -> None:
        """Cover and remove what is to be, one partition after another."""
        try:
            while here := next((here for here in self._here.values() if here.todo), None):
                await self._work_on(here, here.todo[0])
        except Exception as exc:  # noqa: BLE001 - a version that covers some users only must not be left so
            await self._on_error(exc)
        self._work = None

    async def _work_on(self, here: _Here, versions: Versions) -> None:
        begun = here.statuses[versions]
        status = await (self._remove if begun.stage == "removing" else self._cover)(here, versions, begun)
        if here.statuses[versions] is not begun or versions not in here.todo:
            return  # something else was said meanwhile, which is on the list, or nothing is to be done
        here.todo.remove(versions)
        if status is not None:
            here.statuses[versions] = status
            await self._report(status)

    async def _cover(self, here: _Here, _: Versions, status: Status) -> Status | None:
        """Write a pair's vectors; None if it is not published any more."""
        try:
            return await self._backfill.cover(here.owned, status, self._report)
        except NotPublished:
            return None

    async def _remove(self, here: _Here, versions: Versions, status: Status) -> Status | None:
        """Remove a pair's vectors, or all of an item version; None while they are served."""
        user_version, item_version = versions
        meta = await self._kv.update_meta(lambda meta: meta)
        current = meta.current
        served = current is not None and item_version == current.item_version
        if served and current is not None and user_version in ("", current.user_version):
            what = f"encoder {user_version}" if user_version else f"item version {item_version}"
            log.warning("%s is retired while it is served; activate another one first", what)
            return None
        spoken = [] if user_version else self._spoken_of(item_version, status.partition)
        known = {key.rsplit(":", 1)[1] for key in meta.encoders} | {one.user_version for one in spoken}
        users = [user_version] if user_version else sorted(known)
        removed = await self._backfill.remove(here.owned, status, users, self._report)
        if here.statuses[versions] is status and versions in here.todo:
            for one in spoken:
                await self._tell(removed.at(removed.stage, user_version=one.user_version))
        return removed

    async def _report(self, status: Status) -> None:
        """Say how far it is; of all pairs of an item version together, under the name of one."""
        user_version = status.user_version or self._encoders.base.version
        await self._tell(status.at(status.stage, user_version=user_version))


def _is_wanted(status: Status, versions: Versions, live: set[Versions], catalogue: Catalogue) -> bool:
    """Whether work on a pair that was to be done is to be done still."""
    user_version, item_version = versions
    if status.stage == "covering":
        return versions in live
    return versions not in live if user_version else item_version in catalogue.retired


def _without(fallbacks: Collection[str], meta: Meta) -> Meta:
    return replace(meta, fallbacks={key: record for key, record in meta.fallbacks.items() if key not in fallbacks})
