"""The compose file as the specification's own parser reads it: who waits for whom, and what nobody may do."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
from compose_file import project, why_no_parser
from documents import ROOT

from stream.config import ENV_PREFIX, Settings

pytestmark = pytest.mark.skipif(why_no_parser() is not None, reason=str(why_no_parser()))

Service = dict[str, Any]
ALWAYS: Final = {"kafka", "items", "worker", "events", "prometheus", "grafana"}
ONE_SHOT: Final = {"items", "events"}
#: Their images write below their root when they start; the file says so.
WRITABLE: Final = {"kafka", "prometheus", "grafana"}
#: What the file decides by itself, for it also makes the places that these name.
DECIDED: Final = {"BOOTSTRAP_SERVERS", "KV_URL", "STATE_DIR", "ITEMS", "HTTP", "CACHE_DIR"}


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    """All of them, those of the profiles among them."""
    found: dict[str, Service] = project("redis", "inspect")["services"]
    return found


def test_valkey_runs_in_its_profile_only_and_is_waited_for_there(services: dict[str, Service]) -> None:
    plain = project()["services"]
    assert set(plain) == ALWAYS
    assert set(services) == {*ALWAYS, "valkey", "inspector"}
    needed = {name for name, how in plain["worker"]["depends_on"].items() if how["required"]}
    assert needed == {"kafka", "items"}, "without the profile it would be waited for in vain"
    assert services["worker"]["depends_on"]["valkey"]["condition"] == "service_healthy"


def test_who_waits_for_whom(services: dict[str, Service]) -> None:
    waits = {
        (name, other, how["condition"])
        for name, service in services.items()
        for other, how in (service.get("depends_on") or {}).items()
    }
    assert waits == {
        ("worker", "kafka", "service_healthy"),
        ("worker", "items", "service_completed_successfully"),
        ("worker", "valkey", "service_healthy"),
        ("events", "worker", "service_healthy"),
        ("inspector", "worker", "service_healthy"),
        ("grafana", "prometheus", "service_healthy"),
    }
    for _, other, how in waits:
        assert how != "service_healthy" or services[other]["healthcheck"]["test"]


def test_everybody_is_confined(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert service["user"] not in ("", "0", "root"), name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service
        assert not service.get("privileged")
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("read_only", False) is (name not in WRITABLE), name
        assert bool(service.get("tmpfs")) is (name not in WRITABLE), name
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) <= 2
        assert 0 < int(limits["memory"]) <= 1_500 << 20
        assert limits["pids"] > 0
        for port in service.get("ports", ()):
            assert port["host_ip"] == "127.0.0.1", name
        for volume in service.get("volumes", ()):
            assert volume["type"] == "volume", f"{name} is given a folder of the host"


def test_compose_can_copy_inline_configurations_in(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert not (service.get("configs") and service.get("read_only")), f"Compose refuses to start {name}"


def test_images_are_pinned(services: dict[str, Service]) -> None:
    names = [service["image"] for service in services.values() if "build" not in service]
    names += re.findall(r"^FROM (\S+)", services["worker"]["build"]["dockerfile_inline"], re.MULTILINE)
    assert len(names) == 5
    for name in names:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?@sha256:[0-9a-f]{64}", name), name
    built = [service["image"] for service in services.values() if "build" in service]
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert built == [f"user-embedding-stream:{version[1]}"] * 4


def test_the_image_takes_no_file_whose_hash_is_not_known(services: dict[str, Service]) -> None:
    recipe = services["worker"]["build"]["dockerfile_inline"]
    lines = re.findall(r"pip install ([^&\n]*)", recipe)
    assert [next(word for word in ("--require-hashes", "--no-index") if word in line) for line in lines] == [
        "--require-hashes",
        "--no-index",
    ]


def test_health_is_asked_for_cheaply(services: dict[str, Service]) -> None:
    for name, service in services.items():
        if name in ONE_SHOT:
            assert "healthcheck" not in service
            continue
        check = service["healthcheck"]
        assert not re.search(r"kafka-\w|\.sh|java", " ".join(check["test"])), "it starts a JVM each time"
        assert check["timeout"]
        assert check["start_period"]
        assert check["start_interval"], "who waits for it would wait for a whole interval"


def test_a_wrong_setting_is_not_tried_again(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert service["restart"] == ("no" if name in ONE_SHOT else "on-failure")
    worker = services["worker"]
    assert worker["entrypoint"] == ["tini", "-e", "2", "--"], "exit 2 becomes 0, after which nothing is started"
    assert worker["command"] == ["uemb", "worker"]
    assert "init" not in worker, "the signal would have to pass two"
    for name in ONE_SHOT:
        assert services[name]["entrypoint"] is None, "a failure must be one"
        assert services[name]["init"] is True


def test_the_inspector_reads_what_the_worker_writes_and_asks_for_a_token(services: dict[str, Service]) -> None:
    worker, inspector = services["worker"], services["inspector"]
    seen = inspector["environment"]
    assert {name: seen[name] for name in worker["environment"]} == worker["environment"]
    assert seen["UEMB_INSPECT_TOKEN"] == "look"
    assert inspector["command"][-3:] == ["0.0.0.0:9470", "--worker", "worker:9464"]
    assert {volume["target"] for volume in inspector["volumes"]} == {volume["target"] for volume in worker["volumes"]}
    assert all(volume["read_only"] for volume in inspector["volumes"])


def test_a_stop_is_given_its_time(services: dict[str, Service]) -> None:
    grace_s = int(services["worker"]["stop_grace_period"].removesuffix("m0s")) * 60
    assert grace_s > Settings.model_fields["stop_timeout_s"].default


def test_every_setting_reaches_the_worker() -> None:
    names = [name for name in Settings.model_fields if not name.startswith("inspect")]  # which no worker reads
    given = {f"{ENV_PREFIX}{name.upper()}": f"value of {name}" for name in names}
    seen = project(**given)["services"]["worker"]["environment"]
    fixed = {f"{ENV_PREFIX}{name}" for name in DECIDED}
    assert {name: seen.get(name) for name in given.keys() - fixed} == {n: given[n] for n in given.keys() - fixed}
    assert not {name for name in fixed if seen[name] == given[name]}


def test_without_settings_the_worker_has_its_defaults() -> None:
    seen = project()["services"]["worker"]["environment"]
    told = {name.removeprefix(ENV_PREFIX) for name, value in seen.items() if name.startswith(ENV_PREFIX) and value}
    assert told == DECIDED
    assert Settings(**{name.lower(): seen[f"{ENV_PREFIX}{name}"] for name in DECIDED}).http == "0.0.0.0:9464"


def test_items_and_brokers_of_ones_own() -> None:
    mine = project(
        UEMB_ITEMS_DIR="./mine",
        UEMB_COMPOSE_BOOTSTRAP_SERVERS="kafka.example:9093",
        UEMB_TLS_DIR="/etc/kafka-tls",
        UEMB_COMPOSE_KV_URL="redis://valkey",
    )["services"]
    for name in ("items", "worker", "events"):
        volumes = {volume["target"]: volume for volume in mine[name]["volumes"]}
        assert volumes["/items/demo"]["source"] == str(ROOT / "mine")
        assert volumes["/items/demo"]["read_only"] is True
        assert mine[name]["environment"]["UEMB_BOOTSTRAP_SERVERS"] == "kafka.example:9093"
    assert {v["target"]: v["source"] for v in mine["worker"]["volumes"]}["/tls"] == "/etc/kafka-tls"
    assert mine["worker"]["environment"]["UEMB_KV_URL"] == "redis://valkey"


class OneShot:
    """A service that ends, with `uemb` replaced by a script that notes how it is called."""

    def __init__(self, name: str, folder: Path, **environment: str) -> None:
        self._service = project(**environment)["services"][name]
        self.folder = folder
        (folder / "items").mkdir(exist_ok=True)
        self._calls = folder / "calls"
        fake = folder / "uemb"
        fake.write_text(f'#!/bin/sh\necho "$*" >>{self._calls}\n[ ! -e {folder}/broken ] || exit 2\n'
                        f'[ "$2" != build ] || mkdir {folder}/items/demo\n')  # fmt: skip
        fake.chmod(0o755)

    def up(self) -> tuple[int, list[str]]:
        """Exit code, and what was called."""
        self._calls.write_text("")
        command = [word.replace("/items", str(self.folder / "items")) for word in self._service["command"]]
        path = {"PATH": f"{self.folder}:{os.environ['PATH']}"}
        own = {name: str(value) for name, value in self._service["environment"].items() if value is not None}
        ran = subprocess.run(command, env={**own, **path}, capture_output=True, timeout=60, check=False)
        return ran.returncode, self._calls.read_text().replace(str(self.folder), "").splitlines()


def test_items_are_made_once_and_checked_each_time(tmp_path: Path) -> None:
    items = OneShot("items", tmp_path)
    (tmp_path / "broken").touch()
    assert items.up() == (2, ["items build /items/demo --version demo_v1"])
    (tmp_path / "broken").unlink()
    assert items.up() == (0, ["items build /items/demo --version demo_v1", "items check /items/demo"])
    assert items.up() == (0, ["items check /items/demo"])


def test_items_of_ones_own_are_checked_and_never_made(tmp_path: Path) -> None:
    items = OneShot("items", tmp_path, UEMB_ITEMS_DIR="./mine")
    assert items.up() == (0, ["items check /items/demo"])
    (tmp_path / "broken").touch()
    assert items.up() == (2, ["items check /items/demo"])


def test_events_are_sent_once(tmp_path: Path) -> None:
    events = OneShot("events", tmp_path)
    (tmp_path / "broken").touch()
    assert events.up() == (2, ["send --movielens --rate 500"])
    (tmp_path / "broken").unlink()
    assert events.up() == (0, ["send --movielens --rate 500"])
    assert events.up() == (0, [])


@pytest.mark.parametrize("what", ["UEMB_ITEMS_DIR", "UEMB_COMPOSE_BOOTSTRAP_SERVERS"])
def test_no_events_are_made_up_where_anything_is_ones_own(what: str, tmp_path: Path) -> None:
    assert OneShot("events", tmp_path, **{what: "./mine"}).up() == (0, [])
