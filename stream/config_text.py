"""Texts of settings: mappings and durations."""

import re
from typing import Final

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


def pairs(value: object, separator: str) -> object:
    """A mapping from a text like ``a:1,b:2``; what is no text stays as it is.

    Raises:
        ValueError: the text is none like that, or names something twice.
    """
    if not isinstance(value, str):
        return value
    out: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in value.split(","))):
        name, found, rest = part.partition(separator)
        if not found or not name.strip() or not rest.strip():
            msg = f"write name{separator}value, separated by commas"
            raise ValueError(msg)
        if name.strip() in out:
            msg = f"{name.strip()} is given twice"
            raise ValueError(msg)
        out[name.strip()] = rest.strip()
    return out


def seconds(text: str) -> float:
    """Seconds that a text like ``30d``, ``36h`` or ``90`` stands for.

    Raises:
        ValueError: it stands for none.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        msg = "write seconds, or a number with s, m, h or d, like 30d"
        raise ValueError(msg)
    return float(found[1]) * _SECONDS[found[2]]
