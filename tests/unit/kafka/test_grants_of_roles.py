"""The lists of grants: what the documents say of them is what the code says, and `uemb acl` prints the same."""

import json
import shlex
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from click.testing import CliRunner

from stream.cli.acl import _STORE
from stream.cli.root import cli
from stream.config import Settings
from stream.kafka.grants import ROLES, Grant, single
from stream.kv.redis.grants import looker, reader, writer
from stream.kv.urls import RedisAddress

ROOM = Path(__file__).parents[3] / "stream"
ONE, CLUSTER = RedisAddress(False, "h"), RedisAddress(False, "h", seeds=(("h", 6379),))


@pytest.fixture(autouse=True)
def _only_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"UEMB_{name.upper()}", raising=False)


def table() -> Iterator[str]:
    """The table of all roles, for the settings as they are by default."""
    yield "| role | runs | grant | why |"
    yield "| --- | --- | --- | --- |"
    for name, role in ROLES.items():
        first = f"`{name}`", ", ".join(role.commands)
        for (operations, kind, why, optional), some in groupby(role.grants(Settings()), key=_alike):
            names = ", ".join(f"`{grant.name}{'*' if grant.prefixed else ''}`" for grant in some)
            reason = f"not a must: {why}" if optional else why
            yield f"| {first[0]} | {first[1]} | {', '.join(operations)} {kind} {names} | {reason} |"
            first = "", ""


def _alike(grant: Grant) -> tuple[object, ...]:
    return grant.operations, grant.kind, grant.why, grant.optional


def test_the_table_of_grants_is_that_of_the_code() -> None:
    assert "\n".join(table()) in (ROOM / "worker" / "README.md").read_text()


def test_the_lists_for_redis_are_those_of_the_code() -> None:
    text = (ROOM / "kv" / "README.md").read_text()
    for access, who in ((writer, "worker, operator"), (reader, "reader, release, eraser"), (looker, "auditor")):
        assert f"| {who} | `{access(ONE).rules}` | `{access(CLUSTER).rules}` |".replace("|slots", "\\|slots") in text


def test_every_grant_has_a_reason_and_is_given_once() -> None:
    for role in ROLES.values():
        grants = single(role.grants(Settings()))
        assert all(grant.why for grant in grants)
        assert len({str(grant) for grant in grants}) == len(grants)


def said(*words: str, **settings: str) -> str:
    ended = CliRunner().invoke(cli, ["acl", *words], env={f"UEMB_{k.upper()}": v for k, v in settings.items()})
    assert ended.exit_code == 0, ended.exception
    return ended.stdout


def test_the_document_holds_both() -> None:
    url = "redis://ali:secret@h:6379/2"
    document = json.loads(said("--format", "json", kv_url=url))
    assert list(document) == list(ROLES)
    (grant,) = document["sender"]["kafka"][:1]
    assert grant == {
        "operations": ["Write"],
        "kind": "topic",
        "name": "user-events.view",
        "prefixed": False,
        "why": "events",
        "optional": False,
    }
    assert document["sender"]["redis"] is None
    assert document["reader"]["redis"]["keys"] == "%R~uemb:*"
    assert set(document["reader"]["redis"]["commands"]) == {"mget", "select"}
    assert json.loads(said("--format", "json"))["reader"]["redis"] is None


def test_lines_for_redis_hold_no_password_of_ours() -> None:
    text = said("--format", "redis-acl", kv_url="redis://ali:secret@h")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [shlex.split(line)[2] for line in lines] == list(_STORE)
    assert "secret" not in text
    text = said("--format", "redis-acl", "--role", "reader", kv_url="redis://ali:secret@h")
    assert text.endswith("\nACL SETUSER ali reset on >PASSWORD %R~uemb:* -@all +mget\n")


def test_where_there_is_no_redis() -> None:
    ended = CliRunner().invoke(cli, ["acl", "--format", "redis-acl"])
    assert "UEMB_KV_URL names no Redis" in str(ended.exception)
