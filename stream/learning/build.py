"""Item vectors out of interactions, by one of two methods, as a folder that a worker can serve."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from stream.core.events import EventRow
from stream.items.space import ItemSpace
from stream.learning.item_vectors import ItemVectors
from stream.learning.ppmi import ppmi_vectors
from stream.learning.two_tables import two_table_vectors

Method = Literal["two-tables", "ppmi"]
_METHODS: Final[Mapping[str, Callable[..., ItemVectors]]] = {"two-tables": two_table_vectors, "ppmi": ppmi_vectors}


def learn(events: Iterable[EventRow], method: Method = "two-tables", **kwargs: Any) -> ItemVectors:
    """Item vectors by a method; other arguments are its own.

    Raises:
        ItemSpaceError: these events can't fill the dimensions.
        ValueError: an argument is out of its range, or there is no such method.
    """
    if method not in _METHODS:
        msg = f"no method {method!r}; choose one of {', '.join(_METHODS)}"
        raise ValueError(msg)
    return _METHODS[method](events, **kwargs)


def build_space(
    events: Iterable[EventRow], path: str | Path, version: str, method: Method = "two-tables", **kwargs: Any
) -> ItemSpace:
    """Learn item vectors and save them as a new folder.

    Raises:
        ItemSpaceError: the events can't fill the dimensions, or the folder exists.
    """
    made = learn(events, method, **kwargs)
    return ItemSpace.save(
        path,
        version,
        made.ids,
        made.vectors,
        metric=made.metric,
        popularity=made.popularity,
        history_vectors=made.history_vectors,
    )
