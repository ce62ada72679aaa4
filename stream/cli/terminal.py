"""What commands print: results on stdout, progress on stderr (a bar on a terminal, one plain line elsewhere).

Ids, keys, headers and names are other people's text. It is shown as it is: nothing in it is markup or an emoji's name,
and characters that would act on a terminal, or on the order of what stands beside them, are escaped.
"""

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from stream.foreign_text import ACTIVE, escaped

#: Units of progress that are not counted one by one: bytes, and steps that mean nothing by themselves.
MB: Final = "MB"
PERCENT: Final = "%"


class PlainConsole(Console):
    """A console to which strings are text and nothing else; lines and tables of our own making are printed as such."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **kwargs)

    def print(self, *objects: Any, **kwargs: Any) -> None:
        """Print; see `Console.print`."""
        super().print(*(escaped(o) if isinstance(o, str) else o for o in objects), **kwargs)


err: Final = PlainConsole(stderr=True)
out: Final = PlainConsole(soft_wrap=True)


def print_json(value: object) -> None:
    """One JSON document on one line of stdout; what would act on a terminal is escaped in it as JSON does."""
    text = json.dumps(value, ensure_ascii=not _takes_all(sys.stdout))
    if not text.isascii() or "\x7f" in text:
        text = "".join(json.dumps(c)[1:-1] if unicodedata.category(c) in ACTIVE else c for c in text)
    click.echo(text.replace("\x7f", "\\u007f"))


def take_any_text() -> None:
    """Have stdout and stderr escape what their encoding lacks (as in the C locale), where they would fail."""
    for stream in (sys.stdout, sys.stderr):
        if not _takes_all(stream):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def as_utf8(argument: str) -> str:
    """A command-line argument whose bytes are UTF-8, as text, whatever the locale took them for."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return argument


def _takes_all(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")


def amount(done: int, total: int | None, unit: str) -> str:
    """How much is done, and of how much while that is more.

    >>> amount(1200, 4000, "events"), amount(4_924_029, None, MB), amount(1, 8, PERCENT)
    ('1,200 of 4,000 events', '4.9 MB', '12 %')
    """
    if unit == PERCENT:
        return f"{100 * done // total} %" if total else ""
    parts = [done] if total is None or done >= total else [done, total]
    return f"{' of '.join(f'{n / 1e6:,.1f}' if unit == MB else f'{n:,}' for n in parts)} {unit}"


@contextmanager
def progress_bar(text: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield ``update(done, total)``; a total of None means that it is not known.

    Args:
        text: what goes on.
        unit: what is counted, in the plural; `MB` where bytes are, `PERCENT` where steps are.
    """
    if not err.is_terminal:
        last = [""]

        def remember(done: int, total: int | None) -> None:
            last[0] = amount(done, total, unit) if done else ""

        yield remember
        if last[0]:
            err.print(f"{text}: {last[0]}")
        return
    shown = TextColumn("{task.fields[amount]}", markup=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), shown)
    with Progress(*columns, TimeRemainingColumn(), console=err) as progress:
        task = progress.add_task(text, total=None, amount="")
        yield lambda done, total: progress.update(task, completed=done, total=total, amount=amount(done, total, unit))
