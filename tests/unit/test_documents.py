"""Documents are true: what they name is there, what they leave out isn't a command, and they stay short."""

import doctest
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from documents import ROOT, anchors, documents, prose

from stream.cli.root import cli
from stream.config import ENV_PREFIX, Settings

#: Six lines of 120 characters: a paragraph beyond that is read twice, or not at all.
PARAGRAPH_CHARS = 720
every_document = pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))


def words_in_code(file: Path) -> list[str]:
    """What stands in backticks in the prose, and each line of shell."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", file.read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose(file)) + [line for block in blocks for line in block.splitlines()]


@every_document
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(file)):
        path, _, anchor = target.partition("#")
        to = file.parent / path if path else file
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


@every_document
def test_files_and_names_are_there(file: Path) -> None:
    for word in words_in_code(file):
        for path in re.findall(r"(?<![\w/.])(?:stream|tests|schemas)/[\w./-]*\w", word):
            assert (ROOT / path).exists(), path
        if re.fullmatch(r"stream(\.\w+)+", word):
            assert resolved(word), word


def resolved(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for at in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:at]))
        except ModuleNotFoundError:
            continue
        for part in parts[at:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@every_document
def test_settings_are_there(file: Path) -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | {"UEMB_ITEMS_DIR"}  # compose's own
    assert set(re.findall(r"UEMB_[A-Z_]*[A-Z]", file.read_text())) <= known


def path_of(words: list[str]) -> tuple[str, ...] | None:
    """The command that a line of shell names, None for an unknown one; () where it is no line of ours."""
    command: click.Command = cli
    names: list[str] = []
    for word in words:
        if not isinstance(command, click.Group) or word.startswith("-"):
            break
        found = command.get_command(click.Context(command), word)
        if found is None:
            return None
        command = found
        names.append(word)
    return tuple(names)


@every_document
def test_commands_are_there(file: Path) -> None:
    for word in words_in_code(file):
        line = re.search(r"(?:^|/|\s)uemb ([a-z].*)", word)
        if line is not None:
            arguments = shlex.split(line[1].split(" #")[0].replace("|", " ").replace("…", ""))
            assert path_of(arguments), word


def test_the_page_of_commands_lists_every_one() -> None:
    page = (ROOT / "stream" / "cli" / "README.md").read_text()

    def listed(command: click.Command, names: tuple[str, ...]) -> None:
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                one = command.get_command(context, name)
                assert one is not None
                listed(one, (*names, name))
        else:
            together = f"`uemb {' '.join(names)}" in page
            beside = re.search(rf"\| `uemb {' '.join(names[:-1])} .*· `{names[-1]}`", page)
            assert together or beside, names

    listed(cli, ())


@every_document
def test_paragraphs_are_short(file: Path) -> None:
    for line in prose(file).splitlines():
        assert line.startswith("|") or len(line) <= PARAGRAPH_CHARS, line[:60]


@every_document
def test_sessions_of_python_do_what_they_show(file: Path) -> None:
    for block in re.findall(r"^```python\n(>>>.*?)^```$", file.read_text(), re.DOTALL | re.MULTILINE):
        test = doctest.DocTestParser().get_doctest(block, {}, str(file), str(file), 0)
        assert not doctest.DocTestRunner().run(test).failed, "see the output above"


def test_the_readme_is_read_in_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert len(text.encode()) <= 9_500
    first = "\n".join(text.splitlines()[:100])
    for sign in (
        "uemb demo",
        "pytest",
        "◄─► changelog",
        "uemb worker &",
        "get_many",
        "10. **",
        "[stream](stream/README.md)",
    ):
        assert sign in first, sign
