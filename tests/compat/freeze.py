"""Keep what this release writes, for all later ones to read: ``python tests/compat/freeze.py``.

It makes the folder of the version in ``pyproject.toml``, once: what a released version wrote doesn't change any more.
Before the release, ``--again`` makes it anew.
"""

import json
import shutil
import sys
import tomllib
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
_WIDTH: Final = 120
sys.path[:0] = [str(HERE), str(HERE.parent)]


def present_version() -> str:
    """The version that this checkout is."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


def packed(data: bytes | None) -> Any:
    """Bytes for JSON, so that a difference can be read: text where they are text, else lines of base64."""
    if data is None:
        return None
    try:
        if (text := data.decode()).replace("\n", "").isprintable():
            return text
    except UnicodeDecodeError:
        pass
    coded = b64encode(data).decode()
    return {"base64": [coded[at : at + _WIDTH] for at in range(0, len(coded), _WIDTH)]}


def unpacked(told: Any) -> bytes | None:
    """The bytes again."""
    if told is None:
        return None
    return told.encode() if isinstance(told, str) else b64decode("".join(told["base64"]))


def main(again: bool) -> None:
    """Make the folder.

    Raises:
        SystemExit: it is there already.
    """
    from stored_formats import FORMATS

    folder = HERE / present_version()
    if folder.exists() and not again:
        sys.exit(f"{folder} is there; give the version in pyproject.toml a new number, or --again before its release")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "schemas").mkdir(parents=True)
    for file in [*ROOT.glob("schemas/*.json"), *ROOT.glob("schemas/*.avsc")]:
        shutil.copyfile(file, folder / "schemas" / file.name)
    for name, stored in FORMATS.items():
        cases = {
            case: {"parts": {part: packed(data) for part, data in parts.items()}, "says": stored.read(parts)}
            for case, parts in stored.write().items()
        }
        text = json.dumps(cases, indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main("--again" in sys.argv[1:])
