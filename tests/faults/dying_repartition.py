"""`uemb repartition` that kills itself, as by SIGKILL, once so many batches of records are acknowledged."""

import os
import signal
import sys
from typing import Any

from stream.cli.root import main
from stream.worker import repartition

left = int(sys.argv[1])
write = repartition.write_all


def dying(*arguments: Any) -> None:
    global left
    write(*arguments)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


repartition.write_all = dying
sys.argv = ["uemb", "repartition", "--partitions", sys.argv[2]]
main()
