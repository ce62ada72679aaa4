"""What the inspector makes of two logs: the changelog, and dead letters; read from a list that stands for brokers."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from stream.config import Settings
from stream.core.history import History
from stream.core.history_codec import HistoryCodec, sort_key
from stream.errors import DeliveryError, UembError
from stream.inspector import histories as of_users
from stream.inspector import letters as of_letters
from stream.inspector.histories import KEPT_PARTITIONS, Histories
from stream.inspector.inspector import _replay
from stream.inspector.letters import LettersWatch
from stream.kafka.log_reader import Span
from stream.keys import one_user_per_partition

SETTINGS = Settings()
CODEC = HistoryCodec(SETTINGS.event_types)
NOW_MS = time.time_ns() // 1_000_000


class Record:
    """A record, as the client gives it."""

    def __init__(self, partition: int, offset: int, key: bytes, value: bytes | None, **facts: Any) -> None:
        self._partition, self._offset, self._key, self._value = partition, offset, key, value
        self._headers, self._ts_ms = facts.get("headers", []), facts.get("ts_ms", NOW_MS)

    def partition(self) -> int:
        return self._partition

    def offset(self) -> int:
        return self._offset

    def key(self) -> bytes:
        return self._key

    def value(self) -> bytes | None:
        return self._value

    def headers(self) -> list[tuple[str, bytes]]:
        return self._headers

    def timestamp(self) -> tuple[int, int]:
        return 1, self._ts_ms


class Log:
    """Partitions of one topic; `breaks_after` records a read fails, once."""

    def __init__(self, partitions: int) -> None:
        self.records: list[list[Record]] = [[] for _ in range(partitions)]
        self.breaks_after: int | None = None
        self.is_away = False
        self.reads: list[Span] = []

    def put(self, partition: int, key: bytes, value: bytes | None, **facts: Any) -> None:
        self.records[partition].append(Record(partition, len(self.records[partition]), key, value, **facts))

    def whole(self, _: object, topic: str, partition: int) -> Span | None:
        if self.is_away:
            raise DeliveryError("no answer")
        return Span(topic, partition, 0, len(self.records[partition])) if partition < len(self.records) else None

    def read(self, _: object, spans: list[Span], *args: object, **options: object) -> Iterator[Record]:
        for span in spans:
            self.reads.append(span)
            for record in self.records[span.partition][span.start : span.end]:
                if self.breaks_after is not None:
                    self.breaks_after -= 1
                    if self.breaks_after < 0:
                        self.breaks_after = None
                        raise DeliveryError("no answer")
                yield record


class Consumer:
    """Stands for the client, which the log needs not."""

    def close(self) -> None: ...


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    made = Log(2 * KEPT_PARTITIONS)
    for module in (of_users, of_letters):
        monkeypatch.setattr(module, "open_consumer", lambda *_: Consumer())
        monkeypatch.setattr(module, "whole", made.whole)
        monkeypatch.setattr(module, "read", made.read)
    monkeypatch.setattr(of_letters, "since", lambda _, spans, __: spans)
    monkeypatch.setattr(of_letters, "topic_partitions", lambda *_, **__: len(made.records))
    return made


USERS = one_user_per_partition(2 * KEPT_PARTITIONS)


def put_history(log: Log, partition: int, items: list[str], revision: int = 1, epoch: int = 1) -> None:
    keys = [sort_key(n, item.encode(), b"view") for n, item in enumerate(items)]
    log.put(partition, USERS[partition], History(CODEC, 100, keys, revision=revision).encode(epoch))


def items_of(histories: Histories, partition: int) -> list[str] | None:
    kept = histories.of(USERS[partition].decode(), len(USERS))
    return None if kept is None else [one.item_id for one in kept.history.interactions()]


def test_a_partition_is_read_once_and_then_what_is_new(log: Log) -> None:
    histories = Histories(SETTINGS)
    put_history(log, 3, ["a"])
    assert items_of(histories, 3) == ["a"]
    put_history(log, 3, ["a", "b"], revision=2)
    assert items_of(histories, 3) == ["a", "b"]
    assert [(span.partition, span.start, span.end) for span in log.reads] == [(3, 0, 1), (3, 1, 2)]
    log.put(3, USERS[3], None)
    assert items_of(histories, 3) is None
    histories.close(time.monotonic() + 60)
    with pytest.raises(UembError, match="ends"):
        items_of(histories, 3)


def test_a_read_that_breaks_off_is_made_again(log: Log) -> None:
    histories = Histories(SETTINGS)
    put_history(log, 3, ["a"])
    put_history(log, 3, ["a", "b"], revision=2)
    log.breaks_after = 1
    with pytest.raises(DeliveryError):
        items_of(histories, 3)
    assert items_of(histories, 3) == ["a", "b"]


def test_a_topic_that_was_made_anew_is_read_anew(log: Log) -> None:
    histories = Histories(SETTINGS)
    for revision in (1, 2, 3):
        put_history(log, 3, ["old"], revision=revision)
    assert items_of(histories, 3) == ["old"]
    log.records[3].clear()
    assert items_of(histories, 3) is None
    put_history(log, 3, ["new"])
    assert items_of(histories, 3) == ["new"]


def test_while_brokers_are_away_what_was_read_is_told_with_its_age(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    histories = Histories(SETTINGS)
    put_history(log, 3, ["a"])
    assert items_of(histories, 3) == ["a"]
    put_history(log, 3, ["a", "b"], revision=2)
    log.is_away = True
    assert items_of(histories, 3) == ["a"]
    log.is_away = False
    assert items_of(histories, 3) == ["a"]  # they are not asked again at once: each question would wait for them
    with pytest.MonkeyPatch.context() as later:
        later.setattr(of_users, "_AWAY_S", 0.0)
        assert items_of(histories, 3) == ["a", "b"]
    log.is_away = True
    with pytest.raises(DeliveryError):
        items_of(histories, 4)  # which nobody has read


def test_so_many_partitions_are_kept(log: Log) -> None:
    histories = Histories(SETTINGS)
    for partition in range(KEPT_PARTITIONS + 1):
        put_history(log, partition, [str(partition)])
        assert items_of(histories, partition) == [str(partition)]
    assert len(histories._read) == KEPT_PARTITIONS
    assert items_of(histories, 0) == ["0"]
    assert items_of(histories, 2) == ["2"]  # 1 went for 0
    assert sum(span.partition == 0 for span in log.reads) == 2
    histories.close(time.monotonic() + 60)


def put_letter(log: Log, partition: int = 0, reason: str = "not_json", topic: str = "t", **facts: Any) -> None:
    names = {"reason": reason, "topic": topic, "partition": "0", "offset": "7", "timestamp": "1", "detail": "d"}
    headers = [(f"dlq.{name}", text.encode()) for name, text in names.items()]
    log.put(partition, b"k", b"v", headers=headers, **facts)


def test_letters_are_counted_once_whatever_breaks(log: Log) -> None:
    for _ in range(10):
        put_letter(log)
    watch = LettersWatch(SETTINGS)
    log.breaks_after = 6
    with pytest.raises(DeliveryError):
        watch.look()
    view = watch.look()
    assert dict(view.counts) == {("not_json", "t"): 10}
    assert [fact.place for fact in view.newest["not_json", "t"]] == [f"0:{n}" for n in range(10)]
    put_letter(log, topic="u")
    view = watch.look()
    assert sum(view.counts.values()) == 11
    assert view.written >= 1


def test_a_clock_of_the_far_future_makes_no_minutes(log: Log) -> None:
    put_letter(log, ts_ms=32_503_680_000_000)
    view = LettersWatch(SETTINGS).look()
    (minute,) = view.minutes
    assert abs(minute - NOW_MS // 60_000) < 10


def test_letters_of_a_topic_that_was_made_anew_are_counted_anew(log: Log) -> None:
    watch = LettersWatch(SETTINGS)
    for _ in range(3):
        put_letter(log)
    assert sum(watch.look().counts.values()) == 3
    log.records[0].clear()
    put_letter(log, reason="invalid_id")
    assert dict(watch.look().counts) == {("invalid_id", "t"): 1}


@pytest.mark.parametrize("topic", ["", "x\x03\nrm -rf ~\n", "t" * 250, "$(reboot)", "a b"])
def test_a_command_is_made_of_names_alone(topic: str) -> None:
    assert _replay("not_json", topic) is None
    assert _replay("$(reboot)", "t") is None
    assert _replay("not_json", "t" * 249) == f"uemb dlq replay --reason not_json --topic {'t' * 249}"
