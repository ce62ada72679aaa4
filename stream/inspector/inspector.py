"""All that the page shows, from the sources behind it; any thread may ask."""

import base64
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, Final, TypeVar, cast

from stream.config import Settings
from stream.core.events import Reason
from stream.errors import ConfigError, StoreError, UembError
from stream.foreign_text import one_line
from stream.inspector.checklist import checks_of
from stream.inspector.crowd import crowd
from stream.inspector.histories import Histories
from stream.inspector.letters import LettersWatch
from stream.inspector.now import snapshot
from stream.inspector.sources import Source, now_ms
from stream.inspector.store import StoreWatch
from stream.inspector.users import Question, UserView
from stream.inspector.versions import Loaded, Versions, VersionsView, VersionsWatch
from stream.inspector.workers import Workers
from stream.kafka.letter_reader import Filter, read_letters
from stream.kv.protocol import KVReader
from stream.rollout.comparison import Shown, VersionReport, compare

#: Users that a checklist compares.
_SAMPLE: Final = 300
#: A map and a comparison take a second of work; who asks again within this gets the same.
_KEPT_S: Final = 5.0
#: Bytes of a key, a value or a header that are shown, and how many headers.
_SHOWN_BYTES: Final = 4_096
_HEADERS: Final = 50
#: What looks or reads for longer when all is to end is left behind.
_STOP_S: Final = 3.0
_Made = TypeVar("_Made")
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")


class Inspector:
    """The sources, and answers from them.

    Args:
        settings: the workers' own.
        workers: addresses at which workers answer.
        titles: of items, by id.

    Raises:
        ConfigError: an address is none.
    """

    def __init__(self, settings: Settings, workers: Sequence[str], titles: Mapping[str, str]) -> None:
        self._settings = settings
        self._titles = titles
        self._workers, self._store = Workers(workers), StoreWatch(settings.kv_url)
        self._versions, self._dead = VersionsWatch(settings), LettersWatch(settings)
        self._histories, self._loaded = Histories(settings), Loaded(settings.history_limit)
        self._users = UserView(settings, self._histories, titles)
        self._of_workers = Source("workers", self._workers.look)
        self._of_store = Source("store", self._store.look)
        self._of_versions = Source("versions", self._versions.look)
        self._of_letters = Source("letters", self._dead.look)
        self._kept: dict[tuple[str, Versions], tuple[float, object]] = {}
        self._making = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def start(self) -> None:
        """Begin to look."""
        for source in self._sources:
            source.start()

    def stop(self) -> None:
        """Look no more, and let go of everything."""
        for source in self._sources:
            source.stop()
        until_s = time.monotonic() + _STOP_S
        let_go = (self._workers.close, self._store.close, self._versions.close, self._dead.close)
        for source, close in zip(self._sources, let_go, strict=True):
            if source.has_ended(until_s):
                close()
        self._histories.close(until_s)

    @property
    def _sources(self) -> tuple[Source[Any], ...]:
        return self._of_workers, self._of_store, self._of_versions, self._of_letters

    def now(self) -> dict[str, Any]:
        """The state at this moment."""
        document = snapshot(
            now_ms(),
            self._of_workers.reading,
            self._of_store.reading,
            self._of_versions.reading,
            self._of_letters.reading,
        )
        document["reading"] = self._histories.progress
        return document

    def about(self) -> dict[str, Any]:
        """What does not change while the page is open."""
        return {"types": list(self._settings.event_types)}

    def user(self, question: Question) -> dict[str, Any]:
        """All about a user; see `stream.inspector.users.UserView.answer`."""
        view = self._view()
        pair = self._loaded.pair(view, question.versions or self._read())
        return self._users.answer(question, pair, self._reader(), view.partitions)

    def letters(self) -> dict[str, Any]:
        """Dead letters by kind and minute, with the newest of each kind and what sends it again."""
        reading = self._of_letters.reading
        if reading.seen is None:
            raise ConfigError(reading.error or "the dead letters are being read; ask again in a moment")
        seen = reading.seen
        return {
            "topic": self._settings.dlq_topic,
            "since_ms": seen.since_ms,
            "kinds": [
                {
                    "reason": reason,
                    "topic": topic,
                    "count": count,
                    "newest": [fact._asdict() for fact in reversed(seen.newest.get((reason, topic), []))],
                    "replay": _replay(reason, topic),
                }
                for (reason, topic), count in sorted(seen.counts.items(), key=lambda one: -one[1])
            ],
            "minutes": [
                {"minute": minute, "counts": [[*kind, n] for kind, n in sorted(counts.items())]}
                for minute, counts in sorted(seen.minutes.items())
            ],
        }

    def letter(self, partition: int, offset: int) -> dict[str, Any]:
        """One letter, with as much of its payload as is shown."""
        with closing(read_letters(self._settings, Filter(letters=frozenset([(partition, offset)])))) as found:
            letter = next(found, None)
        if letter is None:
            msg = f"{self._settings.dlq_topic} holds no letter {partition}:{offset}"
            raise ConfigError(msg)
        return {
            "place": f"{partition}:{offset}",
            "key": _shown(letter.key),
            "value": _shown(letter.value),
            "headers": [[name[:200], _shown(value)] for name, value in letter.headers[:_HEADERS]],
            "replay": f"uemb dlq replay --letter {partition}:{offset}",
        }

    def crowd(self, versions: Versions | None) -> dict[str, Any]:
        """The map; see `stream.inspector.crowd.crowd`."""
        pair = self._loaded.pair(self._view(), versions or self._read())
        user_version, space = pair.encoder.version, pair.space
        key = "crowd", (user_version, space.version)
        return self._once(key, lambda: crowd(self._settings, self._store.reader, user_version, space, self._titles))

    def checklist(self, versions: Versions | None) -> dict[str, Any]:
        """Whether a pair may be activated: what speaks for it and what against, beside the served one."""
        view = self._view()
        versions = versions or next((pair.versions for pair in view.pairs if pair.versions != view.served), None)
        if versions is None or view.served is None:
            return {"checks": [], "compared": None, "activate": []}
        found = [one for one in view.pairs if one.versions == versions]
        if not found:
            msg = "no vectors are published of these versions"
            raise ConfigError(msg)
        report, problem = self._once(("comparison", versions), lambda: self._compared(view, versions))
        return checks_of(found[0], view, report, problem)

    def _compared(self, view: VersionsView, versions: Versions) -> tuple[VersionReport | None, str | None]:
        """A pair beside the served one, or why it can't be compared; neither of the served one itself."""
        try:
            served, other = self._loaded.pair(view, None), self._loaded.pair(view, versions)
            if versions == view.served:
                return None, None
            shown = [Shown(pair.encoder.version, pair.space) for pair in (served, other)]
            return compare(self._settings, self._store.reader, shown[0], shown[1], _SAMPLE), None
        except UembError as exc:
            return None, one_line(str(exc))

    def _once(self, key: tuple[str, Versions], make: Callable[[], _Made]) -> _Made:
        """Make something unless it was made a moment ago; each thing once at a time, whoever asks."""
        with self._making:
            lock = self._locks.setdefault(key[0], threading.Lock())
        with lock:
            kept = self._kept.get(key)
            if kept is not None and time.monotonic() - kept[0] < _KEPT_S:
                return cast(_Made, kept[1])
            document = make()
            with self._making:
                self._kept = {k: v for k, v in self._kept.items() if time.monotonic() - v[0] < _KEPT_S}
                self._kept[key] = time.monotonic(), document
            return document

    def _view(self) -> VersionsView:
        reading = self._of_versions.reading
        if reading.seen is None:
            raise UembError(reading.error or "the topics are being read; ask again in a moment")
        self._loaded.forget(reading.seen)
        return reading.seen

    def _read(self) -> Versions | None:
        """The pair that readers follow, as the store says; None where that is not known."""
        seen = self._of_store.reading.seen
        current = None if seen is None else seen.meta.current
        return None if current is None else (current.user_version, current.item_version)

    def _reader(self) -> KVReader | None:
        try:
            return self._store.reader
        except StoreError:
            return None


def _replay(reason: str, topic: str) -> str | None:
    """The command that sends a kind's letters again; None for what is no letter of ours."""
    if reason not in {str(known) for known in Reason} or not _TOPIC.fullmatch(topic):  # anybody may write a letter
        return None
    return shlex.join(["uemb", "dlq", "replay", "--reason", reason, "--topic", topic])


def _shown(data: bytes | None) -> dict[str, Any] | None:
    """Bytes as text where they are, in base64 otherwise, and whether that is all of them."""
    if data is None:
        return None
    head = data[:_SHOWN_BYTES]
    try:
        text, is_text = head.decode(), True
    except UnicodeDecodeError as exc:
        if len(data) > len(head) and exc.start >= len(head) - 3:  # cut within a character
            text, is_text = head[: exc.start].decode(), True
        else:
            text, is_text = base64.b64encode(head).decode(), False
    return {"text": text, "is_text": is_text, "bytes": len(data), "whole": len(head) == len(data)}
