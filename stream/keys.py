"""Ids, partitioning and cache keys: the names under which everything is found again."""

import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAX_ID_BYTES: Final = 256
INT64_MIN: Final = -(1 << 63)
INT64_MAX: Final = (1 << 63) - 1

#: First part of a key after ``uemb:`` that a version name must not take.
RESERVED_WORDS: Final = frozenset(
    {"app", "current", "fallback", "encoder", "epoch", "watermark", "meta", "rebuild", "sentinel"}
)

APP_KEY: Final = "uemb:app"
CURRENT_KEY: Final = "uemb:current"
META_KEY: Final = "uemb:meta"
#: Key of a partition's claims in the changelog; no user has such an id.
CLAIM_KEY: Final = b"\0claim"

#: For fewer keys arrays cost more than they save.
_FEW: Final = 16
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}")


def canonical_id(value: int | str) -> str:
    """Return the one text under which an id is known; ``5`` and ``"5"`` are the same id.

    >>> canonical_id(5), canonical_id("5"), canonical_id("05")
    ('5', '5', '05')

    Args:
        value: a 64-bit signed integer, or a text of 1-256 UTF-8 bytes without control characters.

    Raises:
        ValueError: the id is out of range, empty, too long, or holds control characters or lone surrogates.
    """
    if isinstance(value, int):
        if isinstance(value, bool) or not INT64_MIN <= value <= INT64_MAX:
            msg = "an integer id must fit in 64 bits"
            raise ValueError(msg)
        return str(value)
    if not isinstance(value, str):
        msg = "an id must be a string or an integer"
        raise ValueError(msg)  # noqa: TRY004 - callers turn every wrong id into one kind of error
    try:
        size = len(value)
        if size <= MAX_ID_BYTES:  # of a longer one no more is looked at: it may have millions
            if not value.isprintable() and _CONTROL.search(value):
                msg = "an id must hold no control characters"
                raise ValueError(msg)
            size = size if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        msg = "an id must be valid Unicode"
        raise ValueError(msg) from None
    if not 1 <= size <= MAX_ID_BYTES:
        msg = f"an id must have 1 to {MAX_ID_BYTES} UTF-8 bytes"
        raise ValueError(msg)
    return value


def check_version_name(name: str) -> str:
    """Return `name` if it may name a version, else raise ``ValueError`` with what is allowed."""
    if not _VERSION.fullmatch(name):
        msg = f"version name {name[:80]!r} must match [A-Za-z0-9._-]{{1,64}}"
        raise ValueError(msg)
    if not name.strip("."):  # it names a folder, too
        msg = f"version name {name!r} must not be of dots alone"
        raise ValueError(msg)
    if name in RESERVED_WORDS:
        msg = f"version name {name!r} is a reserved word"
        raise ValueError(msg)
    return name


def murmur2(data: bytes) -> int:
    """Kafka's 32-bit murmur2 as the Java client computes it (``org.apache.kafka.common.utils.Utils.murmur2``)."""
    m = 0x5BD1E995
    n = len(data)
    h = 0x9747B28C ^ n
    end = n & ~3
    for i in range(0, end, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & 0xFFFFFFFF
        h = (h * m & 0xFFFFFFFF) ^ ((k ^ (k >> 24)) * m & 0xFFFFFFFF)
    if n > end:
        h = (h ^ int.from_bytes(data[end:], "little")) * m & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * m & 0xFFFFFFFF
    return h ^ (h >> 15)


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition that owns `key` among `partitions`, as Java's and aiokafka's default partitioner do.

    >>> [partition_of(user, 12) for user in (b"1", b"42", b"anna")]
    [3, 4, 7]
    """
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def partitions_of(keys: Sequence[bytes], partitions: int) -> list[int]:
    """`partition_of` each of many keys, at once."""
    if len(keys) < _FEW:
        return [partition_of(key, partitions) for key in keys]
    sizes = np.fromiter(map(len, keys), dtype=np.int64, count=len(keys))
    width = int(sizes.max()) // 4 + 1  # words, so that behind each key there is a zero
    padded = b"".join([key.ljust(4 * width, b"\0") for key in keys])
    words = np.frombuffer(padded, dtype="<u4").reshape(len(keys), width)
    m = np.uint32(0x5BD1E995)
    h: NDArray[Any] = np.uint32(0x9747B28C) ^ sizes.astype(np.uint32)
    for n in range(width - 1):
        k: NDArray[Any] = words[:, n] * m
        k = (k ^ (k >> 24)) * m
        h = np.where(sizes >= 4 * n + 4, (h * m) ^ k, h)
    rest = words[np.arange(len(keys)), sizes // 4]
    h = np.where(sizes % 4 > 0, (h ^ rest) * m, h)
    h = (h ^ (h >> 13)) * m
    h = h ^ (h >> 15)
    found: list[int] = ((h & 0x7FFFFFFF).astype(np.int64) % partitions).tolist()
    return found


def one_user_per_partition(partitions: int) -> list[bytes]:
    """An id that lies in each partition [partitions], for who asks about partitions by their users.

    >>> one_user_per_partition(4)
    [b'0', b'4', b'5', b'1']
    """
    found: dict[int, bytes] = {}
    first = 0
    while len(found) < partitions:
        users = [b"%d" % number for number in range(first, first + 4 * partitions)]
        for user, partition in zip(users, partitions_of(users, partitions), strict=True):
            found.setdefault(partition, user)
        first += len(users)
    return [found[partition] for partition in range(partitions)]


def user_cache_key(user_id: int | str, item_emb_version: str, user_emb_version: str) -> str:
    """Key of one user's vector in the key-value store and on the output topic (seed §6).

    >>> user_cache_key(42, "films_v1", "mix-edd8f311")
    'uemb:mix-edd8f311:films_v1:42'
    """
    return f"uemb:{user_emb_version}:{item_emb_version}:{user_id}"


def fallback_key(item_emb_version: str, user_emb_version: str) -> str:
    """Key of the fallback record of a pair of versions."""
    return f"uemb:fallback:{user_emb_version}:{item_emb_version}"


def encoder_key(user_emb_version: str) -> str:
    """Key of the full hash behind a user-embedding version's name."""
    return f"uemb:encoder:{user_emb_version}"


def epoch_key(partition: int) -> str:
    """Key of the newest claim (fencing token) of a partition."""
    return f"uemb:epoch:{partition}"


def watermark_key(partition: int) -> str:
    """Key of a partition's watermark."""
    return f"uemb:watermark:{partition}"


def rebuild_key(partition: int) -> str:
    """Key of the request that a partition's owner writes it anew."""
    return f"uemb:rebuild:{partition}"


def sentinel_key(tag: str, partition: int) -> str:
    """Key of a partition's sentinel in the slot of the hash tag `tag` of a cluster."""
    return f"uemb:sentinel:{{{tag}}}:{partition}"
