"""The users of one pair of versions as a float32 matrix, kept current from the embedding topic (no Kafka in here).

Feed it every record of the topic, in the order of each partition; repeats and replays change nothing. A row stays with
its user until the user is gone, so its number can be the label in a usearch or hnswlib index.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.core.formulas import Float32
from stream.core.records import CorruptRecord, decode
from stream.keys import check_version_name, partition_of

_FIRST_ROWS = 1024
_NO_ROW = -1


class _Seen(NamedTuple):
    """The newest record of a user that was applied."""

    epoch: int
    revision: int
    row: int


class UserMatrix:
    """Applies records of the embedding topic; those of other pairs of versions are none of its business.

    What counts is ``(epoch, revision)``, compared in that order: a lower one than was applied is old and changes
    nothing, an equal one is the same state sent again, and a null value means that the user is gone and forgotten here:
    what follows it begins anew. A user whose newest record is a fallback has no row: that vector is nobody's taste.

    >>> from stream.records import EmbeddingRecord, encode
    >>> def state(revision, vector):  # as the topic brings it
    ...     vector = np.float32(vector)
    ...     return encode(
    ...         EmbeddingRecord("42", 1, revision, "ok", "", 2, 0, None, "mix-1", "films_v1", vector, norm=1.0)
    ...     )
    >>> users = UserMatrix(2, "films_v1", "mix-1")
    >>> key = b"uemb:mix-1:films_v1:42"
    >>> users.apply(key, state(8, [0, 1])), users.apply(key, state(7, [1, 0]))  # the second is older
    (0, None)
    >>> users.row(42), users.vectors[users.live].tolist()
    (0, [[0.0, 1.0]])
    >>> users.apply(key, None), len(users)
    (0, 0)

    Args:
        dim: dimension d of the vectors.
        item_version: the item version that they live in.
        user_version: the user-embedding version.
        partitions: how many the topic has. When a topic grows, users move to other partitions, and are taken away where
            they were, in no order between the two: with this, and `apply` told where a record lies, only the one counts
            that lies on its user's partition. When the topic has grown, begin anew with a new matrix.

    Attributes:
        ids: canonical user id of each row [rows], None where the row is free.
        others: records of other pairs of versions, or on other partitions than their user's, that were left alone.

    Raises:
        ValueError: a version is no name, or a number is not positive.
    """

    def __init__(self, dim: int, item_version: str, user_version: str, partitions: int | None = None) -> None:
        if dim < 1 or (partitions is not None and partitions < 1):
            msg = f"dimension and partitions must be positive, not {dim} and {partitions}"
            raise ValueError(msg)
        self.dim = dim
        self.item_version = check_version_name(item_version)
        self.user_version = check_version_name(user_version)
        self.partitions = partitions
        self.ids: list[str | None] = []
        self.others = 0
        self._prefix = f"uemb:{user_version}:{item_version}:"
        self._matrix = np.zeros((_FIRST_ROWS, dim), dtype=np.float32)
        self._live = np.zeros(_FIRST_ROWS, dtype=np.bool_)
        self._seen: dict[str, _Seen] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        """How many users have a row."""
        return len(self.ids) - len(self._free)

    @property
    def vectors(self) -> Float32:
        """Unit vectors [rows, d], zero where the row is free; read-only, and valid until the next `apply`."""
        view = self._matrix[: len(self.ids)]
        view.flags.writeable = False
        return view

    @property
    def live(self) -> NDArray[np.int64]:
        """Numbers of the rows that are not free [n], ascending."""
        return np.flatnonzero(self._live[: len(self.ids)])

    def row(self, user_id: int | str) -> int | None:
        """The user's row, None without one."""
        seen = self._seen.get(str(user_id))
        return None if seen is None or seen.row == _NO_ROW else seen.row

    def apply(self, key: bytes | None, value: bytes | None, partition: int | None = None) -> int | None:
        """Take in one record; return the row to index anew, or to remove where `ids` has None there.

        Args:
            key: the record's key.
            value: the record in Avro single-object encoding, or None for a tombstone.
            partition: where it lies; looked at where the matrix knows how many there are.

        Returns:
            The row that changed, or None if nothing did.

        Raises:
            CorruptRecord: the value is no such record, or another one than its key says; nothing was changed.
        """
        name = (key or b"").decode(errors="replace")
        if not name.startswith(self._prefix):
            self.others += 1
            return None
        user = name[len(self._prefix) :]
        if partition is not None and self.partitions and partition_of(user.encode(), self.partitions) != partition:
            self.others += 1
            return None
        if value is None:
            gone = self._seen.pop(user, None)
            return None if gone is None else self._freed(gone.row)
        record = decode(value)
        if (
            record.user_id != user
            or len(record.vector) != self.dim
            or (record.user_embedding_version, record.item_embedding_version) != (self.user_version, self.item_version)
        ):
            msg = "a record is not of the user, versions and dimension that its key stands for"
            raise CorruptRecord(msg)
        seen = self._seen.get(user, _Seen(-1, -1, _NO_ROW))
        if (record.epoch, record.revision) < (seen.epoch, seen.revision):
            return None
        row, changed = seen.row, None
        if record.status != "ok":
            row, changed = _NO_ROW, self._freed(row)
        elif row == _NO_ROW:
            row = changed = self._taken(user)
            self._matrix[row] = record.vector
        elif not np.array_equal(self._matrix[row], record.vector):
            changed = row
            self._matrix[row] = record.vector
        self._seen[user] = _Seen(record.epoch, record.revision, row)
        return changed

    def _taken(self, user: str) -> int:
        """A row for a user: one that is free, or a new one."""
        if self._free:
            row = self._free.pop()
            self.ids[row] = user
        else:
            row = len(self.ids)
            if row == len(self._matrix):
                self._matrix = np.concatenate((self._matrix, np.zeros_like(self._matrix)))
                self._live = np.concatenate((self._live, np.zeros_like(self._live)))
            self.ids.append(user)
        self._live[row] = True
        return row

    def _freed(self, row: int) -> int | None:
        if row == _NO_ROW:
            return None
        self.ids[row] = None
        self._matrix[row] = 0
        self._live[row] = False
        self._free.append(row)
        return row
