"""Unsigned varints, least significant seven bits first, as in Avro and in stored histories."""

from typing import Final

_END_SHIFT: Final = 70


def varint(value: int) -> bytes:
    """A number that is not negative, in as few bytes as it takes.

    >>> varint(300).hex(), read_varint(varint(300), 0)
    ('ac02', (300, 2))
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, pos: int) -> tuple[int, int]:
    """The number at `pos`, and the place after it.

    Raises:
        IndexError: the data end before it does.
        ValueError: it takes more bytes than one of 64 bits does.
    """
    shift = result = 0
    while shift < _END_SHIFT:
        byte = data[pos]
        pos += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, pos
        shift += 7
    raise ValueError
