"""Examples in docstrings do what they show; a module that gains one is found by its text."""

import doctest
from importlib import import_module
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
MODULES: Final = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "stream").rglob("*.py")
    if ">>>" in file.read_text()
)


def test_there_are_examples() -> None:
    assert MODULES


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_do_what_they_show(name: str) -> None:
    failed, attempted = doctest.testmod(import_module(name))
    assert attempted, "there is a >>> in it that is no example"
    assert not failed, "see the output above"
