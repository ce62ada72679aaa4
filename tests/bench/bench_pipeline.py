"""`uemb bench` on a real Kafka of its own: the worker beside a plain Faust agent, latency, memory, bytes per user.

python tests/bench/bench_pipeline.py [--quick] [--json]
"""

import os
import sys

from harness import broker

from stream.cli.root import main

if __name__ == "__main__":
    with broker() as bootstrap:
        os.environ["UEMB_BOOTSTRAP_SERVERS"] = bootstrap
        sys.argv[1:1] = ["bench"]
        main()
