"""`uemb repartition` that kills itself, as by SIGKILL, once so many batches of records are acknowledged."""

import os
import signal
import sys
from typing import Any

from stream.cli.root import main
from stream.worker.repartition import Repartition

left = int(sys.argv[1])
write = Repartition._write


def dying(self: Repartition, *arguments: Any) -> None:
    global left
    write(self, *arguments)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


Repartition._write = dying  # type: ignore[method-assign]
sys.argv = ["uemb", "repartition", "--partitions", sys.argv[2]]
main()
