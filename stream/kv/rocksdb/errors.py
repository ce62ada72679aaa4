"""What RocksDB's errors mean, for the history table and the embedded store: rocksdict passes on RocksDB's own words."""

from typing import Final

#: What RocksDB says of files that are torn, changed or missing.
_DAMAGE: Final = ("Corruption", "No such file", "does not exist", "Invalid argument", "NotFound", "checksum")


def first_line(exc: BaseException) -> str:
    """First line of an error's text, or its kind where it has none."""
    return str(exc).splitlines()[0] if str(exc) else type(exc).__name__


def is_damage(text: str) -> bool:
    """Whether the words speak of files that can't be trusted any more, rather than of a disk that refuses."""
    return any(sign in text for sign in _DAMAGE)
