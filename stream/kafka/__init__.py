"""The wire: Faust's transport and producer, topics and access, logs, schema registry, the embedded broker."""

from stream.extras import need_worker

need_worker(__name__)
