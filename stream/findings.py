"""What a check of the set-up found: how it stands, in one line, and what to do about it."""

from enum import StrEnum
from typing import NamedTuple

from stream.errors import UembError


class Status(StrEnum):
    """How something stands."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


class Finding(NamedTuple):
    """One line of what was found.

    Attributes:
        status: how it stands; a worker starts with a warning, and not with what failed.
        detail: what there is, without secrets, ids and payloads.
        todo: what to do about it; empty where that is nothing.
        about: which one, where several are looked at.
    """

    status: Status
    detail: str
    todo: str = ""
    about: str = ""


def ok(detail: str, about: str = "") -> Finding:
    """It is as it must be."""
    return Finding(Status.OK, detail, about=about)


def warning(detail: str, todo: str, about: str = "") -> Finding:
    """It works, and may not for long, or not well."""
    return Finding(Status.WARNING, detail, todo, about)


def failed(detail: str, todo: str, about: str = "") -> Finding:
    """A worker would not start, or not work."""
    return Finding(Status.FAILED, detail, todo, about)


def skipped(detail: str, about: str = "") -> Finding:
    """It was not looked at, and why."""
    return Finding(Status.SKIPPED, detail, about=about)


def of_error(error: UembError, todo: str, about: str = "") -> Finding:
    """What an error says; behind its semicolon stands what to do, or `todo` holds.

    >>> of_error(UembError("the disk is full; make room"), "see the log")[1:3]
    ('the disk is full', 'make room')
    """
    detail, _, what_to_do = str(error).partition("; ")
    return failed(detail, what_to_do or todo, about)
