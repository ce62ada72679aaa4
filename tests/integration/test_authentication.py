"""Each way to log in, by each command that connects, sound and with each fault: a table made on a real broker.

``pytest -m slow -s tests/integration/test_authentication.py`` prints all of it.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import warm_start
from kafka_broker import KafkaBroker
from pipeline import UEMB, Pipeline
from secured_broker import BOTH, CLIENT, OTHER, SCRAM, SECRETS, TLS, SecuredBroker, there

from stream.feed.dataset import Dataset

pytestmark = pytest.mark.kafka

#: A generous bound for a machine that is busy; the table says what it was.
BOUND_S = 30.0
EVENT = "user_id,item_id,type,ts\n1,2,view,1700000000000\n"
WAYS = {
    "SCRAM over TLS": ("SCRAMSSL", SCRAM),
    "PLAIN over TLS": ("SASLSSL", BOTH),
    "mTLS": ("MTLS", {**TLS, **CLIENT}),
    "OAUTHBEARER": ("OAUTH", None),
}
COMMANDS = (
    "worker",
    "send {events}",
    "tail",
    "items status",
    "items activate films_v1",
    "items retire films_v1",
    "encoder status",
    "delete 1",
    "dlq list",
    "dlq replay",
    "kv rebuild",
    "verify",
    "repartition --partitions 4 --dry-run",
    "bench --quick",
    "doctor",
)
LAPSED = {"ssl_certfile": "ended.pem", "ssl_keyfile": "ended-key.pem", "ssl_key_password": ""}


class Fault(NamedTuple):
    """What is wrong, what is said of it, and the listener where that is another one."""

    settings: dict[str, str]
    says: str
    listener: str = ""


def fault_of(way: str, fault: str) -> Fault:
    if fault == "wrong secret":
        return {
            "mTLS": Fault({"ssl_key_password": "no"}, "UEMB_SSL_KEY_PASSWORD"),
            "OAUTHBEARER": Fault({"sasl_oauth_client_secret": "no"}, "UEMB_SASL_OAUTH_CLIENT_SECRET"),
        }.get(way, Fault({"sasl_password": "no"}, "UEMB_SASL_PASSWORD"))
    return {
        "wrong CA": Fault({"ssl_cafile": "other.pem"}, "UEMB_SSL_CAFILE"),
        "wrong host name": Fault({"ssl_cafile": "elsewhere.pem"}, "UEMB_BOOTSTRAP_SERVERS", "ELSEWHERE"),
        "expired certificate": Fault({"ssl_cafile": "ended.pem"}, "has expired", "ENDED"),
        "expired certificate of the client": Fault(LAPSED, "UEMB_SSL_CERTFILE"),
        "certificate of another CA": Fault({**OTHER, "ssl_key_password": ""}, "UEMB_SSL_CERTFILE"),
        "wrong CA of the issuer": Fault({"sasl_oauth_cafile": "other.pem"}, "UEMB_SASL_OAUTH_CAFILE"),
    }[fault]


FAULTS = ("wrong secret", "wrong CA", "wrong host name", "expired certificate")
OWN_FAULTS = {
    "mTLS": ("expired certificate of the client", "certificate of another CA"),
    "OAUTHBEARER": ("wrong CA of the issuer",),
}
CASES = [(way, fault) for way in WAYS for fault in (*FAULTS, *OWN_FAULTS.get(way, ()))]
#: Each command, each way and each fault at least once.
SOME = [(*CASES[(4 * n) % len(CASES)], command) for n, command in enumerate(COMMANDS)]


@pytest.fixture(scope="module")
def kafka(secured_kafka: SecuredBroker) -> KafkaBroker:
    """For pipelines, which look at it over PLAINTEXT."""
    return secured_kafka


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], dict[str, tuple[int, float]]]]:
    """Exit code and seconds of each command, by way and case; printed at the end."""
    cells: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    warm_start.run([*UEMB, "--help"], os.environ)  # the first of all waits for imports
    yield cells
    print("\n| login | what is wrong | commands | exit | slowest |\n| --- | --- | --- | --- | --- |")
    for (way, case), by_command in cells.items():
        codes = sorted({code for code, _ in by_command.values()})
        slowest = max(by_command, key=lambda command: by_command[command][1])
        took = f"{by_command[slowest][1]:.1f} s, `{slowest.split(' {')[0]}`"
        print(f"| {way} | {case} | {len(by_command)} | {', '.join(map(str, codes))} | {took} |")


@pytest.fixture
def attempt(
    secured_kafka: SecuredBroker,
    item_folder: Path,
    tmp_path: Path,
    table: dict[tuple[str, str], dict[str, tuple[int, float]]],
) -> Callable[[str, str, str], None]:
    """Runs a command under a fault, and looks at how it ends."""
    (tmp_path / "events.csv").write_text(EVENT)

    def attempt(way: str, fault: str, command: str) -> None:
        listener, settings = WAYS[way]
        wrong = fault_of(way, fault)
        given = there(secured_kafka.ca.parent, {**(settings or secured_kafka.token_settings), **wrong.settings})
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("UEMB_")},
            **{f"UEMB_{name.upper()}": value for name, value in given.items()},
            "UEMB_BOOTSTRAP_SERVERS": secured_kafka.at[wrong.listener or listener],
            "UEMB_ITEMS": str(item_folder),
            "UEMB_KV_URL": f"rocksdb://{tmp_path / 'kv'}",
            "UEMB_STATE_DIR": str(tmp_path / "state"),
            "UEMB_HTTP": "",
        }
        begun_s = time.monotonic()
        ended = warm_start.run([*UEMB, *command.format(events=tmp_path / "events.csv").split()], environment)
        took_s = time.monotonic() - begun_s
        table.setdefault((way, fault), {})[command] = (ended.returncode, took_s)
        said = ended.stdout + ended.stderr
        lines = [line for line in said.splitlines() if wrong.says in line]
        print(f"{way}, {fault}, {command}: {ended.returncode}, {took_s:.2f} s, {lines}")
        assert took_s < BOUND_S
        assert not any(secret in said for secret in SECRETS)
        assert "Traceback" not in said
        if command == "doctor":
            assert (ended.returncode, bool(lines)) == (1, True), said
            return
        assert ended.returncode == 2, said
        *before, last = ended.stderr.splitlines()
        assert last.startswith("uemb: "), said
        assert wrong.says in last, said
        assert not before or (command == "worker" and all("CRITICAL" in line for line in before)), said

    return attempt


@pytest.mark.parametrize(("way", "fault", "command"), SOME)
def test_a_fault_of_the_login_is_one_line(
    way: str, fault: str, command: str, attempt: Callable[[str, str, str], None]
) -> None:
    attempt(way, fault, command)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "fault"), CASES)
def test_every_fault_by_every_command(way: str, fault: str, attempt: Callable[[str, str, str], None]) -> None:
    for command in COMMANDS:
        attempt(way, fault, command)


def test_some_cells_are_of_every_kind() -> None:
    assert {way for way, _, _ in SOME} == set(WAYS)
    assert {fault for _, fault, _ in SOME} == {fault for _, fault in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_command_by_a_sound_login(
    way: str,
    secured_kafka: SecuredBroker,
    make_pipeline: Callable[..., Pipeline],
    films: Dataset,
    tmp_path: Path,
    table: dict[tuple[str, str], dict[str, tuple[int, float]]],
) -> None:
    listener, settings = WAYS[way]
    given: dict[str, Any] = there(secured_kafka.ca.parent, settings or secured_kafka.token_settings)
    pipeline = make_pipeline(**given)
    pipeline.environment["UEMB_BOOTSTRAP_SERVERS"] = secured_kafka.at[listener]
    events = tmp_path / "events.csv"
    rows = [f"{e.user_id},{e.item_id},{e.type},{e.ts_ms}" for e in films.events[:300]]
    events.write_text("\n".join(["user_id,item_id,type,ts", *rows]) + "\n")
    pipeline.start()
    pipeline.until_ready()
    running = ["send {events}", "tail --from-beginning -n 1", "items status", "encoder status", "delete 1", "dlq list"]
    running += ["dlq replay", "kv rebuild", "doctor", "verify", "items activate films_v1"]
    for command in running:
        begun_s = time.monotonic()
        pipeline.uemb(*command.format(events=events).split())
        table.setdefault((way, "nothing"), {})[command] = (0, time.monotonic() - begun_s)
    assert pipeline.stop() == 0
    table[way, "nothing"]["worker"] = (0, 0.0)
    begun_s = time.monotonic()
    pipeline.uemb("repartition", "--partitions", "8", "--dry-run")
    table[way, "nothing"]["repartition"] = (0, time.monotonic() - begun_s)
