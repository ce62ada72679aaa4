"""The compiled loops, where numba is installed (the extra `fast`); without it the plain ways are taken."""

from functools import cache
from types import ModuleType


@cache
def kernels() -> ModuleType | None:
    """`stream.core.kernels`, loaded when it is first asked for: that takes some 0.4 s and 120 MB."""
    try:
        from stream.core import kernels as found
    except ImportError:
        return None
    return found
