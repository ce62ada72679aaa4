"""The worker's log: readable beside a client that repeats itself, by people and by programs."""

import json
import logging
import re
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from stream.logs import REPEAT_S, JsonLines, NotAgain, TextLines

#: 2026-02-03 04:05:06.789 UTC.
CREATED = 1_770_091_506.789
NEW_LINES = "one\ntwo\r\nthree\u2028four\x85five"


def record(message: str = "done", *args: object, exc: BaseException | None = None) -> logging.LogRecord:
    exc_info = None if exc is None else (type(exc), exc, exc.__traceback__)
    made = logging.LogRecord("stream.worker.app", logging.WARNING, "", 0, message, args, exc_info)
    made.created = CREATED
    return made


def as_json(made: logging.LogRecord, **identity: object) -> dict[str, Any]:
    line = JsonLines(identity).format(made)
    assert line.splitlines() == [line]
    fields: dict[str, Any] = json.loads(line)
    return fields


def run(program: str) -> list[dict[str, Any]]:
    """Objects that a program writes to stderr, on which there must be nothing else."""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    return [json.loads(line) for line in ended.stderr.splitlines()]


def test_a_line_of_text_tells_its_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    line = TextLines(3).format(record("%s done", "all"))
    time_text, _, rest = line.partition(" [3] ")
    assert rest == "WARNING stream.worker.app: all done"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", time_text)
    assert datetime.fromisoformat(time_text) == datetime(2026, 2, 3, 4, 5, 6, 789_000, UTC)


def test_an_object_says_when_who_and_what() -> None:
    fields = as_json(record("%s done", "all"), app="shop", process=0, instance=None)
    assert fields.pop("pid") > 0
    assert fields == {
        "time": "2026-02-03T04:05:06.789Z",
        "level": "WARNING",
        "logger": "stream.worker.app",
        "message": "all done",
        "app": "shop",
        "process": 0,
    }


@pytest.mark.parametrize("message", [NEW_LINES, "a \ud800 half", '{"a": "b"}', "", "ü"])
def test_a_record_is_one_line_whatever_is_in_it(message: str) -> None:
    assert as_json(record("%s", message))["message"] == message


def test_a_record_whose_arguments_do_not_fit_is_told_all_the_same() -> None:
    assert as_json(record("%s and %s", "one"))["message"] == "%s and %s"


def test_an_exception_is_in_fields_of_its_own() -> None:
    try:
        raise KeyError(NEW_LINES)
    except KeyError as exc:
        fields = as_json(record("failed", exc=exc))
    assert fields["message"] == "failed"
    assert fields["exception"] == "KeyError"
    assert fields["traceback"].startswith("Traceback (most recent call last):\n")
    assert as_json(record(exc=json.JSONDecodeError("x", "", 0)))["exception"] == "json.decoder.JSONDecodeError"


@pytest.mark.parametrize(
    ("does", "logger", "exception"),
    [
        ("logging.getLogger('aiokafka.conn').error('a\\nb')", "aiokafka.conn", None),
        ("logging.getLogger('mode.worker').warning('a')", "mode.worker", None),
        ("logging.getLogger('anything').warning('a')", "anything", None),
        ("print_error('no\\nbroker')", "stream.logs", None),
        ("warnings.warn('old')", "py.warnings", None),
        ("1 / 0", "stream.logs", "ZeroDivisionError"),
        ("t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()", "stream.logs", "ZeroDivisionError"),
        ("type('A', (), {'__del__': lambda self: 1 / 0})()", "stream.logs", "ZeroDivisionError"),
    ],
)
def test_whatever_speaks_in_the_process_speaks_json(does: str, logger: str, exception: str | None) -> None:
    (fields,) = run(
        "import logging, threading, warnings; from stream.logs import print_error, setup_logging; "
        f"setup_logging('info', 'json', app='shop'); {does}"
    )
    assert (fields["logger"], fields.get("exception"), fields["app"]) == (logger, exception, "shop")


def test_what_libraries_say_below_a_warning_is_not_written() -> None:
    assert (
        run(
            "import logging; from stream.logs import setup_logging; setup_logging('info', 'json'); "
            "[logging.getLogger(name).info('a') for name in ('aiokafka', 'faust', 'mode', 'anything')]; "
            "logging.getLogger('asyncio').error('a'); logging.getLogger('stream.x').debug('a')"
        )
        == []
    )


def test_what_the_kafka_client_repeats_is_written_once_in_a_while() -> None:
    now_s = [100.0]
    log = NotAgain(lambda: now_s[0])

    def written(name: str, topic: str) -> bool:
        return log.filter(logging.LogRecord(name, logging.ERROR, "", 0, "no topic %s", (topic,), None))

    assert [written("aiokafka.cluster", "a") for _ in range(3)] == [True, False, False]
    assert written("aiokafka.cluster", "b"), "other news are held back"
    assert [written("stream.worker.app", "a") for _ in range(2)] == [True, True], "what others say is held back"
    now_s[0] += REPEAT_S
    assert written("aiokafka.cluster", "a")


def test_what_is_remembered_is_bounded() -> None:
    log = NotAgain(lambda: 0.0)
    for n in range(2_000):
        assert log.filter(logging.LogRecord("aiokafka", logging.ERROR, "", 0, "node %s", (n,), None))
    assert len(log._said) < 1_000


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_tells_of_logins_stays_silent_whoever_sets_up_the_log(form: str) -> None:
    """Faust's own command does so after us, and a logger below one that is named forgets its level."""
    script = f"""
import logging, logging.config
from stream.logs import log_config
logging.getLogger("aiokafka.conn").setLevel(logging.WARNING)
logging.config.dictConfig(log_config("debug", "{form}"))
assert logging.getLogger("aiokafka").isEnabledFor(logging.DEBUG)
assert not logging.getLogger("aiokafka.conn").isEnabledFor(logging.INFO)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
