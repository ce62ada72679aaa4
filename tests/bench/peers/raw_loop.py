"""The peer without guarantees: confluent-kafka, users in memory, numpy over each poll, no claim, no order, no restart.

Reads JSON events, keeps the running sums of all users in one array, writes history and vector to two topics and two
RocksDBs, and commits whatever became of that. It is the least that such a job can do in Python. One JSON argument.
"""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from confluent_kafka import Consumer, Producer
from rocksdict import Options, Rdict, WriteBatch

from stream.cli.bench.load import Load
from stream.core.formulas import ALPHA_SHORT, DECAY_LONG, DECAY_SHORT

LIMIT = 100


class Event(msgspec.Struct):
    user_id: int
    item_id: int


def database(path: Path) -> Rdict:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    return Rdict(str(path), options)


class Sums:
    """Histories as rings of rows, and both sums of each user."""

    def __init__(self, load: Load, vectors: np.ndarray) -> None:
        self.vectors = vectors
        self.powers = np.exp(-np.array([DECAY_LONG, DECAY_SHORT]))[:, None]
        self.rows = np.zeros((load.users, LIMIT), dtype=np.int32)
        self.at = np.zeros(load.users, dtype=np.int64)
        self.sums = np.zeros((load.users, 2, load.dim))
        factors = self.powers ** np.arange(LIMIT)[::-1]
        for user, history in load.histories():
            self.rows[user] = [item for _, item, _ in history]
            self.sums[user] = factors @ vectors[self.rows[user]]

    def add(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Vectors after each event, in the order of the events."""
        vectors = np.empty((len(users), self.vectors.shape[1]), dtype=np.float32)
        order = np.argsort(users, kind="stable")
        ordered = users[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        rank = np.arange(len(users)) - np.repeat(starts, np.diff(np.r_[starts, len(users)]))
        for n in range(int(rank.max()) + 1):
            chosen = order[rank == n]
            of, new = users[chosen], items[chosen]
            place = self.at[of] % LIMIT
            old = self.rows[of, place]
            self.rows[of, place] = new
            self.at[of] += 1
            sums = self.sums[of] * self.powers + self.vectors[new][:, None, :]
            sums -= self.powers**LIMIT * self.vectors[old][:, None, :]
            self.sums[of] = sums
            parts = sums / np.linalg.norm(sums, axis=2, keepdims=True)
            mixed = (1 - ALPHA_SHORT) * parts[:, 0] + ALPHA_SHORT * parts[:, 1]
            vectors[chosen] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        return vectors


def main(spec: dict[str, Any]) -> None:
    sums = Sums(Load(users=spec["users"], dim=spec["dim"]), np.load(spec["vectors"], allow_pickle=False))
    histories, store = database(Path(spec["folder"]) / "histories"), database(Path(spec["folder"]) / "store")
    client = {"bootstrap.servers": spec["bootstrap"], "log_level": 0}
    consumer = Consumer(
        {**client, "group.id": spec["app"], "auto.offset.reset": "earliest", "enable.auto.commit": False,
         "fetch.wait.max.ms": 10}
    )  # fmt: skip
    consumer.subscribe([spec["events"]])
    producer = Producer(
        {**client, "linger.ms": 10, "queue.buffering.max.messages": 1_000_000, "compression.type": "lz4"}
    )
    decode = msgspec.json.Decoder(Event).decode
    while True:
        messages = consumer.consume(1000, 0.5)
        if not messages:
            continue
        events = [decode(message.value()) for message in messages]
        users = np.array([event.user_id for event in events])
        vectors = sums.add(users, np.array([event.item_id for event in events]))
        kept, shown = WriteBatch(raw_mode=True), WriteBatch(raw_mode=True)
        for message, user, vector in zip(messages, users.tolist(), vectors, strict=True):
            key, state, value = message.key(), sums.rows[user].tobytes(), vector.tobytes()
            kept.put(key, state)
            shown.put(key, value)
            for topic, what in ((spec["changelog"], state), (spec["output"], value)):
                while True:
                    try:
                        producer.produce(topic, what, key, message.partition())
                        break
                    except BufferError:
                        producer.poll(0.05)
        histories.write(kept)
        store.write(shown)
        producer.flush()
        consumer.commit(asynchronous=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
