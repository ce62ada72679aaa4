"""Commands to the servers of a cluster: each at the server that has its key, all of one server in one round trip.

The client library has a cluster client too. It sends ``ASKING`` and the command that it is meant for over whichever
connections are free, two as a rule, so that a key of a slot under way to another server is not found (redis-py 8.1).
Commands on one key each need no more than this module does.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as Dropped
from redis.exceptions import TimeoutError as Silent

from stream.kv.redis.async_client import async_client
from stream.kv.redis.client import connection_arguments
from stream.kv.redis.scripts import Script
from stream.kv.redis.slots import Address, Primary, SlotMap, slot_of
from stream.kv.urls import RedisAddress

#: Redirections that a command follows; a slot under way takes two, and each server that took over meanwhile one more.
_TURNS: Final = 8
_PAUSE_S: Final = 0.02


class Call(NamedTuple):
    """A command on one key, or a script on it.

    Attributes:
        name: the command; of a script's call ignored.
        key: what it is about.
        args: the rest.
        script: what to run instead of a command.
    """

    name: str
    key: bytes | str
    args: tuple[bytes | str | int, ...] = ()
    script: Script | None = None


class Router:
    """Connections to the servers of one cluster, used from one event loop; its errors are the client library's.

    Args:
        address: the cluster.
        timeout_s: longest wait for one answer.

    Attributes:
        down: servers that failed when they were last asked, and how.

    Raises:
        ConfigError: a file that the address names can't be used.
    """

    def __init__(self, address: RedisAddress, timeout_s: float) -> None:
        self._arguments = connection_arguments(address, timeout_s)
        self._seeds = [Address(host, port) for host, port in address.seeds]
        self._clients: dict[Address, Any] = {}
        self._map: SlotMap | None = None
        self._outdated = True
        self._refreshing = asyncio.Lock()
        self.down: dict[Address, RedisError | OSError] = {}

    async def run(self, calls: Sequence[Call], *, hasty: bool = False) -> list[Any]:
        """Run commands, in no particular order; return what each was answered, an exception for one that failed.

        Args:
            calls: the commands.
            hasty: whether those for servers in `down` fail at once, and the owners of slots as once known are good
                enough. Somebody else then calls `primaries` now and then, and `ask` of those in `down`.

        Raises:
            RedisError: no server tells where slots are.
            OSError: likewise.
        """
        slots = [slot_of(call.key) for call in calls]
        replies: list[Any] = [None] * len(calls)
        asks: dict[int, Address] = {}
        whole: set[int] = set()  # scripts whose text must be sent
        todo: Sequence[int] = range(len(calls))
        slot_map = self._map if hasty and self._map is not None else await self.slots()
        for turn in range(_TURNS):
            trips: dict[Address, list[int]] = {}
            for n in todo:
                place = asks.get(n) or slot_map.place(slots[n])
                if place is None:
                    replies[n] = ClusterDownError("CLUSTERDOWN Hash slot not served")
                    self._outdated = True
                else:
                    trips.setdefault(place, []).append(n)
            await asyncio.gather(
                *(self._trip(place, ns, calls, replies, asks, whole, hasty) for place, ns in trips.items())
            )
            asked, asks = asks, {}
            again = []
            for n in todo:
                reply = replies[n]
                if isinstance(reply, MovedError):
                    slot_map.moved(slots[n], self._redirected(reply, asked.get(n) or slot_map.place(slots[n])))
                    self._outdated = True
                elif isinstance(reply, AskError):
                    asks[n] = self._redirected(reply, slot_map.place(slots[n]))
                elif isinstance(reply, NoScriptError) and n not in whole:
                    whole.add(n)
                elif isinstance(reply, TryAgainError):
                    await asyncio.sleep(_PAUSE_S)
                else:
                    # What failed may have another owner by now; whoever repeats the command asks again who has it.
                    self._outdated |= isinstance(reply, Dropped | Silent | OSError | ClusterDownError | ReadOnlyError)
                    continue
                again.append(n)
            if not again:
                break
            todo = again
            if turn > 1:
                await asyncio.sleep(_PAUSE_S)
        return replies

    async def ask(self, place: Address, *commands: tuple[str, ...]) -> list[Any]:
        """Run commands that are about a server, not a key; raises what it or the connection raises."""
        try:
            async with self._client(place).pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                # What it raises itself says which command failed, and before redis-py 7.1 not how.
                answers: list[Any] = await pipeline.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        except (RedisError, OSError) as exc:
            self._outdated = True
            if isinstance(exc, Dropped | Silent | OSError):
                self.down[place] = exc
            raise
        self.down.pop(place, None)
        return answers

    async def primaries(self) -> list[Primary]:
        """Every server that has slots, asked for anew."""
        self._outdated = True
        return (await self.slots()).primaries

    async def slots(self) -> SlotMap:
        """Owners of the slots, asked for anew if a command has met another one, or none, since."""
        async with self._refreshing:
            if self._outdated or self._map is None:
                self._map = await self._fetched()
                self._outdated = False
            return self._map

    async def close(self) -> None:
        """Disconnect; the next use connects again, if need be in another event loop."""
        clients, self._clients, self._map, self._outdated = list(self._clients.values()), {}, None, True
        self._refreshing = asyncio.Lock()  # one that was ever waited for belongs to its event loop
        for client in clients:
            with suppress(RedisError, OSError):  # of a connection that is broken nothing is left to close
                await client.aclose()

    async def _trip(
        self,
        place: Address,
        numbers: Sequence[int],
        calls: Sequence[Call],
        replies: list[Any],
        asks: Mapping[int, Address],
        whole: set[int],
        hasty: bool,
    ) -> None:
        """One round trip to one server; leaves an answer or an exception for each of its commands."""
        if hasty and (error := self.down.get(place)) is not None:
            # Another one of its kind: each raise would make the traceback of one that is kept longer.
            answers: list[Any] = [type(error)(str(error))] * len(numbers)
        else:
            try:
                async with self._client(place).pipeline(transaction=False) as pipeline:
                    for n in numbers:
                        if n in asks:
                            pipeline.execute_command("ASKING")
                        pipeline.execute_command(*_packed(calls[n], n in whole))
                    found = iter(await pipeline.execute(raise_on_error=False))
                answers = [(next(found), next(found))[1] if n in asks else next(found) for n in numbers]
                self.down.pop(place, None)
            except (RedisError, OSError) as exc:
                answers = [exc] * len(numbers)
                if isinstance(exc, Dropped | Silent | OSError):
                    self.down[place] = exc
                if isinstance(exc, Silent):  # a path that lets nothing through is that of all its connections
                    await self._client(place).connection_pool.disconnect(inuse_connections=False)
        for n, answer in zip(numbers, answers, strict=True):
            replies[n] = answer

    async def _fetched(self) -> SlotMap:
        known = [] if self._map is None else [primary.place for primary in self._map.primaries]
        # Last those that failed: their silence would cost the wait of a timeout each.
        places = sorted(dict.fromkeys([*known, *self._seeds]), key=lambda place: place in self.down)
        error: RedisError | OSError | None = None
        for place in places:
            try:
                fetched = SlotMap((await self.ask(place, ("CLUSTER SLOTS",)))[0], place)
            except (RedisError, OSError) as exc:
                error = exc
                continue
            if fetched.primaries:
                await self._forget(set(places) - {p.place for p in fetched.primaries} - set(self._seeds))
                return fetched
        raise error or ClusterDownError("CLUSTERDOWN no server of the cluster has slots")

    async def _forget(self, gone: set[Address]) -> None:
        for place in gone:
            self.down.pop(place, None)
            if (client := self._clients.pop(place, None)) is not None:
                with suppress(RedisError, OSError):
                    await client.aclose()

    def _client(self, place: Address) -> Any:
        if place not in self._clients:
            self._clients[place] = async_client({**self._arguments, "host": place.host, "port": place.port})
        return self._clients[place]

    @staticmethod
    def _redirected(to: AskError, asked: Address | None) -> Address:
        # A server that doesn't know the other's address names its port alone.
        return Address(to.host or (asked.host if asked is not None else ""), to.port)


def _packed(call: Call, whole: bool) -> tuple[bytes | str | int, ...]:
    if call.script is None:
        return (call.name, call.key, *call.args)
    return (
        ("EVAL", call.script.text, 1, call.key, *call.args)
        if whole
        else ("EVALSHA", call.script.sha, 1, call.key, *call.args)
    )


def checked(replies: Sequence[Any]) -> Sequence[Any]:
    """The answers; raises the first that is an exception."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
