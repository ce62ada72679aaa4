"""The workload of the benchmarks: an item space, users with full histories, and events that go on; seeded."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import numpy as np
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from stream.config import Settings
from stream.core.history import History
from stream.core.history_codec import HistoryCodec, sort_key
from stream.errors import NotAllowed
from stream.items.space import ItemSpace
from stream.kafka.grants import REFUSED
from stream.keys import partition_of

TYPES: Final = ("view", "like")
START_MS: Final = 1_700_000_000_000
EPOCH: Final = 1  # of the states that a run starts with
ITEM_VERSION: Final = "bench_v1"
_STEP_MS: Final = 10

#: Makes the text of a user's or an item's id.
MakeId = Callable[[int], str]
IDS: Final[dict[str, MakeId]] = {
    "integer": str,
    "uuid": lambda n: str(UUID(int=(n * 0x9E3779B97F4A7C15F39CC0605CEDC835) % (1 << 128), version=4)),
    "text": lambda n: f"sku-{n:08d}-blue-xl",
}


@dataclass(frozen=True)
class Load:
    """Users with histories of `length` interactions each, in an item space of `items` rows and `dim` dimensions."""

    users: int = 5_000
    length: int = 100
    items: int = 20_000
    dim: int = 48
    seed: int = 7
    user_id: MakeId = str
    item_id: MakeId = str

    def space(self, folder: Path) -> ItemSpace:
        """Write and load the item space."""
        rows = np.random.default_rng(self.seed).normal(size=(self.items, self.dim))
        return ItemSpace.save(folder, ITEM_VERSION, [self.item_id(n) for n in range(self.items)], rows)

    def histories(self) -> Iterator[tuple[int, list[tuple[int, int, str]]]]:
        """Each user's number with (event time, item number, type), oldest first."""
        rng = np.random.default_rng(self.seed + 1)
        for user in range(self.users):
            items = rng.integers(self.items, size=self.length).tolist()
            first = START_MS - (self.length + 1) * 3_600_000 + user
            yield user, [(first + n * 3_600_000, item, TYPES[item % 2]) for n, item in enumerate(items)]

    def events(self, count: int, start: int = 0) -> Iterator[tuple[bytes, bytes]]:
        """Key and JSON value of `count` events from number `start` on, of random users in the order of time."""
        rng = np.random.default_rng((self.seed, start))
        users, items = rng.integers(self.users, size=count).tolist(), rng.integers(self.items, size=count).tolist()
        for n, (user, item) in enumerate(zip(users, items, strict=True), start):
            user_id, item_id = self.user_id(user), self.item_id(item)
            event = {
                "user_id": int(user_id) if self.user_id is str else user_id,
                "item_id": int(item_id) if self.item_id is str else item_id,
                "type": TYPES[item % 2],
                "ts": START_MS + n * _STEP_MS,
            }
            yield user_id.encode(), json.dumps(event).encode()

    def states(self, settings: Settings) -> Iterator[tuple[bytes, bytes]]:
        """User id and stored state of each user, as a worker writes them."""
        codec = HistoryCodec(settings.event_types)
        for user, interactions in self.histories():
            keys = [sort_key(ts, self.item_id(item).encode(), kind.encode()) for ts, item, kind in interactions]
            history = History(codec, settings.history_limit, sorted(keys), revision=len(keys))
            yield self.user_id(user).encode(), history.encode(EPOCH)

    def tables(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """User id, key and value of each user in a plain Faust table's changelog."""
        for user, interactions in self.histories():
            name = self.user_id(user)
            yield name.encode(), json.dumps(name).encode(), json.dumps([list(i) for i in interactions]).encode()


def make_topics(client: dict[str, Any], topics: dict[str, dict[str, str]], partitions: int) -> None:
    """Create topics with their settings.

    Raises:
        NotAllowed: they may not be created.
    """
    admin = AdminClient({**client, "log_level": 0})
    new = [NewTopic(name, partitions, 1, config=config) for name, config in topics.items()]
    for name, future in admin.create_topics(new, operation_timeout=30).items():
        try:
            future.result()
        except KafkaException as exc:
            if exc.args[0].code() not in REFUSED:
                raise
            raise NotAllowed(name, to="Create topic") from exc


def delete_topics(client: dict[str, Any], prefix: str) -> None:
    """Remove all topics of a run."""
    admin = AdminClient({**client, "log_level": 0})
    names = [name for name in admin.list_topics(timeout=30).topics if name.startswith(prefix)]
    for future in admin.delete_topics(names, operation_timeout=30).values() if names else ():
        future.exception()


class Writer:
    """Writes records of any kind, each to its user's partition, and waits for all."""

    def __init__(self, client: dict[str, Any], partitions: int) -> None:
        self._producer = Producer(
            {**client, "linger.ms": 20, "compression.type": "lz4", "acks": "all", "log_level": 0, "batch.size": 500_000}
        )
        self._partitions = partitions

    def write(self, records: Iterator[tuple[str, bytes, bytes, bytes]]) -> None:
        """Write (topic, user id, key, value) records."""
        for topic, user, key, value in records:
            partition = partition_of(user, self._partitions)
            while True:
                try:
                    self._producer.produce(topic, value, key, partition)
                    break
                except BufferError:
                    self._producer.poll(0.1)
        self._producer.flush()
