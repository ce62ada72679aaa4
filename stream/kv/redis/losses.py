"""Whether part of a cluster lost what it held: sentinel keys in all slots, and who served them.

A server that comes back empty, or set back to an older copy, lacks its sentinels. One that lacks only the last writes
has them all: replication is asynchronous, so a replica that takes over may lack acknowledged writes, and so may a
server that starts again from its own disk. Neither can be told from one that lacks nothing, so both count as a loss:
rebuilding a partition costs its users' writes once more, beside the events, and nothing else. Slots that are moved take
their keys along, and are none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from stream.core.json_records import decode_json, encode_json
from stream.core.records import kv_entry


class Sentinel(msgspec.Struct, frozen=True):
    """What the body of a sentinel says of the server that held it; see `Server`."""

    node: str
    run: str
    history: str


class Server(NamedTuple):
    """One run of a server that has slots.

    Attributes:
        node: its name in the cluster, the same for all runs.
        run: of this run.
        history: name of the data's history, which a replica has from its primary.
        before: the history that it continues since it took over as a primary, zeros without one.
    """

    node: str
    run: str
    history: str
    before: str

    @classmethod
    def of(cls, node: str, info: Mapping[str, Any]) -> "Server":
        """From what the server tells of itself, its sections ``server`` and ``replication``."""
        names = ("run_id", "master_replid", "master_replid2")
        return cls(node, *(str(info.get(name, "")) for name in names))

    @property
    def known(self) -> bool:
        """Whether it tells what another run of it, or a replica in its place, would tell otherwise."""
        return bool(self.run and self.history)

    def sentinel(self) -> bytes:
        """Body of a sentinel that it holds."""
        return encode_json(Sentinel(self.node, self.run, self.history))


@dataclass(slots=True)
class Known:
    """The servers that hold what a partition's owner has written.

    Attributes:
        runs: newest run of each, by its node.
        histories: those of all of them, present and past.
    """

    runs: dict[str, str] = field(default_factory=dict)
    histories: set[str] = field(default_factory=set)

    @classmethod
    def by(cls, sentinels: Iterable[bytes]) -> "Known":
        """Those that wrote sentinels, entries as stored; damaged ones tell nothing."""
        known = cls()
        for entry in sentinels:
            try:
                found = decode_json(kv_entry(entry)[2], Sentinel)
            except ValueError:
                continue
            known.runs[found.node] = found.run
            known.histories.add(found.history)
        return known

    def adopt(self, present: Iterable[Server]) -> bool:
        """Take over who has slots at present; return whether one of them may lack what was written.

        That is one that was started anew, or took over from another. One that was not known before and took over from
        nobody has got its slots with their keys.
        """
        servers = list(present)
        lossy = any(
            self.runs[server.node] != server.run if server.node in self.runs else server.before in self.histories
            for server in servers
        )
        self.runs = {server.node: server.run for server in servers}
        self.histories |= {server.history for server in servers}
        return lossy
