"""What ends with the block that it was made for."""

from types import TracebackType
from typing import Self


class Closing:
    """Closes itself at the end of a `with`."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
