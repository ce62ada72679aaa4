"""Where a cluster keeps its keys: which server has which of the 16,384 slots."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from redis.crc import key_slot

SLOTS: Final = 16_384
#: Sentinels of a partition. They lie in as many equal bands of slots, so a server with 1 % of the slots has one.
SENTINELS: Final = 256


class Address(NamedTuple):
    """Where a server of the cluster listens."""

    host: str
    port: int


class Primary(NamedTuple):
    """A server that has slots; `node` is its name in the cluster, which it keeps over restarts."""

    place: Address
    node: str


class SlotMap:
    """Owners of slots as one server told them, corrected by what redirections tell.

    Args:
        reply: answer to ``CLUSTER SLOTS``.
        asked: who gave it; a server that doesn't know its own address leaves it out.
    """

    def __init__(self, reply: Sequence[Sequence[Any]], asked: Address) -> None:
        self._ranges: list[tuple[int, int, Primary]] = []
        for first, last, primary, *_ in reply:
            host = _text(primary[0]) or asked.host
            self._ranges.append((int(first), int(last), Primary(Address(host, int(primary[1])), _text(primary[2]))))
        self._owners: list[Primary | None] = [None] * SLOTS
        for start, end, owner in self._ranges:
            self._owners[start : end + 1] = [owner] * (end + 1 - start)
        self._moved: dict[int, Address] = {}

    @property
    def primaries(self) -> list[Primary]:
        """Every server that has slots, once."""
        return list(dict.fromkeys(owner for _, _, owner in self._ranges))

    def primary(self, slot: int) -> Primary | None:
        """Owner of a slot when the map was made, None where it had none."""
        return self._owners[slot]

    def place(self, slot: int) -> Address | None:
        """Where to ask for the keys of a slot, None where nobody has it."""
        owner = self._owners[slot]
        return self._moved.get(slot, owner.place if owner is not None else None)

    def moved(self, slot: int, place: Address) -> None:
        """Take note of a redirection."""
        self._moved[slot] = place


def slot_of(key: bytes | str) -> int:
    """Slot of a key: of what stands in its first braces, or of all of it."""
    return int(key_slot(key.encode() if isinstance(key, str) else key))


@cache
def sentinel_tags() -> tuple[tuple[int, str], ...]:
    """Slot and hash tag of each sentinel, one in every band of slots; the same in every process and release."""
    width, tags, number = SLOTS // SENTINELS, dict[int, tuple[int, str]](), 0
    while len(tags) < SENTINELS:
        slot = slot_of(str(number))
        tags.setdefault(slot // width, (slot, str(number)))
        number += 1
    return tuple(tags[band] for band in range(SENTINELS))


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""
