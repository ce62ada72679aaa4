"""The command ``uemb doctor``: would a worker start with these settings, and if not, why?"""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from typing import Final

import click

from stream.cli.terminal import out, print_json
from stream.config import load_settings, misspelt, settings_faults
from stream.errors import ExitCode
from stream.findings import Finding, Status, failed, ok, skipped, warning

_SETTINGS: Final = "settings"


@click.command()
@click.option(
    "--role",
    type=click.Choice(["worker", "auditor"]),
    default="worker",
    show_default=True,
    help="whose grants this user must have; an auditor may look at everything, and do nothing (`uemb acl`)",
)
@click.option("--json", "as_json", is_flag=True, help="print all lines as one JSON document")
def doctor(role: str, as_json: bool) -> None:
    """Check all that a worker with these settings depends on, and say what to do about what is wrong.

    Writes nothing, joins no group, and disturbs no running worker. Exit 0 where nothing failed, 1 where something did,
    2 where the settings can't be read.
    """
    for name in ("stream", "aiokafka"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what it finds is on screen
    found = asyncio.run(_checked(role, as_json))
    if as_json:
        print_json([_document(name, finding) for name, finding in found])
    statuses = [finding.status for _, finding in found]
    if not as_json:
        out.print(", ".join(f"{statuses.count(status)} {status}" for status in Status if status in statuses))
    if (_SETTINGS, Status.FAILED) in [(name, finding.status) for name, finding in found]:
        sys.exit(ExitCode.WRONG)
    if Status.FAILED in statuses:
        sys.exit(ExitCode.FAULT)


async def _checked(role: str, as_json: bool) -> list[tuple[str, Finding]]:
    found = []
    async for name, finding in _all(role):
        found.append((name, finding))
        if not as_json:
            _print(name, finding)
    return found


async def _all(role: str) -> AsyncIterator[tuple[str, Finding]]:
    faults = settings_faults()
    for fault in faults:
        detail, _, todo = fault.partition("; ")
        yield _SETTINGS, failed(detail, todo or "correct it, or unset it")
    for name, meant in misspelt(os.environ).items():
        yield _SETTINGS, warning(f"{name} is not a setting and has no effect", f"is {meant} meant?")
    if faults:
        yield "all else", skipped(f"{_SETTINGS} must be in order first")
        return
    settings = load_settings()
    yield _SETTINGS, ok(f"{len(settings.model_fields_set)} are set, the rest is as by default (`uemb config`)")
    from stream.cli.doctor.checks import Checkup
    from stream.cli.doctor.run import run_checks

    async for name, finding in run_checks(Checkup(settings, role).checks):
        yield name, finding


def _print(name: str, finding: Finding) -> None:
    about = f" {finding.about}" if finding.about else ""
    out.print(f"{finding.status:8} {name}{about}: {finding.detail}")
    if finding.todo:
        out.print(f"         → {finding.todo}")


def _document(name: str, finding: Finding) -> dict[str, str]:
    about = f" {finding.about}" if finding.about else ""
    return {"check": f"{name}{about}", "status": finding.status, "detail": finding.detail, "todo": finding.todo}
