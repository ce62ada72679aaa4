"""What the benchmark scripts share: the broker in KAFKA_BOOTSTRAP_SERVERS, or one of their own."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kafka_broker import KafkaBroker, why_unavailable


@contextmanager
def broker() -> Iterator[str]:
    """A real Kafka; yields its address."""
    if reason := why_unavailable():
        sys.exit(reason)
    with KafkaBroker() as kafka:
        yield kafka.bootstrap
