"""Foreign text is only text: whatever an id holds, it is shown, and nothing in it acts on the terminal.

Progress is told in units that people count in.
"""

import asyncio
import io
import json
import os
import subprocess

import click.testing
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import UEMB
from reader_store import META, PARTITIONS
from strategies import acts

from stream.cli import terminal
from stream.cli.root import cli
from stream.cli.terminal import MB, PERCENT, PlainConsole, amount, progress_bar
from stream.kv.stores import open_writer
from stream.logs import escaped

#: What the contract allows: 1 to 256 bytes of UTF-8 without control characters.
ids = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40).filter(
    lambda text: len(text.encode()) <= 256
)
odd = st.sampled_from(
    ["[/x]", "[red]boo[/red]", "a:smile:b", "like:100:5", "\u202eevil", "a\u2028b", "[link=x]", "\\[b]"]
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that holds nobody's vector but a fallback."""
    url = f"rocksdb://{tmp_path_factory.mktemp('text') / 'kv'}"

    async def make() -> None:
        writer = open_writer(url)
        await writer.update_meta(lambda _: META)
        for partition in range(PARTITIONS):
            await writer.open_partition(partition)
        await writer.close()

    asyncio.run(make())
    return url


@given(st.text())
def test_escaped_text_is_one_line_in_which_nothing_acts(text: str) -> None:
    shown = escaped(text)
    assert not acts(shown)
    assert "\n" not in shown
    assert escaped(shown) == shown


@settings(deadline=None, max_examples=30)
@given(st.lists(ids | odd, min_size=1, max_size=3))
def test_any_valid_id_through_get(store: str, users: list[str]) -> None:
    run = click.testing.CliRunner().invoke
    environment = {"UEMB_KV_URL": store, "COLUMNS": "80"}
    plain = run(cli, ["get", "--", *users], env=environment)
    assert plain.exception is None
    assert not acts(plain.stdout)
    for user, line in zip(users, plain.stdout.splitlines(), strict=True):
        assert line.startswith(f"user {escaped(user)}: ")
    as_json = run(cli, ["get", "--json", "--", *users], env=environment)
    assert not acts(as_json.stdout)
    assert [json.loads(line)["user_id"] for line in as_json.stdout.splitlines()] == users


def test_text_that_the_locale_lacks_is_escaped(store: str) -> None:
    """The C locale, without what Python does to make it UTF-8."""
    c_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment = {**os.environ, **c_locale, "UEMB_KV_URL": store}
    for option in ((), ("--json",)):
        command = [*UEMB, "get", *option, "j\u00fcrgen"]
        ended = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, b"")
        if option:
            assert json.loads(ended.stdout)["user_id"] == "j\u00fcrgen"
        else:
            assert ended.stdout.startswith(rb"user j\xfcrgen: ")


#: Done, of how much, in which unit, and how that is said.
AMOUNTS = [
    (0, None, "events", "0 events"),
    (1234, None, "events", "1,234 events"),
    (1234, 40_000, "events", "1,234 of 40,000 events"),
    (40_000, 40_000, "users", "40,000 users"),
    (1_500_000, 4_924_029, MB, "1.5 of 4.9 MB"),
    (4_924_029, 4_924_029, MB, "4.9 MB"),
    (999, 4000, PERCENT, "24 %"),
    (4000, 4000, PERCENT, "100 %"),
    (0, None, PERCENT, ""),
]


@pytest.mark.parametrize(("done", "total", "unit", "said"), AMOUNTS)
def test_progress_is_told_in_peoples_units(done: int, total: int | None, unit: str, said: str) -> None:
    assert amount(done, total, unit) == said


@pytest.mark.parametrize(("done", "total", "unit", "said"), [a for a in AMOUNTS if a[0]])
def test_progress_off_a_terminal_is_one_line(
    done: int, total: int | None, unit: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("what goes on", unit) as update:
        update(0, total)
        update(done, total)
    assert capsys.readouterr() == ("", f"what goes on: {said}\n")


def test_nothing_done_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("what goes on", "events") as update:
        update(0, 5)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_has_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "err", PlainConsole(file=screen, force_terminal=True, width=120))
    with progress_bar("fetched [x]", MB) as update:
        update(1_500_000, 4_924_029)
    assert "fetched [x]" in screen.getvalue()
    assert "1.5 of 4.9 MB" in screen.getvalue()
