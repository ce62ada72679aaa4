"""A real Prometheus on the configuration of the compose file, and promtool; Debian's package `prometheus` has both."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from closing import Closing
from compose_file import inline
from kafka_broker import free_ports

START_TIMEOUT_S: Final = 60.0
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(
    r"(?P<before>\[|\b(?:for|keep_firing_for|scrape_interval|evaluation_interval): )(?P<n>\d+)(?P<unit>[smh])\b"
)


def why_no_prometheus() -> str | None:
    """The reason why there is none on this machine, or None."""
    found = all(map(shutil.which, ("prometheus", "promtool")))
    return None if found else "no Prometheus: install prometheus (it brings promtool)"


def promtool(*args: str) -> str:
    """Run a command of promtool that must end well; what it says."""
    ran = subprocess.run(["promtool", *args], capture_output=True, text=True, timeout=60, check=False)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    return said


def scaled(text: str, scale: float) -> str:
    """Rules or a configuration with every window, `for` and interval this many times as long; nothing else changes.

    >>> scaled("for: 5m\\nexpr: rate(x[10m]) > 60", 1 / 30)
    'for: 10000ms\\nexpr: rate(x[20000ms]) > 60'
    """

    def shorter(found: re.Match[str]) -> str:
        ms = round(int(found["n"]) * _UNITS[found["unit"]] * 1000 * scale)
        return f"{found['before']}{ms}ms"

    return _DURATION.sub(shorter, text)


class Prometheus(Closing):
    """A server that scrapes some workers, each the same application's.

    Args:
        folder: for its files.
        targets: addresses of workers.
        scale: see `scaled`; of the rules and the intervals alike.
    """

    def __init__(self, folder: Path, targets: Sequence[str], *, scale: float = 1.0) -> None:
        self._scale = scale
        (folder / "alerts.yml").write_text(scaled(inline("alerts"), scale))
        config = scaled(inline("prometheus"), scale).replace("/etc/prometheus/alerts.yml", str(folder / "alerts.yml"))
        assert config.count('"worker:9464"') == 1
        listed = ", ".join(f'"{target}"' for target in targets)
        (folder / "prometheus.yml").write_text(config.replace('"worker:9464"', listed))
        (port,) = free_ports(1)
        self._url = f"http://127.0.0.1:{port}"
        self._log = folder / "prometheus.log"
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        with self._log.open("ab") as log:
            # The shell reads the end of its input when this process ends, in whatever way, and takes the server along.
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", '"$@" & child=$!; read -r _; kill -9 "$child"; wait', "sh", *command,
                 f"--web.listen-address=127.0.0.1:{port}"],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            self.until(self._answers, "Prometheus answers", START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 300) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s:g} s: {what}\n{self._log.read_text()[-2_000:]}")
            time.sleep(0.2)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series that an expression has now."""
        return list(self._ask("query", query=expression)["result"])

    def value(self, expression: str) -> float | None:
        """Value of an expression with one series at most; None without one."""
        found = self.query(expression)
        assert len(found) <= 1, expression
        return float(found[0]["value"][1]) if found else None

    def query_range(self, expression: str, since_s: float) -> list[dict[str, Any]]:
        """Series that an expression had since then (epoch s), with their values."""
        now_s = time.time()
        step_s = max(15 * self._scale, (now_s - since_s) / 1_000)
        return list(self._ask("query_range", query=expression, start=since_s, end=now_s, step=step_s)["result"])

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {one["labels"]["alertname"] for one in self._ask("alerts")["alerts"] if one["state"] == "firing"}

    def annotations(self, alert: str) -> Mapping[str, str]:
        """What one that fires says."""
        return next(one["annotations"] for one in self._ask("alerts")["alerts"] if one["labels"]["alertname"] == alert)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self._url}/-/ready", timeout=5).close()
        except OSError:
            return False
        return True

    def _ask(self, what: str, **parameters: object) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(
                f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}", timeout=30
            ) as answer:
                document = json.load(answer)
        except urllib.error.HTTPError as exc:
            raise AssertionError(f"{parameters}: {exc.read().decode()}") from exc
        assert document["status"] == "success"
        data: dict[str, Any] = document["data"]
        return data
