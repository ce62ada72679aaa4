"""As near to `docker compose up` as it gets without an engine: its image's recipe, and its services as processes.

The recipe's steps run in a fresh virtual environment on nothing but what they copy; the services' commands in that, on
a real Kafka, beside a real Prometheus. What stays unseen is what an engine does: containers, networks, limits.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from compose_file import project, why_no_parser
from documents import ROOT
from kafka_broker import KafkaBroker, free_ports
from prometheus import Prometheus, why_no_prometheus

from stream.feed.dataset import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_500)]

WHY_NOT: Final = why_no_parser() or why_no_prometheus() or (None if shutil.which("tini") else "no tini: install tini")
#: Programs of the base image that change the system: ours do nothing, or next to it.
_STUBS: Final = {
    "apt-get": "",
    "useradd": "",
    "install": 'while [ $# -gt 0 ]; do case $1 in /*) mkdir -p "$1";; esac; shift; done',
}


class Image:
    """What the recipe makes of a folder that stands for the container's root.

    Attributes:
        environment: of what runs in it.
        command: that it has without another.
    """

    def __init__(self, root: Path, recipe: str) -> None:
        self.root = root
        self._cwd = root
        self.command: list[str] = []
        subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True, timeout=120)
        (root / "stubs").mkdir()
        for name, script in _STUBS.items():
            (root / "stubs" / name).write_text(f"#!/bin/sh\n{script}\n")
            (root / "stubs" / name).chmod(0o755)
        path = f"{root / 'stubs'}:{root / 'venv' / 'bin'}:{os.environ['PATH']}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("UEMB_", "PYTHON", "VIRTUAL_ENV"))}
        self.environment = {**clean, "PATH": path, "HOME": str(root / "home")}
        for step in re.sub(r"\\\n\s*", "", recipe).strip().splitlines():
            word, rest = step.split(maxsplit=1)
            getattr(self, f"_{word.lower()}")(rest)

    def here(self, text: str) -> str:
        """A text with its absolute paths moved below our root."""
        return re.sub(r"(?<![\w.])/(?=(?:src|home|data|items|tls|var)\b)|(?<=cd )/(?=\s)", f"{self.root}/", text)

    def _from(self, image: str) -> None:
        assert image.startswith(f"python:3.{sys.version_info.minor}."), "the tests' Python stands for the image's"

    def _workdir(self, path: str) -> None:
        self._cwd = Path(self.here(path))
        self._cwd.mkdir(parents=True, exist_ok=True)

    def _copy(self, paths: str) -> None:
        *sources, target = paths.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, self._cwd / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, self._cwd / target)

    def _run(self, line: str) -> None:
        command = ["/bin/sh", "-c", self.here(line)]
        ran = subprocess.run(command, cwd=self._cwd, env=self.environment, capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"

    def _user(self, name: str) -> None:
        assert name == "uemb"

    def _cmd(self, words: str) -> None:
        self.command = json.loads(words)


class Services:
    """The file's services, run in the image."""

    def __init__(self, image: Image, folder: Path, broker: KafkaBroker, **environment: str) -> None:
        self._services = project(**environment)["services"]
        self._image = image
        self._broker = broker
        self._log = folder / "services.log"
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"

    def settings(self, name: str) -> dict[str, str]:
        """What a service is told, with this machine's names."""
        told = {k: str(v) for k, v in self._services[name]["environment"].items() if v is not None}
        told = {
            k: self._image.here(re.sub(r"(?<=//)/", self._image.here("/data").removesuffix("data"), v))
            for k, v in told.items()
        }
        names = {"kafka:19092": self._broker.bootstrap, "0.0.0.0:9464": self.address}
        return {**self._image.environment, **{k: names.get(v, v) for k, v in told.items()}}

    def start(self, name: str, **more: str) -> "subprocess.Popen[bytes]":
        """Start one."""
        service = self._services[name]
        command = [*(service["entrypoint"] or []), *(service["command"] or self._image.command)]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [self._image.here(word) for word in command],
                env={**self.settings(name), **more},
                cwd=self._image.root / "home",
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, name: str, **more: str) -> int:
        """Run one that ends; its exit code."""
        return self.start(name, **more).wait(timeout=300)

    def until_healthy(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        """Wait as what depends on it does."""
        probe = self._services[name]["healthcheck"]["test"]
        assert probe[0] == "CMD"
        deadline = time.monotonic() + 180
        while subprocess.run(
            probe[1:], env=self.settings(name), capture_output=True, timeout=60, check=False
        ).returncode:
            assert process.poll() is None, self.last_words()
            assert time.monotonic() < deadline, self.last_words()

    def last_words(self) -> str:
        """End of what all of them said."""
        return self._log.read_text(errors="replace")[-3_000:]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The recipe's outcome."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    return Image(tmp_path_factory.mktemp("image"), project()["services"]["worker"]["build"]["dockerfile_inline"])


@pytest.fixture(scope="module")
def broker() -> Iterator[KafkaBroker]:
    """One of the file's own: its topics have the default names."""
    with KafkaBroker() as broker:
        yield broker


def ask(image: Image, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**image.environment, **more}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_image_has_what_its_command_and_its_health_check_need(image: Image) -> None:
    assert image.command == ["uemb", "worker"]
    assert not any((image.root / "src").iterdir()), "the sources stay behind"
    assert ask(image, "which", "uemb").stdout.strip() == str(image.root / "venv" / "bin" / "uemb")
    assert ask(image, "uemb", "--help").returncode == 0
    healthy = ask(image, *project()["services"]["worker"]["healthcheck"]["test"][1:], UEMB_HTTP="127.0.0.1:1")
    assert (healthy.returncode, healthy.stdout) == (
        1,
        "not ready: 127.0.0.1:1: no worker answers (Connection refused)\n",
    )
    for extra in ("numba", "onnxruntime"):
        assert ask(image, "python", "-c", f"import {extra}").returncode == 0, extra


def test_up_and_up_again(films: Dataset, image: Image, broker: KafkaBroker, tmp_path: Path) -> None:
    services = Services(image, tmp_path, broker, UEMB_DEMO_RATE="20000")
    with ExitStack() as ending:
        assert services.run("items") == 0, services.last_words()
        worker = services.start("worker")
        ending.callback(worker.kill)
        services.until_healthy("worker", worker)
        prometheus = ending.enter_context(Prometheus(tmp_path, [services.address], scale=1 / 30))
        assert services.run("events") == 0, services.last_words()

        def seen() -> Any:
            return prometheus.value("sum(uemb_records_total)")

        prometheus.until(lambda: seen() == len(films.events), "all events are processed")
        prometheus.until(lambda: prometheus.value("sum(uemb_lag_records)") == 0, "all are durable")
        assert prometheus.value("sum(up)") == 1
        assert not prometheus.firing()
        user = films.events[-1].user_id
        answer = ask(image, "uemb", "get", user, "--json", UEMB_KV_URL=services.settings("worker")["UEMB_KV_URL"])
        assert json.loads(answer.stdout)["depends_on"] == {"item_embedding_version": "demo_v1"}, answer.stderr
        for name in ("items", "events"):
            assert services.run(name) == 0, services.last_words()
        assert seen() == len(films.events), "nothing is sent twice"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0, services.last_words()
    assert services.run("worker", UEMB_ENCODER="mixed") == 0, "a wrong setting is an end that on-failure leaves alone"
    assert "UEMB_ENCODER" in services.last_words()
    assert services.run("worker", UEMB_BOOTSTRAP_SERVERS="127.0.0.1:1") == 75, "what may pass is tried again"
