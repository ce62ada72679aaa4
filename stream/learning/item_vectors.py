"""Item vectors out of interactions, by one of two methods, as a folder that a worker can serve."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from stream.core.events import EventRow
from stream.core.formulas import Float64
from stream.items.manifest import Metric
from stream.items.space import ItemSpace

DIM: Final = 48

Note = Callable[[str], None]
Method = Literal["two-tables", "ppmi"]


class ItemVectors(NamedTuple):
    """What was learned of n items.

    Attributes:
        ids: their ids, row order.
        vectors: what the index holds, float64 [n, d].
        popularity: how often each was interacted with, float64 [n].
        metric: the similarity that the vectors are made for.
        history_vectors: what they count as in a history, float64 [n, d]; None for `vectors`.
    """

    ids: list[str]
    vectors: Float64
    popularity: Float64
    metric: Metric = "cosine"
    history_vectors: Float64 | None = None


def learn(events: Iterable[EventRow], method: Method = "two-tables", **kwargs: Any) -> ItemVectors:
    """Item vectors by a method; other arguments are its own.

    Raises:
        ItemSpaceError: these events can't fill the dimensions.
        ValueError: an argument is out of its range, or there is no such method.
    """
    # Imported here: they are made of this module's types.
    from stream.learning.ppmi import ppmi_vectors
    from stream.learning.two_tables import two_table_vectors

    methods: Mapping[str, Callable[..., ItemVectors]] = {"two-tables": two_table_vectors, "ppmi": ppmi_vectors}
    if method not in methods:
        msg = f"no method {method!r}; choose one of {', '.join(methods)}"
        raise ValueError(msg)
    return methods[method](events, **kwargs)


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
