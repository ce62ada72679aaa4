"""`uemb doctor` in this process: its exit code, and what it said of each check."""

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

from click.testing import CliRunner

from stream.cli.root import cli
from stream.kafka import brokers


class Diagnosis(NamedTuple):
    """What it said; a line is `check: detail; todo`."""

    code: int
    lines: list[dict[str, str]]

    def of(self, *statuses: str) -> list[str]:
        """Lines of these statuses."""
        return [
            f"{line['check']}: {line['detail']}; {line['todo']}" for line in self.lines if line["status"] in statuses
        ]

    @property
    def wrong(self) -> list[str]:
        """Lines of what failed, and of warnings."""
        return self.of("failed", "warning")

    @property
    def statuses(self) -> dict[str, str]:
        """Status of each check."""
        return {line["check"]: line["status"] for line in self.lines}


def diagnose(environment: Mapping[str, str]) -> Diagnosis:
    """Run it under the settings of an environment, and no others."""
    unset = dict.fromkeys(name for name in os.environ if name.startswith("UEMB_"))
    given = {name: value for name, value in environment.items() if name.startswith("UEMB_") or name == "HOME"}
    brokers._reached.clear()
    ended = CliRunner().invoke(cli, ["doctor", "--json"], env={**unset, **given})
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    assert ended.stderr == "", ended.stderr
    found = Diagnosis(ended.exit_code, json.loads(ended.stdout))
    assert all(line["detail"] and "\n" not in line["detail"] for line in found.lines)
    assert all(line["todo"] for line in found.lines if line["status"] in ("failed", "warning")), found.wrong
    return found
