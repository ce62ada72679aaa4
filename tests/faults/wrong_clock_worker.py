"""A worker whose wall clock is so many seconds off; the argument, negative for behind."""

import sys
import time

OFFSET_S = float(sys.argv[1])
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + OFFSET_S
time.time_ns = lambda: _time_ns() + int(OFFSET_S * 1e9)

from stream.config import load_settings  # noqa: E402
from stream.logs import setup_logging  # noqa: E402
from stream.worker.app import EmbeddingApp  # noqa: E402 - the clock is wrong from the first import on
from stream.worker.run import main  # noqa: E402

setup_logging("info")
main(EmbeddingApp(load_settings()))
