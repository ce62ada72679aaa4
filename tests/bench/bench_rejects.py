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

from stream.bench.load import Load, Writer, delete_topics
from stream.bench.process import Ends
from stream.bench.throughput import Stage, measure
from stream.config import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prefix = f"uemb-rejects-{uuid.uuid4().hex[:8]}"
    with broker() as bootstrap, tempfile.TemporaryDirectory() as folder:
        settings = load_settings(bootstrap_servers=bootstrap)
        stage = Stage(settings, prefix, Path(folder), Load())
        ends = Ends(settings.librdkafka_client, stage.partitions)
        try:
            stage.prepare()
            stage.feed(2 * args.events, 0)
            system, output = stage.worker("w")
            with system:
                system.until_claimed(stage.partitions)
                applied = measure(system, ends, output, system.mark(), 2 * args.events)
                stage.until_read(system)
                bad = (
                    value.replace(b'"view"', b'"buy"').replace(b'"like"', b'"buy"') if n % 2 else value[:-1]
                    for n, (_, value) in enumerate(stage.load.events(args.events))
                )
                users = (user for user, _ in stage.load.events(args.events))
                first = system.mark()
                Writer(settings.librdkafka_client, stage.partitions).write(
                    (stage.events, user, user, value) for user, value in zip(users, bad, strict=True)
                )
                rejected = measure(system, ends, f"{prefix}.w.dlq", first, args.events)
        finally:
            ends.close()
            delete_topics(settings.librdkafka_client, prefix)
    found = {
        "applied_cpu_us": applied.cpu_us_per_event,
        "rejected_cpu_us": rejected.cpu_us_per_event,
        "ratio": rejected.cpu_us_per_event / applied.cpu_us_per_event,
    }
    print(json.dumps(found, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
