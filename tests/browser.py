"""The inspector as a person meets it: a process of its own, and a real headless Chromium that opens its page."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from closing import Closing
from kv_entries import eventually
from npm_packages import npm_home
from pipeline import UEMB, Pipeline
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

#: Longest wait for something to be on the page.
PATIENCE_MS: Final = 60_000.0
_CHROMIUM: Final = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_AXE: Final = Path(__file__).parent / "axe"


def why_no_browser() -> str | None:
    """The reason why there is no page to look at on this machine, or None."""
    return None if _CHROMIUM else "no browser: install chromium"


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with nothing in it."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=options)
        try:
            yield browser
        finally:
            browser.close()


class Inspector(Closing):
    """``uemb inspect`` of a pipeline.

    Args:
        pipeline: its settings and folder.
        workers: addresses of workers.
        arguments: further ones of the command.
        environment: further settings.
    """

    def __init__(self, pipeline: Pipeline, workers: Sequence[str], *arguments: str, **environment: str) -> None:
        self.log = pipeline.folder / f"inspector-{len(list(pipeline.folder.glob('inspector-*')))}.log"
        named = [word for address in workers for word in ("--worker", address)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*UEMB, "inspect", "--address", "127.0.0.1:0", *named, *arguments],
                env={**pipeline.environment, **environment}, stdout=log, stderr=log,
            )  # fmt: skip
        eventually(lambda: "inspector: http" in self.said() or self.process.poll() is not None)
        found = re.search(r"inspector: (http://\S+/)", self.said())
        assert found, self.said()
        self.url = found[1]

    def said(self) -> str:
        """What it wrote."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Stop it, which it does in order."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            code = self.process.wait(60)
            assert code == 0, self.said()
        assert "Traceback" not in self.said(), self.said()

    def ask(self, path: str, **question: Any) -> dict[str, Any]:
        """An answer, as the page gets it."""
        body = json.dumps(question).encode() if question else None
        request = urllib.request.Request(self.url + path.removeprefix("/"), body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            document: dict[str, Any] = json.loads(answer.read())
        return document

    def sockets(self) -> int:
        """Connections that it has with others, its listening socket left aside."""
        port = int(self.url.rstrip("/").rpartition(":")[2])
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        fields = [line.split() for line in lines]
        return sum(int(one[1].rpartition(":")[2], 16) == port and one[3] == "01" for one in fields)

    def memory_mb(self) -> float:
        """What it has in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


class Tab:
    """One page of an inspector, and what went wrong in it."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.url = url
        self.faults: list[str] = []
        self.asked: set[str] = set()
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("console", self._on_console)
        self.page.on("request", lambda request: self.asked.add(request.url))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.faults.append(message.text)

    def open(self, view: str = "now") -> Page:
        """Show a view."""
        self.page.goto(f"{self.url}#{view}")
        return self.page

    def until(self, condition: str, what: str) -> None:
        """Wait until an expression is true on the page."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(f"Boolean({condition})"):  # waiting in the page takes an eval, which it forbids
            if time.monotonic() > deadline:
                text = self.page.evaluate("document.body.innerText")
                raise AssertionError(f"not on the page: {what}\n{text[:4000]}\n{self.faults}")
            self.page.wait_for_timeout(50)

    def until_shown(self, text: str) -> None:
        """Wait until a text can be read on the page."""
        self.until(f"document.body.innerText.includes({json.dumps(text)})", text)

    def barriers(self) -> list[str]:
        """What axe-core finds serious or worse in what is shown."""
        self.page.evaluate((npm_home(_AXE) / "node_modules/axe-core/axe.min.js").read_text())
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{one['id']}: {one['help']} ({node['html'][:200]}; {node['failureSummary'][:200]})"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]

    def close(self) -> None:
        """Nothing went wrong, and nobody else was asked."""
        self.context.close()
        assert self.faults == []
        assert {url for url in self.asked if not url.startswith(self.url)} == set()
