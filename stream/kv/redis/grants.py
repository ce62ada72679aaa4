"""What a Redis server's access list must allow, for those who write vectors and for those who read: the least."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from stream.kv.urls import RedisAddress

#: Keys of all that is ours.
KEYS: Final = "~uemb:*"
#: The same, to be read only; servers before 7 know no such pattern.
KEYS_TO_READ: Final = "%R~uemb:*"


class Access(NamedTuple):
    """What somebody may do.

    Attributes:
        keys: pattern of the keys, as ``ACL SETUSER`` takes it.
        commands: why each is needed.
    """

    keys: str
    commands: Mapping[str, str]

    @property
    def rules(self) -> str:
        """Arguments of ``ACL SETUSER`` behind the password."""
        return " ".join([self.keys, "-@all", *(f"+{command}" for command in self.commands)])


_SCRIPT: Final = "within a script"


def reader(address: RedisAddress) -> Access:
    """What `EmbeddingReader` needs, and every command that reads vectors."""
    commands = {"mget": "vectors, progress and versions"}
    if address.seeds:
        commands = {
            "get": "vectors, progress and versions",
            "cluster|slots": "which server has which keys",
            "ping": "whether a server that was down is back",
            "asking": "keys whose slot is being moved",
        }
    return Access(KEYS_TO_READ, {**commands, **_of_database(address)})


def looker(address: RedisAddress) -> Access:
    """What `uemb doctor` and `uemb verify` need."""
    more = {"get": "vectors; the store's owner", "info": "memory policy, release, role"}
    if not address.seeds:
        more["time"] = "the server's clock"
    return Access(KEYS_TO_READ, {**reader(address).commands, **more})


def writer(address: RedisAddress) -> Access:
    """What a worker needs."""
    commands = {
        "get": "the store's owner and versions; within scripts",
        "set": "requests to rebuild",
        "evalsha": "compare and set",
        "eval": "the same where the server has forgotten the script",
        "getrange": _SCRIPT,
        "mset": _SCRIPT,
        "del": _SCRIPT,
        "time": "whether a heartbeat is of now",
        "info": "role and memory policy",
    }
    if not address.seeds:
        commands["mget"] = "vectors and progress, at takeover"
    else:
        commands |= {
            "set": f"requests to rebuild; {_SCRIPT}",
            "exists": _SCRIPT,
            "cluster|slots": "which server has which keys",
            "asking": "keys whose slot is being moved",
        }
    return Access(KEYS, {**commands, **_of_database(address)})


def _of_database(address: RedisAddress) -> dict[str, str]:
    return {"select": f"database {address.db}"} if address.db else {}
