r"""Where producers keep what an event needs: paths into JSON documents, as ``UEMB_EVENT_FIELDS`` writes them.

``product.id`` leads into objects, ``items[0].id`` to an element of an array, and ``items[].id`` to each of them, which
makes one interaction of every element. A dot or bracket that belongs to a key has a backslash before it: ``user\.id``.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, NamedTuple

#: A key, the index of an element, or each element (None).
Step = str | int | None
_STEP: Final = re.compile(r"((?:[^.\[\]\\]|\\.)+)|\[(\d{0,6})\]")
_PATH_MAX_CHARS: Final = 200
#: Elements of one event that are interactions at most. A record may hold a hundred thousand, each of which would be
#: published as a record of its own; a history keeps the newest hundred.
MAX_ELEMENTS: Final = 1_000


class NoValue(Exception):
    """A document has nothing at a path, or not what the path leads through."""

    def __init__(self, detail: str, *, missing: bool) -> None:
        super().__init__(detail)
        self.missing = missing


class FieldPath(NamedTuple):
    """A path, taken apart.

    Attributes:
        text: as it is written.
        to: its steps, up to the array whose elements are interactions if there is one.
        inside: the steps inside each element; None where there is no such array.
    """

    text: str
    to: tuple[str | int, ...]
    inside: tuple[str | int, ...] | None

    @property
    def column(self) -> str:
        """Name of the column of a table that it stands for."""
        return re.sub(r"\\(.)", r"\1", self.text)


@lru_cache(1024)
def parse_path(text: str) -> FieldPath:
    """Take a path apart.

    Raises:
        ValueError: it is none; the text says why.
    """
    if len(text) > _PATH_MAX_CHARS or not text.isprintable():  # what isn't printable are halves of surrogates, too
        msg = f"a path must have at most {_PATH_MAX_CHARS} printable characters"
        raise ValueError(msg)
    steps: list[Step] = []
    at = 0
    while at < len(text):
        found = _STEP.match(text, at)
        if found is None or (found[1] is None and not steps):
            msg = f"{text!r} is no path: write keys with dots between them, [] or [0] after the key of an array"
            raise ValueError(msg)
        steps.append(re.sub(r"\\(.)", r"\1", found[1]) if found[1] is not None else int(found[2]) if found[2] else None)
        at = found.end()
        if at < len(text) and text[at] == ".":
            at += 1
            if at == len(text) or text[at] in ".[":
                at = len(text) + 1
        elif at < len(text) and text[at] != "[":
            at = len(text) + 1
    if at != len(text) or not steps:
        msg = f"{text!r} is no path: write keys with dots between them"
        raise ValueError(msg)
    if steps.count(None) > 1:
        msg = f"{text!r} has two []: the elements of one array become interactions"
        raise ValueError(msg)
    cut = steps.index(None) if None in steps else len(steps)
    before, after = steps[:cut], steps[cut + 1 :] if cut < len(steps) else None
    return FieldPath(text, tuple(before), None if after is None else tuple(after))  # type: ignore[arg-type]


def array_of(paths: Sequence[FieldPath]) -> tuple[str | int, ...] | None:
    """Steps to the array whose elements are interactions; None where each document is one.

    Raises:
        ValueError: they name two arrays.
    """
    arrays = {path.to for path in paths if path.inside is not None}
    if len(arrays) > 1:
        msg = f"{' and '.join(path.text for path in paths if path.inside is not None)} go through different arrays"
        raise ValueError(msg)
    return next(iter(arrays), None)


class Values:
    """The values at `paths` of one document after another.

    >>> values = Values([parse_path("user.id"), parse_path("items[].sku")])
    >>> values.of({"user": {"id": 42}, "items": [{"sku": "a"}, {"sku": "b"}]})
    [(42, 'a'), (42, 'b')]

    Raises:
        ValueError: they name two arrays.
    """

    def __init__(self, paths: Sequence[FieldPath]) -> None:
        self._paths = paths
        self._array = array_of(paths)
        keys = [path.to[0] for path in paths if path.inside is None and len(path.to) == 1]
        self._pick = itemgetter(*keys) if len(keys) == len(paths) > 1 else None

    def of(self, document: Any) -> list[tuple[Any, ...]]:
        """The values: once, or for each element of the array that the paths go through.

        Raises:
            NoValue: there is nothing at one of them.
        """
        if self._pick is not None:  # as a rule, all is at the top: a fifth of the time
            try:
                return [self._pick(document)]
            except (TypeError, LookupError):
                pass  # what is missing is found out below
        paths, array = self._paths, self._array
        if array is None:
            return [tuple([_follow(document, path.to, path) for path in paths])]
        through = next(path for path in paths if path.inside is not None)
        elements = _follow(document, array, through)
        if not isinstance(elements, list):
            msg = f"expected an array on the path {through.text}"
            raise NoValue(msg, missing=False)
        if len(elements) > MAX_ELEMENTS:
            msg = f"more than {MAX_ELEMENTS} elements on the path {through.text}"
            raise NoValue(msg, missing=False)
        if not elements:
            return []
        # what is outside of the array is the same for all
        outside = {path: _follow(document, path.to, path) for path in paths if path.inside is None}
        return [
            tuple([outside[path] if path.inside is None else _follow(element, path.inside, path) for path in paths])
            for element in elements
        ]


def _follow(document: Any, steps: Sequence[str | int], path: FieldPath) -> Any:
    value = document
    try:
        for step in steps:
            if type(value) is str:  # which has an element 0, too
                break
            value = value[step]
        else:
            return value
    except (TypeError, LookupError):
        pass
    raise _nothing(document, steps, path)


def _nothing(value: Any, steps: Sequence[str | int], path: FieldPath) -> NoValue:
    """Why there is nothing at a path."""
    for step in steps:
        if not isinstance(value, dict if isinstance(step, str) else list):
            kind = "object" if isinstance(step, str) else "array"
            return NoValue(f"expected an {kind} on the path {path.text}", missing=False)
        if not (step in value if isinstance(step, str) else step < len(value)):
            break
        value = value[step]  # type: ignore[index]
    return NoValue(f"no field at the path {path.text}", missing=True)
