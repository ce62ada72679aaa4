"""The lock of the worker's image agrees with pyproject.toml, whose readers' ranges hold the worker's own versions."""

import re
import tomllib
from typing import Any, Final

import pytest
from documents import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: Final[dict[str, list[str]]] = PROJECT["project"]["optional-dependencies"]
#: A requirement with the hashes of its files, as uv writes it.
_LOCKED: Final = re.compile(r"^([\w.-]+)==(\S+)(?: ; .+)? \\\n((?:    --hash=\S+(?: \\)?\n)+)", re.MULTILINE)
LOCK: Final = (ROOT / "stream" / "worker" / "requirements.lock").read_text()


def pins(extra: str) -> dict[str, str]:
    """Versions that an extra pins, those of the extras that it names among them."""
    found: dict[str, str] = {}
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == PROJECT["project"]["name"]:
            for other in requirement.extras:
                found |= pins(other)
        else:
            (version,) = requirement.specifier
            assert version.operator == "==", f"{extra}: {requirement} is not pinned"
            found[canonicalize_name(requirement.name)] = version.version
    return found


def test_the_lock_has_every_version_that_the_image_is_to_have() -> None:
    locked = {name: version for name, version, _ in _LOCKED.findall(LOCK)}
    assert pins("image").items() <= locked.items(), "make the lock anew: stream/worker/README.md"
    assert f"setuptools=={locked['setuptools']}" in PROJECT["build-system"]["requires"]


def test_every_line_of_the_lock_has_hashes() -> None:
    names = re.findall(r"^([\w.-]+)==", LOCK, re.MULTILINE)
    assert names == [name for name, _, _ in _LOCKED.findall(LOCK)]
    for name, _, hashes in _LOCKED.findall(LOCK):
        assert re.fullmatch(r"(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", hashes), name
    assert len(names) > len(pins("image"))


@pytest.mark.parametrize("text", PROJECT["project"]["dependencies"])
def test_readers_take_ranges_that_hold_what_the_worker_pins(text: str) -> None:
    requirement = Requirement(text)
    assert {part.operator for part in requirement.specifier} == {">=", "<"}
    assert requirement.specifier.contains(pins("worker")[canonicalize_name(requirement.name)])


def test_everything_else_is_pinned() -> None:
    for extra in EXTRAS:
        assert pins(extra)
