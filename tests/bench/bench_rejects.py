"""CPU of a rejected event beside that of an applied one, in the same worker and run.

    python tests/bench/bench_rejects.py [--events 50000] [--json]

Events of users with full histories first, then as many records that are turned away (half of an unknown type, half no
JSON), each to the dead-letter topic with its headers. Prints the worker's CPU microseconds for each kind.
"""

import argparse
import json
import tempfile
import uuid
from pathlib import Path

from harness import broker

from stream.cli.bench.load import Load, Writer, delete_topics
from stream.cli.bench.process import Ends
from stream.cli.bench.throughput import Setup, measure
from stream.config import load_settings
from stream.kafka.connection import librdkafka_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prefix = f"uemb-rejects-{uuid.uuid4().hex[:8]}"
    with broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        settings = load_settings(bootstrap_servers=bootstrap)
        setup = Setup(settings, prefix, Path(folder), Load())
        ends = Ends(librdkafka_config(settings), setup.partitions)
        try:
            setup.prepare()
            setup.feed(2 * args.events, 0)
            system, output = setup.worker("w")
            with system:
                system.until_claimed(setup.partitions)
                applied = measure(system, ends, output, system.mark(), 2 * args.events)
                setup.until_read(system)
                bad = (
                    value.replace(b'"view"', b'"buy"').replace(b'"like"', b'"buy"') if n % 2 else value[:-1]
                    for n, (_, value) in enumerate(setup.load.events(args.events))
                )
                users = (user for user, _ in setup.load.events(args.events))
                first = system.mark()
                Writer(librdkafka_config(settings), setup.partitions).write(
                    (setup.events, user, user, value) for user, value in zip(users, bad, strict=True)
                )
                rejected = measure(system, ends, f"{prefix}.w.dlq", first, args.events)
        finally:
            ends.close()
            delete_topics(librdkafka_config(settings), prefix)
    found = {
        "applied_cpu_us": applied.cpu_us_per_event,
        "rejected_cpu_us": rejected.cpu_us_per_event,
        "ratio": rejected.cpu_us_per_event / applied.cpu_us_per_event,
    }
    print(json.dumps(found, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
