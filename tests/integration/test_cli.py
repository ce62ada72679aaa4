"""The command line as its users meet it: help, errors of one line, files in, vectors out, and Ctrl-C."""

import contextlib
import csv
import fcntl
import json
import logging
import os
import random
import re
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import warm_start
from confluent_kafka.admin import AdminClient
from pipeline import UEMB, Event, Pipeline, expected

from stream.cli.root import cli, main
from stream.config import load_settings
from stream.core.encoders import TimeMixEncoder, VersionedEncoder
from stream.core.formulas import user_embed_mix
from stream.items.space import ItemSpace
from stream.kafka.embedded_broker import DevBroker

USER_VERSION = load_settings().versioned_encoder.version
NOW_MS = time.time_ns() // 1_000_000
#: The seed's own example.
SEED_INPUT: dict[str, Any] = {
    "user_id": 42,
    "history_item_ids": [311, 98, 712, 45, 45, 901],
    "history_ts": [1700, 1705, 1710, 1713, 1715, 1718],
    "item_embedding_version": "items_v42",
}
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("UEMB_")} | {"COLUMNS": "100"}
NO_BROKER = {"UEMB_BOOTSTRAP_SERVERS": "127.0.0.1:1"}


class Ran(NamedTuple):
    """What a command did; a code of None: it did not end."""

    code: int | None
    out: str
    err: str


def uemb(*args: str | Path, timeout_s: float = 120, **environment: str) -> Ran:
    """Run a command to its end."""
    try:
        ended = warm_start.run([*UEMB, *map(str, args)], {**CLEAN, **environment}, timeout_s)
    except subprocess.TimeoutExpired as exc:
        return Ran(None, str(exc.output), str(exc.stderr))
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def check_error(ran: Ran, *says: str, code: int = 2) -> None:
    """The exit code and one line on stderr that names what is wrong."""
    assert ran.code == code, ran
    assert ran.out == ""
    assert "Traceback" not in ran.err, ran.err
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert not [what for what in says if what not in lines[0]], lines[0]


def parsed(line: str) -> dict[str, Any]:
    """A JSON document without NaN and the like."""
    document = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the tests read, and an item space with the ids of the seed's example."""
    folder = tmp_path_factory.mktemp("cli")
    ids = sorted({*range(0, 1000, 7), *SEED_INPUT["history_item_ids"]})
    ItemSpace.save(folder / "items", "items_v42", ids, np.random.default_rng(42).normal(size=(len(ids), 48)))
    ItemSpace.save(folder / "damaged", "items_v43", range(9), np.random.default_rng(43).normal(size=(9, 4)))
    (folder / "damaged" / "ids.txt").write_text("0\n" * 9)
    write_csv(folder / "small.csv", some_events(300, 20))
    write_csv(folder / "buys.csv", [(user, item, "buy", ts) for user, item, _, ts in some_events(300, 20)])
    files = {
        "seed.json": json.dumps(SEED_INPUT),
        "other_version.json": json.dumps({**SEED_INPUT, "item_embedding_version": "items_v7"}),
        "no_user.json": json.dumps({**SEED_INPUT, "user_id": ...} | {"user_id": None}),
        "lacks_items.json": json.dumps({"user_id": 42}),
        "lengths.json": json.dumps({**SEED_INPUT, "history_ts": [1]}),
        "list.json": "[1, 2]",
        "huge_time.json": json.dumps({**SEED_INPUT, "history_ts": [1, 2, 3, 4, 5, 10**400]}),
        "nan_time.json": json.dumps({**SEED_INPUT, "history_ts": [1, 2, 3, 4, 5, float("nan")]}),
        "deep.json": "[" * 100_000,
        "not.json": "{",
        "bad.csv": "user_id,item_id,type,ts\n1,2,view,yesterday\n",
        "header.csv": "user,item\n1,2\n",
        "seconds.jsonl": '{"user_id": 1, "item_id": 2, "type": "view", "ts": 1700000000}\n',
        "empty.csv": "user_id,item_id,type,ts\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "latin1.json").write_bytes(b'{"user_id": "\xe9"}')
    return folder


def some_events(count: int, users: int, items: int = 80) -> list[Event]:
    """Events of users who each keep to one half of the items, a second apart."""
    rng = random.Random(count)
    rows = []
    for n in range(count):
        user = rng.randrange(users)
        item = 2 * rng.randrange(items // 2) + user % 2
        rows.append((f"u{user}", f"i{item}", rng.choice(["view", "like"]), NOW_MS - (count - n) * 1000))
    return rows


def write_csv(path: Path, rows: Sequence[Event]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "type", "ts"), *rows])


# -- help and errors ----------------------------------------------------------------------------------------------


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def test_the_commands_of_the_contract_are_there() -> None:
    have = {" ".join(path) for path in commands()}
    first = {
        "demo",
        "worker",
        "broker",
        "send",
        "get",
        "tail",
        "embed",
        "items",
        "items build",
        "items check",
        "config",
    }
    assert have >= first


class Wrong(NamedTuple):
    """A command line, settings, and what the error names; {folder} is the fixture's."""

    line: str
    says: tuple[str, ...]
    settings: Mapping[str, str] = {}
    code: int = 2


#: Errors of commands that start nothing.
ERRORS = {
    "setting_out_of_range": Wrong("config", ("UEMB_HISTORY_LIMIT",), {"UEMB_HISTORY_LIMIT": "1"}),
    "user_version_of_a_wrong_shape": Wrong("config", ("'user:7'",), {"UEMB_USER_VERSION": "user:7"}),
    "user_version_reserved": Wrong("get 1", ("'current'", "reserved"), {"UEMB_USER_VERSION": "current"}),
    "home_of_nobody": Wrong("config", ("UEMB_ITEMS",), {"UEMB_ITEMS": "~nobody-of-that-name/items"}),
    "session_without_end": Wrong("config", ("UEMB_SESSION_TIMEOUT_S",), {"UEMB_SESSION_TIMEOUT_S": "inf"}),
    "get_without_a_store": Wrong("get 1", ("/nowhere/kv",), {"UEMB_KV_URL": "rocksdb:///nowhere/kv"}, 75),
    "get_from_a_server_that_is_away": Wrong(
        "get 1", ("redis://127.0.0.1:1/0", "can't be reached"), {"UEMB_KV_URL": "redis://:open-sesame@127.0.0.1:1"}, 75
    ),
    "get_from_no_known_store": Wrong("get 1", ("'leveldb'", "rocksdb:///"), {"UEMB_KV_URL": "leveldb:///kv"}),
    "embed_missing_file": Wrong("embed {folder}/nothing.json --items {folder}/items", ("nothing.json",)),
    "embed_without_items": Wrong("embed {folder}/seed.json", ("--items", "UEMB_ITEMS")),
    "embed_other_version": Wrong(
        "embed {folder}/other_version.json --items {folder}/items", ("'items_v7'", "'items_v42'")
    ),
    "embed_not_json": Wrong("embed {folder}/not.json --items {folder}/items", ("input",)),
    "embed_latin1": Wrong("embed {folder}/latin1.json --items {folder}/items", ("input",)),
    "embed_list": Wrong("embed {folder}/list.json --items {folder}/items", ("input",)),
    "embed_no_user": Wrong("embed {folder}/no_user.json --items {folder}/items", ("input",)),
    "embed_lacks_items": Wrong("embed {folder}/lacks_items.json --items {folder}/items", ("history_item_ids",)),
    "embed_lengths_differ": Wrong("embed {folder}/lengths.json --items {folder}/items", ("history_ts",)),
    "embed_huge_time": Wrong("embed {folder}/huge_time.json --items {folder}/items", ("input",)),
    "embed_nan_time": Wrong("embed {folder}/nan_time.json --items {folder}/items", ("input",)),
    "embed_deep": Wrong("embed {folder}/deep.json --items {folder}/items", ("input",)),
    "build_over_a_folder": Wrong(
        "items build {folder}/items --version v2 --events {folder}/small.csv --dim 4", ("exists",)
    ),
    "build_from_nothing": Wrong("items build {folder}/new --version v2 --events {folder}/empty.csv", ("empty.csv",)),
    "build_from_too_little": Wrong(
        "items build {folder}/new --version v2 --events {folder}/small.csv --dim 400", ("400", "dimension")
    ),
    "build_share": Wrong("items build {folder}/new --version v2 --events {folder}/small.csv --share 2", ("share",)),
    "build_version": Wrong("items build {folder}/new --version a:b --events {folder}/small.csv --dim 4", ("'a:b'",)),
    "check_missing": Wrong("items check {folder}/nothing", ("{folder}/nothing", "manifest.json")),
    "check_damaged": Wrong("items check {folder}/damaged", ("ids.txt", "sha256")),
    "unknown_command": Wrong("embedd", ("embedd",)),
    "unknown_option": Wrong("get --jsom 1", ("--jsom",)),
    "missing_argument": Wrong("get", ("USERS",)),
    "missing_option": Wrong("items build {folder}/new", ("--version",)),
    "not_a_number": Wrong("tail -n many", ("-n", "many")),
}
#: Errors of commands that start clients, threads or signal handlers: each in a process of its own.
ERRORS_OF_PROCESSES = {
    "tail_without_a_broker": Wrong("tail", ("127.0.0.1:1", "UEMB_BOOTSTRAP_SERVERS"), NO_BROKER, 75),
    "delete_without_a_broker": Wrong("delete 42", ("no broker answers", "UEMB_BOOTSTRAP_SERVERS"), NO_BROKER, 75),
    "tail_without_credentials": Wrong("tail", ("UEMB_SASL_",), {"UEMB_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}),
    "worker_with_a_bad_setting": Wrong("worker", ("'sum'", "avg", "mix"), {"UEMB_ENCODER": "sum"}),
    "worker_without_certificates": Wrong(
        "worker", ("/nowhere/ca.pem",), {"UEMB_SECURITY_PROTOCOL": "SSL", "UEMB_SSL_CAFILE": "/nowhere/ca.pem"}
    ),
    "send_missing_file": Wrong("send {folder}/nothing.csv", ("{folder}/nothing.csv",), NO_BROKER),
    "send_bad_row": Wrong("send {folder}/bad.csv", ("bad.csv line 2", "ts"), NO_BROKER),
    "send_bad_header": Wrong("send {folder}/header.csv", ("header.csv line 1", "user_id"), NO_BROKER),
    "send_seconds": Wrong("send {folder}/seconds.jsonl", ("seconds.jsonl line 1", "milliseconds"), NO_BROKER),
    "send_bad_rate": Wrong("send --rate 0 {folder}/small.csv", ("rate",), NO_BROKER),
    "demo_missing_file": Wrong("demo --events {folder}/nothing.csv", ("{folder}/nothing.csv",)),
    "demo_empty_file": Wrong("demo --events {folder}/empty.csv", ("empty.csv",)),
}


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    """Runs a command in this process, which is quick, and undoes what it did to the process."""
    level = logging.getLogger("stream").level
    for name in [name for name in os.environ if name.startswith("UEMB_")]:
        monkeypatch.delenv(name)

    def run(*args: str | Path, **environment: str) -> Ran:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.argv", ["uemb", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as exc:
            code = int(exc.code or 0)
        return Ran(code, *capfd.readouterr())

    yield run
    logging.getLogger("stream").setLevel(level)


@pytest.fixture(scope="module")
def outside(folder: Path) -> Iterator[dict[str, Future[Ran]]]:
    """All of `ERRORS_OF_PROCESSES`, two at a time while other tests run."""
    own = {"UEMB_CACHE_DIR": str(folder / "cache"), "UEMB_STATE_DIR": str(folder / "state")}
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(uemb, *shlex.split(wrong.line.format(folder=folder)), **{**own, **wrong.settings})
            for name, wrong in ERRORS_OF_PROCESSES.items()
        }


@pytest.fixture(autouse=True)
def _under_way(outside: object, demos: object) -> None:
    """Have all that takes its time under way from the first test on."""


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str, run_here: Callable[..., Ran], folder: Path) -> None:
    wrong = ERRORS[name]
    ran = run_here(*shlex.split(wrong.line.format(folder=folder)), **wrong.settings)
    check_error(ran, *(what.format(folder=folder) for what in wrong.says), code=wrong.code)


@pytest.mark.parametrize("path", [(), *commands()], ids=" ".join)
def test_help(path: tuple[str, ...], run_here: Callable[..., Ran]) -> None:
    for flag in ("--help", "-h"):
        ran = run_here(*path, flag)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith("Usage: ")
        assert " ".join([*path, "["]) in ran.out.splitlines()[0]
        _, _, options = ran.out.partition("\nOptions:\n")
        assert "--help" in options
        lines = options.partition("\n\n")[0].splitlines()
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            alone = line.lstrip().startswith("-") and "  " not in line.strip()
            assert not alone or after.startswith("    "), f"not explained: {line}"


def test_without_arguments_it_helps(run_here: Callable[..., Ran]) -> None:
    ran = run_here()
    assert "Commands:" in ran.out + ran.err


# -- settings -----------------------------------------------------------------------------------------------------


def test_config_masks_secrets(run_here: Callable[..., Ran]) -> None:
    secret = {"UEMB_SASL_PASSWORD": "open-sesame", "UEMB_SASL_USERNAME": "ali"}
    as_json, as_table = run_here("config", "--json", **secret), run_here("config", **secret)
    for ran in (as_json, as_table):
        assert (ran.code, ran.err) == (0, "")
        assert "open-sesame" not in ran.out
        assert "ali" in ran.out
    values = parsed(as_json.out)
    assert set(values["sasl_password"]) == {"*"}
    assert values["user_embedding_version"] == USER_VERSION
    assert values["event_topics"] == ["user-events.view", "user-events.like"]


def test_config_masks_the_password_of_the_store(run_here: Callable[..., Ran]) -> None:
    url = {"UEMB_KV_URL": "rediss://ali:open-sesame@host:7000/2"}
    for ran in (run_here("config", "--json", **url), run_here("config", **url)):
        assert (ran.code, ran.err) == (0, "")
        assert "open-sesame" not in ran.out
        assert "rediss://ali:**********@host:7000/2" in ran.out


def test_config_shows_values_as_they_are_set(run_here: Callable[..., Ran]) -> None:
    set_to = {
        "UEMB_KV_URL": "rocksdb:///srv/a/rather/long/path/to/the/store/of/vectors/kv",
        "UEMB_EVENT_TYPES": "view:1,like:2,share:3",
        "UEMB_TYPE_WEIGHTS": "like=2.5",
        "UEMB_EVENT_FIELDS": "user_id=uid",
        "UEMB_IGNORED_TYPES": "impression,skip",
    }
    shown = run_here("config", **set_to).out
    missing = [value for value in set_to.values() if value not in shown]
    assert not missing, "what is shown can't be pasted into the environment"


# -- embed and items ----------------------------------------------------------------------------------------------


def test_embed_the_seeds_example(folder: Path, run_here: Callable[..., Ran]) -> None:
    ran = run_here("embed", folder / "seed.json", "--items", folder / "items")
    assert (ran.code, ran.err) == (0, "")
    got = parsed(ran.out)
    space = ItemSpace.load(folder / "items")
    want = user_embed_mix(space.rows(SEED_INPUT["history_item_ids"]), np.asarray(space.history_vectors))
    np.testing.assert_allclose(got["user_embedding"]["vector"], want, rtol=0, atol=1e-6)
    assert got["user_embedding"]["dim"] == 48
    assert got["user_embedding"]["norm"] == pytest.approx(1.0, abs=1e-5)
    assert got["user_embedding_version"] == USER_VERSION
    assert got["depends_on"] == {"item_embedding_version": "items_v42"}
    assert (got["user_id"], got["status"], got["reason"]) == ("42", "ok", "")
    assert (got["history_len"], got["unknown_items"], got["as_of"]) == (6, 0, 1718)


def test_embed_orders_by_time_and_reads_from_stdin(folder: Path, run_here: Callable[..., Ran]) -> None:
    shuffled = [3, 0, 5, 1, 4, 2]
    document = {**SEED_INPUT, **{k: [SEED_INPUT[k][i] for i in shuffled] for k in ("history_item_ids", "history_ts")}}
    got = subprocess.run(
        [*UEMB, "embed", "-"],
        input=json.dumps(document).encode(),
        env={**CLEAN, "UEMB_ITEMS": str(folder / "items"), "UEMB_USER_VERSION": "user_v7"},
        capture_output=True,
        check=True,
    )
    plain = parsed(run_here("embed", folder / "seed.json", "--items", folder / "items").out)
    assert parsed(got.stdout.decode()) == {**plain, "user_embedding_version": "user_v7"}


def test_embed_with_an_encoder_that_goes_by_time(
    folder: Path, tmp_path: Path, run_here: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UEMB_ENCODER", "mix_time")
    monkeypatch.setenv("UEMB_EVENT_TS_UNIT", "s")
    space = ItemSpace.load(folder / "items")
    got = parsed(run_here("embed", folder / "seed.json", "--items", folder / "items").out)
    want, _, _ = VersionedEncoder(TimeMixEncoder()).embed(
        space, SEED_INPUT["history_item_ids"], None, [1_000 * ts for ts in SEED_INPUT["history_ts"]]
    )
    np.testing.assert_allclose(got["user_embedding"]["vector"], want, rtol=0, atol=1e-6)
    (tmp_path / "timeless.json").write_text(json.dumps({k: v for k, v in SEED_INPUT.items() if k != "history_ts"}))
    ran = run_here("embed", tmp_path / "timeless.json", "--items", folder / "items")
    assert (ran.code, "goes by time; the input needs history_ts" in ran.err) == (2, True)
    (tmp_path / "texts.json").write_text(json.dumps({**SEED_INPUT, "history_ts": [True] * 6}))
    ran = run_here("embed", tmp_path / "texts.json", "--items", folder / "items")
    assert (ran.code, "history_ts" in ran.err) == (2, True)


def test_an_encoder_is_trained_and_checked(folder: Path, tmp_path: Path, run_here: Callable[..., Ran]) -> None:
    made, items, events = tmp_path / "encoder", tmp_path / "items", ("--events", folder / "small.csv")
    assert run_here("items", "build", items, "--version", "films_v2", "--dim", "6", *events).code == 0
    options = ("--items", items, *events, "--features", "mean,mean:5,last")
    trained = parsed(run_here("encoder", "train", made, *options, "--json").out)
    checked = parsed(run_here("encoder", "check", made, "--json").out)
    assert {name: trained[name] for name in ("features", "model_sha256", "item_version", "dim")} == {
        "features": ["mean", "mean:5", "last"],
        "model_sha256": checked["model_sha256"],
        "item_version": "films_v2",
        "dim": 6,
    }
    assert checked["about"]["cases"] == trained["cases"] >= 50
    again = run_here("encoder", "train", made, *options)
    assert (again.code, "exists already" in again.err) == (2, True)
    wrong = run_here("encoder", "train", tmp_path / "other", *options[:-1], "median")
    assert (wrong.code, "a feature is mean" in wrong.err) == (2, True)
    assert "sound; mean, mean:5, last of item version films_v2" in run_here("encoder", "check", made).out
    nowhere = run_here("encoder", "check", tmp_path / "nowhere")
    assert (nowhere.code, "can't be read" in nowhere.err) == (2, True)


@pytest.mark.parametrize(("method", "metric"), [("two-tables", "dot"), ("ppmi", "cosine")])
def test_items_build_and_check(
    method: str, metric: str, folder: Path, tmp_path: Path, run_here: Callable[..., Ran]
) -> None:
    chosen = [] if method == "two-tables" else ["--method", method]
    options = ["--version", "films_v2", "--dim", "6", "--events", folder / "small.csv", "--json", *chosen]
    built = run_here("items", "build", tmp_path / "space", *options)
    assert built.code == 0, built.err
    checked = run_here("items", "check", tmp_path / "space", "--json")
    assert (checked.code, checked.err) == (0, "")
    assert parsed(built.out) == parsed(checked.out)
    facts = parsed(checked.out)
    assert (facts["version"], facts["dim"], facts["metric"]) == ("films_v2", 6, metric)
    assert facts["two_sided"] is (method == "two-tables")
    assert facts["items"] == len(ItemSpace.load(tmp_path / "space"))
    assert run_here("items", "build", tmp_path / "again", *options).out == built.out, "the same events, other vectors"
    assert "films_v2" in run_here("items", "check", tmp_path / "space").out


# -- send, get, tail ----------------------------------------------------------------------------------------------


def test_send_a_file_and_get_what_came_of_it(folder: Path, tmp_path: Path, unique: str) -> None:
    space = ItemSpace.load(folder / "items")
    rng = random.Random(8)
    users = ["7", "zo\u00eb", "a b/c:d", "-12"]
    events = [
        (rng.choice(users), rng.choice(space.ids).decode(), rng.choice(["view", "like"]), NOW_MS - n * 1000)
        for n in range(60)
    ]
    write_csv(tmp_path / "first.csv", events[:30])
    lines = [{"user_id": u, "item_id": int(i), "type": t, "ts": ts, "more": 1} for u, i, t, ts in events[30:]]
    (tmp_path / "then.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with DevBroker() as broker:
        # this broker lets a group wait 3 s for its members, so a session must last longer
        pipeline = Pipeline(
            broker.bootstrap,
            unique,
            tmp_path,
            folder / "items",
            session_timeout_s=10,
            event_topics="user-events.view,user-events.like",
        )
        pipeline.topics = {kind: f"user-events.{kind}" for kind in ("view", "like")}
        environment = {k: v for k, v in pipeline.environment.items() if k.startswith("UEMB_")}
        try:
            pipeline.start()
            pipeline.until_ready()
            sent = uemb("send", tmp_path / "first.csv", "--json", **environment)
            assert sent.code == 0, sent.err
            report = parsed(sent.out)
            assert (report["sent"], report["interrupted"]) == (30, False)
            sent = uemb("send", tmp_path / "then.jsonl", **environment)
            assert (sent.code, sent.out[:3]) == (0, "30 "), sent
            pipeline.until_committed(30)

            count = len(pipeline.read(pipeline.output))
            assert count == 60
            tailed = uemb("tail", "-n", str(count), "--from-beginning", "--json", **environment)
            assert (tailed.code, tailed.err) == (0, "")
            last = {}
            for line in tailed.out.splitlines():
                document = parsed(line)
                last[document["key"]] = document["record"]
            got = uemb("get", "--json", "--", *users, "nobody", **environment)
            assert (got.code, got.err) == (0, "")
            *found, nobody = map(parsed, got.out.splitlines())
            want = expected(events, space)
            for user, document in zip(users, found, strict=True):
                assert document.pop("stale") is False
                assert document.pop("lag_s") == pytest.approx(0, abs=5)
                record = last[f"uemb:{USER_VERSION}:items_v42:{user}"]
                # the reader's answer has no norm: it is computed from the vector again
                norm = document["user_embedding"].pop("norm")
                assert norm == pytest.approx(record["user_embedding"].pop("norm"), abs=1e-6)
                assert document == record
                assert (document["status"], document["history_len"]) == ("ok", want[user]["history_len"])
                np.testing.assert_allclose(document["user_embedding"]["vector"], want[user]["vector"], atol=1e-6)
            assert (nobody["status"], nobody["reason"]) == ("fallback", "missing")

            one = uemb("tail", "-n", "1", "--from-beginning", "--json", **environment)
            assert one.code == 0
            assert parsed(one.out)["key"] in last
            assert len(one.out.splitlines()) == 1
            plain = uemb("get", "7", "nobody", **environment)
            assert [line.split(":")[0] for line in plain.out.splitlines()] == ["user 7", "user nobody"]
            assert "fallback (missing)" in plain.out
            assert pipeline.stop() == 0
        finally:
            pipeline.kill()


def test_send_goes_to_the_topics_that_are_set(folder: Path) -> None:
    with DevBroker() as broker:
        environment = {"UEMB_BOOTSTRAP_SERVERS": broker.bootstrap, "UEMB_EVENT_TOPICS": "shop.view,shop.like"}
        ran = uemb("send", folder / "small.csv", **environment)
        topics = set(AdminClient({"bootstrap.servers": broker.bootstrap}).list_topics(timeout=60).topics)
    assert ran.code == 2 or topics == {"shop.view", "shop.like"}, (
        "sent to topics that no worker with these settings reads"
    )


# -- demo ---------------------------------------------------------------------------------------------------------


class Demo:
    """`uemb demo` on a small file, with a cache folder of its own."""

    def __init__(self, cache: Path, *args: str | Path, **environment: str) -> None:
        self.cache = cache
        self._process = subprocess.Popen(
            [*UEMB, "demo", *map(str, args)],
            env={**CLEAN, **environment, "UEMB_CACHE_DIR": str(cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def worker_runs(self) -> bool:
        """Whether a process holds the databases that the demo's worker writes."""
        files = list((self.cache / "demo" / "kv").glob("p-*.seq"))
        return len(files) == 4 and all(map(_is_locked, files))

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition while the demo runs."""
        deadline = time.monotonic() + 120
        while not condition():
            assert self._process.poll() is None, self._process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Ctrl-C in its terminal: a signal to its process group."""
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self, timeout_s: float = 120) -> Ran:
        """Wait for its end; one that does not end in time is stopped."""
        try:
            out, err = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGTERM)
            out, err = self._process.communicate(timeout=60)
            return Ran(None, out.decode(), err.decode())
        return Ran(self._process.returncode, out.decode(), err.decode())


def _is_locked(file: Path) -> bool:
    with file.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def check_demo(ran: Ran, events: int, users: int) -> None:
    assert ran.code == 0, ran.err
    summary = parsed(ran.out)
    assert (summary["sent"], summary["processed"], summary["dead_letters"]) == (events, events, 0)
    assert (summary["users"], summary["synthetic"]) == (users, False)
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p99"]
    assert summary["shown"]


@pytest.mark.slow
def test_demo_with_ctrl_c_early_once_and_twice_and_again(folder: Path, tmp_path: Path) -> None:
    slowly = ("--events", folder / "small.csv", "--rate", "5")
    early, once, twice = demos = [Demo(tmp_path / name, *slowly) for name in ("early", "once", "twice")]
    try:
        early.until(lambda: (early.cache / "demo" / "worker.log").exists())
        early.interrupt()
        for demo in (once, twice):
            demo.until(demo.worker_runs)
        time.sleep(0.5)
        once.interrupt()
        twice.interrupt()
        time.sleep(0.05)
        twice.interrupt()
        for demo in demos:
            ran = demo.end()
            assert ran.code == 130, ran
            assert "Traceback" not in ran.err
            assert "stopping" in ran.err
            assert not demo.worker_runs()
    finally:
        for demo in demos:
            demo.end(0)
    again = Demo(tmp_path / "twice", "--events", folder / "small.csv", "--json")
    check_demo(again.end(), 300, 20)
    assert not again.worker_runs()


@pytest.mark.slow
def test_demo_that_stays_has_a_page(folder: Path, tmp_path: Path) -> None:
    """On the embedded broker, where the page says of every user what it says on a real one."""
    demo = Demo(tmp_path, "--events", folder / "small.csv", "--stay")
    try:
        log = tmp_path / "demo" / "inspector.log"
        demo.until(lambda: log.exists() and "inspector: http" in log.read_text())
        (url,) = re.findall(r"inspector: (http://\S+/)", log.read_text())
        question = json.dumps({"user": str(some_events(300, 20)[0][0])}).encode()
        request = urllib.request.Request(f"{url}api/user", question, {"Content-Type": "application/json"})
        answers: list[dict[str, Any]] = []

        def is_answered() -> bool:
            with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60) as answer:
                answers.append(json.loads(answer.read()))  # else it is still being read
            return bool(answers)

        demo.until(is_answered)
        assert (answers[0]["status"], answers[0].get("agrees")) == ("ok", True), answers
        demo.interrupt()
        ran = demo.end()
        assert (ran.code, "Traceback" in ran.err) == (0, False), ran
        assert f"look at it:          {url}" in ran.err
        assert not demo.worker_runs()
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=60)
    finally:
        demo.end(0)


@pytest.fixture(scope="module")
def demos(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Ran]]]:
    """Demos that nobody interrupts, while other tests run."""
    cache = tmp_path_factory.mktemp("demos")
    few = cache / "few"
    few.write_text("".join("\t".join(map(str, row)) + "\n" for row in some_events(200, 10, items=12)))
    headless = ("--events", few, "--columns", "user_id,item_id,type,ts")
    other = {"UEMB_EVENT_TOPICS": "shop.clicks", "UEMB_APP_ID": "shop", "UEMB_DLQ_TOPIC": "shop.dlq"}
    with ThreadPoolExecutor(3) as pool:
        yield {
            "types": pool.submit(lambda: Demo(cache / "types", "--events", folder / "buys.csv", "--json").end()),
            "few": pool.submit(lambda: Demo(cache / "of few", *headless, "--json").end()),
            "shop": pool.submit(
                lambda: Demo(cache / "shop", "--events", folder / "small.csv", "--json", **other).end()
            ),
        }


@pytest.mark.slow
def test_demo_with_types_of_ones_own(demos: Mapping[str, Future[Ran]]) -> None:
    """A file of one's own may name its types as it likes; or the demo says in one line that it may not."""
    ran = demos["types"].result()
    assert ran.code is not None, f"it went on for ever:\n{ran.err}"
    if ran.code == 0:
        check_demo(ran, 300, 20)
    else:
        check_error(ran._replace(err=ran.err.splitlines()[-1]), "buy")


def test_demo_with_few_items(demos: Mapping[str, Future[Ran]]) -> None:
    """A small shop's file has fewer items than the demo's usual dimensions; this one has no header."""
    check_demo(demos["few"].result(), 200, 10)


def test_demo_beside_settings_of_another_pipeline(demos: Mapping[str, Future[Ran]]) -> None:
    """Who has a real pipeline's settings in the environment can run the demo all the same."""
    ran = demos["shop"].result()
    assert ran.code is not None, f"it went on for ever:\n{ran.err}"
    check_demo(ran, 300, 20)


@pytest.mark.parametrize("name", ERRORS_OF_PROCESSES)
def test_error_of_a_process(name: str, outside: Mapping[str, Future[Ran]], folder: Path) -> None:
    wrong = ERRORS_OF_PROCESSES[name]
    check_error(outside[name].result(), *(what.format(folder=folder) for what in wrong.says), code=wrong.code)
