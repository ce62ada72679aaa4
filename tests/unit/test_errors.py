"""How a process ends: each error has its exit code, and each document that an operator reads has them all."""

import re
from collections.abc import Iterator

import pytest
from documents import ROOT

from stream import errors
from stream.errors import ExitCode, UembError

PAGES = ("stream/cli/README.md", "stream/worker/README.md")


def tree(kind: type[UembError] = UembError) -> Iterator[type[UembError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from tree(below)


def test_the_tree_is_drawn_as_it_is_with_the_exit_code_of_each() -> None:
    drawn = re.findall(r"^([│├└─ ]*)(\w+) +(\d+)  ", errors.__doc__ or "", re.MULTILINE)
    assert [(name, int(code)) for _, name, code in drawn] == [(e.__name__, e.exit_code) for e in tree()]
    assert [len(branch) // 4 for branch, _, _ in drawn] == [len(e.__mro__) - len(UembError.__mro__) for e in tree()]


def test_each_error_ends_a_process_in_one_of_the_ways_that_are_told() -> None:
    for error in tree():
        assert error.exit_code in (ExitCode.FAULT, ExitCode.WRONG, ExitCode.TRY_AGAIN), error


def test_what_may_succeed_a_little_later_is_worth_another_start() -> None:
    for error in tree():
        assert not error.retriable or error.exit_code == ExitCode.TRY_AGAIN, error


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_list_every_exit_code(page: str) -> None:
    (table,) = re.findall(r"^\| exit \|.*\n\| --- .*\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.MULTILINE)
    listed = [int(code) for row in table.splitlines() for code in re.findall(r"\d+", row.split("|")[1])]
    assert listed == list(ExitCode)
