"""What is planted where it belongs, and looked for where it must not be: secrets, ids of users, payloads."""

import base64
import json
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from pipeline import Pipeline

#: Of data: in no log, page, report or record of ours but the documented ones.
USER, ITEM, PAYLOAD = "planted-user-51c2", "planted-item-7d09", "planted-payload-e3b8"
MARKS = (USER, ITEM, PAYLOAD)


class Planted:
    """Collects what was written, and says where a secret or a mark is in it.

    Args:
        secrets: by where each is planted; another one is an entry more, and the setting that holds it.
    """

    def __init__(self, secrets: Mapping[str, str]) -> None:
        self.secrets = dict(secrets)
        self._written: dict[str, bytes] = {}
        self._with_marks: set[str] = set()

    def add(self, where: str, text: str | bytes, *, marks: bool = False) -> None:
        """Take in something that was written; with `marks`, what is there to show users and payloads."""
        name = f"{where} ({len(self._written)})"
        self._written[name] = text if isinstance(text, bytes) else text.encode()
        if marks:
            self._with_marks.add(name)

    def add_commands(self, pipeline: Pipeline, lines: Iterable[str], code: int = 0, *, marks: bool = False) -> None:
        """Run commands, and take in all that they say."""
        for line in lines:
            self.add(f"uemb {line}", pipeline.uemb(*line.split(), code=code), marks=marks)

    def add_pages(self, address: str) -> None:
        """Take in what a worker serves."""
        for path in ("/metrics", "/healthz", "/readyz"):
            with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
                self.add(path, answer.read())

    def add_topic(self, pipeline: Pipeline, topic: str) -> None:
        """Take in all records of a topic."""
        for record in pipeline.read(topic):
            self.add(f"topic {topic}", b"%r %r %r" % (record.key(), record.value(), record.headers()))

    def add_folder(self, folder: Path) -> None:
        """Take in all files, which may hold what a worker keeps of users, and no secret."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.add(f"file {file.relative_to(folder)}", file.read_bytes(), marks=True)

    def found(self) -> Iterator[str]:
        """Where something is that must not be."""
        for where, text in self._written.items():
            for name, secret in self.secrets.items():
                yield from (f"{name} in {where}" for form in forms(secret) if form.encode() in text)
            if where not in self._with_marks:
                yield from (f"{mark} in {where}" for mark in MARKS if mark.encode() in text)


def forms(secret: str) -> set[str]:
    """A secret as it may be written: as it is, in a URL, in JSON or Python's `repr`, in base64 and in hex."""
    data = secret.encode()
    escaped = json.dumps(secret)[1:-1]
    return {secret, escaped, quote(secret, safe=""), base64.b64encode(data).decode().rstrip("="), data.hex()}
