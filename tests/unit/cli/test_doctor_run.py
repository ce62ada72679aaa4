"""Checks run side by side, wait for what they need, and end in time; what one of them does stops no other."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from stream.cli.doctor.run import Check, run_checks
from stream.errors import ConfigError
from stream.findings import Finding, Status, failed, ok, skipped, warning


def run(*checks: Check) -> list[tuple[str, Status, str, str]]:
    async def all_of_them() -> list[tuple[str, Status, str, str]]:
        return [(name, found.status, found.detail, found.todo) async for name, found in run_checks(checks)]

    return asyncio.run(all_of_them())


def check(
    name: str,
    look: Callable[[], Sequence[Finding]] = lambda: [ok("fine")],
    *,
    needs: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    timeout_s: float = 60.0,
) -> Check:
    return Check(name, look, timeout_s, "mend it", needs, after)


@pytest.fixture
def hang() -> Iterator[Callable[[], Sequence[Finding]]]:
    """A look that comes to no end while the test runs."""
    over = threading.Event()

    def look() -> Sequence[Finding]:
        over.wait()
        return []

    yield look
    over.set()


def raising(error: Exception) -> Callable[[], Sequence[Finding]]:
    def look() -> Sequence[Finding]:
        raise error

    return look


@pytest.mark.parametrize(
    ("found", "goes_on"),
    [
        ([ok("x")], True),
        ([warning("x", "y")], True),
        ([failed("x", "y"), ok("z")], True),  # one of several suffices
        ([failed("x", "y")], False),
        ([skipped("x")], False),
        ([], False),
    ],
)
def test_what_is_needed_must_be_in_order(found: Sequence[Finding], goes_on: bool) -> None:
    *_, needing, further, beside = run(
        check("first", lambda: found), check("second", needs=("first",)), check("third", needs=("second",)), check("by")
    )
    if goes_on:
        assert needing[:3] == ("second", Status.OK, "fine")
    else:
        assert needing == ("second", Status.SKIPPED, "first must be in order first", "")
        assert further == ("third", Status.SKIPPED, "second must be in order first", "")
    assert beside[1] is Status.OK


@pytest.mark.parametrize(
    ("error", "detail", "todo"),
    [
        (ConfigError("it is so; do that"), "it is so", "do that"),
        (ConfigError("it is so"), "it is so", "mend it"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied /x", "mend it"),
        (KeyError("secret-1"), "it could not be looked at (KeyError)", "mend it"),
    ],
)
def test_an_error_is_a_line(error: Exception, detail: str, todo: str) -> None:
    found = run(check("first", raising(error)), check("second", after=("first",)))
    assert found == [("first", Status.FAILED, detail, todo), ("second", Status.OK, "fine", "")]


def test_what_hangs_is_given_up_side_by_side(hang: Callable[[], Sequence[Finding]]) -> None:
    began = time.monotonic()
    found = run(*(check(str(n), hang, timeout_s=0.5) for n in range(40)))
    assert {line[1:] for line in found} == {(Status.FAILED, "no answer within 0.5 s", "mend it")}
    assert time.monotonic() - began < 20  # one after another it would be that at least


def test_lines_come_in_order_and_use_what_came_before(tmp_path: Path) -> None:
    seen: list[str] = []
    turn = threading.Event()

    def late() -> Sequence[Finding]:
        turn.wait(60)
        seen.append("late")
        return [ok("a"), ok("b")]

    def early() -> Sequence[Finding]:
        turn.set()
        return [ok("c")]

    def last() -> Sequence[Finding]:
        return [ok(" ".join(seen))]

    found = run(check("late", late), check("early", early), check("last", last, after=("late",)))
    assert [line[2] for line in found] == ["a", "b", "c", "late"]
