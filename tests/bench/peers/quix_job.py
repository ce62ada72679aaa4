"""The peer on Quix Streams, in an environment of its own: histories in its state (RocksDB with a changelog), JSON out.

Histories begin empty, which spares it work. One JSON argument.
"""

import json
import sys
from typing import Any

import numpy as np
from quixstreams import Application

LIMIT = 100


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / (np.linalg.norm(vector) + 1e-12)


def main(spec: dict[str, Any]) -> None:
    vectors = np.load(spec["vectors"], allow_pickle=False)
    factors = [np.exp(-decay * np.arange(LIMIT)[::-1]).astype(np.float32) for decay in spec["decays"]]
    shares = (1 - spec["alpha_short"], spec["alpha_short"])
    app = Application(
        broker_address=spec["bootstrap"],
        consumer_group=spec["app"],
        auto_offset_reset="earliest",
        auto_create_topics=True,
        state_dir=spec["folder"],
        use_changelog_topics=True,
        loglevel="WARNING",
    )

    def embed(event: dict[str, Any], state: Any) -> list[float]:
        history = [*state.get("history", []), event["item_id"]][-LIMIT:]
        state.set("history", history)
        rows = vectors[history]
        parts = [share * unit(of[-len(history) :] @ rows) for share, of in zip(shares, factors, strict=True)]
        found: list[float] = unit(parts[0] + parts[1]).tolist()
        return found

    events = app.topic(spec["events"], value_deserializer="json", key_deserializer="bytes")
    output = app.topic(spec["output"], value_serializer="json", key_serializer="bytes")
    app.dataframe(events).apply(embed, stateful=True).to_topic(output)
    app.run()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
