"""Other people's text, made fit to be shown: what would act on a terminal is escaped, and nothing is endless.

Ids, keys, headers, names and paths are shown as they are, but for characters that would act on a terminal or on the
order of what stands beside them.
"""

import unicodedata
from collections.abc import Iterable
from typing import Final

#: Control, format (bidirectional and invisible), line and paragraph separators, and halves of surrogate pairs.
ACTIVE: Final = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs"})
#: Longest error; a path may have four thousand characters.
LINE_MAX_CHARS: Final = 5_000
_NAMES: Final = 12
_NAME_MAX_CHARS: Final = 60


def escaped(text: str) -> str:
    r"""Text on one line in which nothing acts: `\x1b`, `\n` and the like for what would.

    >>> print(escaped("a\x1b[31mb\u202ec"))
    a\x1b[31mb\u202ec
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ACTIVE else c for c in text)


def one_line(text: str, max_chars: int = LINE_MAX_CHARS) -> str:
    """An error's text as one line of bounded length."""
    if len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    return escaped(" ".join(text.split()) if not text.isprintable() else text)


def shortened(text: str) -> str:
    """A name, as far as it helps to know it.

    >>> len(shortened("x" * 1_000_000))
    60
    """
    return text if len(text) <= _NAME_MAX_CHARS else text[: _NAME_MAX_CHARS - 1] + "…"


def listed(names: Iterable[object]) -> str:
    """The first of some names, as far as it helps to know them; ``nothing`` without any.

    >>> listed(["user", "item"]), listed([])
    ('user, item', 'nothing')
    """
    some = [shortened(str(name)) for _, name in zip(range(_NAMES + 1), names, strict=False)]
    return ", ".join(some if len(some) <= _NAMES else [*some[:_NAMES], "…"]) or "nothing"
