"""Packages of npm that tests need: those of a lock file and no others, fetched on first use and kept for later runs."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

_MIN_NODE: Final = 18
_INSTALL_TIMEOUT_S: Final = 300.0


def why_no_node() -> str | None:
    """The reason why packages of npm can't be had on this machine, or None."""
    found = re.match(r"v(\d+)", _said("node", "--version"))
    if found is None or int(found[1]) < _MIN_NODE or not _said("npm", "--version"):
        return f"no packages of npm: install Node.js {_MIN_NODE} or newer, and npm"
    return None


def _said(program: str, argument: str) -> str:
    found = shutil.which(program)
    return (found and subprocess.run([found, argument], capture_output=True, text=True, timeout=60).stdout) or ""


def npm_home(source: Path) -> Path:
    """A copy of a folder with a lock file, and the packages in its ``node_modules``."""
    root = Path(os.environ.get("UEMB_TEST_CACHE") or "~/.cache/user-embedding-stream").expanduser()
    lock = (source / "package-lock.json").read_bytes()
    home = root / f"{source.name}-{hashlib.sha256(lock).hexdigest()[:12]}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{source.name}.lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(source, home, ignore=shutil.ignore_patterns("node_modules"))
            installed = subprocess.run(
                ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=home, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S,
            )  # fmt: skip
            assert installed.returncode == 0, installed.stderr
            (home / "complete").touch()
    return home
