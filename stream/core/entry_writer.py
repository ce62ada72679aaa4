"""Key-value entries and output records of a step, written by one loop."""

from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.core import kernels
from stream.core.encoders import REASONS
from stream.core.formulas import Float32, Float64
from stream.core.records import PREFIX_BYTES, record_parts, status_part

Int64 = NDArray[np.int64]


class Facts(NamedTuple):
    """What records say of m states besides their vectors.

    Attributes:
        users: whose.
        epochs: the claim on the partition under which each is written [m].
        revisions: of each state [m].
        lengths: of each history [m].
        unknown: how many of its items the space lacks [m].
        as_of: when its newest interaction was in ms, -1 without one [m].
    """

    users: list[bytes]
    epochs: Int64
    revisions: Int64
    lengths: Int64
    unknown: Int64
    as_of: Int64


class EntryWriter:
    """Writes entries of one pair of versions, whose body is an Avro record of vectors of `dim` dimensions.

    Tests hold what it writes against fastavro byte for byte.
    """

    def __init__(self, user_embedding_version: str, item_embedding_version: str, dim: int) -> None:
        parts = record_parts(user_embedding_version, item_embedding_version, dim)
        flags = [status_part(*reason) for reason in REASONS]
        self._flags = _bytes(b"".join(flags))
        self._flags_at = np.array([0, *accumulate(map(len, flags))])
        self._header, self._versions, self._size = map(_bytes, (parts.header, parts.versions, parts.vector_size))

    def write(
        self, facts: Facts, status: NDArray[np.int8], norms: Float64, vectors: Float32
    ) -> tuple[list[bytes], list[bytes | None]]:
        """Entries, and their bodies, None for that of an empty history.

        Args:
            facts: of the states.
            status: `VectorStatus` of each vector [m].
            norms: of each vector [m].
            vectors: [m, d].
        """
        users = facts.users
        data, bounds = kernels.write_entries(
            _bytes(b"".join(users)), np.array([0, *accumulate(map(len, users))]), facts.epochs, facts.revisions,
            facts.lengths, facts.unknown, facts.as_of, status, self._flags, self._flags_at, self._header,
            self._versions, self._size, norms.astype("<f8", copy=False)[:, None].view(np.uint8),
            np.ascontiguousarray(vectors, dtype="<f4").view(np.uint8),
        )  # fmt: skip
        block, at = data.tobytes(), bounds.tolist()
        entries = [block[start:end] for start, end in pairwise(at)]
        return entries, [entry[PREFIX_BYTES:] or None for entry in entries]


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)
