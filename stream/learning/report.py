"""An evaluation as people read it: tables in Markdown, and a figure."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from stream.errors import ConfigError
from stream.learning.evaluate import Reading, Report, Row

PLOTS_HINT: Final = "a figure needs matplotlib: pip install 'user-embedding-stream[plots]'"
#: What each reading is, for its heading.
MEANING: Final[dict[Reading, str]] = {
    "ordered": "as ordered",
    "shuffled": "ties shuffled",
    "older": "ties shuffled, histories strictly older",
}
COLUMNS: Final = ("method", "R@10 [95 % by user]", "R@50", "NDCG@10", "coverage@10", "head@10", "gain [95 %]")


def cells(row: Row) -> tuple[str, ...]:
    """One method's figures, as `COLUMNS` names them."""
    return (
        row.method,
        f"{row.recall_10:.3f} [{row.low:.3f}, {row.high:.3f}]",
        f"{row.recall_50:.3f}",
        f"{row.ndcg_10:.3f}",
        f"{row.coverage_10:.2f}",
        f"{row.head_share_10:.2f}",
        f"{row.gain:+.3f} [{row.gain_low:+.3f}, {row.gain_high:+.3f}]",
    )


def stale_rows(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heading and rows of what old vectors find."""
    by_method = {name: list(some) for name, some in groupby(report.stale, key=lambda stale: stale.method)}
    ages = [age(stale.ttl_s) for stale in next(iter(by_method.values()), [])]
    rows = [(name, *(f"{stale.recall_10:.3f}" for stale in some)) for name, some in by_method.items()]
    return ("R@10 of a vector made anew", *ages), rows


def age(ttl_s: int) -> str:
    """How old a vector may grow.

    >>> [age(s) for s in (0, 60, 600, 3600, 86400)]
    ['per event', 'after 1 min', 'after 10 min', 'after 1 h', 'after 24 h']
    """
    if not ttl_s:
        return "per event"
    return f"after {ttl_s // 60} min" if ttl_s < 3_600 else f"after {ttl_s // 3_600} h"


def summary(report: Report) -> str:
    """What was compared, in one line."""
    cases = ", ".join(f"{count:,} {MEANING[reading]}" for reading, count in report.cases.items())
    return f"{report.events:,} events of {report.users:,} users, {report.items:,} items; cases: {cases}"


def markdown(report: Report) -> str:
    """The report as Markdown."""

    def lines() -> Iterator[str]:
        yield summary(report)
        for reading, rows in groupby(report.rows, key=lambda row: row.reading):
            yield f"\n**{MEANING[reading]}**\n"
            yield from _table(COLUMNS, [cells(row) for row in rows])
        for method, why in report.left_out.items():
            yield f"\nLeft out: {method}, which {why}."
        heading, stale = stale_rows(report)
        if stale:
            yield ""
            yield from _table(heading, stale)

    return "\n".join(lines()) + "\n"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"|{' --- |' * len(heading)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def save_figure(report: Report, path: Path) -> None:
    """Recall with intervals, and recall by age, as a picture (.png, .svg, .pdf).

    Raises:
        ConfigError: matplotlib is missing, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ConfigError(PLOTS_HINT) from exc
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    reading: Reading = "shuffled" if "shuffled" in report.cases else next(iter(report.cases))
    rows = sorted((row for row in report.rows if row.reading == reading), key=lambda row: row.recall_10)
    values = [row.recall_10 for row in rows]
    errors = [[row.recall_10 - row.low for row in rows], [row.high - row.recall_10 for row in rows]]
    left.barh([row.method for row in rows], values, xerr=errors, color="#4878a8", ecolor="#333333", capsize=2)
    left.set_xlabel(f"recall@10, {MEANING[reading]}, 95 % by user")
    for name, stale in groupby(report.stale, key=lambda stale: stale.method):
        some = list(stale)
        right.plot(
            [age(one.ttl_s).removeprefix("after ") for one in some],
            [one.recall_10 for one in some],
            marker="o",
            label=name,
        )
    right.set_ylim(bottom=0)
    right.set_ylabel("recall@10")
    right.set_xlabel("a cached vector is made anew after")
    if report.stale:
        right.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as exc:  # ValueError: a suffix that is no picture's
        msg = f"{path} can't be written ({exc})"
        raise ConfigError(msg) from exc
