"""The project's documents: which there are, and the examples in them, which tests run as they stand."""

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
_FENCE: Final = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """Every Markdown file of the project, in order."""
    folders = ("stream", "schemas", "tests")
    return [ROOT / "README.md", *sorted(file for folder in folders for file in (ROOT / folder).rglob("*.md"))]


def prose(file: Path) -> str:
    """A document without its fenced blocks."""
    return _FENCE.sub("", file.read_text())


def anchors(file: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def example(document: str, mark: str) -> str:
    """The fenced block right after ``<!-- mark -->`` in a document, which is named by its path from the root."""
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert found, f"{document} has no block right after <!-- {mark} -->"
    return found[1]


def run_example(document: str, mark: str, names: dict[str, object]) -> None:
    """Run a Python block of a document; `names` are what it has, and afterwards what it made."""
    exec(compile(example(document, mark), document, "exec"), names)
