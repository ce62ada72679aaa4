"""The command group ``uemb dlq``: what was turned away, why, and sending it again after a fix."""

import base64
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stream.cli.terminal import out, print_json, progress_bar
from stream.config import load_settings
from stream.errors import ConfigError

if TYPE_CHECKING:
    from stream.kafka.dead_letters import Letter
    from stream.kafka.letter_reader import Filter

_Command = TypeVar("_Command", bound=Callable[..., None])


@click.group()
def dlq() -> None:
    """Look at dead letters, and replay them."""


def _filters(command: _Command) -> _Command:
    """Options that choose letters."""
    for option in (
        click.option("--letter", "letters", multiple=True, help="this one, as partition:offset; repeatable"),
        click.option("--until", help="written before this time (ISO 8601, or epoch milliseconds)"),
        click.option("--since", help="written at or after this time (ISO 8601, or epoch milliseconds)"),
        click.option("--topic", "topics", multiple=True, help="from this input topic; repeatable"),
        click.option("--reason", "reasons", multiple=True, help="turned away for this reason; repeatable"),
    ):
        command = option(command)
    return command


def _filter(
    reasons: tuple[str, ...],
    topics: tuple[str, ...],
    since: str | None,
    until: str | None,
    letters: tuple[str, ...],
) -> "Filter":
    from stream.core.events import Reason
    from stream.kafka.letter_reader import Filter

    if unknown := set(reasons) - {str(reason) for reason in Reason}:
        msg = f"there is no reason {sorted(unknown)[0]!r}; there are {', '.join(Reason)}"
        raise ConfigError(msg)
    return Filter(
        frozenset(reasons),
        frozenset(topics),
        _ms("--since", since),
        _ms("--until", until),
        frozenset(map(_place, letters)),
    )


def _place(letter: str) -> tuple[int, int]:
    partition, _, offset = letter.partition(":")
    if not (partition.isdecimal() and offset.isdecimal()):
        msg = "name a letter as partition:offset, as `uemb dlq list --records` prints it"
        raise ConfigError(msg)
    return int(partition), int(offset)


def _ms(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    if text.isdecimal():
        return min(int(text), (1 << 63) - 1)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        msg = f"{option}: write an ISO 8601 time such as 2026-01-31T12:00:00Z, or epoch milliseconds"
        raise ConfigError(msg) from exc
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


@dlq.command("list")
@_filters
@click.option("--records", is_flag=True, help="one line per letter instead of counts; never its payload")
@click.option("--json", "as_json", is_flag=True, help="one JSON document per line")
def list_letters(
    reasons: tuple[str, ...],
    topics: tuple[str, ...],
    since: str | None,
    until: str | None,
    letters: tuple[str, ...],
    records: bool,
    as_json: bool,
) -> None:
    """Count dead letters by reason and topic."""
    from stream.kafka.dead_letters import Header
    from stream.kafka.letter_reader import read_letters

    wanted = _filter(reasons, topics, since, until, letters)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    with progress_bar("read", "dead letters") as update:
        for letter in read_letters(load_settings(), wanted, update):
            if not records:
                groups[letter.reason or "not a letter", letter.text(Header.TOPIC)].append(letter.timestamp_ms)
                continue
            facts = _facts(letter)
            if as_json:
                print_json(facts)
            else:
                out.print("  ".join(str(value) for value in facts.values()))
    for (reason, topic), times in sorted(groups.items()):
        facts = {"reason": reason, "topic": topic, "count": len(times)}
        facts |= {"first": _time(min(times)), "last": _time(max(times))}
        if as_json:
            print_json(facts)
        else:
            out.print(f"{facts['count']:>9,}  {reason}  {topic}  {facts['first']} to {facts['last']}")


def _facts(letter: "Letter") -> dict[str, Any]:
    """What may be said of a letter without its payload."""
    from stream.kafka.dead_letters import Header

    return {
        "letter": f"{letter.partition}:{letter.offset}",
        "time": _time(letter.timestamp_ms),
        "reason": letter.reason or "not a letter",
        "source": ":".join(map(letter.text, (Header.TOPIC, Header.PARTITION, Header.OFFSET))),
        "bytes": letter.value_size,
        "detail": letter.text(Header.DETAIL),
    }


@dlq.command()
@click.argument("letter")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def show(letter: str, as_json: bool) -> None:
    """Show one LETTER (partition:offset, as `uemb dlq list --records` prints it) whole, payload included."""
    from stream.kafka.letter_reader import Filter, read_letters

    wanted = Filter(letters=frozenset([_place(letter)]))
    settings = load_settings()
    found = next(read_letters(settings, wanted), None)
    if found is None:
        msg = f"{settings.dlq_topic} holds no letter {letter}"
        raise ConfigError(msg)
    document = {
        **_facts(found),
        "key": _readable(found.key),
        "value": _readable(found.value),
        "headers": [[name, _readable(value)] for name, value in found.headers],
    }
    if as_json:
        print_json(document)
        return
    for name, value in document.items():
        out.print(f"{name}: {value}")


def _readable(data: bytes | None) -> Any:
    """UTF-8 as text, null as None, anything else in base64."""
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


@dlq.command()
@_filters
@click.option("--dry-run", is_flag=True, help="only count what would be sent")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def replay(
    reasons: tuple[str, ...],
    topics: tuple[str, ...],
    since: str | None,
    until: str | None,
    letters: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send dead letters to their input topics again, once what was wrong is mended.

    Key, value and headers are the rejected record's own, the partition is that of its key. Letters stay in the
    dead-letter topic; sending one twice changes no history. What is still at fault is turned away again: each replay
    adds a new dead letter for it, so replay by --reason or --letter what the fix has mended.
    """
    from stream.cli.dlq.replay import Replayer
    from stream.kafka.letter_reader import read_letters

    settings = load_settings()
    wanted = _filter(reasons, topics, since, until, letters)
    with progress_bar("read", "dead letters") as update, Replayer(settings, dry_run=dry_run) as replayer:
        report = replayer.replay(read_letters(settings, wanted, update))
    if as_json:
        print_json({"sent": report.sent, "dry_run": dry_run, "left": dict(report.left)})
        return
    why = {"foreign": "of no input topic of these settings", "keyless": "without a key", "gone": "no longer there"}
    left = "".join(f", {n:,} left ({why[cause]})" for cause, n in sorted(report.left.items()))
    out.print(f"{report.sent:,} {'would be sent' if dry_run else 'sent again'}{left}")


def _time(ts_ms: int) -> str:
    return datetime.fromtimestamp(ts_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
