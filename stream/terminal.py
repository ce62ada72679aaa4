"""What commands print: results on stdout, progress on stderr (a bar on a terminal, one plain line elsewhere)."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

USAGE_ERROR: Final = 2
INTERRUPTED: Final = 130

err: Final = Console(stderr=True, highlight=False)
out: Final = Console(highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    """One JSON document on one line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield ``update(done, total)``; a total of None means that it is not known."""
    if not err.is_terminal:
        last = [0]

        def remember(done: int, _: int | None) -> None:
            last[0] = done

        yield remember
        if last[0]:
            err.print(f"{text}: {last[0]:,}")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
