"""Options that describe files of events, for each command that reads some."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Final, NamedTuple, get_args

import click

from stream.config import Settings, load_settings
from stream.core.events import TsUnit
from stream.errors import ConfigError
from stream.feed.shape import FileShape

_DELIMITERS: Final = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}


class FileOptions(NamedTuple):
    """What the options say of files of events; None for what they leave to the settings."""

    fields: str | None = None
    ts_unit: TsUnit | None = None
    kind: str | None = None
    columns: str | None = None
    delimiter: str | None = None


def file_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options, as its argument `look`."""

    @click.option("--fields", help="names in the files, user_id=uid,item_id=sku; default UEMB_EVENT_FIELDS")
    @click.option("--ts-unit", type=click.Choice(get_args(TsUnit)), help="time unit of the files")
    @click.option("--type", "kind", help="type of all rows, for files that have none")
    @click.option("--columns", help="columns of CSV without a header, user_id,item_id,_,type,ts (_ is not read)")
    @click.option("--delimiter", help="between the columns of CSV: one character, or tab; found by itself as a rule")
    @wraps(command)
    def with_look(
        *args: Any,
        fields: str | None,
        ts_unit: TsUnit | None,
        kind: str | None,
        columns: str | None,
        delimiter: str | None,
        **more: Any,
    ) -> None:
        command(*args, look=FileOptions(fields, ts_unit, kind, columns, delimiter), **more)

    return with_look


def shape_of_files(settings: Settings, look: FileOptions, topic: str | None = None) -> FileShape:
    """What the files look like: as events on the topics do, but for what the options say.

    Args:
        settings: describe the topics.
        look: the options.
        topic: takes all rows; its type of its own, if it has one, is theirs.

    Raises:
        ConfigError: an option is wrong, or contradicts the settings.
    """
    try:
        named = settings if look.fields is None else load_settings(event_fields=look.fields)
    except ConfigError as exc:
        raise ConfigError(str(exc).replace("UEMB_EVENT_FIELDS", "--fields")) from exc
    if topic is not None and topic not in settings.event_topics:
        msg = f"--topic must be one of UEMB_EVENT_TOPICS ({', '.join(settings.event_topics)})"
        raise ConfigError(msg)
    own = settings.event_type_by_topic.get(topic) if topic is not None else None
    if look.kind is not None and own is not None and look.kind != own:
        msg = f"--type {look.kind}: all events of the topic {topic} are of the type {own} (UEMB_EVENT_TYPE_BY_TOPIC)"
        raise ConfigError(msg)
    kind = look.kind or own
    if kind is not None and kind not in settings.event_types:
        msg = f"the type {kind} is not among UEMB_EVENT_TYPES, so a worker would not take these events"
        raise ConfigError(msg)
    delimiter = None if look.delimiter is None else _DELIMITERS.get(look.delimiter, look.delimiter)
    if delimiter is not None and (len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n'):
        msg = f"--delimiter {look.delimiter!r}: it must be one character, as ';', or tab"
        raise ConfigError(msg)
    columns = None if look.columns is None else tuple(name.strip() for name in look.columns.split(","))
    return FileShape(named.event_fields, look.ts_unit or settings.event_ts_unit, kind, columns, delimiter)
