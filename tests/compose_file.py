"""The compose file: what is inline in it, and the project that the compose specification's own parser makes of it."""

import fcntl
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml
from documents import ROOT

COMPOSE: Final = ROOT / "docker-compose.yml"
_PARSER: Final = ROOT / "tests" / "compose_parser"
#: The parser needs it; anything from 1.21 on fetches a newer one by itself.
_GO: Final = (1, 21)
_BUILD_TIMEOUT_S: Final = 400.0


def why_no_parser() -> str | None:
    """The reason why the parser can't be built on this machine, or None."""
    go = shutil.which("go")
    found = go and subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, timeout=60, check=False)
    version = found.stdout.strip().removeprefix("go").split(".") if found else []
    if len(version) >= 2 and version[1].isdecimal() and (int(version[0]), int(version[1])) >= _GO:
        return None
    return f"no parser of compose files: install Go {_GO[0]}.{_GO[1]} or newer"


@cache
def _parser() -> str:
    """The parser, built on first use; Go keeps what it compiled."""
    root = Path(os.environ.get("UEMB_TEST_CACHE") or "~/.cache/user-embedding-stream").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    program = root / "compose-parser"
    with (root / "compose-parser.lock").open("w") as lock:  # or each process of a run would compile it anew
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = subprocess.run(
            ["go", "build", "-mod=readonly", "-o", str(program), "."],
            cwd=_PARSER,
            env={**os.environ, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=_BUILD_TIMEOUT_S,
            check=False,
        )
    assert built.returncode == 0, built.stderr
    return str(program)


def project(*profiles: str, **environment: str) -> dict[str, Any]:
    """What `docker compose` would run, in a shell without settings but those in `environment`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("UEMB_", "COMPOSE_"))}
    read = subprocess.run(
        [_parser(), str(COMPOSE), *profiles],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert read.returncode == 0, read.stderr
    loaded: dict[str, Any] = json.loads(read.stdout)
    return loaded


def inline(config: str) -> str:
    """A configuration that is inline in the file, as its service reads it."""
    document = yaml.safe_load(COMPOSE.read_text())
    content: str = document["configs"][config]["content"]
    assert "$" not in content.replace("$$", ""), "a dollar sign that is not doubled"
    return content.replace("$$", "$")


def alert_rules() -> list[dict[str, Any]]:
    """The rules, each as a mapping."""
    (group,) = yaml.safe_load(inline("alerts"))["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def dashboard() -> dict[str, Any]:
    """Grafana's dashboard."""
    loaded: dict[str, Any] = json.loads(inline("grafana-dashboard"))
    return loaded
