"""The peer: a plain Faust agent that does the seed's job, JSON in, JSON out, one event at a time.

It holds each user's history in a Faust table on RocksDB with a changelog, recomputes the mixture with the seed's
formula for every event and sends it to a topic. ``python -m faust -A stream.cli.bench.peer worker`` runs it; `PEER` in
the environment says on what.
"""

import json
import os
from bisect import insort
from typing import Any, Final

import faust
import numpy as np

from stream.config import Settings, load_settings
from stream.core.formulas import user_embed_mix
from stream.kafka.tokens import tokens_of, uses_tokens

PEER: Final = "UEMB_BENCH_PEER"
HISTORY_LIMIT: Final = 100


def make_app(spec: dict[str, Any]) -> faust.App:
    """The application for one run.

    Args:
        spec: ``app_id``, ``bootstrap``, ``topic``, ``output``, ``partitions``, ``vectors`` (path of the item matrix;
            the row of an item is its number), ``data`` (folder) and ``settings`` (Faust's own).
    """
    vectors = np.load(spec["vectors"], allow_pickle=False)
    app = faust.App(
        spec["app_id"],
        broker=f"kafka://{spec['bootstrap']}",
        broker_credentials=credentials(load_settings()),
        store="rocksdb://",
        datadir=spec["data"],
        topic_partitions=spec["partitions"],
        topic_disable_leader=True,
        web_enabled=False,
        table_standby_replicas=0,
        **spec["settings"],
    )
    events = app.topic(spec["topic"], key_type=bytes, key_serializer="raw", value_serializer="json")
    output = app.topic(spec["output"], key_serializer="raw", value_serializer="json", partitions=spec["partitions"])
    histories = app.Table("history", default=list, partitions=spec["partitions"])

    async def embed(stream: Any) -> None:
        async for event in stream.events():
            value = event.value
            user = str(value["user_id"])
            history = histories[user]
            insort(history, [value["ts"], value["item_id"], value["type"]])
            history = histories[user] = history[-HISTORY_LIMIT:]
            vector = user_embed_mix(np.array([item for _, item, _ in history], dtype=np.int64), vectors)
            record = {
                "user_embedding": {"dim": len(vector), "norm": 1.0, "vector": vector.tolist()},
                "user_embedding_version": "user_v7",
                "depends_on": {"item_embedding_version": "items_v42"},
            }
            await output.send(key=event.message.key, value=record, partition=event.message.partition)

    app.agent(events)(embed)
    return app


def credentials(settings: Settings) -> Any:
    """How to show the brokers who this is, as Faust takes it; None where nobody asks."""
    tls = settings.tls_context()
    if not settings.uses_sasl:
        return None if tls is None else faust.SSLCredentials(context=tls)
    if uses_tokens(settings):
        return faust.OAuthCredentials(oauth_cb=tokens_of(settings).for_aiokafka, ssl_context=tls)
    password = settings.secret("sasl_password")
    return faust.SASLCredentials(
        username=settings.sasl_username, password=password, ssl_context=tls, mechanism=settings.sasl_mechanism
    )


def __getattr__(name: str) -> Any:
    """Make the application when Faust's command line asks for it."""
    if name == "app":
        globals()["app"] = make_app(json.loads(os.environ[PEER]))
        return globals()["app"]
    raise AttributeError(name)
