"""What readers do without: the packages of the extra ``[worker]``, and one line for who needs them and lacks some."""

import sys
from functools import cache
from importlib.util import find_spec
from typing import Final

#: One of each kind; pip installs all of the extra or none.
_MODULES: Final = ("aiokafka", "click", "confluent_kafka", "faust", "numba", "pydantic_settings", "rich", "scipy")


@cache
def _missing() -> tuple[str, ...]:
    # One that is loaded is not looked for: Faust's stand-in for itself has no spec.
    return tuple(name for name in _MODULES if name not in sys.modules and find_spec(name) is None)


def need_worker(what: str) -> None:
    """Refuse to go on without the packages that workers and `uemb` need.

    Args:
        what: who asks, as the error's text begins.

    Raises:
        ImportError: some are not installed; its text says what to do.
    """
    if missing := _missing():
        lacks = ", ".join(missing)
        msg = f"{what} needs {lacks}, which readers do without: pip install 'user-embedding-stream[worker]'"
        raise ImportError(msg)
