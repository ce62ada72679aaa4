"""Which interactions a command works with: a file of one's own, MovieLens-100K, or a synthetic stream."""

from itertools import chain
from pathlib import Path

from stream.core.events import event_order
from stream.errors import ConfigError
from stream.feed.dataset import DEFAULT_CACHE_DIR, Dataset, DatasetUnavailable, Note
from stream.feed.event_files import read_file
from stream.feed.movielens import movielens
from stream.feed.shape import NATIVE, FileShape
from stream.feed.synthetic import synthetic
from stream.items.input_files import files_in
from stream.logs import OnProgress


def load(
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
    events_file: str | Path | None = None,
    on_progress: OnProgress | None = None,
    on_note: Note | None = None,
    *,
    shape: FileShape = NATIVE,
) -> Dataset:
    """The file if one is given, else MovieLens-100K, else (one line through `on_note`) the synthetic stream.

    Raises:
        ConfigError: the file can't be read or holds a bad row.
    """
    if events_file is not None:
        return load_file(events_file, shape)
    try:
        return movielens(cache_dir, on_progress)
    except DatasetUnavailable as exc:
        if on_note is not None:
            on_note(f"{exc}; using a synthetic stream instead")
        return synthetic()


def load_file(path: str | Path, shape: FileShape = NATIVE) -> Dataset:
    """Events of one's own, sorted by `event_order`; for the formats see `stream.feed.event_files`.

    Raises:
        ConfigError: the file can't be read, holds no events, or has a bad row.
    """
    rows = chain.from_iterable(read_file(file, shape) for file in files_in([Path(path)]))
    events = sorted(rows, key=event_order)
    if not events:
        msg = f"{path} holds no events"
        raise ConfigError(msg)
    return Dataset(Path(path).name, events, {}, synthetic=False)
